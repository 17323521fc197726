"""The committed numbers of notebook 05's networks give its committed tables, to the digit."""

import pytest

from icprobe import figures
from icprobe.artifact.settings import RegressionSettings
from icprobe.data import paths
from icprobe.regression import experiments
from icprobe.regression.problems import Prior
from icprobe.regression.study import Study
from icprobe.regression.training import Recipe, load_or_train
from icprobe.regression.transformer import Shape


@pytest.fixture(scope="module")
def given():
    return RegressionSettings().model_dump()


def study(given):
    prior = Prior(dimension=given["dimension"], noise=given["noise"])
    shape = {name: given[f"network_{name}"] for name in ("pairs", "width", "layers", "heads")}
    recipe = {"prior": prior, "shape": Shape(**shape), "steps": given["network_steps"]}
    recipes = [
        Recipe(**recipe, rate=given["network_rate"], seed=seed)
        for seed in range(given["network_seeds"])
    ]
    networks = [load_or_train(one, given["networks_dir"]).network for one in recipes]
    sizes = {"B": given["n_tasks"], "N": given["n_examples"], "M": given["n_queries"]}
    more = {"seed": given["seed"], "scores_dir": given["scores_dir"]}
    return Study(prior=prior, networks=networks, **sizes, **more)


TABLES = {
    "05_conditions": lambda given: experiments.under_shifts(study(given), experiments.CONDITIONS),
    "05_corrupted": lambda given: experiments.with_corrupted_labels(study(given)),
}


@pytest.mark.parametrize("name", TABLES)
def test_committed_numbers_give_the_committed_table(given, monkeypatch, tmp_path, name):
    monkeypatch.setattr(Study, "probing", None)  # nothing is left to compute
    figures.save_table(TABLES[name](given), name, tmp_path)
    committed = (paths.REFERENCE_FIGURES / "laptop" / f"{name}.csv").read_text()
    assert (tmp_path / f"{name}.csv").read_text() == committed
