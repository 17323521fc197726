"""Checkpoints of real (tiny) fine-tuning runs, and TracIn over them against its own definition."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import experiment_on
from test_influence import close, encoded
from test_lm import examples

from icprobe import checkpoints, gradients, influence, store
from icprobe import lm as language_model
from icprobe.checkpoints import Recipe

RECIPE = Recipe(batch_size=4, rate=1e-3)


def load(folder):
    return language_model.load(folder, device="cpu")


def weights(lm):
    return lm.model.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def losses(lm, rows):
    return np.array([-language_model.token_log_likelihoods(lm, row).sum() for row in rows])


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Return an experiment on files, with temporary files in a folder of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return experiment_on(tmp_path, examples(11, 1), examples(5, 2), bos=True)


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(tiny, tmp_path):
    lm = tiny(bos=True)
    pool, before = encoded(lm, 22, seed=1), {n: w.clone() for n, w in weights(lm).items()}
    lm.tokenizer.pad_token = None  # as for many models; the trainer sets one
    found = checkpoints.train(lm, pool, tmp_path, Recipe(batch_size=4, rate=3e-3, saves=4))
    assert [Path(folder).name for folder, _ in found] == [
        f"checkpoint-{step}" for step in (0, 2, 3, 5, 6)
    ]
    assert same(before, weights(lm)) and same(before, weights(load(found[0][0])))
    assert lm.tokenizer.pad_token is None and not lm.model.training
    falling = [losses(load(folder), pool).mean() for folder, _ in found]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.95 * falling[0]
    assert load(found[-1][0]).bos == lm.bos


def test_nobody_is_told_of_the_run(tiny, tmp_path, monkeypatch, capfd):
    """TRL would report it to its makers, and transformers print what it logs."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", None)
    lm = tiny()
    capfd.readouterr()
    checkpoints.train(lm, examples(4, 1), tmp_path, Recipe(saves=1))
    out, err = capfd.readouterr()
    lines = [line for line in err.replace("\r", "\n").split("\n") if line]
    assert not out and all(line.startswith("fine-tuning") for line in lines)


def test_runs_of_one_seed_are_the_same_to_the_last_bit(tiny, tmp_path, monkeypatch):
    lm, rows = tiny("gpt2"), examples(9, 1)  # with dropout
    assert lm.model.config.resid_pdrop > 0

    def run(name, **changes):
        recipe = dataclasses.replace(RECIPE, **changes)
        return checkpoints.train(lm, rows, tmp_path / name, recipe)

    first, again, other = run("first"), run("again"), run("other", seed=1)
    monkeypatch.setattr(checkpoints, "TOKENS_KEPT", 0)
    recomputed = run("recomputed")
    for one, two, three, four in zip(first, again, recomputed, other, strict=True):
        assert one[1] == two[1] == three[1] == four[1]
        own = weights(load(one[0]))
        assert same(own, weights(load(two[0]))) and same(own, weights(load(three[0])))
        assert same(own, weights(load(four[0]))) == one[0].endswith("-0")


def test_rates_are_means_over_the_steps_that_led_to_a_checkpoint(tiny, tmp_path):
    """Six steps at 6/6, 5/6, ..., 1/6 of the rate, two a checkpoint; the start has the first."""
    recipe = Recipe(epochs=2, batch_size=4, rate=0.012, saves=3)
    found = checkpoints.train(tiny(), examples(10, 1), tmp_path, recipe)
    assert [rate for _, rate in found] == pytest.approx([0.012, 0.011, 0.007, 0.003])


@pytest.mark.parametrize("loss_on", ["completion", "text"])
@pytest.mark.parametrize("schedule", checkpoints.SCHEDULES)
def test_what_tracin_means(tiny, tmp_path, monkeypatch, loss_on, schedule):
    """In plain gradient descent, queries' losses fall by what the steps' products add up to.

    Each step is on the whole pool, and starts from the checkpoint before: products there, the rate
    of the step. Holds if ids, mask, loss, rates and weights of run and scores are one and the same.
    """
    lm = tiny(bos=True)
    pool, queries = encoded(lm, 6, seed=1), encoded(lm, 4, seed=2)
    scored = {layer.weight for layer in gradients.linear_layers(lm).values()}
    for weight in lm.model.parameters():
        weight.requires_grad_(weight in scored)
    monkeypatch.setattr(checkpoints, "OPTIMIZER", "sgd")
    recipe = Recipe(epochs=4, batch_size=6, rate=1e-4, schedule=schedule, saves=4)
    found = checkpoints.train(lm, pool, tmp_path, recipe, loss_on)
    folders, rates = zip(*found, strict=True)
    steps = list(zip(folders[:-1], rates[1:], strict=True))
    products = influence.tracin(steps, pool, queries, device="cpu", loss_on=loss_on)
    tokens = sum(len(z.completion if loss_on == "completion" else z.ids) for z in pool)
    fallen = losses(lm, queries) - losses(load(folders[-1]), queries)
    predicted = products.sum(axis=0) / tokens
    np.testing.assert_allclose(fallen, predicted, rtol=0, atol=0.02 * abs(predicted).max())


