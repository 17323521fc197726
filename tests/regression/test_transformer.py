"""The in-context transformer: what it sees, its gradients, its training and its files."""

import json
import subprocess

import numpy as np
import pytest
import torch

from icprobe import paths, regression, regressor, runner, store
from icprobe.regression import Prior
from icprobe.regressor import Recipe, Regressor, Shape

EXACT = {"rtol": 0, "atol": 1e-10}  # networks in float64
PRIOR = Prior(dimension=3)
SHAPE = Shape(pairs=5, width=8, layers=2, heads=2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Regressor(3, SHAPE).double().eval()


@pytest.fixture
def problems(rng):
    return regression.draw(PRIOR, rng, 2, 4, 3, K=3, C=2)


def recipe(**changes):
    return Recipe(**{"prior": PRIOR, "shape": SHAPE, "steps": 12, "batch": 8, **changes})


# --------------------------------------------------------------------------------- what it sees


def test_queries_are_read_as_the_last_pair_is(network, rng):
    x, y = PRIOR.prompts(rng, 4, 5)
    along = network.along(x, y)
    for k in range(5):
        found = network(x[:, :k], y[:, :k], x[:, k : k + 1])[:, 0]
        np.testing.assert_allclose(found.detach(), along[:, k].detach(), **EXACT)


def test_each_query_sees_the_context_and_itself(network, rng):
    x, y = PRIOR.prompts(rng, 2, 4)
    queries, more = (torch.from_numpy(rng.normal(size=(2, n, 3))) for n in (5, 2))
    found = network(x, y, queries)
    together = network(x, y, torch.cat([more, queries], 1))[:, 2:]
    np.testing.assert_allclose(together.detach(), found.detach(), **EXACT)
    changed = y.clone()
    changed[:, -1] += 1
    assert (network(x, changed, queries) - found).abs().min() > 1e-6


def test_a_prediction_does_not_see_its_label_or_later_pairs(network, rng):
    x, y = PRIOR.prompts(rng, 2, 5)
    before = network.along(x, y)
    for j in range(5):
        other_x, other_y = x.clone(), y.clone()
        other_y[:, j] += 1
        other_x[:, j + 1 :] += 1
        after = network.along(other_x, other_y)
        np.testing.assert_allclose(after[:, : j + 1].detach(), before[:, : j + 1].detach(), **EXACT)
        assert j == 4 or (after[:, j + 1] != before[:, j + 1]).all()


def test_contexts_longer_than_trained_are_an_error(network, rng):
    x, y = PRIOR.prompts(rng, 2, 5)
    with pytest.raises(ValueError, match="a context has 5 pairs, this network reads up to 4"):
        network(x, y, x)


def test_a_learner_reads_in_parts(network, problems, monkeypatch):
    whole = regression.gain(regressor.learner(network), problems, 2)
    monkeypatch.setattr(regressor, "TOKENS", 20)
    np.testing.assert_allclose(
        regression.gain(regressor.learner(network), problems, 2), whole, **EXACT
    )


# -------------------------------------------------------------------------------- its gradients


def losses(network, x, y, asked, labels):
    return (labels - network(x[None], y[None], asked[None])[0]) ** 2 / 2


@pytest.mark.parametrize("k", [0, 2])
def test_own_gradients_are_autograds(network, problems, k):
    found = regressor.own_gradients(network, problems, k)
    names = [name for name, _ in network.named_parameters()]
    expected = {form: np.zeros(problems.shape) for form in found}
    contexts = list(problems.bases(k))
    for x, y in contexts:
        for b in range(2):

            def jacobian(asked, x=x[b], y=y[b]):
                out = network(x[None], y[None], asked[None, None])[0, 0]
                parts = torch.autograd.grad(out, list(network.parameters()))
                return dict(zip(names, parts, strict=True)), out.item()

            origin = jacobian(torch.zeros(3).double())[0]
            for i in range(4):
                mine, out = jacobian(problems.x[b, i])
                r = problems.y[b, i].item() - out
                for j in range(3):
                    theirs, out = jacobian(problems.queries[b, j])
                    rr = r * (problems.answers[b, j].item() - out) / len(contexts)
                    forms = {
                        "raw": [(mine[n] * theirs[n]).sum() for n in names],
                        "centred": [
                            ((mine[n] - origin[n]) * (theirs[n] - origin[n])).sum() for n in names
                        ],
                        "embedding": [(mine[n] * theirs[n]).sum() for n in ["read_in.weight"]],
                    }
                    for form, parts in forms.items():
                        expected[form][b, i, j] += rr * sum(parts).item()
    for form, values in expected.items():
        np.testing.assert_allclose(found[form], values, **EXACT)


def test_raw_gradients_are_what_a_small_step_does(network, problems):
    """Finite differences: a step on one example lowers a query's loss by the rate times T."""
    found = regressor.own_gradients(network, problems)["raw"]
    nothing = problems.base_x[0, 0, :0], problems.base_y[0, 0, :0]
    asked = problems.queries[0], problems.answers[0]
    for i in range(4):
        slopes = torch.autograd.grad(
            losses(network, *nothing, problems.x[0, i : i + 1], problems.y[0, i : i + 1]).sum(),
            list(network.parameters()),
        )
        sides = []
        for rate in (1e-5, -1e-5):
            with torch.no_grad():
                for weight, slope in zip(network.parameters(), slopes, strict=True):
                    weight -= rate * slope
                sides.append(losses(network, *nothing, *asked))
                for weight, slope in zip(network.parameters(), slopes, strict=True):
                    weight += rate * slope
        lowered = (sides[1] - sides[0]) / 2e-5  # central differences: errors of second order
        np.testing.assert_allclose(found[0, i], lowered, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- training


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
    small = Recipe(prior, shape, steps=400, rate=5e-3, warmup=20)
    curve = regressor.learning_curve(regressor.train(small).network, prior)
    curve = curve.pivot(index="pairs", columns="learner", values="error")
    assert curve.loc[0, "transformer"] == pytest.approx(curve.loc[0, "prior mean"], rel=0.1)
    assert curve.loc[3, "transformer"] < 0.5 * curve.loc[3, "prior mean"]
    assert (curve["ridge"][1:] < curve["transformer"][1:]).all(), "nobody beats Bayes"


def test_the_same_recipe_gives_the_same_network_and_leaves_the_world_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (regressor.train(recipe(seed=s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.losses.tolist() == again.losses.tolist() != other.losses.tolist()
    for mine, theirs in zip(one.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(regressor, "KEPT_EVERY", 0)
    whole = regressor.train(recipe(), snapshots=[0, 3, 12])
    step, taken = regressor._step, []

    def interrupted(network, optimizer, recipe, number):
        if number == 8 and 8 not in taken:
            taken.append(number)
            raise KeyboardInterrupt
        taken.append(number)
        return step(network, optimizer, recipe, number)

    monkeypatch.setattr(regressor, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        regressor.train(recipe(), tmp_path, [0, 3, 12])
    assert [file.suffix for file in tmp_path.iterdir()] == [".partial"]
    kept = (tmp_path / f"{recipe().name}.partial").read_bytes()
    regressor.train(recipe(), tmp_path, [0])  # other snapshots: from the start
    assert taken.count(0) == 2
    (tmp_path / f"{recipe().name}.partial").write_bytes(kept)
    del taken[9:]
    resumed = regressor.train(recipe(), tmp_path, [0, 3, 12])
    assert taken == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11]
    assert resumed.losses.tolist() == whole.losses.tolist()
    for after in (0, 3, 12):
        for name, tensor in whole.snapshots[after].items():
            assert torch.equal(resumed.snapshots[after][name], tensor)
    last = whole.after(12).state_dict()
    assert all(torch.equal(last[name], t) for name, t in whole.network.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_training(monkeypatch):
    monkeypatch.setattr(regressor, "_step", lambda *_: float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"loss of step 1 is nan: lower the rate \(0.002\)"
    ):
        regressor.train(recipe())


# ---------------------------------------------------------------------------------------- files


def test_networks_are_reused_and_trained_anew_when_asked(tmp_path, capsys):
    made = regressor.obtain(recipe(), tmp_path)
    assert "reused" not in capsys.readouterr().out
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(files) == [f"{recipe().name}.json", f"{recipe().name}.safetensors"]
    found = regressor.obtain(recipe(), tmp_path)
    assert "networks: reused" in capsys.readouterr().out
    for mine, theirs in zip(made.network.parameters(), found.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    np.testing.assert_allclose(found.losses, made.losses, atol=1e-5)
    np.testing.assert_allclose(found.curve["error"], made.curve["error"], atol=1e-5)
    regressor.obtain(recipe(), tmp_path, fresh=True)
    assert "reused" not in capsys.readouterr().out
    again = (tmp_path / f"{recipe().name}.safetensors").read_bytes()
    assert again == files[f"{recipe().name}.safetensors"]
    record = json.loads((tmp_path / f"{recipe().name}.json").read_text())
    assert record["recipe"]["prior"]["dimension"] == 3 and "torch" in record["made_with"]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_damaged_files_are_an_error(tmp_path, suffix):
    regressor.obtain(recipe(), tmp_path)
    file = tmp_path / f"{recipe().name}{suffix}"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(store.StoreError, match=r"safetensors or the \.json beside it is damaged"):
        regressor.obtain(recipe(), tmp_path)


def test_a_fresh_training_forgets_and_says_how_near_it_comes(tmp_path, capsys, monkeypatch):
    regressor.obtain(recipe(), tmp_path)
    (tmp_path / f"{recipe().name}.partial").write_bytes(b"left over")
    regressor.obtain(recipe(), tmp_path, fresh=True)
    assert "anew; its learning curve is within 0.0%" in capsys.readouterr().out
    other = tmp_path / f"{recipe(seed=1).name}.safetensors"
    for suffix in (".json", ".safetensors"):
        file = tmp_path / f"{recipe().name}{suffix}"
        file.rename(other.with_suffix(suffix))
    with pytest.raises(store.StoreError, match="it is of another recipe"):
        regressor.obtain(recipe(seed=1), tmp_path)


def test_snapshots_are_of_steps_that_are_taken():
    with pytest.raises(ValueError, match=r"snapshots are \[0, 13\], expected 0 to 12 steps"):
        regressor.train(recipe(), snapshots=[0, 13])


def test_own_gradients_do_not_depend_on_the_batch(network, problems, monkeypatch):
    whole = regressor.own_gradients(network, problems, 1)
    monkeypatch.setattr(regressor, "TOGETHER", 3)
    for form, values in regressor.own_gradients(network, problems, 1).items():
        np.testing.assert_allclose(values, whole[form], **EXACT)


def test_names_tell_recipes_apart():
    names = {
        recipe(**changes).name
        for changes in (
            {},
            {"seed": 1},
            {"steps": 13},
            {"rate": 1e-3},
            {"prior": Prior(3, noise=0.4)},
            {"shape": Shape(5, 8, 2, 1)},
        )
    }
    assert len(names) == 6 and all(name.startswith("d3-w8-l2-seed") for name in names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shape(width=10, heads=4), "width is 10, expected a multiple of 4 heads"),
        (lambda: Shape(pairs=0), "pairs is 0"),
        (lambda: recipe(steps=0), "steps is 0"),
        (lambda: recipe(rate=0.0), "rate is 0.0"),
        (lambda: recipe(decay_from=1.0), "decay_from is 1.0"),
        (lambda: recipe(warmup=-1), "warmup is -1"),
    ],
)
def test_what_is_out_of_range_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_learning_curve_is_that_of_single_calls(network):
    curve = regressor.learning_curve(network, PRIOR, n=200)
    x, y = PRIOR.prompts(np.random.default_rng([0, 2**31]), 200, 5)
    ridge = regression.Ridge(PRIOR)
    for k in (0, 3):
        rows = curve[curve["pairs"] == k].set_index("learner")
        for name, who in {"ridge": ridge, "transformer": network}.items():
            with torch.no_grad():
                errors = (y[:, k] - who(x[:, :k], y[:, :k], x[:, k : k + 1])[:, 0]) ** 2
            assert rows.loc[name, "error"] == pytest.approx(errors.mean().item())
            assert rows.loc[name, "low"] < rows.loc[name, "error"] < rows.loc[name, "high"]


# -------------------------------------------------------------------------- the committed networks


def test_committed_networks_are_notebook_05s_and_learn_as_recorded(monkeypatch, capsys):
    notebook = next(n for n in runner.find_notebooks(paths.ROOT) if n.number == 5)
    given = notebook.defaults
    names = ("pairs", "width", "layers", "heads")
    shape = Shape(**{name: given[f"network_{name}"] for name in names})
    priors = [
        Prior(given["dimension"], given["noise"]),
        Prior(given["dimension"], given["noise"], given["prior_mean"], given["prior_spread"]),
    ]
    recipes = [
        Recipe(prior, shape, given["network_steps"], rate=given["network_rate"], seed=seed)
        for prior in priors
        for seed in range(given["network_seeds"])
    ]
    folder = paths.resolve(given["networks_dir"])
    files = [f"{recipe.name}{kind}" for recipe in recipes for kind in (".json", ".safetensors")]
    assert sum((folder / file).stat().st_size for file in files) < 5e6
    if (paths.ROOT / ".git").exists():  # else unpacked from an archive
        listed = ["git", "ls-files", "."]
        assert sorted(subprocess.check_output(listed, cwd=folder, text=True).split()) == sorted(
            files
        )

    monkeypatch.setattr(regressor, "train", None)
    for recipe in recipes:
        made = regressor.obtain(recipe, folder, device="cpu")
        curve = regressor.learning_curve(made.network, recipe.prior)
        assert curve[["pairs", "learner"]].equals(made.curve[["pairs", "learner"]])
        kept = curve["learner"] != "least squares"  # which has no expectation to speak of
        np.testing.assert_allclose(curve[kept]["error"], made.curve[kept]["error"], rtol=1e-3)
        # and what they have learnt: nearer to the Bayes learner than to nothing, at every length
        errors = curve.pivot_table(index="pairs", columns="learner", values="error")[1:]
        learnt = errors["prior mean"] - errors["transformer"]
        assert (learnt > 0.75 * (errors["prior mean"] - errors["ridge"])).all()
    assert capsys.readouterr().out.count("networks: reused") == len(recipes)
