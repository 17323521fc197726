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
import pytest

from icprobe.finetuning import judge as judging
from icprobe.finetuning.judge import Judge, JudgeError, win_rates

PROMPTS = ["What is {2} + 2?", "Name a colour.", "Say hello.", "Name a day."]
REFERENCES = ["four", "red", "hello", "Monday"]
LONG = ["It is certainly four.", "Red and green.", "Hello there!", "Monday, or Tuesday."]
SHORT = ["4", "red", "hi", "Sunday"]


def longer(a: str, b: str) -> str:
    return "T" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def completion(text: str | None) -> dict:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "finish_reason": "length", "message": message}]}


@pytest.fixture
def server(monkeypatch):
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
        state.judge = Judge(url=state.url, model="tiny-judge")
        yield state
        huggingface_hub.close_session()
        served.shutdown()


def rates(server, first=LONG, second=SHORT, cache=None, **changed):
    asked = Judge(**{"url": server.url, "model": "tiny-judge", **changed})
    return win_rates(asked, PROMPTS, REFERENCES, first, second, cache)


def compare(server, prompt="p", reference="r", first="one", second="other"):
    (share,) = win_rates(server.judge, [prompt], [reference], [first], [second])
    return share


def test_the_better_answer_wins_in_both_orders(server):
    mixed = [LONG[0], SHORT[1], "Ho!", LONG[3]]
    shares = rates(server, mixed, [SHORT[0], LONG[1], "Hi!", LONG[3]])
    assert shares.dtype == np.float64
    np.testing.assert_array_equal(shares, [1, 0, 0.5, 0.5])
    assert len(server.requests) == 2 * 3  # equal answers are not shown
    assert win_rates(server.judge, [], [], [], []).shape == (0,)
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        rates(server, LONG[:3])


@pytest.mark.parametrize(
    ("there", "back", "share"),
    [
        (" A\n", "**B**", 1),
        ("A", "T", 0.75),
        ("T", "B", 0.75),
        ("B", "B", 0.5),
        ("T", "T", 0.5),
        ("T", "A", 0.25),
        ("B", "T", 0.25),
        ("B", "A", 0),
    ],
)
def test_a_share_is_the_mean_over_both_orders(server, there, back, share):
    server.rule = lambda a, b: there if a == "first" else back
    assert compare(server, first="first", second="second") == share


@pytest.mark.parametrize(("key", "sent"), [(" secret-key\n", "secret-key"), (None, "none")])
def test_what_is_sent(server, monkeypatch, key, sent):
    monkeypatch.setenv("HF_TOKEN", "hf_private")  # which is nobody's business
    if key:
        monkeypatch.setenv(judging.KEY_VARIABLE, key)
    compare(server, "the {prompt}", "the reference")
    orders = [("one", "other"), ("other", "one")]
    for (path, headers, body), answers in zip(server.requests, orders, strict=True):
        assert path == "/v1/chat/completions"
        named = {name.lower(): value for name, value in headers.items()}
        assert named["authorization"] == f"Bearer {sent}"
        [message] = body.pop("messages")
        assert body.pop("max_tokens") < 20
        assert body == {"model": "tiny-judge", "temperature": 0.0, "stream": False}
        texts = ("the {prompt}", "the reference", *answers)
        places = [message["content"].index(f"\n{text}\n") for text in texts]
        assert places == sorted(places)


def test_the_cache_answers_what_was_asked_before(server, tmp_path):
    cache = tmp_path / "folder" / "verdicts.jsonl"
    shares = rates(server, cache=cache)
    assert len(server.requests) == 8
    np.testing.assert_array_equal(rates(server, cache=cache), shares)
    np.testing.assert_array_equal(rates(server, SHORT, LONG, cache), 1 - shares)
    assert len(server.requests) == 8
    lines = cache.read_text().splitlines()
    assert len(lines) == 8
    for line in lines:
        kept = json.loads(line)
        assert sorted(kept) == ["key", "verdict"]
        assert re.fullmatch("[0-9a-f]{64}", kept["key"])
        assert kept["verdict"] in ("A", "B", "T")


