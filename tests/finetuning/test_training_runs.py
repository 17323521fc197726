"""Trainings that are made once and kept: what is reused, what is made anew, and what it is."""

import dataclasses
import gc
import json
import shutil
import weakref
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
from icprobe.finetuning.training_runs import UNTOUCHED, Runs, TrainingRun
from icprobe.scores import StoreError

RECIPE = Recipe(batch_size=2, rate=1e-2)
pytestmark = pytest.mark.usefixtures("frozen")
ONE, TWO = TrainingRun("one", (0, 3, 5)), TrainingRun("two", (4, 1))


def rows(n, seed, options=()):
    return datasets.Dataset.from_list(
        [row | {"options": None} for row in examples(n, seed)]
        if not options
        else questions(options, seed)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "model", "llama", bos=True)


@pytest.fixture
def bench(folder, tmp_path):
    return Runs(
        scores_dir=str(tmp_path / "scores"),
        lm=models.load(str(folder), device="cpu"),
        pool=rows(8, 1),
        queries=rows(5, 2, [0, 2, 3, 0, 2]),
        recipe=RECIPE,
    )


@pytest.fixture
def calls(monkeypatch):
    """Ids and seeds of the trainings that are made; one that is None is interrupted."""
    made, train = [], sft.train

    def counted(lm, chosen, recipe, *more):
        if None in made:
            made.remove(None)
            raise KeyboardInterrupt
        made.append(([row.id for row in chosen], recipe.seed))
        return train(lm, chosen, recipe, *more)

    monkeypatch.setattr(sft, "train", counted)
    return made


def files(bench):
    kept = Path(bench.scores_dir) / training_runs.FOLDER
    return {str(f.relative_to(kept)): f.read_bytes() for f in kept.rglob("*") if f.is_file()}


def keys(bench, *asked):
    return [bench._key(run) for run in asked]


def record(bench, run):
    return Path(bench.scores_dir) / training_runs.FOLDER / f"{bench._key(run)}.json"


def same(one, other):
    assert one.curve.equals(other.curve) and one.measures.equals(other.measures)
    assert (one.answers, one.checkpoints) == (other.answers, other.checkpoints)


# ----------------------------------------------------------------------------------- what is kept


@pytest.mark.filterwarnings("ignore:.* prompts lost tokens at the left")
@pytest.mark.parametrize("options", [{}, {"loss_on": "text"}, {"max_length": 18}])
def test_an_result_is_that_of_training_and_evaluating(bench, options):
    bench, loss_on = dataclasses.replace(bench, **options), options.get("loss_on", "completion")
    before, result = bench.run([UNTOUCHED, dataclasses.replace(ONE, seed=3)])
    recipe, most = dataclasses.replace(RECIPE, seed=3), options.get("max_length")
    chosen = models.encode(bench.lm, bench.pool.select(ONE.rows), most)
    assert any(row.truncated for row in chosen) == (most is not None)
    trained = sft.train(bench.lm, chosen, recipe, loss_on=loss_on)
    assert result.curve.equals(trained.curve) and len(before.curve) == 0
    for found, lm, n in ((before, bench.lm, None), (result, trained.lm, 0)):
        expected = evaluation.evaluate(lm, bench.queries, most, n)[list(MEASURES)]
        assert list(found.measures.index) == bench.queries["id"] == list(expected.index)
        np.testing.assert_allclose(found.measures, expected, rtol=RTOL, atol=ATOL)
        assert found.answers == {} and found.checkpoints == []


def test_a_finished_training_is_never_made_again(bench, calls, capsys, monkeypatch):
    found = bench.run([ONE, UNTOUCHED, TWO])
    assert calls == [(["1-0", "1-3", "1-5"], 0), (["1-4", "1-1"], 0)]
    kept = files(bench)
    monkeypatch.setattr(evaluation, "evaluate", None)
    for result, again in zip(found[::-1], bench.run([TWO, UNTOUCHED, ONE]), strict=True):
        same(result, again)
    assert "reused 3 of 3" in capsys.readouterr().out
    assert len(calls) == 2 and files(bench) == kept


