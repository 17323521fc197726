"""The judge of answers, against a real server on this machine that judges by a known rule."""

import http.server
import json
import re
import socket
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas as pd
import pytest

from icprobe.finetuning import judge as judging
from icprobe.finetuning.judge import Judge, JudgeError, win_rates
from icprobe.finetuning.training_runs import RunResult

QUERIES = [
    {"id": "q0", "prompt": "What is {2} + 2?", "completion": "four"},
    {"id": "q1", "prompt": "Name a colour.", "completion": "red"},
    {"id": "q2", "prompt": "Say hello.", "completion": "hello"},
    {"id": "q3", "prompt": "Name a day.", "completion": "Monday"},
]
LONG = ["It is certainly four.", "Red and green.", "Hello there!", "Monday, or Tuesday."]
SHORT = ["4", "red", "hi", "Sunday"]


def longer(a: str, b: str) -> str:
    return "T" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def completion(text: str | None) -> dict:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "finish_reason": "length", "message": message}]}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serve chat completions: `rule` takes both answers; what it returns is sent as it says.

    A text is the model's reply, a number an HTTP error, bytes or a dictionary the whole response.
    """
    state = SimpleNamespace(rule=longer, requests=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, dict(self.headers), body))
            question = body["messages"][0]["content"]
            answers = re.search("<answer_A>\n(.*)\n</.*<answer_B>\n(.*)\n</", question, re.S)
            said = state.rule(*answers.groups())
            status = said if isinstance(said, int) else 200
            if isinstance(said, int):
                said = {"error": f"refused {self.headers['Authorization']}"}
            said = completion(said) if isinstance(said, str) else said
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("ICPROBE_JUDGE_KEY", raising=False)
    state.waits = []
    monkeypatch.setattr(judging.time, "sleep", state.waits.append)
    huggingface_hub.close_session()  # the next one sees these settings
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.handle_error = lambda *_: None  # a client that gave up waiting
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{served.server_port}/v1"
        state.cache = tmp_path / "folder" / "verdicts.jsonl"
        yield state
        huggingface_hub.close_session()
        served.shutdown()


def judge(server, fresh=False, **changed):
    asked = {"url": server.url, "model": "tiny-judge"} | changed
    return Judge(**asked, cache=server.cache, fresh=fresh)


def rates(server, first=LONG, second=SHORT, queries=QUERIES, **changed):
    asked = judge(server, **changed)
    return [asked.wins(*each) for each in zip(queries, first, second, strict=True)]


def compare(server, first="one", second="other"):
    return judge(server).wins({"prompt": "the {prompt}", "completion": "the text"}, first, second)


@pytest.mark.parametrize(
    ("there", "back", "share"),
    [(" A\n", "**B**", 1), ("A", "T", 0.75), ("T", "B", 0.75), ("B", "B", 0.5), ("T", "T", 0.5),
     ("T", "A", 0.25), ("B", "T", 0.25), ("B", "A", 0)],
)  # fmt: skip
def test_wins_are_the_mean_over_both_orders(server, there, back, share):
    server.rule = lambda a, b: there if a == "one" else back
    assert compare(server, "same", "same") == 0.5 and not server.requests
    assert compare(server) == share
    assert len(server.requests) == 2


@pytest.mark.parametrize(("key", "sent"), [(" secret-key\n", "secret-key"), (None, "none")])
def test_what_is_sent(server, monkeypatch, key, sent):
    monkeypatch.setenv("HF_TOKEN", "hf_private")  # which is nobody's business
    if key:
        monkeypatch.setenv(judging.KEY_VARIABLE, key)
    compare(server)
    orders = [("one", "other"), ("other", "one")]
    for (path, headers, body), answers in zip(server.requests, orders, strict=True):
        assert path == "/v1/chat/completions"
        named = {name.lower(): value for name, value in headers.items()}
        assert named["authorization"] == f"Bearer {sent}"
        [message] = body.pop("messages")
        assert body.pop("max_tokens") < 20
        assert body == {"model": "tiny-judge", "temperature": 0.0, "stream": False}
        texts = ("the {prompt}", "the text", *answers)
        places = [message["content"].index(f"\n{text}\n") for text in texts]
        assert places == sorted(places)


def test_the_cache_answers_what_was_asked_before_without_a_text(server):
    shares = rates(server)
    assert shares == [1, 1, 1, 1] == rates(server)
    assert rates(server, SHORT, LONG) == [0, 0, 0, 0]
    assert len(server.requests) == 8
    whole = server.cache.read_text()
    for line in whole.splitlines():
        assert re.fullmatch('{"key": "[0-9a-f]{64}", "verdict": "[ABT]"}', line)
    assert rates(server, fresh=True) == shares
    assert len(server.requests) == 16 and server.cache.read_text() == whole * 2


@pytest.mark.parametrize("changed", ["model", "url", "TEMPLATE", "prompt", "completion"])
def test_the_cache_does_not_answer_what_was_not_asked(server, monkeypatch, changed):
    rates(server)
    other = {"model": "other", "url": server.url.replace("/v1", "/other/v1")}
    queries = [QUERIES[0] | {changed: "new"}, *QUERIES[1:]]
    if changed == "TEMPLATE":
        monkeypatch.setattr(judging, changed, judging.TEMPLATE + " Think well.")
    rates(server, queries=queries, **{name: other[name] for name in other if name == changed})
    assert len(server.requests) == 8 + (2 if changed in QUERIES[0] else 8)


@pytest.mark.parametrize("stop", [401, KeyboardInterrupt])
def test_an_interrupted_run_asks_only_the_rest(server, monkeypatch, stop):
    reply = Judge._reply

    def interrupted(self, question):
        if stop is KeyboardInterrupt and len(server.requests) == 3:
            raise stop
        return reply(self, question)

    server.rule = lambda a, b: stop if len(server.requests) == 4 else longer(a, b)
    with monkeypatch.context() as patch, pytest.raises((JudgeError, KeyboardInterrupt)):
        patch.setattr(Judge, "_reply", interrupted)
        rates(server)
    assert len(server.cache.read_bytes().splitlines()) == 3
    server.requests.clear()
    server.rule = longer
    assert rates(server) == [1] * 4
    assert len(server.requests) == 8 - 3
    assert len(server.cache.read_bytes().splitlines()) == 8


@pytest.mark.parametrize("damage", [(-1, None), (-20, None), (-70, None), (120, 130)])
def test_a_line_that_is_not_whole_is_asked_again(server, damage):
    rates(server)
    whole = server.cache.read_bytes()
    start, end = damage
    rest = b"" if end is None else whole[end:]
    server.cache.write_bytes(whole[:start] + "\N{SNOWMAN}".encode()[: len(rest)] + rest)
    for _ in range(2):
        assert rates(server) == [1] * 4
    assert len(server.requests) == (8 if start == -1 else 9)
    assert {*server.cache.read_bytes().splitlines()} >= {*whole.splitlines()}


@pytest.mark.parametrize(
    ("reply", "shown"),
    [("very " * 500, "very very"), ("AB", "AB"), (completion(None), "finish_reason='length'"),
     ({"error": "busy"}, "no chat completion"), (b"<html>a page</html>", "no chat completion")],
)  # fmt: skip
def test_a_reply_that_is_no_verdict_is_an_error_the_second_time(server, reply, shown):
    server.rule = lambda a, b: reply
    with pytest.raises(JudgeError, match=re.escape(shown)) as caught:
        compare(server)
    assert len(str(caught.value)) < 500 and len(server.requests) == 2
    server.rule = lambda a, b: reply if len(server.requests) == 3 else longer(a, b)
    assert compare(server) == 0 and len(server.requests) == 5


def test_a_reply_with_the_key_is_told_without_it(server, monkeypatch):
    monkeypatch.setenv("ICPROBE_JUDGE_KEY", "secret-key")
    server.rule = lambda a, b: "no verdict for secret-key"
    with pytest.raises(JudgeError, match=re.escape("no verdict for ***")):
        compare(server)


def test_a_busy_server_is_asked_again(server):
    server.rule = lambda a, b: 503 if len(server.requests) in (1, 2) else longer(a, b)
    assert compare(server, first="longest", second="long") == 1 and server.waits == [1, 2]


@pytest.mark.parametrize(("status", "asked"), [(400, 1), (401, 1), (404, 1), (429, 4), (500, 4)])
def test_a_server_that_refuses_is_a_clear_error_without_the_key(server, monkeypatch, status, asked):
    monkeypatch.setenv("ICPROBE_JUDGE_KEY", "secret-key")
    server.rule = lambda a, b: status
    with pytest.raises(JudgeError, match=server.url) as caught:
        compare(server)
    assert "refused Bearer ***" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert len(server.requests) == asked


def test_a_dead_port_is_a_clear_error(server):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match=rf"{url}: .*refused"):
            rates(server, url=url)
    assert server.waits == [1, 2, 4]


def test_offline_mode_is_named(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(JudgeError, match="HF_HUB_OFFLINE"):
        compare(server)
    assert server.waits == []


def test_a_server_that_does_not_answer_in_time_is_an_error(server, monkeypatch):
    monkeypatch.setattr(judging, "TIMEOUT", 0.1)
    monkeypatch.setattr(judging, "RETRIES", 1)
    ready = threading.Event()
    server.rule = lambda a, b: ready.wait(10) and "A"
    start = time.monotonic()
    with pytest.raises(JudgeError, match="timed out"):
        compare(server)
    assert time.monotonic() - start < 5 and len(server.requests) == 2
    ready.set()


@pytest.mark.parametrize(("field", "value"), [("url", "some/model"), ("url", ""), ("model", "")])
def test_fields_out_of_range_are_named(tmp_path, field, value):
    given = {"url": "http://127.0.0.1/v1", "model": "m"} | {field: value}
    with pytest.raises(ValueError, match=f"judge_{field} is '{value}'"):
        Judge(**given, cache=tmp_path / "cache")


def test_win_rates_are_means_over_seeds_of_what_all_answered(server):
    of_a = [{"q0": "long", "q2": "x"}, {"q0": "longer", "q2": "xx"}, {}]
    of_b = [{"q0": "lo", "q2": "x", "q3": "y"}, {"q0": "long", "q2": "xxx"}, {}]
    results = {
        name: [RunResult(pd.DataFrame(), pd.DataFrame(), answers) for answers in of_seeds]
        for name, of_seeds in (("a", of_a), ("b", of_b))
    }
    rng, pairs = np.random.default_rng(0), [("a", "b"), ("b", "a"), ("a", "a")]
    table = win_rates(judge(server), QUERIES, results, pairs, rng, 50)
    assert table["estimate"].tolist() == [2.5 / 4, 1.5 / 4, 0.5]
    assert (table["low"] <= table["estimate"]).all() and (table["estimate"] <= table["high"]).all()
    assert (table[["seeds", "queries"]] == 2).all(axis=None)
    with pytest.raises(ValueError, match="raise n_answered"):
        win_rates(judge(server), QUERIES, {"a": results["a"][2:]}, [("a", "a")], rng)
