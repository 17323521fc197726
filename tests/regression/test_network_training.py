"""Training the in-context transformer: rates, seeds, snapshots, files."""

import json
import shutil

import numpy as np
import pytest
import torch

from icprobe.regression import training
from icprobe.regression.problems import Prior
from icprobe.regression.training import Recipe, learning_curve, load_or_train, train
from icprobe.regression.transformer import Shape
from icprobe.scores import store

PRIOR = Prior(dimension=3)
SHAPE = Shape(pairs=5, width=8, layers=2, heads=2)


def recipe(**changes):
    return Recipe(**{"prior": PRIOR, "shape": SHAPE, "steps": 12, "batch": 8, **changes})


def same(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_rates_rise_stay_and_fall():
    rates = [recipe(steps=100, warmup=10, decay_from=0.5, rate=1.0).rate_at(s) for s in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10:51] == [1.0] * 41
    assert (np.diff(rates[50:]) < 0).all() and rates[75] == pytest.approx(0.5)
    assert 0 < rates[99] < 2e-3
    assert recipe(warmup=0, decay_from=0.0).rate_at(0) == 2e-3


def test_training_teaches():
    prior = Prior(dimension=1, noise=0.1)
    shape = Shape(pairs=4, width=16, layers=2, heads=2)
    small = Recipe(prior=prior, shape=shape, steps=400, rate=5e-3, warmup=20)
    curve = learning_curve(train(small).network, prior)
    curve = curve.pivot(index="pairs", columns="learner", values="error")
    assert curve.loc[0, "transformer"] == pytest.approx(curve.loc[0, "prior mean"], rel=0.1)
    assert curve.loc[3, "transformer"] < 0.5 * curve.loc[3, "prior mean"]
    assert (curve["ridge"][1:] < curve["transformer"][1:]).all(), "nobody beats Bayes"


def test_the_same_recipe_gives_the_same_network_and_leaves_the_world_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (train(recipe(seed=s)).network for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, again) and not same(one, other)


def test_snapshots_are_the_network_after_as_many_steps():
    whole = train(recipe(warmup=0, decay_from=0.9), snapshots=[0, 3, 12])
    assert list(whole.snapshots) == [0, 3, 12] and same(whole.snapshots[12], whole.network)
    assert not whole.network.training and not whole.snapshots[3].training
    # rates are constant at first, so a shorter training takes the same steps
    early = train(recipe(warmup=0, decay_from=0.9, steps=4), snapshots=[3]).snapshots[3]
    assert same(whole.snapshots[3], early) and not same(whole.snapshots[0], early)


def test_a_loss_that_is_not_finite_stops_the_training(monkeypatch):
    monkeypatch.setattr(training, "_step", lambda *_: float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1 is nan.*0\.002"):
        train(recipe())


def test_networks_are_reused_and_trained_anew_when_asked(tmp_path, capsys, monkeypatch):
    made = load_or_train(recipe(), tmp_path)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [f"{recipe().name}.json", f"{recipe().name}.safetensors"]
    before = (tmp_path / files[1]).read_bytes()
    record = json.loads((tmp_path / files[0]).read_text())
    assert record["recipe"]["prior"]["dimension"] == 3 and "torch" in record["made_with"]
    load_or_train(recipe(), tmp_path, fresh=True)
    assert (tmp_path / files[1]).read_bytes() == before
    assert "reused" not in capsys.readouterr().out
    monkeypatch.setattr(training, "train", None)
    found = load_or_train(recipe(), tmp_path)
    assert "networks: reused" in capsys.readouterr().out
    assert same(made.network, found.network) and found.curve.equals(made.curve)


def test_damaged_and_foreign_files_are_an_error(tmp_path):
    load_or_train(recipe(), tmp_path)
    files = [tmp_path / f"{recipe().name}{suffix}" for suffix in (".json", ".safetensors")]
    for file in files:
        shutil.copy(file, tmp_path / f"{recipe(seed=1).name}{file.suffix}")
    with pytest.raises(store.StoreError, match=rf"{recipe(seed=1).name}.*another recipe"):
        load_or_train(recipe(seed=1), tmp_path)
    for file in reversed(files):
        file.write_bytes(file.read_bytes()[:60])
        with pytest.raises(store.StoreError, match=recipe().name):
            load_or_train(recipe(), tmp_path)
