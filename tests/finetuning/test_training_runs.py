"""Trainings that are made once and kept: what is reused, what is made anew, and what it is."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import ATOL, RTOL, examples, questions, save_tiny

from icprobe import models
from icprobe.data import paths
from icprobe.finetuning import evaluation, sft, training_runs
from icprobe.finetuning.evaluation import MEASURES
from icprobe.finetuning.recipe import Recipe
from icprobe.finetuning.training_runs import Runs, _Training
from icprobe.scores import StoreError

RECIPE = Recipe(batch_size=2, rate=1e-2)
pytestmark = pytest.mark.usefixtures("frozen")
ONE, TWO = {"one": [0, 3, 5]}, {"two": [4, 1]}
IDS = {"one": ["1-0", "1-3", "1-5"], "two": ["1-4", "1-1"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "model", "llama", bos=True)


@pytest.fixture
def bench(folder, tmp_path):
    pool = [row | {"options": None} for row in examples(8, 1)]
    return Runs(
        scores_dir=str(tmp_path / "scores"),
        lm=models.load(str(folder), device="cpu"),
        pool=datasets.Dataset.from_list(pool),
        queries=datasets.Dataset.from_list(questions([0, 2, 3, 0, 2], 2)),
        recipe=RECIPE,
    )


@pytest.fixture
def calls(monkeypatch):
    """Ids and seeds of the trainings that are made; one that is None is interrupted."""
    made, train = [], sft.train

    def counted(lm, chosen, recipe, **more):
        if None in made:
            made.remove(None)
            raise KeyboardInterrupt
        made.append(([row.id for row in chosen], recipe.seed))
        return train(lm, chosen, recipe, **more)

    monkeypatch.setattr(sft, "train", counted)
    return made


def files(bench):
    kept = Path(bench.scores_dir) / training_runs.FOLDER
    return {file.name: file.read_bytes() for file in kept.glob("*")}


def keys(bench, *asked):
    """Return the keys of trainings (rows and seed; no rows for the untouched model)."""
    return [bench._key(_Training("any", tuple(rows), seed)) for rows, seed in asked]


def record(bench, selection):
    (rows,) = selection.values()
    return Path(bench.scores_dir) / training_runs.FOLDER / f"{keys(bench, (rows, 0))[0]}.json"


def same(one, other):
    assert one.curve.equals(other.curve) and one.measures.equals(other.measures)
    assert one.answers == other.answers


@pytest.mark.filterwarnings("ignore:.* prompts lost tokens at the left")
@pytest.mark.parametrize("options", [{}, {"loss_on": "text"}, {"max_length": 18}])
def test_a_result_is_that_of_training_and_evaluating(bench, options):
    bench, loss_on = replace(bench, **options), options.get("loss_on", "completion")
    before, (_, result) = bench.untouched(), bench.run([ONE, ONE])["one"]
    most = options.get("max_length")
    chosen = models.encode(bench.lm, bench.pool.select(ONE["one"]), most)
    assert any(row.truncated for row in chosen) == (most is not None)
    trained = sft.train(bench.lm, chosen, replace(RECIPE, seed=1), loss_on=loss_on)
    assert result.curve.equals(trained.curve) and len(before.curve) == 0
    for found, lm, n in ((before, bench.lm, None), (result, trained.lm, 0)):
        expected = evaluation.evaluate(lm, bench.queries, most, n)[list(MEASURES)]
        assert list(found.measures.index) == bench.queries["id"] == list(expected.index)
        np.testing.assert_allclose(found.measures, expected, rtol=RTOL, atol=ATOL)
        assert found.answers == {}


def test_selections_by_seed_are_made_once(bench, calls, capsys, monkeypatch):
    """A selection that has two names is one training, and so one record."""
    chosen = [ONE | {"y": np.array([4, 1]), **TWO}, {"one": [6], "y": [4, 1], "two": [4, 1]}]
    found = bench.run(chosen)
    assert calls == [(IDS["one"], 0), (IDS["two"], 0), (["1-6"], 1), (IDS["two"], 1)]
    assert list(found) == ["one", "y", "two"]
    kept = files(bench)
    assert len(kept) == 4
    monkeypatch.setattr(evaluation, "evaluate", None)
    again = bench.run([{name: rows[name] for name in ("two", "one", "y")} for rows in chosen])
    for name, results in found.items():
        for one, other, twin in zip(results, again[name], found["y"], strict=True):
            same(one, other)
            if name == "two":
                same(one, twin)
    assert "reused 4 of 4" in capsys.readouterr().out
    assert len(calls) == 4 and files(bench) == kept


def test_reference_records_are_read_and_never_written(bench, calls, monkeypatch, tmp_path):
    (found,) = bench.run([ONE])["one"]
    reference = tmp_path / "reference"
    Path(bench.scores_dir).rename(reference)
    monkeypatch.setattr(paths, "REFERENCE_SCORES", reference)
    before = {path: path.read_bytes() for path in reference.rglob("*.json")}
    same(found, *bench.run([ONE])["one"])
    assert len(calls) == 1 and not Path(bench.scores_dir).exists()
    same(found, *bench.run([ONE], fresh=True)["one"])
    assert len(calls) == 2 and len(files(bench)) == 1
    with pytest.raises(StoreError, match="reference"):
        replace(bench, scores_dir=str(reference)).run([ONE], fresh=True)
    assert {path: path.read_bytes() for path in reference.rglob("*.json")} == before


def test_records_hold_no_text(bench):
    bench.untouched()
    bench.run([ONE])
    for name, content in files(bench).items():
        assert name.endswith(".json")
        text = json.dumps(json.loads(content), ensure_ascii=False)
        for row in [*bench.pool, *bench.queries]:
            for part in (row["prompt"], row["completion"], *(row["options"] or [])):
                assert len(part) > 2 and part not in text and part.strip() not in text


def test_answers_are_kept_where_they_are_asked_for(bench, calls):
    bench.untouched()
    bench.run([ONE])
    kept = files(bench)
    talking = replace(bench, keep_answers=True)

    def all_results(of):
        return [of.untouched(), *of.run([ONE, ONE])["one"]]

    results = all_results(talking)
    expected = evaluation.evaluate(bench.lm, bench.queries)["answer"].dropna().to_dict()
    assert results[0].answers == expected != results[1].answers
    assert list(results[1].answers) == list(expected) and results[2].answers == {}
    now = files(bench)
    assert len(now) == 5 and kept.items() <= now.items() and len(calls) == 3
    for made, again in zip(results, all_results(talking), strict=True):
        same(made, again)
    assert all(silent.answers == {} for silent in all_results(bench))
    assert len(calls) == 3 and files(bench) == now


def test_answers_that_are_damaged_are_made_anew_with_their_record(bench, calls):
    talking = replace(bench, keep_answers=True)
    (first,) = talking.run([ONE])["one"]
    file = record(talking, ONE)
    answers = file.with_suffix(".jsonl")
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-9])
    with pytest.raises(StoreError, match=file.name):
        talking.run([ONE])
    file.unlink()  # as the message says
    (again,) = talking.run([ONE])["one"]
    same(first, again)
    assert answers.read_bytes() == whole and len(calls) == 2


def test_as_many_answers_of_as_many_tokens_as_asked_for(bench):
    for n, expected in ((1, 1), (9, 2)):
        short = replace(bench, n_answered=n, answer_tokens=1, keep_answers=True).untouched()
        assert short.measures["rouge_l"].count() == len(short.answers) == expected
        found = {len(models.text_ids(bench.lm, text)) for text in short.answers.values()}
        assert max(found) <= 3, "one token, or the sign for half a letter"


def test_the_untouched_model_is_evaluated_in_float32(bench, tiny):
    lm = tiny(dtype="bfloat16")
    coarse = replace(bench, lm=lm).untouched()
    exact = models.LM(lm.model.float(), lm.tokenizer, {})
    expected = evaluation.evaluate(exact, bench.queries)["nats_per_token"]
    np.testing.assert_allclose(coarse.measures["nats_per_token"], expected, rtol=RTOL, atol=ATOL)


FIRST, SECOND, UNTOUCHED = ((0, 3, 5), 0), ((4, 1), 0), ((), 0)


def changed(dataset, column):
    """Return the data set with one character more in one row's text."""
    table = dataset.to_list()
    value = table[3][column]
    table[3][column] = [*(value or []), "!"] if column == "options" else f"{value}!"
    return datasets.Dataset.from_list(table)