@pytest.mark.parametrize("changed", ["model", "url", "TEMPLATE", "PROMPTS", "REFERENCES"])
def test_the_cache_does_not_answer_what_was_not_asked(server, tmp_path, monkeypatch, changed):
    cache = tmp_path / "verdicts.jsonl"
    rates(server, cache=cache)
    other = {"model": "other", "url": server.url.replace("/v1", "/other/v1")}
    if changed == "TEMPLATE":
        monkeypatch.setattr(judging, changed, judging.TEMPLATE + " Think well.")
    elif changed.isupper():
        monkeypatch.setitem(globals(), changed, ["new", *globals()[changed][1:]])
    rates(server, cache=cache, **{name: other[name] for name in other if name == changed})
    assert len(server.requests) == 8 + (2 if changed in ("PROMPTS", "REFERENCES") else 8)


@pytest.mark.parametrize("stop", [401, KeyboardInterrupt])
def test_an_interrupted_run_asks_only_the_rest(server, tmp_path, monkeypatch, stop):
    cache = tmp_path / "verdicts.jsonl"
    if stop == 401:
        server.rule = lambda a, b: longer(a, b) if len(server.requests) <= 3 else stop
        with pytest.raises(JudgeError, match="401"):
            rates(server, cache=cache)
    else:
        ask = Judge.ask

        def interrupted(self, question):
            if len(server.requests) == 3:
                raise KeyboardInterrupt
            return ask(self, question)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Judge, "ask", interrupted)
            rates(server, cache=cache)
    assert len(cache.read_bytes().splitlines()) == 3
    server.rule, server.requests[:] = longer, []
    np.testing.assert_array_equal(rates(server, cache=cache), [1] * 4)
    assert len(server.requests) == 8 - 3
    assert len(cache.read_bytes().splitlines()) == 8


@pytest.mark.parametrize("lost", [1, 20, 70])
def test_a_line_that_was_not_written_to_its_end_is_asked_again(server, tmp_path, lost):
    cache = tmp_path / "verdicts.jsonl"
    rates(server, cache=cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-lost])
    rates(server, cache=cache)
    assert len(server.requests) == 8 + 1
    assert cache.read_bytes() == whole


@pytest.mark.parametrize("damage", ["{", "", '{"key": "ab", "verdict": "A"}', "\N{SNOWMAN}"])
def test_other_damage_is_an_error_that_names_the_line(server, tmp_path, damage):
    cache = tmp_path / "verdicts.jsonl"
    rates(server, cache=cache)
    lines = cache.read_text().splitlines()
    lines[2] = damage
    content = "\n".join(lines) + "\n"
    cache.write_text(content, encoding="utf-8")
    with pytest.raises(JudgeError, match=re.escape(f"{cache}, line 3 is no verdict")):
        rates(server, cache=cache)
    assert len(server.requests) == 8
    assert cache.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ("Both answers are " + "very " * 500, "Both answers are very"),
        ("AB", "AB"),
        (completion(None), "finish_reason='length'"),
        ({"error": "busy"}, "no chat completion"),
        (b"<html>a page</html>", "no chat completion"),
    ],
)
def test_a_reply_that_is_no_verdict_is_an_error_the_second_time(server, reply, shown):
    server.rule = lambda a, b: reply
    with pytest.raises(JudgeError, match=re.escape(shown)) as caught:
        compare(server)
    assert len(str(caught.value)) < 500 and len(server.requests) == 2
    server.rule = lambda a, b: reply if len(server.requests) == 3 else longer(a, b)
    assert compare(server) == 0 and len(server.requests) == 5


def test_a_busy_server_is_asked_again(server):
    server.rule = lambda a, b: 503 if len(server.requests) in (1, 2) else longer(a, b)
    assert compare(server, first="longest", second="long") == 1
    assert server.waits == [1, 2]


@pytest.mark.parametrize(("status", "asked"), [(400, 1), (401, 1), (404, 1), (429, 4), (500, 4)])
def test_a_server_that_refuses_is_a_clear_error_without_the_key(server, monkeypatch, status, asked):
    monkeypatch.setenv("ICPROBE_JUDGE_KEY", "secret-key")
    server.rule = lambda a, b: status
    with pytest.raises(JudgeError, match=server.url) as caught:
        compare(server)
    assert "refused Bearer ***" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert len(server.requests) == asked


def test_a_dead_port_is_a_clear_error_and_finished_verdicts_stay(server, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    rates(server, cache=cache)
    before = cache.read_bytes()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match=rf"{url}: .*refused"):
            rates(server, cache=cache, url=url)
    assert server.waits == [1, 2, 4]
    assert cache.read_bytes() == before


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
def test_fields_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"(?s){field}.*'{value}'"):
        Judge(**{"url": "http://127.0.0.1/v1", "model": "m", field: value})
