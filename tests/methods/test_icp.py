"""Laws of in-context probing, and scores that survive interruption."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ATOL, RTOL
from icprobe.experiment import Experiment
from icprobe.store import ScoresNotFound
from test_lm import examples

from icprobe import icp
from icprobe import lm as language_model

NOTHING = language_model.Encoded("nothing", (), ())


def test_an_empty_context_gains_nothing(tiny):
    for bos in (False, True):
        lm = tiny(bos=bos)
        queries = language_model.encode(lm, examples(5))
        others = language_model.encode(lm, examples(2, seed=1))
        after = icp.log_likelihoods(lm, queries, [others[0], NOTHING, others[1]])
        zero_shot = icp.log_likelihoods(lm, queries)
        assert zero_shot.shape == (5,) and after.shape == (3, 5)
        np.testing.assert_allclose(icp.gain(after, zero_shot)[1], 0, atol=ATOL)
        slow = [language_model.token_log_likelihoods(lm, query).sum() for query in queries]
        np.testing.assert_allclose(zero_shot, slow, rtol=RTOL, atol=ATOL)


def test_the_context_is_preamble_demonstration_separators(tiny):
    lm = tiny(bos=True)
    row = {"id": "d", "prompt": "2+2=", "completion": " 4"}
    demonstration = language_model.encode(lm, [row])[0]

    def text(*args):
        return lm.tokenizer.decode(icp.context(lm, *args))

    assert text(demonstration) == "2+2= 4\n\n"
    assert text(demonstration, "Help:") == "Help:\n\n2+2= 4\n\n"
    assert text(demonstration, "Help:", "|") == "Help:|2+2= 4|"
    assert text(NOTHING) == "" and text(None, "Help:") == "Help:\n\n"


@pytest.mark.parametrize("preamble", ["", icp.PUBLISHED_PREAMBLE])
def test_pairs_equal_the_reference(tiny, preamble):
    lm = tiny("gpt_neox", bos=True)
    queries = language_model.encode(lm, examples(4))
    demonstrations = language_model.encode(lm, examples(3, seed=1))
    actual = icp.log_likelihoods(lm, queries, demonstrations, preamble)
    expected = [[icp.reference(lm, q, d, preamble) for q in queries] for d in demonstrations]
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)


def test_permuting_the_training_set_permutes_rows(tiny):
    lm = tiny()
    queries = language_model.encode(lm, examples(4))
    demonstrations = language_model.encode(lm, examples(6, seed=1, words=20))
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


def experiment(folder, model, **changes):
    sources = {"train": "data/demo.jsonl", "queries": "data/demo.jsonl"}
    parameters = {"n_train": 10, "n_query": 3, "max_length": 200, **sources, **changes}
    return Experiment(scores_dir=str(folder), model=str(model), **parameters)


@pytest.fixture
def model(tmp_path):
    from conftest import save_tiny

    return save_tiny(tmp_path / "model", "llama")


def test_probing_through_the_store(tmp_path, model, monkeypatch, capsys):
    what = experiment(tmp_path / "scores", model)
    with pytest.warns(UserWarning, match="texts are both query and training example"):
        pool, questions = what.load_data()
    lm = what.load_model()
    probe = icp.probe(what, lm)
    assert probe.gain.shape == probe.neutral_gain.shape == (10, 3)
    direct = icp.log_likelihoods(lm, questions, pool)
    np.testing.assert_allclose(probe.demonstrated, direct, rtol=RTOL, atol=ATOL)
    direct = icp.log_likelihoods(lm, questions, icp.neutral_demonstrations(lm, pool))
    np.testing.assert_allclose(probe.neutral, direct, rtol=RTOL, atol=ATOL)

    # finished scores are found without model and data, and are not computed again
    monkeypatch.setattr(icp, "log_likelihoods", None)
    found = icp.find(experiment(tmp_path / "scores", model), made_by="run notebook 01")
    assert (found.gain == probe.gain).all() and (found.neutral == probe.neutral).all()
    capsys.readouterr()
    again = icp.probe(what, lm)
    assert (again.demonstrated == probe.demonstrated).all()
    assert "reused 10 of 10 rows" in capsys.readouterr().out


def test_twins_are_scored_only_where_asked_for(tmp_path, model):
    what = experiment(tmp_path / "scores", model)
    with pytest.warns(UserWarning, match="texts are both query and"):
        probe = icp.probe(what, what.load_model(), neutral=False)
    assert probe.neutral is None
    assert not list((tmp_path / "scores").glob("icp_neutral-*"))
    found = icp.find(what, made_by="run notebook 01", neutral=False)
    assert (found.gain == probe.gain).all()
    with pytest.raises(ScoresNotFound, match="no icp_neutral scores"):
        icp.find(what, made_by="run notebook 01")


@pytest.mark.filterwarnings("ignore:.*texts are both query and training example")
def test_a_part_of_an_experiment_knows_its_places(tmp_path, model):
    what = experiment(tmp_path / "scores", model)
    part = replace(what, n_train=4, n_query=2)
    rows, columns = what.places(part)
    for whole, some, at in zip(what.load_data(), part.load_data(), (rows, columns), strict=True):
        assert [whole[int(i)]["id"] for i in at] == list(some["id"])
    with pytest.raises(ValueError, match="is not in"):
        part.places(what)
    scores = np.arange(8.0).reshape(4, 2)
    among = what.spread(part, scores)
    assert (among[np.ix_(rows, columns)] == scores).all()
    assert np.isnan(among).sum() == among.size - 8
    # a side that keeps all keeps its name, so that finished scores of the whole are found
    size = len(what.load_data()[0])
    assert what.part(size + 1, None).identity == what.part(None, None).identity == what.identity
    assert what.part(size - 1, None).n_train == size - 1
    other = what.on("sentiment", 8, 4)
    assert (other.train, other.queries, other.n_train, other.n_query) == (*["sentiment"] * 2, 8, 4)
    assert (other.model, other.seed, other.max_length) == (what.model, what.seed, what.max_length)


@pytest.mark.parametrize("pools, message", [
    (None, "condition_pools is None, expected"),
    ({"crosed": [8, 4]}, "condition_pools: 'crosed' is not a suite, there are: .*crossed"),
    *(({"crossed": sizes}, r"condition_pools: 'crossed' has .*, expected \[N, M\]")
      for sizes in ([8], [8, 4, 2], [8, 0], [8.0, 4], 8, "84", None)),
])  # fmt: skip
def test_condition_pools_that_make_no_sense(tmp_path, model, pools, message):
    what = experiment(tmp_path / "scores", model)
    assert what.pools({}) == {}
    with pytest.raises(ValueError, match=message):
        what.pools(pools)


def test_scores_never_go_under_another_key(tmp_path, model, tiny):
    what = experiment(tmp_path / "scores", model)
    with pytest.raises(ValueError, match="is not"):
        icp.probe(what, tiny("gpt2"))
    row = {"id": "long", "prompt": "x" * 190, "completion": " yes"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    what = experiment(tmp_path / "scores", model, queries=str(tmp_path / "long.jsonl"), n_query=1)
    with pytest.raises(ValueError, match="'long' with its longest context has"):
        icp.probe(what, what.load_model(), "w" * 400)
    assert not (tmp_path / "scores").exists(), "nothing may be begun that cannot be finished"


def test_models_that_cannot_be_packed_are_refused(tiny, monkeypatch):
    language_model.check_packing(tiny("mistral"))
    lm = tiny()
    language_model.check_packing(lm)
    forward = lm.model.forward

    def deaf(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", deaf)
    for refusing in (lm, *map(tiny, ("bloom", "mpt", "mamba", "lfm2"))):
        with pytest.raises(ValueError, match="takes no packed rows"):
            language_model.check_packing(refusing)


def test_missing_scores_say_what_to_run(tmp_path, model):
    what = experiment(tmp_path / "scores", model)
    with pytest.warns(UserWarning, match="texts are both query and"):
        icp.probe(what, what.load_model())
    for change, field in (
        ({"dtype": "float64"}, r"identity\.model\.dtype"),
        ({"n_train": 9}, r"identity\.train\.limit"),
        ({"seed": 1}, r"identity\.(train|queries)\.seed"),
        ({"max_length": 199}, r"identity\.max_length"),
    ):
        with pytest.raises(ScoresNotFound, match=field) as error:
            icp.find(experiment(tmp_path / "scores", model, **change), made_by="run notebook 01")
        assert "run notebook 01" in str(error.value)
    with pytest.raises(ScoresNotFound, match=r"identity\.options\.preamble"):
        icp.find(what, "run notebook 01", preamble="Other")


def test_findings_have_intervals_around_them(tiny):
    rng = np.random.default_rng(0)
    same_task = rng.random((30, 20)) < 0.3
    gain = rng.normal(size=(30, 20)) + 2 * same_task
    probe = icp.Probe(np.zeros(20), gain, np.full((30, 20), 0.5))
    table = icp.findings(probe, same_task, rng.integers(9, 99, 30), rng).set_index("quantity")
    assert (table["low"] <= table["estimate"]).all() and (table["estimate"] <= table["high"]).all()
    row = table.loc["mean gain, same task"]
    assert row["estimate"] == pytest.approx(gain[same_task].mean()) and row["n"] == same_task.sum()
    assert row["low"] < 2 < row["high"]
    over = table.loc["mean gain over neutral, same task", "estimate"]
    assert over == pytest.approx(row["estimate"] - 0.5)
