"""The published scores' statistics against scipy, closed forms and simulated scores."""

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from icprobe.statistics import authors_scores as published
from icprobe.statistics.measures import in_common

BOTH = published.BOTH


def simulate(rng, n, m, hardness=0.0):
    """Return both scores of n examples and m queries, and the ICP answers [n, m] behind a share."""
    worth = rng.normal(size=(n, 1))
    chances = 1 / (1 + np.exp(-worth - hardness * rng.normal(size=m)))
    helped = rng.random((n, m)) < chances
    influence = 400 + 50 * worth + 60 * rng.normal(size=(n, m))
    return helped.mean(1), influence.astype(np.float32), helped


def test_agreement_is_scipys_and_overlaps_those_of_sets(rng):
    icp, matrix, _ = simulate(rng, 400, 30)
    influence = matrix.mean(1, dtype=float)
    sizes = published.cut_sizes(icp)
    found = published.agreement(icp, influence, 30, sizes, reliable=0.9)
    assert found[BOTH, "Spearman"] == pytest.approx(spearmanr(icp, influence).statistic)
    assert found[BOTH, "Kendall"] == pytest.approx(kendalltau(icp, influence).statistic)
    assert found[BOTH, "Pearson"] == pytest.approx(np.corrcoef(icp, influence)[0, 1])
    ceiling = np.sqrt(0.9 * published.share_reliability(icp, 30))
    assert found["noise ceiling, at least", "correlation"] == pytest.approx(ceiling)
    over = found[f"{BOTH} over the ceiling, at most", "Pearson"]
    assert over == pytest.approx(found[BOTH, "Pearson"] / ceiling)
    for name, (end, k) in sizes.items():  # no influence is tied
        cut = float(name.split()[-1])
        chosen = np.flatnonzero(icp > cut if end == "top" else icp <= cut)
        order = np.argsort(influence if end == "bottom" else -influence)
        expected = len(set(chosen) & set(order[:k])) / k
        assert found[name, published.IN_COMMON] == pytest.approx(expected)
    assert len(sizes) == 4 and not published.cut_sizes(np.full(3, 0.6)), "no set is empty"
    rho = [spearmanr(icp, of_query).statistic for of_query in matrix.T]
    np.testing.assert_allclose(published.by_query(icp, matrix), rho)


def formula_20(helped):
    M = helped.shape[1]
    return M / (M - 1) * (1 - helped.var(0).sum() / helped.sum(1).var())


def test_the_reliability_of_shares_is_formula_20_where_queries_are_alike_and_less_elsewhere(rng):
    n, m = 20_000, 40
    *_, helped = simulate(rng, n, m)
    reliable = published.share_reliability(helped.mean(1), m)
    assert reliable == pytest.approx(formula_20(helped), abs=1e-3)
    # the same examples with new queries
    chances = rng.beta(4, 2, size=n)
    first, second = rng.binomial(m, chances) / m, rng.binomial(m, chances) / m
    # the standard error of this correlation is 0.003
    expected = np.corrcoef(first, second)[0, 1]
    assert published.share_reliability(first, m) == pytest.approx(expected, abs=0.015)
    *_, helped = simulate(rng, n, m, hardness=2)
    assert published.share_reliability(helped.mean(1), m) < formula_20(helped) - 0.05
    assert np.isnan(published.share_reliability(np.full(5, 0.5), m))


def test_repeated_overlaps_of_known_shares(rng):
    certain = np.repeat([0.0, 1.0], [70, 30])
    found = published.repeated_overlaps(certain, 10**6, rng, repeats=3)
    for values in found.values():
        np.testing.assert_allclose(values, 1)
    m, n = 20, 20_000
    chances = rng.beta(6, 2, size=n)
    first, second = rng.binomial(m, chances) / m, rng.binomial(m, chances) / m
    for name, values in published.repeated_overlaps(first, m, rng, repeats=3).items():
        end, k = published.cut_sizes(first)[name]
        # the shares' form is kept only roughly
        assert values.mean() == pytest.approx(in_common(first, second, k, end), abs=0.06)


def test_the_interval_of_the_reliability_holds_it(rng):
    """Row means of signal + noise over m queries, whose Spearman has a closed form."""
    n, m, noise = 1000, 20, 2.0
    truth = 6 / np.pi * np.arcsin(1 / (1 + noise**2 / m) / 2)
    hits = 0
    for _ in range(10):
        values = rng.normal(size=(n, 1)) + noise * rng.normal(size=(n, m))
        low, high = published.reliability_interval(values, rng, resamples=40)
        assert high - low < 0.1
        hits += low - 0.01 <= truth <= high + 0.01  # of the sample of examples
    assert hits >= 8


def test_findings_are_complete_and_repeatable(rng):
    scores = simulate(rng, 300, 12)[:2]
    tables = [published.findings(*scores, np.random.default_rng(3), 40, 10) for _ in range(2)]
    assert tables[0].equals(tables[1])
    table = tables[0].set_index(["quantity", "unit"])
    assert table.index.is_unique and np.isfinite(table.to_numpy()).all()
    assert (table["low"] <= table["high"]).all()
    row = table.loc[(BOTH, "Spearman")]
    icp, mean = scores[0], scores[1].mean(1, dtype=float)
    assert row["estimate"] == pytest.approx(spearmanr(icp, mean).statistic)
    same = table.loc[(f"{BOTH}, these queries", "Spearman")]
    assert same["estimate"] == row["estimate"] and same["low"] < row["estimate"] < same["high"]
    # fewer things are drawn
    assert same["high"] - same["low"] < row["high"] - row["low"]
    curve = published.overlap_curve(icp, mean, "top")
    assert curve.index[-1] == 300 and curve.iloc[-1] == 1
