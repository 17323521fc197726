"""Intervals: by hand, and how often they hold the truth."""

import numpy as np
import pandas as pd
import pytest
from sampled import agreement, whole
from scipy.stats import norm

from icprobe import statistics


def test_intervals_of_a_table_are_those_of_its_entries(pair):
    first, second = pair
    measure, rows = statistics.agreements([first, -first], [second], "query"), pd.Series(["a", "b"])
    rng = np.random.default_rng(1)
    table = statistics.with_intervals(rows.to_frame("name"), measure, first.shape, rng, 50)
    for row, one in zip(table.itertuples(index=False), (first, -first), strict=True):
        alone = agreement(one, second), first.shape, np.random.default_rng(1), 50
        assert row[1:] == pytest.approx(statistics.bootstrap_ci(*alone))


def test_an_interval_needs_most_of_its_resamples(rng):
    """One pair is all that there is: half of the resamples do not have it."""
    first, second = np.zeros((12, 6)), rng.normal(size=(12, 6))
    first[3, 2] = 1
    measure = agreement(first, second, "example")
    assert np.isfinite(whole(measure, first.shape))
    assert np.isnan(statistics.bootstrap_ci(measure, first.shape, rng, 100, "fisher")[1:]).all()


def test_intervals_cover(rng):
    """A mean of row effects + column effects + noise: its standard error has a closed form."""
    N, M, runs, hits = 25, 25, 200, 0
    for _ in range(runs):
        values = rng.normal(size=(N, 1)) + rng.normal(size=M) + rng.normal(size=(N, M))
        measure = statistics.pair_mean(values, np.ones_like(values, dtype=bool))
        _, low, high = statistics.bootstrap_ci(measure, (N, M), rng, resamples=200)
        hits += low <= 0 <= high
    # resampling both sides is a little generous; resampling pairs would cover 40 %
    assert 0.90 <= hits / runs <= 1.0
    exact = 2 * norm.ppf(0.975) * np.sqrt(1 / N + 1 / M + 1 / (N * M))
    assert high - low == pytest.approx(exact, rel=0.35)


def test_the_interval_of_a_correlation_covers(rng):
    """Means of truths that correlate, with noise of each query's own: the target is without it."""
    N, M, runs = 60, 12, 100
    target = 6 / np.pi * np.arcsin(0.8 / (1 + 1 / M) / 2)  # over these M queries' like
    covered = {"fisher": 0, "percentile": 0}
    for _ in range(runs):
        truth = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=N).T
        first, second = (one[:, None] + rng.normal(size=(N, M)) for one in truth)
        measure = agreement(first, second, "example")
        for kind in covered:
            _, low, high = statistics.bootstrap_ci(measure, (N, M), rng, 100, kind)
            covered[kind] += low <= target <= high
    assert 0.92 * runs <= covered["fisher"]
    assert covered["percentile"] < covered["fisher"]  # why there is another


def test_ends_by_hand(rng):
    values = rng.normal(0.5, 0.1, size=(4000, 3))
    low, high = statistics.confidence_interval(
        np.array([0.5, 0.4, 0.3]), values, np.array(["percentile", "normal", "fisher"])
    )
    assert (low[0], high[0]) == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=0.015)
    assert (low[1], high[1]) == pytest.approx((0.4 - 0.196, 0.4 + 0.196), abs=0.01)
    spread = 1.96 * np.arctanh(values[:, 2]).std(ddof=1)
    assert low[2] == pytest.approx(np.tanh(np.arctanh(0.3) - spread), abs=1e-3)
    low, high = statistics.confidence_interval(np.array([1.0]), np.ones((9, 1)), "fisher")
    assert low[0] <= 1 <= high[0]
    unknown = statistics.confidence_interval(np.array([np.nan]), values[:, :1], "fisher")
    assert np.isnan(unknown).all()
