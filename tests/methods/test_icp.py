"""Laws of in-context probing, and scores that survive interruption."""

import json

import numpy as np
import pytest
from helpers import ATOL, RTOL, examples, experiment_on

from icprobe import models
from icprobe.methods import icp
from icprobe.scores import ScoresNotFound, load, score

NOTHING = models.Encoded("nothing", (), ())


def test_an_empty_context_gains_nothing(tiny):
    for bos in (False, True):
        lm = tiny(bos=bos)
        queries = models.encode(lm, examples(5))
        others = models.encode(lm, examples(2, seed=1))
        after = icp.log_likelihoods(lm, queries, [others[0], NOTHING, others[1]])
        zero_shot = icp.log_likelihoods(lm, queries)
        assert zero_shot.shape == (5,) and after.shape == (3, 5)
        np.testing.assert_allclose(icp.gain(after, zero_shot)[1], 0, atol=ATOL)
        slow = [models.token_log_likelihoods(lm, query).sum() for query in queries]
        np.testing.assert_allclose(zero_shot, slow, rtol=RTOL, atol=ATOL)


def test_the_context_is_preamble_demonstration_separators(tiny):
    lm = tiny(bos=True)
    row = {"id": "d", "prompt": "2+2=", "completion": " 4"}
    demonstration = models.encode(lm, [row])[0]

    def text(*args):
        return lm.tokenizer.decode(icp.context(lm, *args))

    assert text(demonstration) == "2+2= 4\n\n"
    assert text(demonstration, "Help:") == "Help:\n\n2+2= 4\n\n"
    assert text(demonstration, "Help:", "|") == "Help:|2+2= 4|"
    assert text(NOTHING) == "" and text(None, "Help:") == "Help:\n\n"


@pytest.mark.parametrize("preamble", ["", icp.PUBLISHED_PREAMBLE])
def test_pairs_equal_the_reference(tiny, preamble):
    lm = tiny("gpt_neox", bos=True)
    queries = models.encode(lm, examples(4))
    demonstrations = models.encode(lm, examples(3, seed=1))
    actual = icp.log_likelihoods(lm, queries, demonstrations, preamble)
    expected = [[icp.reference(lm, q, d, preamble) for q in queries] for d in demonstrations]
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)


def test_permuting_the_training_set_permutes_rows(tiny):
    lm = tiny()
    queries = models.encode(lm, examples(4))
    demonstrations = models.encode(lm, examples(6, seed=1, words=20))
    order = [3, 0, 5, 1, 4, 2]
    scores = icp.log_likelihoods(lm, queries, demonstrations)
    permuted = icp.log_likelihoods(lm, queries, [demonstrations[i] for i in order])
    np.testing.assert_allclose(permuted, scores[order], rtol=RTOL, atol=ATOL)


def test_scores_from_gains():
    gain = np.array([[1.0, 2.0, -3.0, 0.0], [-1.0, -1.0, -1.0, 4.0]])
    assert icp.icp_score(gain).tolist() == [0.5, 0.25], "a tie is no help"
    zero_shot = np.array([-1.0, -2.0])
    assert icp.gain(np.array([[0.0, -3.0]]), zero_shot).tolist() == [[1.0, -1.0]]
    assert icp.gain_per_token(gain, [1, 2, 3, 4])[0].tolist() == [1, 1, -1, 0]


def test_neutral_demonstrations_keep_form_and_length(tiny):
    lm = tiny()
    rows = [
        {"prompt": f"Do it.\n{'fact ' * k}\nsecond line\nAnswer:", "completion": " yes" * k}
        for k in (2, 3, 9, 9)
    ]
    rows.append({"prompt": "No frame here", "completion": " x"})
    neutral = icp.neutral_demonstrations(lm, rows)
    for row, encoded in zip(rows[:4], neutral[:4], strict=True):
        prompt = lm.tokenizer.decode(encoded.prompt)
        first, middle, last = prompt.split("\n")
        assert (first, last) == ("Do it.", "Answer:")
        assert middle in icp.NEUTRAL_TEXT * 9 and "fact" not in middle
        assert abs(len(prompt) - len(row["prompt"])) <= 10
        assert lm.tokenizer.decode(encoded.completion).strip() in icp.NEUTRAL_TEXT
    assert "frame" not in lm.tokenizer.decode(neutral[4].prompt)
    assert neutral[2] == neutral[3] and neutral[0].id != neutral[2].id
    assert lm.tokenizer.decode(neutral[4].prompt) in icp.NEUTRAL_TEXT