@pytest.mark.parametrize("name", ["prompt", "completion", "options", "id"])
def test_the_key_changes_with_the_texts(bench, name):
    queries = replace(bench, queries=changed(bench.queries, name))
    assert len({*keys(bench, FIRST, UNTOUCHED), *keys(queries, FIRST, UNTOUCHED)}) == 4
    pool = replace(bench, pool=changed(bench.pool, name))
    learnt = name in ("prompt", "completion")
    assert (keys(bench, FIRST) != keys(pool, FIRST)) == learnt, "an example trained on"
    assert keys(bench, SECOND, UNTOUCHED) == keys(pool, SECOND, UNTOUCHED), "others are not"


def test_the_key_changes_with_all_that_matters_and_nothing_else(bench, tiny, monkeypatch, tmp_path):
    recipes = [{"epochs": 2}, {"batch_size": 3}, {"rate": 1e-3}, {"schedule": "cosine"}]
    recipes += [{"warmup": 0.5}, {"lora_rank": 2}, {"saves": 1}]
    changes = [{"recipe": replace(RECIPE, **recipe)} for recipe in recipes]
    changes += [{"loss_on": "text"}, {"max_length": 99}, {"n_answered": 1}, {"answer_tokens": 1}]
    changes += [{"lm": tiny("qwen")}, {"queries": bench.queries.select([1, 0, 2, 3, 4])}]
    found = keys(bench, FIRST, ((0, 3, 5), 1), ((5, 3, 0), 0), ((0, 3), 0))
    for change in changes:
        found += keys(replace(bench, **change), FIRST)
    for module in (training_runs, evaluation):
        with monkeypatch.context() as patch:
            patch.setattr(module, "VERSION", 99)
            found += keys(bench, FIRST)
    assert len(set(found)) == len(found) == 4 + len(changes) + 2

    larger = datasets.concatenate_datasets([bench.pool, bench.pool])
    what = {"scores_dir": str(tmp_path), "pool": larger, "keep_answers": True, "n_answered": 9}
    other = replace(bench, **what, recipe=replace(RECIPE, seed=5))
    assert keys(bench, FIRST) == keys(other, FIRST)
    # answers are the first seed's; the untouched model does not depend on how it would be trained
    assert keys(bench, (*FIRST[:1], 1)) == keys(replace(other, answer_tokens=1), (*FIRST[:1], 1))
    trained = replace(other, recipe=Recipe(rate=1, epochs=9), loss_on="text")
    assert keys(bench, UNTOUCHED) == keys(trained, UNTOUCHED)