def test_stored_tracin_equals_its_definition(experiment, tmp_path, capsys, monkeypatch):
    recipe = dataclasses.replace(RECIPE, saves=1)
    lm, options = experiment.load_model(), {"layers": "mlp", "loss_on": "text", "reduction": "mean"}
    start = influence.attribute(experiment, lm, **options)
    actual = checkpoints.tracin(experiment, lm, recipe, start.dot, **options)
    assert actual.dtype == np.float32 and actual.shape == (11, 5)

    pool, queries = experiment.load_data()
    run = checkpoints.train(lm, pool, tmp_path / "run", recipe, "text")
    expected = influence.tracin(run, pool, queries, device="cpu", **options)
    close(actual, expected)
    assert abs(expected - run[0][1] * start.dot).max() > 0.1 * abs(expected).max()
    np.testing.assert_array_equal(
        checkpoints.find(experiment, recipe, "run this", **options), actual
    )

    # the products at the start are made where they are not given, and nothing is left behind
    close(checkpoints.tracin(experiment, lm, recipe, fresh=True, **options), expected)
    assert not list(Path(tempfile.gettempdir()).iterdir())

    # finished scores cost no training, another recipe has scores of its own
    capsys.readouterr()
    monkeypatch.setattr(checkpoints, "train", None)
    monkeypatch.setattr(influence, "GradientDot", None)
    np.testing.assert_array_equal(checkpoints.tracin(experiment, lm, recipe, **options), actual)
    assert "tracin: reused 11 of 11 rows from" in capsys.readouterr().out
    other = dataclasses.replace(recipe, seed=1)
    with pytest.raises(TypeError, match="not callable"):
        checkpoints.tracin(experiment, lm, other, start.dot, **options)
    with pytest.raises(
        store.ScoresNotFound, match=r"0 of 11 rows are finished in .*\nTo make them: run this"
    ):
        checkpoints.find(experiment, other, "run this", **options)
    with pytest.raises(store.ScoresNotFound, match=r"options.recipe.epochs: stored 1, asked 2"):
        checkpoints.find(experiment, dataclasses.replace(recipe, epochs=2), "", **options)


def test_an_error_leaves_no_checkpoints_and_no_scores(experiment, monkeypatch):
    lm, dot = experiment.load_model(), np.ones((11, 5))

    def broken(later, *_, **__):
        assert all(Path(folder).is_dir() for folder, _ in later)
        raise FloatingPointError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr(influence, "tracin", broken)
        with pytest.raises(FloatingPointError, match="not finite"):
            checkpoints.tracin(experiment, lm, RECIPE, dot)
    with pytest.raises(FloatingPointError, match=r"loss at step 2 is \S+: lower rate"):
        checkpoints.tracin(experiment, lm, dataclasses.replace(RECIPE, rate=1e30), dot)
    assert not list(Path(tempfile.gettempdir()).iterdir())
    with pytest.raises(store.ScoresNotFound, match=r"0 of 11 rows"):
        checkpoints.find(experiment, RECIPE, "")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a whole number from 1"),
        ({"batch_size": 2.0}, "batch_size is 2.0, expected a whole number from 1"),
        ({"saves": True}, "saves is True, expected a whole number from 1"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0"),
        ({"rate": 0}, "rate is 0, expected a positive number"),
        ({"rate": float("nan")}, "rate is nan, expected a positive number"),
        ({"rate": "high"}, "rate is 'high', expected a positive number"),
        ({"schedule": "square"}, r"schedule is 'square', expected one of \('linear', 'cosine'"),
    ],
)
def test_wrong_recipes(wrong, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**wrong)


def test_wrong_arguments(experiment, tiny, tmp_path):
    lm, many = experiment.load_model(), dataclasses.replace(RECIPE, saves=4)
    message = r"saves is 4 checkpoints, but 11 examples make 3 steps with epochs=1 and batch_size=4"
    with pytest.raises(ValueError, match=message):
        checkpoints.tracin(experiment, lm, many)
    with pytest.raises(ValueError, match=r"dot has shape \(5, 11\), expected \(11, 5\)"):
        checkpoints.tracin(experiment, lm, RECIPE, np.ones((5, 11)))
    with pytest.raises(ValueError, match="loss_on is 'all', expected 'completion' or 'text'"):
        checkpoints.train(lm, experiment.load_data()[0], tmp_path, RECIPE, "all")
    with pytest.raises(ValueError, match=r"model .* is not"):
        checkpoints.tracin(experiment, tiny("qwen"), RECIPE)
    assert Recipe(rate=1) == Recipe(rate=1.0)
    assert json.dumps(dataclasses.asdict(Recipe(rate=1))).count("1.0") == 1
