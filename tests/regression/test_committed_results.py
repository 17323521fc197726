"""Committed networks and numbers of notebook 05: they give its committed tables, to the digit."""

import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from icprobe import figures
from icprobe.artifact import claims
from icprobe.artifact.settings import RegressionSettings
from icprobe.data import paths
from icprobe.regression import experiments, training
from icprobe.regression.experiments import CONDITIONS, FAR
from icprobe.regression.problems import Prior, Shift
from icprobe.regression.study import Study
from icprobe.regression.training import Recipe, learning_curve, load_or_train
from icprobe.regression.transformer import Shape
from icprobe.scores import store

LAPTOP = RegressionSettings()
PRIOR = Prior(dimension=LAPTOP.dimension, noise=LAPTOP.noise)
INFORMED = replace(PRIOR, mean=LAPTOP.prior_mean, spread=LAPTOP.prior_spread)


def recipes(prior, **changes):
    sizes = {name: getattr(LAPTOP, f"network_{name}") for name in ("pairs", "width", "layers")}
    shape = Shape(**sizes, heads=LAPTOP.network_heads)
    given = {"steps": LAPTOP.network_steps, "rate": LAPTOP.network_rate, "shape": shape} | changes
    return [Recipe(prior=prior, seed=seed, **given) for seed in range(LAPTOP.network_seeds)]


def study(prior):
    return Study(
        prior=prior,
        networks=[load_or_train(one, LAPTOP.networks_dir).network for one in recipes(prior)],
        scores_dir=LAPTOP.scores_dir,
        B=LAPTOP.n_tasks,
        N=LAPTOP.n_examples,
        M=LAPTOP.n_queries,
        seed=LAPTOP.seed,
    )


def in_training():
    shape = Shape(pairs=LAPTOP.network_pairs, width=LAPTOP.quick_width, layers=2, heads=2)
    quick = recipes(PRIOR, shape=shape, steps=LAPTOP.quick_steps, rate=0.003)
    return experiments.in_training(study(PRIOR), quick, LAPTOP.watched)


def shifts():
    sweeps = {
        "task": {value: Shift(cosine=value) for value in LAPTOP.cosines},
        "scale": {value: Shift(scale=value) for value in LAPTOP.scales},
        "offset": {2 * value: Shift(offset=value) for value in LAPTOP.offsets},
        "angle": {value: Shift(degrees=value) for value in LAPTOP.angles},
    }
    swept = {name: experiments.under_shifts(study(PRIOR), each) for name, each in sweeps.items()}
    return pd.concat(swept, names=["shift"]).reset_index("shift")


def near():
    return experiments.under_shifts(study(PRIOR), CONDITIONS)


def far():
    return experiments.under_shifts(study(INFORMED), CONDITIONS | FAR)


def findings():
    n = LAPTOP.n_tasks
    informed = experiments.findings(far(), n, claims.INFORMED)
    return pd.concat([experiments.findings(near(), n), informed])


TABLES = {
    "05_conditions": near,
    "05_corrupted": lambda: experiments.with_corrupted_labels(study(PRIOR)),
    "05_emergence": in_training,
    "05_findings": findings,
    "05_in_domain": lambda: experiments.in_domain(study(PRIOR), LAPTOP.bases),
    "05_informative_prior": far,
    "05_shifts": shifts,
}


@pytest.mark.parametrize("name", TABLES)
def test_committed_numbers_give_the_committed_table(monkeypatch, tmp_path, name):
    monkeypatch.setattr(Study, "probing", None)  # nothing is left to compute
    figures.save_table(TABLES[name](), name, tmp_path)
    committed = (paths.REFERENCE_FIGURES / "laptop" / f"{name}.csv").read_text()
    assert (tmp_path / f"{name}.csv").read_text() == committed


def test_committed_networks_are_notebook_05s_and_learn_as_recorded(monkeypatch):
    made, folder = [*recipes(PRIOR), *recipes(INFORMED)], paths.REFERENCE_NETWORKS
    files = {f"{recipe.name}{kind}" for recipe in made for kind in (".json", ".safetensors")}
    assert sum((folder / file).stat().st_size for file in files) < 5e6
    if (paths.ROOT / ".git").exists():  # else unpacked from an archive
        listed = subprocess.check_output(["git", "ls-files", "."], cwd=folder, text=True)
        assert set(listed.split()) == files

    monkeypatch.setattr(training, "train", None)
    with pytest.raises(store.StoreError, match="only read"):
        load_or_train(made[0], folder, fresh=True)
    for recipe in made:
        found = load_or_train(recipe, folder)
        curve = learning_curve(found.network, recipe.prior)
        assert curve[["pairs", "learner"]].equals(found.curve[["pairs", "learner"]])
        kept = curve["learner"] != "least squares"  # which has no expectation to speak of
        np.testing.assert_allclose(curve[kept]["error"], found.curve[kept]["error"], rtol=1e-3)
        # and what they have learnt: nearer to the Bayes learner than to nothing, at every length
        errors = curve.pivot_table(index="pairs", columns="learner", values="error")[1:]
        learnt = errors["prior mean"] - errors["transformer"]
        assert (learnt > 0.75 * (errors["prior mean"] - errors["ridge"])).all()