def test_an_interrupted_run_goes_on_and_leaves_the_same_bytes(bench, calls, tmp_path):
    bench = replace(bench, recipe=replace(RECIPE, lora_rank=2), keep_answers=True)
    asked = [ONE | TWO, ONE]
    whole = replace(bench, scores_dir=str(tmp_path / "whole"))
    whole.run(asked)
    calls.clear()
    bench.run([ONE])
    calls.append(None)
    with pytest.raises(KeyboardInterrupt):
        bench.run(asked)
    finished = files(bench)
    assert finished and len(calls) == 1
    bench.run(asked)
    assert calls == [(IDS["one"], 0), (IDS["two"], 0), (IDS["one"], 1)]
    assert finished.items() <= files(bench).items() and files(bench) == files(whole)


@pytest.mark.parametrize("where", ["evaluate", "publish"])
def test_an_interruption_after_the_training_leaves_no_half_record(bench, calls, where, monkeypatch):
    bench = replace(bench, keep_answers=True)
    owner = training_runs.store if where == "publish" else evaluation
    original, passed = getattr(owner, where), []

    def interrupted(*args):
        passed.append(args)
        if len(passed) == 2:  # the second evaluation; the record, after the answers
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.run([TWO | ONE])
    finished = {name for name in files(bench) if name.endswith(".json")}
    assert finished == ({record(bench, TWO).name} if where == "evaluate" else set())
    bench.run([TWO | ONE])
    assert len(calls) == 3 and len(files(bench)) == 4


def test_fresh_makes_anew(bench, calls):
    bench = replace(bench, keep_answers=True)
    first = bench.run([ONE | TWO])
    kept = files(bench)
    record(bench, ONE).write_text("{}")
    same(*first["one"], *bench.run([ONE], fresh=True)["one"])
    assert calls == [(IDS["one"], 0), (IDS["two"], 0), (IDS["one"], 0)]
    assert files(bench) == kept
    calls.append(None)
    with pytest.raises(KeyboardInterrupt):
        bench.run([ONE], fresh=True)
    assert len(files(bench)) == 2, "nothing old is taken for fresh"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "{}",
        lambda text: text.replace('"correct": [', '"correct": [0.5, '),
        lambda text: text.replace('"batch_size": 2', '"batch_size": 3'),
        lambda text: text.replace('"nats_per_token": [', '"nats_per_token": ["x", '),
    ],
)
def test_a_damaged_record_is_named(bench, calls, damage):
    bench.run([ONE | TWO])
    file = record(bench, ONE)
    whole = file.read_text()
    file.write_text(damage(whole))
    with pytest.raises(StoreError, match=file.name):
        bench.run([TWO | ONE])
    assert len(calls) == 2
    file.unlink()
    bench.run([TWO | ONE])
    assert len(calls) == 3 and file.read_text() == whole


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (ONE, "one, seed 0: loss at step 2"),
        (TWO, r"two, seed 0: log-likelihood of '2-0' .*is not finite"),  # after its only step
    ],
)
def test_a_training_that_diverges_is_named_and_others_stay(bench, calls, chosen, message):
    wild = replace(bench, recipe=replace(RECIPE, rate=1e30))
    wild.untouched()
    kept = files(wild)
    with pytest.raises(FloatingPointError, match=message):
        wild.run([chosen])
    assert files(wild) == kept and len(kept) == 1 and len(calls) == 1


def test_what_cannot_be_written_is_named(bench, tmp_path):
    (tmp_path / "scores").write_text("a file")
    with pytest.raises(StoreError, match=r"json: Not a directory"):
        bench.untouched()


def test_models_of_past_trainings_are_gone(bench, monkeypatch):
    train, alive = sft.train, weakref.WeakSet()

    def watched(*arguments, **more):
        found = train(*arguments, **more)
        alive.add(found.lm.model)
        found.lm.model.__dict__["itself"] = found.lm.model  # as they do in a notebook's kernel
        return found

    monkeypatch.setattr(sft, "train", watched)
    gc.disable()  # whatever it would find by itself, and whenever
    try:
        bench.run([ONE | TWO])
    finally:
        gc.enable()
    assert not list(alive)
