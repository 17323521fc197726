"""Gradient methods through their stores: what is reused, and that it is what the functions give."""

import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import close, examples, experiment_on

from icprobe.methods import gradient
from icprobe.methods.gradient import (
    ClampedLog,
    EKFACInfluence,
    GradientDot,
    GradientProducts,
    ProjectedProducts,
    factors,
    load_parts,
)
from icprobe.scores import ScoresNotFound, load, score


@pytest.fixture
def experiment(tmp_path):
    return experiment_on(tmp_path, examples(11, 1), examples(5, 2))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(GradientProducts.block_size, "cpu", 4)


@pytest.mark.usefixtures("small_blocks")
def test_an_interrupted_run_resumes_with_the_same_numbers(experiment, monkeypatch):
    lm = experiment.load_model()
    products, calls = GradientDot.products, []

    def interrupted(self, train, *rest, **more):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(train))
        return products(self, train, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(GradientDot, "products", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(experiment, GradientProducts(), lm)
    with pytest.raises(ScoresNotFound, match="8 of 11 rows"):
        load(experiment, GradientProducts())
    resumed = score(experiment, GradientProducts(), lm)
    pool, queries = experiment.load_data()
    close(resumed["gradient_dot"], gradient.gradient_dot(lm, pool, queries))
    close(resumed["gradient_cosine"], gradient.gradient_dot(lm, pool, queries, cosine=True))

    def untouched(*_, **__):
        raise AssertionError("finished scores need no gradient")

    monkeypatch.setattr(factors, "factors", untouched)
    for again in (score(experiment, GradientProducts(), lm), load(experiment, GradientProducts())):
        for name, scores in resumed.items():
            np.testing.assert_array_equal(again[name], scores)
    with pytest.raises(ScoresNotFound):
        load(experiment, GradientProducts(layers="mlp"))


def test_parts_have_stores_of_their_own(experiment):
    lm = experiment.load_model()
    pool, queries = experiment.load_data()
    parts = {"mlp": "mlp", "attention": "attn"}
    first = score(experiment, GradientProducts(), lm)
    scores = score(experiment, GradientProducts(parts=parts), lm)
    np.testing.assert_array_equal(scores["gradient_dot"], first["gradient_dot"])
    close(scores["mlp"], gradient.gradient_dot(lm, pool, queries, layers="mlp"))
    close(scores["mlp"] + scores["attention"], scores["gradient_dot"])
    score(experiment, GradientProducts(loss_on="text", parts={"other": "mlp"}), lm)
    found = load_parts(experiment, GradientProducts())
    assert list(found) == ["attention", "mlp"]
    np.testing.assert_array_equal(found["attention"], scores["attention"])
    with pytest.raises(ValueError, match="'attn' matches the part 'mlp'"):
        score(experiment, GradientProducts("attn", parts={"mlp": "mlp"}), lm)


KILLED = """
import os, signal
from icprobe.methods.gradient import GradientProducts
from icprobe.scores import Experiment, ScoreStore, score

GradientProducts.block_size["cpu"] = 4
write = ScoreStore.write

def write_and_die(self, block, scores):
    write(self, block, scores)
    if (self.method, block) == ("gradient_dot", 1):
        os.kill(os.getpid(), signal.SIGKILL)

ScoreStore.write = write_and_die
score(Experiment(**{experiment}), GradientProducts(memory=1e-6))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_a_killed_run_resumes_and_leaves_the_same_bytes(experiment, tmp_path):
    """Killed between the two files of one block, with factors in temporary files."""
    lm, products = experiment.load_model(), GradientProducts(memory=1e-6)
    (tmp_path / "tmp").mkdir()
    fields = {f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment)}
    died = subprocess.run(
        [sys.executable, "-c", KILLED.replace("{experiment}", repr(fields))],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not list((tmp_path / "tmp").glob("*"))
    parts = sorted(path.name for path in tmp_path.glob("scores/*/part-*.parquet"))
    assert parts == ["part-00000.parquet"] * 2 + ["part-00001.parquet"]
    score(experiment, products, lm)
    score(dataclasses.replace(experiment, scores_dir=str(tmp_path / "whole")), products, lm)
    files = sorted(path.relative_to(tmp_path / "whole") for path in tmp_path.glob("whole/*/*"))
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "scores" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_slow_estimators_are_those_of_the_functions(experiment):
    lm = experiment.load_model()
    pool, queries = experiment.load_data()
    found = score(experiment, ClampedLog("mlp"), lm)["clamped_log"]
    np.testing.assert_array_equal(found, gradient.clamped_log(lm, pool, queries, "mlp"))
    found = score(experiment, EKFACInfluence(2, "mlp", seed=3), lm)["ekfac"]
    layers = gradient.last_blocks(lm, 2, "mlp")
    held = gradient.EKFAC(lm, queries, pool, layers, seed=3)
    close(found, held.scores(pool))
    with pytest.raises(ValueError, match="last 4 blocks: the model has 3"):
        score(experiment, EKFACInfluence(4), lm)


def test_each_size_of_projection_has_a_store_of_its_own(experiment):
    lm = experiment.load_model()
    found = score(experiment, ProjectedProducts((2, 5), seed=1), lm)
    more = score(experiment, ProjectedProducts((5, 3), seed=1), lm)
    np.testing.assert_array_equal(found["projected 5"], more["projected 5"])
    assert list(more) == ["projected 5", "projected 3"]
    one, other = (
        gradient.projected_gradients(lm, rows, 5, seed=1) for rows in experiment.load_data()
    )
    close(found["projected 5"], one @ other.T)
