"""TracIn over the stored run of a tiny model against its own definition."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import experiment_on
from test_influence import close
from test_lm import examples

from icprobe import checkpoints, influence, store
from icprobe.finetuning import sft
from icprobe.finetuning.recipe import Recipe

RECIPE = Recipe(batch_size=4, rate=1e-3, saves=1)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Return an experiment on files, with temporary files in a folder of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return experiment_on(tmp_path, examples(11, 1), examples(5, 2), bos=True)


@pytest.mark.parametrize("rank", [0, 2])
def test_stored_tracin_equals_its_definition(experiment, tmp_path, capsys, monkeypatch, rank):
    recipe = dataclasses.replace(RECIPE, lora_rank=rank)
    lm, options = experiment.load_model(), {"layers": "mlp", "loss_on": "text", "reduction": "mean"}
    start = influence.attribute(experiment, lm, **options)
    actual = checkpoints.tracin(experiment, lm, recipe, start.dot, **options)
    assert actual.dtype == np.float32 and actual.shape == (11, 5)

    pool, queries = experiment.load_data()
    run = sft.train(lm, pool, recipe, tmp_path / "run", "text").checkpoints
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
    monkeypatch.setattr(sft, "train", None)
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
    with pytest.raises(FloatingPointError, match=r"loss at step 2 is \S+: lower the learning rate"):
        checkpoints.tracin(experiment, lm, dataclasses.replace(RECIPE, rate=1e30), dot)
    assert not list(Path(tempfile.gettempdir()).iterdir())
    with pytest.raises(store.ScoresNotFound, match=r"0 of 11 rows"):
        checkpoints.find(experiment, RECIPE, "")


def test_wrong_arguments(experiment, tiny):
    lm, many = experiment.load_model(), dataclasses.replace(RECIPE, saves=4)
    message = r"saves is 4 checkpoints, but 11 examples make 3 steps with epochs=1 and batch_size=4"
    with pytest.raises(ValueError, match=message):
        checkpoints.tracin(experiment, lm, many)
    with pytest.raises(ValueError, match="saves is 0, expected at least one checkpoint beside"):
        checkpoints.tracin(experiment, lm, dataclasses.replace(RECIPE, saves=0))
    with pytest.raises(ValueError, match=r"dot has shape \(5, 11\), expected \(11, 5\)"):
        checkpoints.tracin(experiment, lm, RECIPE, np.ones((5, 11)))
    with pytest.raises(ValueError, match="loss_on is 'all', expected 'completion' or 'text'"):
        checkpoints.tracin(experiment, lm, RECIPE, np.ones((11, 5)), loss_on="all")
    with pytest.raises(ValueError, match=r"model .* is not"):
        checkpoints.tracin(experiment, tiny("qwen"), RECIPE)
