"""Laws of in-context probing, its neutral control, and both through the store."""

import json
import re

import numpy as np
import pytest
from helpers import ATOL, RTOL, encoded, examples, experiment_on

from icprobe import models
from icprobe.methods import icp
from icprobe.scores import ScoresNotFound, load, score

NOTHING = models.Encoded("nothing", (), ())


@pytest.mark.parametrize("bos", [False, True])
def test_an_empty_context_gains_nothing(tiny, bos):
    lm = tiny(bos=bos)
    queries, others = encoded(lm, 5, 0), encoded(lm, 2, 1)
    after = icp.log_likelihoods(lm, queries, [others[0], NOTHING, others[1]])
    zero_shot = icp.log_likelihoods(lm, queries)
    assert zero_shot.shape == (5,) and after.shape == (3, 5)
    np.testing.assert_allclose(after[1], zero_shot, rtol=RTOL, atol=ATOL)


def test_the_context_is_preamble_demonstration_separators(tiny):
    lm = tiny(bos=True)
    row = {"id": "d", "prompt": "2+2=", "completion": " 4"}
    demonstration = models.encode(lm, [row])[0]

    def text(*args):
        return lm.tokenizer.decode(icp.context(lm, *args))

    assert text(demonstration) == "2+2= 4\n\n"
    assert text(demonstration, "Help:") == "Help:\n\n2+2= 4\n\n"
    assert text(NOTHING) == "" and text(NOTHING, "Help:") == "Help:\n\n"


@pytest.mark.parametrize("preamble", ["", icp.PUBLISHED_PREAMBLE])
def test_pairs_equal_one_forward_pass_each(tiny, preamble):
    lm = tiny("gpt_neox", bos=True)
    queries, demonstrations = encoded(lm, 4, 0), encoded(lm, 3, 1)
    contexts = [icp.context(lm, one, preamble) for one in demonstrations]
    expected = [[models.token_log_likelihoods(lm, q, c).sum() for q in queries] for c in contexts]
    actual = icp.log_likelihoods(lm, queries, demonstrations, preamble)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)


def test_a_tie_is_no_help():
    gain = np.array([[1.0, 2.0, -3.0, 0.0], [-1.0, -1.0, -1.0, 4.0]])
    assert icp.icp_score(gain).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("prompts", "form"),
    [
        (
            [f"Do it.\n{'fact ' * k}\nsecond line\nAnswer:" for k in (2, 3, 9)],
            r"Do it\.\n(.+)\nAnswer:",
        ),
        (
            ["Instruction: Name a city\nin France.\nResponse:", "Instruction: Add two\nResponse:"],
            r"Instruction: (.+)\nResponse:",
        ),
        (["No frame here", "nor there"], "(.+)"),
        # no body: the whole prompt is the frame
        (["Go on.", "Go on."], r"Go on\."),
        (["Say something.\nAnswer:", "Say something.\nAnswer:"], r"Say something\.\nAnswer:"),
        (["", ""], ""),
        (["Question:", "Question: what?"], "Question:(?: (.+))?"),
    ],
)
def test_neutral_demonstrations_keep_form_and_length(tiny, prompts, form):
    lm = tiny()
    rows = [
        {"id": str(k), "prompt": prompt, "completion": " yes" * (1 + len(prompt) // 9)}
        for k, prompt in enumerate(prompts)
    ]
    neutral = icp.neutral_demonstrations(lm, rows)
    for row, one in zip(rows, neutral, strict=True):
        prompt, completion = map(lm.tokenizer.decode, (one.prompt, one.completion))
        found = re.fullmatch(form, prompt)
        assert all(body in icp.NEUTRAL_TEXT * 9 for body in found.groups() if body)
        assert completion.strip() in icp.NEUTRAL_TEXT * 9
        assert abs(len(prompt) - len(row["prompt"])) <= 10
        assert abs(len(completion) - len(row["completion"])) <= 3


@pytest.fixture
def what(tmp_path):
    return experiment_on(tmp_path, examples(10, 1, words=12), examples(3, 2), max_length=200)


def test_probing_through_the_store(what, monkeypatch, tmp_path):
    lm = what.load_model()
    pool, questions = what.load_data()
    gain, neutral_gain = icp.gains(score(what, icp.probing(), lm))
    assert neutral_gain is None and gain.shape == (10, 3)
    assert not list((tmp_path / "scores").glob("icp_neutral-*")), "only where asked for"
    with pytest.raises(ScoresNotFound, match="no icp_neutral scores"):
        load(what, icp.probing(neutral=True))

    scores = score(what, icp.probing(neutral=True), lm)
    gain, neutral_gain = icp.gains(scores)
    zero_shot = icp.log_likelihoods(lm, questions)
    np.testing.assert_array_equal(gain, scores["icp"] - zero_shot)
    direct = icp.log_likelihoods(lm, questions, pool)
    np.testing.assert_allclose(scores["icp"], direct, rtol=RTOL, atol=ATOL)
    direct = icp.log_likelihoods(lm, questions, icp.neutral_demonstrations(lm, pool))
    np.testing.assert_allclose(neutral_gain + zero_shot, direct, rtol=RTOL, atol=ATOL)

    # finished scores are found without model and data, and are not computed again
    monkeypatch.setattr(models, "log_likelihoods", None)
    for found in (load(what, icp.probing(neutral=True)), score(what, icp.probing(neutral=True))):
        assert all((found[name] == matrix).all() for name, matrix in scores.items())
    with pytest.raises(ScoresNotFound, match=r"identity\.options\.preamble"):
        load(what, icp.ICP("Other"))


def test_equal_neutral_texts_are_scored_once_and_with_the_same_others(what, monkeypatch):
    lm, calls = what.load_model(), []
    usual = models.log_likelihoods

    def counted(lm, queries, contexts):
        calls.append(contexts)
        return usual(lm, queries, contexts)

    monkeypatch.setitem(icp.NeutralControl.block_size, "cpu", 1)
    with monkeypatch.context() as patch:
        patch.setattr(models, "log_likelihoods", counted)
        patch.setattr(models, "check_packing", lambda _: None)
        found = score(what, icp.NeutralControl(), lm)["icp_neutral"]
    seen = [context for contexts in calls for context in contexts]
    assert len(seen) == len(set(seen)) < 10
    monkeypatch.setitem(icp.NeutralControl.block_size, "cpu", 10)
    again = score(what, icp.NeutralControl(), lm, fresh=True)["icp_neutral"]
    np.testing.assert_array_equal(again, found)


def test_what_is_too_long_is_found_before_anything_is_begun(what, tmp_path):
    row = {"id": "long", "prompt": "x" * 190, "completion": " yes"}
    (tmp_path / "queries.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="'long' with its longest context has"):
        score(what, icp.ICP("w" * 400))
    assert not (tmp_path / "scores").exists()
