"""Intervals from resampling training examples and queries together."""

import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import norm

# share of the resamples that must have a statistic for its interval to be one
MIN_DEFINED_SHARE = 0.9

# takes row numbers [N] and column numbers [M], returns the statistic(s) of that sample
Measure = Callable[[np.ndarray, np.ndarray], float | np.ndarray]


def bootstrap_ci(
    measure: Measure,
    shape: tuple[int, int],
    rng: np.random.Generator,
    resamples: int = 1000,
    kind: str | np.ndarray = "percentile",
) -> tuple:
    """Return a 95 % interval from resampling training examples and queries together.

    Both are samples, and a pair's score depends on both: resampling pairs would give intervals
    that are far too short. This way they are rather too long, since what a pair has of its own is
    counted up to three times (Owen 2007, The pigeonhole bootstrap): an interval above zero is safe
    evidence, one that holds zero is none of absence.

    Args:
        measure: Takes row numbers [N] and column numbers [M], returns the statistic of that sample
            (not a number where it is undefined there).
        shape: (N, M).
        rng: The source of randomness.
        resamples: How many.
        kind: See `confidence_interval`.

    Returns:
        The measure of all there is, lower and upper end; or arrays of them for a measure that
        returns an array.

    Raises:
        ValueError: If there are fewer than two resamples.
    """
    estimate = measure(*map(np.arange, shape))
    replicates = bootstrap_replicates(measure, shape, rng, resamples)
    return (estimate, *confidence_interval(estimate, replicates, kind))


def bootstrap_replicates(
    measure: Measure, shape: tuple[int, int], rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """Return the measure of resamples of rows and columns: [resamples, ...].

    Arguments and errors are those of `bootstrap_ci`.
    """
    if resamples < 2:
        raise ValueError(f"there are {resamples} resamples, expected at least 2")
    N, M = shape
    draws = ((rng.integers(N, size=N), rng.integers(M, size=M)) for _ in range(resamples))
    return np.array([measure(*drawn) for drawn in draws])


def confidence_interval(
    estimate: np.ndarray, values: np.ndarray, kind: str | np.ndarray = "percentile"
) -> tuple:
    """Return lower and upper ends [...] of 95 % intervals from replicates [resamples, ...].

    Args:
        estimate: [...] of the sample itself.
        values: The same of resamples. There is no interval where more than a tenth are not
            numbers: the others would not stand for them.
        kind: "percentile" of the values, for means and shares. "fisher" for correlations: normal
            around the estimate on the scale of artanh. In a resample some queries stand twice, so
            its means over queries are noisier and correlate less (by up to 0.15 here): percentiles
            would lie too low. "normal" around the estimate for differences of correlations. Or an
            array [...] of these.
    """
    kinds = np.broadcast_to(kind, np.shape(estimate))
    unknown = set(kinds.ravel().tolist()) - {"percentile", "fisher", "normal"}
    if unknown:
        raise ValueError(f"kind is {sorted(unknown)[0]!r}, expected percentile, fisher or normal")
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