def test_reference_records_are_read_and_never_written(bench, calls, monkeypatch, tmp_path):
    (found,) = bench.run([ONE])
    reference = tmp_path / "reference"
    Path(bench.scores_dir).rename(reference)
    monkeypatch.setattr(paths, "REFERENCE_SCORES", reference)
    before = {path: path.read_bytes() for path in reference.rglob("*.json")}
    same(found, *bench.run([ONE]))
    assert len(calls) == 1 and not Path(bench.scores_dir).exists()
    same(found, *bench.run([ONE], fresh=True))
    assert len(calls) == 2 and len(files(bench)) == 1
    with pytest.raises(StoreError, match="reference"):
        dataclasses.replace(bench, scores_dir=str(reference)).run([ONE], fresh=True)
    assert {path: path.read_bytes() for path in reference.rglob("*.json")} == before


def test_equal_selections_share_one_record(bench, calls):
    one, two = bench.run([ONE, TrainingRun("another name", ONE.rows)])
    same(one, two)
    assert len(calls) == len(files(bench)) == 1


def test_records_hold_no_text(bench):
    bench.run([UNTOUCHED, ONE])
    for name, content in files(bench).items():
        assert name.endswith(".json")
        text = json.dumps(json.loads(content), ensure_ascii=False)
        for row in [*bench.pool, *bench.queries]:
            for part in (row["prompt"], row["completion"], *(row["options"] or [])):
                assert len(part) > 2 and part not in text and part.strip() not in text


@pytest.mark.parametrize(("rank", "saves"), [(0, 2), (2, 1)])
def test_checkpoints_stay_beside_the_record(bench, calls, rank, saves):
    bench = dataclasses.replace(
        bench, recipe=dataclasses.replace(RECIPE, lora_rank=rank, saves=saves)
    )
    (result,) = bench.run([ONE])
    assert len(result.checkpoints) == saves + 1
    beside = {Path(folder).parent for folder, _ in result.checkpoints}
    assert beside == {record(bench, ONE).with_suffix("")}
    last = models.load(result.checkpoints[-1][0], device="cpu")
    found = evaluation.evaluate(last, bench.queries, n_answered=0)
    np.testing.assert_allclose(
        result.measures[["nats_per_token", "correct"]],
        found[["nats_per_token", "correct"]],
        rtol=RTOL,
        atol=ATOL,
    )
    shutil.rmtree(result.checkpoints[0][0])
    same(result, *bench.run([ONE]))
    assert len(calls) == 2 and all(Path(folder).is_dir() for folder, _ in result.checkpoints)
    bench.run([ONE])
    assert len(calls) == 2


def test_answers_are_kept_where_they_are_asked_for(bench, calls):
    bench.run([UNTOUCHED, ONE])
    kept = files(bench)
    talking = dataclasses.replace(bench, keep_answers=True)
    asked = [UNTOUCHED, ONE, dataclasses.replace(ONE, seed=1)]
    results = talking.run(asked)
    expected = evaluation.evaluate(bench.lm, bench.queries)["answer"].dropna().to_dict()
    assert results[0].answers == expected != results[1].answers
    assert list(results[1].answers) == list(expected) and results[2].answers == {}
    now = files(bench)
    assert len(now) == 5 and kept.items() <= now.items() and len(calls) == 3
    for made, again in zip(results, talking.run(asked), strict=True):
        same(made, again)
    assert all(silent.answers == {} for silent in bench.run(asked))
    assert len(calls) == 3 and files(bench) == now


@pytest.mark.slow
def test_models_of_the_first_seed_answer(bench):
    asked = [UNTOUCHED, ONE, dataclasses.replace(ONE, seed=1)]
    for n, expected in ((None, 2), (1, 1), (9, 2)):
        what = dataclasses.replace(bench, n_answered=n)
        counts = [result.measures["rouge_l"].count() for result in what.run(asked)]
        assert counts == [expected, expected, 0]
        # the number is in the key of those that answer
        assert (keys(what, *asked[:2]) == keys(bench, *asked[:2])) == (expected == 2)
        assert keys(what, asked[2]) == keys(bench, asked[2])
    short = dataclasses.replace(bench, answer_tokens=1, keep_answers=True)
    (result,) = short.run([ONE])
    found = {len(models.text_ids(bench.lm, text)) for text in result.answers.values()}
    assert len(result.answers) == 2 and max(found) <= 3, "one token, or the sign for half a letter"


