"""TracIn against its own definition, over a stored run's checkpoints."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import close, examples, experiment_on

from icprobe import models
from icprobe.finetuning import sft, tracin
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


def test_stored_tracin_equals_its_definition(experiment, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, batch_size=3)
    lm, options = experiment.load_model(), {"layers": "mlp", "loss_on": "text"}
    pool, queries = experiment.load_data()
    start = gradient.gradient_dot(lm, pool, queries, **options)
    method = TracIn(recipe, **options)
    actual = score(experiment, dataclasses.replace(method, start=start), lm)["tracin"]

    run = sft.train(lm, pool, recipe, tmp_path / "run", "text").checkpoints
    parts = [
        rate * gradient.gradient_dot(models.load(folder, device="cpu"), pool, queries, **options)
        for folder, rate in run
    ]
    expected = np.sum(parts, axis=0)
    close(actual, expected)
    assert abs(expected - parts[0]).max() > 0.1 * abs(expected).max()
    np.testing.assert_array_equal(load(experiment, method)["tracin"], actual)

    # the products at the start are made where they are not given, and nothing is left behind
    close(score(experiment, method, lm, fresh=True)["tracin"], expected)
    assert not list(Path(tempfile.gettempdir()).iterdir())

    # finished scores cost no training, another recipe has scores of its own
    monkeypatch.setattr(sft, "train", None)
    assert score(experiment, method, lm)["tracin"].shape == (11, 5)
    with pytest.raises(ScoresNotFound, match=r"options.recipe.epochs: stored 1, asked 2"):
        load(experiment, TracIn(dataclasses.replace(recipe, epochs=2), **options))


def test_an_error_leaves_no_checkpoints_and_no_scores(experiment, monkeypatch):
    lm, dot = experiment.load_model(), np.ones((11, 5))

    def broken(_, later, *__, **___):
        assert all(Path(folder).is_dir() for folder, _ in later)
        raise FloatingPointError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr(tracin, "over_checkpoints", broken)
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
