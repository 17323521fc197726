"""TracIn against its own definition, over given checkpoints and over a stored run."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import close, examples, experiment_on, save_tiny

from icprobe import models
from icprobe.finetuning import sft
from icprobe.finetuning.recipe import Recipe
from icprobe.finetuning.tracin import TracIn
from icprobe.methods import gradient
from icprobe.scores import ScoresNotFound, load, score

RECIPE = Recipe(batch_size=4, rate=1e-3, saves=1)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Return an experiment on files, with temporary files in a folder of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return experiment_on(tmp_path, examples(11, 1), examples(5, 2), bos=True)


def test_tracin_sums_over_checkpoints(tmp_path):
    folders = [
        save_tiny(tmp_path / name, "llama", seed=seed) for name, seed in (("a", 1), ("b", 2))
    ]
    reached = [models.load(str(folder), device="cpu") for folder in folders]
    train, queries = examples(4, seed=1), examples(3, seed=2)
    expected = sum(
        rate * gradient.gradient_dot(lm, train, queries, layers="mlp")
        for lm, rate in zip(reached, (0.1, 0.02), strict=True)
    )
    checkpoints = list(zip(map(str, folders), (0.1, 0.02), strict=True))
    actual = gradient.tracin(checkpoints, train, queries, device="cpu", layers="mlp")
    assert actual.dtype == np.float32
    close(actual, expected)
    with pytest.raises(ValueError, match="at least one checkpoint"):
        gradient.tracin([], train, queries)
    with pytest.raises(ValueError, match=r"'x': learning rate is None, expected a number"):
        gradient.tracin([("x", None)], train, queries)
    with pytest.raises(ValueError, match=r"expected \(model, learning rate\)"):
        gradient.tracin(["x"], train, queries)


def test_stored_tracin_equals_its_definition(experiment, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, batch_size=3)
    lm, options = experiment.load_model(), {"layers": "mlp", "loss_on": "text"}
    pool, queries = experiment.load_data()
    start = gradient.gradient_dot(lm, pool, queries, **options)
    method = TracIn(recipe, **options)
    actual = score(experiment, dataclasses.replace(method, start=start), lm)["tracin"]
    assert actual.dtype == np.float32 and actual.shape == (11, 5)

    run = sft.train(lm, pool, recipe, tmp_path / "run", "text").checkpoints
    expected = gradient.tracin(run, pool, queries, device="cpu", **options)
    close(actual, expected)
    assert abs(expected - run[0][1] * start).max() > 0.1 * abs(expected).max()
    np.testing.assert_array_equal(load(experiment, method)["tracin"], actual)

    # the products at the start are made where they are not given, and nothing is left behind
    close(score(experiment, method, lm, fresh=True)["tracin"], expected)
    assert not list(Path(tempfile.gettempdir()).iterdir())

    # finished scores cost no training, another recipe has scores of its own
    monkeypatch.setattr(sft, "train", None)
    assert score(experiment, method, lm)["tracin"].shape == (11, 5)
    with pytest.raises(ScoresNotFound, match=r"options.recipe.epochs: stored 1, asked 2"):
        load(experiment, TracIn(dataclasses.replace(recipe, epochs=2), **options))
    with pytest.raises(TypeError, match="not callable"):
        score(experiment, TracIn(dataclasses.replace(recipe, seed=1), **options), lm)


def test_an_error_leaves_no_checkpoints_and_no_scores(experiment, monkeypatch):
    lm, dot = experiment.load_model(), np.ones((11, 5))

    def broken(later, *_, **__):
        assert all(Path(folder).is_dir() for folder, _ in later)
        raise FloatingPointError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr(gradient, "tracin", broken)
        with pytest.raises(FloatingPointError, match="not finite"):
            score(experiment, TracIn(RECIPE, start=dot), lm)
    with pytest.raises(FloatingPointError, match=r"loss at step 2 is \S+: lower the learning rate"):
        score(experiment, TracIn(dataclasses.replace(RECIPE, rate=1e30), start=dot), lm)
    assert not list(Path(tempfile.gettempdir()).iterdir())
    with pytest.raises(ScoresNotFound, match=r"0 of 11 rows"):
        load(experiment, TracIn(RECIPE))


def test_wrong_arguments(experiment):
    lm, dot = experiment.load_model(), np.ones((11, 5))
    for recipe, more, message in (
        ({"saves": 4}, {}, "saves is 4 checkpoints, but 11 examples make 3 steps"),
        ({"saves": 0}, {}, "saves is 0, expected at least one checkpoint"),
        ({}, {"start": dot.T}, r"start has shape \(5, 11\), expected \(11, 5\)"),
        ({}, {"start": dot, "loss_on": "all"}, "loss_on is 'all', expected 'completion' or"),
    ):
        with pytest.raises(ValueError, match=message):
            score(experiment, TracIn(dataclasses.replace(RECIPE, **recipe), **more), lm)