@pytest.mark.parametrize(("field", "value"), [("n_answered", -1), ("answer_tokens", 0)])
def test_options_out_of_range_are_named(bench, field, value):
    with pytest.raises(ValueError, match=f"(?s){field}.*{value}"):
        dataclasses.replace(bench, **{field: value})


def test_selections_by_seed(bench, calls):
    chosen = [
        {"x": np.array([0, 3, 5]), "y": np.array([1, 2])},
        {"x": np.array([6]), "y": np.array([1, 2])},
    ]
    found = bench.run_selections(chosen)
    assert calls == [
        (["1-0", "1-3", "1-5"], 0), (["1-1", "1-2"], 0), (["1-6"], 1), (["1-1", "1-2"], 1),
    ]  # fmt: skip
    assert list(found) == ["x", "y"]
    for name, results in found.items():
        asked = [TrainingRun(name, tuple(map(int, rows[name])), k) for k, rows in enumerate(chosen)]
        for result, again in zip(results, bench.run(asked), strict=True):
            same(result, again)
    assert len(calls) == 4
    bench.run_selections(chosen[:1], fresh=True)
    assert len(calls) == 6


# ------------------------------------------------------------------------------------------- keys


def changed(dataset, column):
    """Return the data set with one character more in one row's text."""
    table = dataset.to_list()
    value = table[3][column]
    table[3][column] = [*(value or []), "!"] if column == "options" else f"{value}!"
    return datasets.Dataset.from_list(table)


@pytest.mark.parametrize("name", ["prompt", "completion", "options", "id"])
def test_the_key_changes_with_the_texts(bench, name):
    queries = dataclasses.replace(bench, queries=changed(bench.queries, name))
    assert len({*keys(bench, ONE, UNTOUCHED), *keys(queries, ONE, UNTOUCHED)}) == 4
    pool = dataclasses.replace(bench, pool=changed(bench.pool, name))
    learnt = name in ("prompt", "completion")
    assert (keys(bench, ONE) != keys(pool, ONE)) == learnt, "an example trained on"
    assert keys(bench, TWO, UNTOUCHED) == keys(pool, TWO, UNTOUCHED), "others are not"


def test_the_key_changes_with_all_that_matters(bench, tiny, monkeypatch):
    others = [
        ONE,
        dataclasses.replace(ONE, seed=1),
        dataclasses.replace(ONE, rows=ONE.rows[::-1]),
        dataclasses.replace(ONE, rows=ONE.rows[:2]),
    ]
    recipes = [{"epochs": 2}, {"batch_size": 3}, {"rate": 1e-3}, {"schedule": "cosine"}]
    recipes += [{"warmup": 0.5}, {"lora_rank": 2}, {"saves": 1}]
    changes = [{"recipe": dataclasses.replace(RECIPE, **recipe)} for recipe in recipes]
    changes += [{"loss_on": "text"}, {"max_length": 99}, {"n_answered": 1}, {"answer_tokens": 1}]
    changes += [{"lm": tiny("qwen")}, {"queries": bench.queries.select([1, 0, 2, 3, 4])}]
    found = keys(bench, *others)
    for change in changes:
        found += keys(dataclasses.replace(bench, **change), ONE)
    for module in (training_runs, evaluation):
        with monkeypatch.context() as patch:
            patch.setattr(module, "VERSION", 99)
            found += keys(bench, ONE)
    assert len(set(found)) == len(found) == 4 + len(changes) + 2


def test_the_key_is_that_of_what_is_trained_not_of_its_name_or_place(bench, tmp_path):
    other = dataclasses.replace(
        bench,
        scores_dir=str(tmp_path / "elsewhere"),
        pool=datasets.concatenate_datasets([bench.pool, rows(3, 7)]),
        recipe=dataclasses.replace(RECIPE, seed=5),
        keep_answers=True,
    )
    assert keys(bench, ONE) == keys(other, dataclasses.replace(ONE, name="other"))
    # the untouched model does not depend on how it would be trained
    other = dataclasses.replace(other, recipe=Recipe(rate=1, epochs=9), loss_on="text")
    assert keys(bench, UNTOUCHED) == keys(other, TrainingRun("", ()))


# ------------------------------------------------------------------------------------ what breaks


