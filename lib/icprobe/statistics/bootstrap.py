"""95 % intervals from resampling training examples and queries together."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm

# fraction of the resamples that must have a statistic for its interval to be one
MIN_DEFINED_SHARE = 0.9
# with fewer queries, resampling them gives intervals that are far too short
MIN_QUERIES = 6

# takes row numbers [N] and column numbers [M], returns the statistic(s) of that sample
Measure = Callable[[np.ndarray, np.ndarray], float | np.ndarray]


def bootstrap_ci(
    measure: Measure,
    shape: tuple[int, int],
    rng: np.random.Generator,
    resamples: int = 1000,
    kind: str | np.ndarray = "percentile",
) -> tuple:
    """Return the measure of all rows and columns, and the ends of its 95 % interval.

    Training examples and queries are both samples, and a pair's score depends on both: resampling
    pairs would give intervals that are far too short. These are rather too long, since noise of
    single pairs counts up to three times (Owen 2007, The pigeonhole bootstrap): an interval above
    zero is safe evidence, one that holds zero is no evidence of absence. `shape` is (N, M), for
    `kind` see `confidence_interval`.
    """
    estimate = measure(*map(np.arange, shape))
    replicates = bootstrap_replicates(measure, shape, rng, resamples)
    return (estimate, *confidence_interval(estimate, replicates, kind))


def bootstrap_replicates(
    measure: Measure, shape: tuple[int, int], rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """Return the measure of resamples of rows and columns: [resamples, ...]."""
    N, M = shape
    draws = ((rng.integers(N, size=N), rng.integers(M, size=M)) for _ in range(resamples))
    return np.array([measure(*drawn) for drawn in draws])


def confidence_interval(
    estimate: np.ndarray, values: np.ndarray, kind: str | np.ndarray = "percentile"
) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper ends [...] of 95 % intervals from replicates [resamples, ...].

    Not numbers where more than a tenth of the replicates are not. `kind` (or kinds [...]) is
    "percentile" for means and fractions, "normal" around the estimate for differences of
    correlations, and for correlations "fisher", normal on the scale of artanh: in a resample some
    queries stand twice, so its means over queries are noisier and correlate less (by up to 0.15
    here), and percentiles would lie too low.
    """
    kinds = np.broadcast_to(kind, np.shape(estimate))
    with warnings.catch_warnings():
        # undefined in every resample
        warnings.filterwarnings("ignore", "All-NaN slice|Degrees of freedom|Mean of empty")
        found = np.nanpercentile(values, [2.5, 97.5], axis=0)
        for name, forth, back in (("fisher", _artanh, np.tanh), ("normal", np.array, np.array)):
            half = norm.ppf(0.975) * np.nanstd(forth(values), axis=0, ddof=1)
            both = back(forth(estimate) + np.multiply.outer([-1, 1], half))
            # a correlation of one comes back a little smaller
            both = np.stack([np.minimum(both[0], estimate), np.maximum(both[1], estimate)])
            found = np.where(kinds == name, both, found)
    known = ~np.isnan(estimate) & (np.isfinite(values).mean(axis=0) >= MIN_DEFINED_SHARE)
    found = np.where(known, found, np.nan)
    return found[0], found[1]


def _artanh(rho: np.ndarray) -> np.ndarray:
    """Return Fisher's transformation, finite where rho is one."""
    return np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))


def with_intervals(
    rows: Sequence[Mapping] | pd.DataFrame,
    measure: Measure,
    shape: tuple[int, int],
    rng: np.random.Generator,
    resamples: int = 1000,
    kind: str | np.ndarray = "percentile",
) -> pd.DataFrame:
    """Return rows with estimate, low and high of a measure that has one value for each of them."""
    numbers = map(np.ravel, bootstrap_ci(measure, shape, rng, resamples, kind))
    return pd.DataFrame(rows).assign(**dict(zip(("estimate", "low", "high"), numbers, strict=True)))
