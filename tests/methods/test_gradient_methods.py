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
    EKFACInfluence,
    GradientProducts,
    ProjectedProducts,
    load_parts,
    projected_gradients,
)
from icprobe.scores import score


@pytest.fixture
def experiment(tmp_path):
    return experiment_on(tmp_path, examples(11, 1), examples(5, 2))


def test_products_cosines_and_parts_have_stores_of_their_own(experiment, monkeypatch):
    monkeypatch.setitem(GradientProducts.block_size, "cpu", 4)
    lm = experiment.load_model()
    rows = experiment.load_data()
    first = score(experiment, GradientProducts(), lm)
    close(first["gradient_dot"], gradient.gradient_dot(lm, *rows))
    close(first["gradient_cosine"], gradient.gradient_dot(lm, *rows, cosine=True))
    parts = {"mlp": "mlp", "attention": "attn"}
    scores = score(experiment, GradientProducts(parts=parts), lm)
    for name, matrix in first.items():
        np.testing.assert_array_equal(scores[name], matrix)
    close(scores["mlp"], gradient.gradient_dot(lm, *rows, layers="mlp"))
    close(scores["mlp"] + scores["attention"], scores["gradient_dot"])
    score(experiment, GradientProducts(loss_on="text", parts={"other": "mlp"}), lm)
    found = load_parts(experiment, GradientProducts())
    assert list(found) == ["attention", "mlp"]
    np.testing.assert_array_equal(found["attention"], scores["attention"])
    score(experiment, GradientProducts(parts={"mlp": "gate_proj"}), lm)
    with pytest.raises(ValueError, match="two parts 'mlp' in"):
        load_parts(experiment, GradientProducts())


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
def test_a_killed_run_resumes_and_leaves_the_same_bytes(experiment, tmp_path, monkeypatch):
    """Killed between the two files of one block, with factors in temporary files."""
    monkeypatch.setitem(GradientProducts.block_size, "cpu", 4)
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


def test_each_size_of_projection_has_a_store_of_its_own(experiment):
    lm = experiment.load_model()
    found = score(experiment, ProjectedProducts((2, 5), seed=1), lm)
    more = score(experiment, ProjectedProducts((5, 3), seed=1), lm)
    np.testing.assert_array_equal(found["projected 5"], more["projected 5"])
    assert list(more) == ["projected 5", "projected 3"]
    one, other = (
        projected_gradients(lm, part.tokens, [5], seed=1)[0] for part in experiment.examples(lm)
    )
    close(found["projected 5"], one @ other.T)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (GradientProducts("attn", parts={"mlp": "mlp"}), "'attn' matches the part 'mlp'"),
        (EKFACInfluence(4), "last 4 blocks: the model has 3"),
    ],
)
def test_what_cannot_be_scored_is_an_error_before_there_is_a_store(experiment, method, message):
    with pytest.raises(ValueError, match=message):
        score(experiment, method)