@pytest.mark.parametrize("options", [{}, {"keep_answers": True}])
def test_an_interrupted_run_goes_on_and_leaves_the_same_bytes(bench, calls, tmp_path, options):
    bench = dataclasses.replace(
        bench, recipe=dataclasses.replace(RECIPE, lora_rank=2, saves=1), **options
    )
    asked = [ONE, TWO, dataclasses.replace(ONE, seed=1)]
    whole = dataclasses.replace(bench, scores_dir=str(tmp_path / "whole"))
    whole.run(asked)
    calls.clear()
    bench.run(asked[:1])
    calls.append(None)
    with pytest.raises(KeyboardInterrupt):
        bench.run(asked)
    finished = files(bench)
    assert finished and len(calls) == 1
    bench.run(asked)
    assert calls == [(["1-0", "1-3", "1-5"], 0), (["1-4", "1-1"], 0), (["1-0", "1-3", "1-5"], 1)]
    assert finished.items() <= files(bench).items()
    now, expected = files(bench), files(whole)
    assert now.keys() == expected.keys()
    for name in now:
        assert now[name] == expected[name] or name.endswith("training_args.bin"), name


@pytest.mark.parametrize("where", ["evaluate", "_write"])
def test_an_interruption_after_the_training_leaves_no_half_record(bench, calls, where, monkeypatch):
    bench = dataclasses.replace(bench, keep_answers=True)
    owner = training_runs if where == "_write" else evaluation
    original, passed = getattr(owner, where), []

    def interrupted(*args):
        passed.append(args)
        if len(passed) == 2:  # the record, after the answers
            raise KeyboardInterrupt
        return original(*args)

    asked = [ONE] if where == "_write" else [TWO, ONE]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.run(asked)
    assert not record(bench, ONE).exists()
    bench.run(asked)
    assert len(calls) == len(asked) + 1 and len(files(bench)) == 2 * len(asked)


def test_fresh_makes_anew(bench, calls):
    bench = dataclasses.replace(bench, keep_answers=True)
    first = bench.run([ONE, TWO])
    kept = files(bench)
    record(bench, ONE).write_text("{}")
    found = bench.run([ONE], fresh=True)
    same(first[0], *found)
    assert calls == [(["1-0", "1-3", "1-5"], 0), (["1-4", "1-1"], 0), (["1-0", "1-3", "1-5"], 0)]
    assert files(bench) == kept
    calls.append(None)
    with pytest.raises(KeyboardInterrupt):
        bench.run([ONE], fresh=True)
    assert len(files(bench)) == 2, "nothing old is taken for fresh"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "{}",
        lambda text: text.replace('"correct": [', '"correct": [0.5, '),
        lambda text: text.replace('"loss": [', '"loss": [0.5, '),
        lambda text: text.replace('"batch_size": 2', '"batch_size": 3'),
        lambda text: text.replace('"nats_per_token": [', '"nats_per_token": ["x", '),
    ],
)
def test_a_damaged_record_is_named(bench, calls, damage):
    bench.run([ONE, TWO])
    file = record(bench, ONE)
    whole = file.read_text()
    file.write_text(damage(whole))
    with pytest.raises(StoreError, match=file.name):
        bench.run([TWO, ONE])
    assert len(calls) == 2
    file.unlink()
    bench.run([TWO, ONE])
    assert len(calls) == 3 and file.read_text() == whole


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (dataclasses.replace(ONE, seed=2), "one, seed 2: loss at step 2"),
        (TWO, r"two, seed 0: log-likelihood of '2-0' .*is not finite"),  # after its only step
    ],
)
def test_a_training_that_diverges_is_named_and_others_stay(bench, calls, run, message):
    wild = dataclasses.replace(bench, recipe=dataclasses.replace(RECIPE, rate=1e30))
    wild.run([UNTOUCHED])
    kept = files(wild)
    with pytest.raises(FloatingPointError, match=message):
        wild.run([UNTOUCHED, run])
    assert files(wild) == kept and len(kept) == 1 and len(calls) == 1
    wild.run([UNTOUCHED])


def test_what_cannot_be_written_is_named(bench, tmp_path):
    (tmp_path / "scores").write_text("a file")
    with pytest.raises(StoreError, match=r"json: Not a directory"):
        bench.run([UNTOUCHED])


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
        bench.run([ONE, TWO])
    finally:
        gc.enable()
    assert not list(alive)
