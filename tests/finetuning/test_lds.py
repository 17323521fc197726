"""The linear datamodelling score against scipy and simulations in which it is known."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from icprobe.finetuning import lds
from icprobe.finetuning.training_runs import RunResult

N, S, M = 40, 16, 6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def drawn():
    return lds.subsets(N, S, 0.3)


def predicted(tau, subsets):
    return np.array([tau[list(rows)].sum(0) for rows in subsets])


def scored(tau, subsets, measured, resamples=10):
    found = lds.scores({"tau": tau}, subsets, measured, np.random.default_rng(0), resamples).iloc[0]
    return found["estimate"]


@pytest.mark.parametrize(("share", "size"), [(0.03, 1), (0.25, 10), (0.5, 20), (0.97, 39)])
def test_subsets_have_a_share_of_the_pool_and_are_random(share, size):
    found = lds.subsets(N, 2000, share, seed=5)
    assert all(rows == tuple(sorted(set(rows))) and len(rows) == size for rows in found)
    assert all(type(row) is int and 0 <= row < N for rows in found for row in rows)
    assert len(set(found)) == 2000 or size in (1, 39)
    often = np.bincount(np.concatenate(found), minlength=N) / 2000
    # four standard errors
    assert often == pytest.approx(size / N, abs=4 * np.sqrt(size / N * (1 - size / N) / 2000))


def test_the_first_subsets_stay_when_there_are_more():
    assert lds.subsets(N, 30, 0.5)[:7] == lds.subsets(N, 7, 0.5)
    assert lds.subsets(N, 7, 0.5) != lds.subsets(N, 7, 0.5, seed=1)
    # a change of these rows means all trainings anew
    assert lds.subsets(9, 4, 0.4, seed=3)[:2] == [(0, 1, 2, 7), (1, 2, 4, 5)]


@pytest.mark.parametrize("fraction", [0, 1, 0.01, 0.99])
def test_a_subset_takes_some_and_leaves_some(fraction):
    with pytest.raises(ValueError, match=f"subset_share is {fraction}"):
        lds.subsets(N, 4, fraction)


def test_what_is_measured_is_by_subset_and_seed():
    results = {
        f"subset {s}": [
            RunResult(pd.DataFrame(), pd.DataFrame({lds.MEASURE: [s, seed, 7]}), {})
            for seed in range(2)
        ]
        for s in range(3)
    }
    expected = [[[s, seed, 7] for seed in range(2)] for s in range(3)]
    np.testing.assert_array_equal(lds.measured(results), expected)


@pytest.mark.parametrize("seeds", [1, 3])
def test_lds_is_scipys(rng, drawn, seeds):
    methods = {"noise": rng.normal(size=(N, M)), "signs": rng.integers(-2, 3, size=(N, M))}
    measured = rng.normal(size=(S, seeds, M))
    measured += predicted(methods["signs"], drawn)[:, None] / 3
    table = lds.scores(methods, drawn, measured, rng, 50)
    assert table["method"].tolist() == list(methods)
    assert (table[["subsets", "seeds", "queries"]] == [S, seeds, M]).all(axis=None)
    for row, tau in zip(table.itertuples(), methods.values(), strict=True):
        expected = []
        for j in range(M):
            sums = [sum(tau[i, j] for i in rows) for rows in drawn]
            expected.append(spearmanr(sums, [np.mean(runs[:, j]) for runs in measured]).statistic)
        assert row.estimate == pytest.approx(np.mean(expected))
        assert row.low < row.estimate < row.high
    assert table["low"][1] > 0 > table["low"][0]


def test_differences_are_of_the_same_resamples(rng, drawn):
    effect = rng.normal(size=(N, M))
    methods = {"gain": effect + 0.1 * rng.normal(size=(N, M)), "hidden states": effect}
    methods |= {"words (TF-IDF)": np.ones((N, M)), "product": rng.normal(size=(N, M))}
    methods["product"][:, 0] = 1.0
    measured = predicted(effect, drawn)[:, None]
    table = lds.scores(methods, drawn, measured, rng, 100).set_index("method")
    assert list(table.index[4:]) == [
        "gain less words (TF-IDF)", "gain less hidden states", "product less gain",
    ]  # fmt: skip
    close = table.loc["gain less hidden states"]
    expected = table.loc["gain", "estimate"] - table.loc["hidden states", "estimate"]
    assert close["estimate"] == pytest.approx(expected)
    assert close["low"] < 0 < close["high"]
    assert close["high"] - close["estimate"] == pytest.approx(close["estimate"] - close["low"])
    far = table.loc["product less gain"]
    assert far["high"] < 0
    assert table["queries"].tolist() == [M, M, 0, M - 1, 0, M, M - 1]
    assert np.isnan(table.loc["words (TF-IDF)", "estimate"])
    found = lds.findings(table.reset_index().assign(ceiling=0.5))
    assert found["quantity"].tolist() == [f"LDS of {name}" for name in table.index]
    assert (found[["unit", "n", "seeds", "ceiling"]] == ["Spearman", S, 1, 0.5]).all(axis=None)


def test_orders_do_not_matter(rng, drawn):
    tau, measured = rng.normal(size=(N, M)), rng.normal(size=(S, 2, M))
    expected = scored(tau, drawn, measured)
    order, queries, pool = (rng.permutation(n) for n in (S, M, N))
    assert scored(tau, [drawn[s] for s in order], measured[order]) == pytest.approx(expected)
    assert scored(tau, drawn, measured[:, ::-1]) == pytest.approx(expected)
    assert scored(tau[:, queries], drawn, measured[:, :, queries]) == pytest.approx(expected)
    # row pool[i] of the old pool is row i of the new one
    renamed = [tuple(np.flatnonzero(np.isin(pool, rows)).tolist()) for rows in drawn]
    assert scored(tau[pool], renamed, measured) == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_ceiling_by_hand(rng, seeds):
    """The root of the reliability of the seeds' mean (Spearman and Brown), query by query."""
    measured = rng.normal(size=(S, seeds, M)) + rng.normal(size=(S, 1, M))
    measured[:, 1, 2] *= -1  # seeds that disagree on a query
    of_queries = []
    for j in range(M):
        pairs = itertools.combinations(measured[:, :, j].T, 2)
        rho = max(0, np.mean([spearmanr(*pair).statistic for pair in pairs]))
        of_queries.append(np.sqrt(seeds * rho / (1 + (seeds - 1) * rho)))
    assert min(of_queries) == 0 or seeds > 2
    assert lds.ceiling(measured) == pytest.approx(np.mean(of_queries))
    assert lds.ceiling(np.repeat(measured[:, :1], 4, axis=1)) == pytest.approx(1)
    assert np.isnan(lds.ceiling(measured[:, :1]))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_predictions_without_noise_reach_the_ceiling_on_average(rng, seeds, noise):
    """Many subsets: what is left are rank against linear correlations, and 300 subsets' chance."""
    subsets = lds.subsets(N, 300, 0.5)
    effect = rng.normal(size=(N, 30))
    truth = predicted(effect, subsets)
    truth /= truth.std(0)
    measured = truth[:, None] + noise * rng.normal(size=(300, seeds, 30))
    found = scored(effect, subsets, measured)
    assert found == pytest.approx(np.sqrt(1 / (1 + noise**2 / seeds)), abs=0.03)
    assert lds.ceiling(measured) == pytest.approx(found, abs=0.03)
