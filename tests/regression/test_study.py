"""Tables of the synthetic notebook: agreements, intervals, areas, findings."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr, ttest_1samp
from sklearn.metrics import roc_auc_score

from icprobe import claims, regression, regression_study, regressor
from icprobe.regression import Prior, Ridge, Shift
from icprobe.regression_study import CONDITIONS, FAR, IN_DOMAIN, Study, interval
from icprobe.regressor import Recipe, Regressor, Shape

PRIOR = Prior(dimension=4)
SHAPE = Shape(pairs=4, width=8, layers=1, heads=2)


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Regressor(4, SHAPE).eval()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def study():
    networks = [network(0), network(1)]
    return Study(prior=PRIOR, networks=networks, B=6, N=15, M=40, seed=3)


def test_agreement_is_scipys(study):
    problems = study.problems()
    first, second = study.probed(problems)[0], regression.at_base(PRIOR, problems)[None]
    kept = np.random.default_rng(0).random((6, 15)) < 0.6
    for mask in (None, kept):
        found = regression_study.agreement(first, second, mask)
        for s in range(2):
            for b in range(6):
                rows = np.arange(15) if mask is None else np.flatnonzero(mask[b])
                means = (x[b, rows].mean(1) for x in (first[s], second[0]))
                assert found[s, b] == pytest.approx(spearmanr(*means).statistic)


def test_networks_are_as_many_or_one():
    one, two, three = (np.zeros((n, 2, 5, 3)) for n in (1, 2, 3))
    assert regression_study.agreement(one, three).shape == (3, 2)
    with pytest.raises(ValueError, match="shape mismatch"):
        regression_study.agreement(two, three)


def test_intervals_are_those_of_students_t(rng):
    values = rng.normal(0.3, 1, size=(2, 8))
    found = interval(values)
    expected = ttest_1samp(values.mean(0), 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["estimate"] == pytest.approx(values.mean())
    assert found["network_sd"] == pytest.approx(values.mean(1).std(ddof=1))
    alone = interval(values[:1, :1])
    assert alone["estimate"] == values[0, 0]
    assert np.isnan([alone["low"], alone["high"], alone["network_sd"]]).all()
    values[0, 3] = np.nan
    assert np.isnan(interval(values)["low"])


def test_in_domain_has_every_pair_and_knows_the_exact_ones(study):
    table = study.in_domain([(0, 1), (2, 3)])
    assert len(table) == 4 * (2 * 8 + 3)  # own gradients of single contexts only
    exact = table[table["influence"] == regression_study.ADD_ONE].set_index(["probing", "k"])
    assert exact.loc[regression_study.BAYES, "estimate"].tolist() == pytest.approx([1, 1])
    one = table[(table["k"] == 0) & (table["probing"] == "gain")].set_index("influence")
    # without pairs, the context's fit is the zero-shot state, and its Hessian a multiple of I
    rows = one.loc[one.index.str.contains("zero-shot|context's fit"), "estimate"]
    assert len(rows) == 3 and np.ptp(rows) < 1e-12
    problems = study.problems(K=2, C=3)
    tracin = regression.at_base(PRIOR, problems, 2)[None]
    for name, scores in zip(("gain", "ICP score"), study.probed(problems, 2), strict=True):
        expected = regression_study.agreement(scores, tracin).mean()
        found = table[(table["k"] == 2) & (table["probing"] == name)].set_index("influence")
        # an untrained network may help all queries with every example
        expected = pytest.approx(expected, nan_ok=name == "ICP score")
        assert found.loc["TracIn at the context's fit", "estimate"] == expected


def test_own_gradients_are_held_against_the_first_network(study):
    alone = replace(study, networks=study.networks[:1]).in_domain([(0, 1)])
    both = study.in_domain([(0, 1)])
    mine = both["influence"].str.startswith("network") & (both["probing"] == "gain")
    assert mine.sum() == 3
    assert both[mine]["estimate"].tolist() == alone[mine]["estimate"].tolist()


def test_conditions_are_compared_task_by_task(study):
    table = study.under({IN_DOMAIN: Shift(), "wide": Shift(scale=3)})
    first = table[table["condition"] == IN_DOMAIN].set_index("quantity")
    assert (first[["less", "less_low", "less_high"]] == 0).all(axis=None)
    other = table[table["condition"] == "wide"].set_index("quantity")
    np.testing.assert_allclose(other["less"], first["estimate"] - other["estimate"])
    assert (other["less_low"] <= other["less"]).all() and (
        other["less"] <= other["less_high"]
    ).all()
    problems = study.problems(Shift(scale=3))
    gains = study.probed(problems)[0]
    tracin = regression.at_base(PRIOR, problems)[None]
    above = regression_study.agreement(gains, tracin) - regression_study.agreement(
        study.bayes(problems)[0], tracin
    )
    row = other.loc["gain less gain of Bayes, against TracIn"]
    assert row["estimate"] == pytest.approx(above.mean())
    assert row["low"] == pytest.approx(interval(above)["low"])
    assert other.loc["mean gain", "estimate"] == pytest.approx(gains.mean())
    helping = (gains.mean(3) > 0).mean()
    assert other.loc["share of examples that help", "estimate"] == pytest.approx(helping)


def test_what_claims_need_is_found(study):
    near = regression_study.findings(study.under(CONDITIONS), 6)
    far = regression_study.findings(study.under(CONDITIONS | FAR), 6, claims.INFORMED)
    found = pd.concat([near, far])
    assert (found[["unit", "n"]] == ["Spearman", 6]).all(axis=None)
    needed = [c.quantities for c in claims.CLAIMS if c.notebook == "05"]
    assert len(needed) == 5 and {q for quantities in needed for q in quantities} <= set(
        found["quantity"]
    )
    assert list(CONDITIONS) == [IN_DOMAIN, *claims.SHIFTS] and list(FAR) == [claims.FAR]
    table = study.under(CONDITIONS).set_index(["condition", "quantity"])
    row = table.loc[("opposite task", "gain against TracIn")]
    mine = near.set_index("quantity").loc["gain against TracIn, in domain less opposite task"]
    assert (
        mine[["estimate", "low", "high"]].tolist()
        == row[["less", "less_low", "less_high"]].tolist()
    )


def test_corrupted_labels_are_ranked(study):
    table = study.corrupted().set_index(["corruption", "method"])
    assert len(table) == 3 * 9
    problems = study.problems(Shift(corruption="outlier"))
    exact = regression.add_one(PRIOR, problems).mean(2)
    areas = [
        roc_auc_score(~hit, scores)
        for hit, scores in zip(problems.corrupted.numpy(), exact, strict=True)
    ]
    row = table.loc[("outlier", regression_study.ADD_ONE)]
    assert row["estimate"] == pytest.approx(np.mean(areas)) and row["estimate"] > 0.8
    mine = table.loc[("outlier", "gain")]
    assert mine["rho"] == pytest.approx(1) and mine["less"] == 0
    assert row["less"] == pytest.approx(mine["estimate"] - row["estimate"])
    # the first term of the exact gain, by hand
    rate = 1 / ((problems.x**2).sum(-1) + PRIOR.penalty)
    first = (rate[..., None] * torch.from_numpy(regression.at_base(PRIOR, problems))).mean(2)
    areas = [
        roc_auc_score(~hit, scores)
        for hit, scores in zip(problems.corrupted.numpy(), first.numpy(), strict=True)
    ]
    found = table.loc[("outlier", "TracIn at the example's rate"), "estimate"]
    assert found == pytest.approx(np.mean(areas))


def test_a_number_by_hand_is_the_matrixs(study):
    problems = study.problems()
    table = regression_study.by_hand(PRIOR, study.networks[0], problems, 4, 2)["value"]
    tracin = regression.at_base(PRIOR, problems)[0, 4, 2]
    assert table["TracIn: r_i r_q x_i . x_q"] == pytest.approx(tracin)
    bayes = regression.gain(Ridge(PRIOR), problems)[0, 4, 2]
    assert table["gain of Bayes: rate T - rate^2 / 2 r_i^2 (x_i . x_q)^2"] == pytest.approx(bayes)
    assert table["the network's gain"] == pytest.approx(
        study.probed(problems)[0][0, 0, 4, 2], rel=1e-4
    )


def test_the_anchor_is_exact_and_converges():
    rng = np.random.default_rng(0)
    table, error = regression_study.anchor(PRIOR, [1e-4, 0.1, 1.0], rng, 4, 40, 30, 3)
    assert error < 1e-10
    rho = table.pivot_table(index="rate", columns="quantity", values="estimate")
    assert rho.loc[1e-4, "gain and TracIn"] > 0.999
    assert rho.loc[1e-4, "ICP score and share of queries with TracIn above 0"] > 0.999
    assert rho.loc[1e-4, "ICP score and TracIn"] < 0.95
    assert rho.loc[1.0, "gain and TracIn"] < 0.5


def test_emergence_looks_at_each_snapshot(study):
    recipe = Recipe(PRIOR, SHAPE, steps=4, batch=4)
    runs = [regressor.train(replace(recipe, seed=s), snapshots=[0, 4]) for s in range(2)]
    table = regression_study.emergence(runs, study)
    assert table["steps"].tolist() == [0] * 4 + [4] * 4
    problems, networks = study.problems(), [run.network for run in runs]
    gains = replace(study, networks=networks).probed(problems)[0]
    tracin = regression.at_base(PRIOR, problems)[None]
    expected = regression_study.agreement(gains, tracin).mean()
    last = table[table["steps"] == 4].set_index("quantity")
    assert last.loc["gain against TracIn", "estimate"] == pytest.approx(expected)
    assert last.loc["error above ridge", "estimate"] > 0


def test_cost_has_a_row_a_dimension():
    recipe = Recipe(PRIOR, SHAPE, batch=4)
    table = regression_study.cost([2, 3], recipe, 2, 1, 5, 4)
    assert table["pairs"].tolist() == [5, 7]
    assert (table.drop(columns=["dimension", "pairs"]) > 0).all(axis=None)