def test_neutral_demonstrations_of_one_line_instructions_keep_their_labels(tiny):
    lm = tiny()
    rows = [
        {"prompt": "Instruction: Name a city\nin France.\nResponse:", "completion": " Paris"},
        {"prompt": "Instruction: Add two\nResponse:", "completion": " 4"},
    ]
    for row, encoded in zip(rows, icp.neutral_demonstrations(lm, rows), strict=True):
        first, last = lm.tokenizer.decode(encoded.prompt).split("\n")
        assert last == "Response:" and first.startswith("Instruction: ")
        assert first.removeprefix("Instruction: ") in icp.NEUTRAL_TEXT
        assert abs(len(first) + len(last) - len(row["prompt"])) <= 10


@pytest.mark.parametrize(
    "prompts",
    [
        ["Go on.", "Go on."],  # the whole prompt is the frame
        ["Say something.\nAnswer:", "Say something.\nAnswer:"],
        ["", ""],
        ["Question:", "Question: what?"],
    ],
)
def test_neutral_demonstrations_of_prompts_without_a_body_have_their_form(tiny, prompts):
    lm = tiny()
    rows = [{"prompt": prompt, "completion": " x"} for prompt in prompts]
    assert lm.tokenizer.decode(icp.neutral_demonstrations(lm, rows)[0].prompt) == prompts[0]


@pytest.fixture
def what(tmp_path):
    return experiment_on(tmp_path, examples(10, 1, words=12), examples(3, 2), max_length=200)


def test_probing_through_the_store(what, monkeypatch):
    lm = what.load_model()
    pool, questions = what.load_data()
    scores = score(what, icp.probing(neutral=True), lm)
    gain, neutral_gain = icp.gains(scores)
    assert gain.shape == neutral_gain.shape == (10, 3)
    direct = icp.log_likelihoods(lm, questions, pool)
    np.testing.assert_allclose(scores["icp"], direct, rtol=RTOL, atol=ATOL)
    direct = icp.log_likelihoods(lm, questions, icp.neutral_demonstrations(lm, pool))
    np.testing.assert_allclose(scores["icp_neutral"], direct, rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(gain, scores["icp"] - icp.log_likelihoods(lm, questions))

    # finished scores are found without model and data, and are not computed again
    monkeypatch.setattr(models, "log_likelihoods", None)
    for found in (load(what, icp.probing(neutral=True)), score(what, icp.probing(neutral=True))):
        assert all((found[name] == matrix).all() for name, matrix in scores.items())
    with pytest.raises(ScoresNotFound, match=r"identity\.options\.preamble"):
        load(what, icp.ICP("Other"))


def test_the_control_is_scored_only_where_asked_for(what, tmp_path):
    gain, neutral_gain = icp.gains(score(what, icp.probing()))
    assert neutral_gain is None and gain.shape == (10, 3)
    assert not list((tmp_path / "scores").glob("icp_neutral-*"))
    with pytest.raises(ScoresNotFound, match="no icp_neutral scores"):
        load(what, icp.probing(neutral=True))


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
    assert len(seen) == len(set(seen))
    monkeypatch.setitem(icp.NeutralControl.block_size, "cpu", 10)
    again = score(what, icp.NeutralControl(), lm, fresh=True)["icp_neutral"]
    np.testing.assert_array_equal(again, found)


def test_what_is_too_long_is_found_before_anything_is_begun(what, tmp_path):
    row = {"id": "long", "prompt": "x" * 190, "completion": " yes"}
    (tmp_path / "queries.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="'long' with its longest context has"):
        score(what, icp.ICP("w" * 400))
    assert not (tmp_path / "scores").exists()


def test_models_that_cannot_be_packed_are_refused(tiny, monkeypatch):
    models.check_packing(tiny("mistral"))
    lm = tiny()
    models.check_packing(lm)
    forward = lm.model.forward

    def deaf(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", deaf)
    for refusing in (lm, *map(tiny, ("bloom", "mpt", "mamba", "lfm2"))):
        with pytest.raises(ValueError, match="takes no packed rows"):
            models.check_packing(refusing)
