"""Statistics of score matrices [N, M]: estimates with intervals."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

# takes row numbers [N] and column numbers [M], returns the statistic of that sample
Measure = Callable[[np.ndarray, np.ndarray], float]


def crossed_interval(
    measure: Measure,
    shape: tuple[int, int],
    rng: np.random.Generator,
    replicates: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return a percentile interval from resampling training examples and queries together.

    Both are samples, and a pair's score depends on both: resampling pairs would give intervals
    that are far too short.

    Args:
        measure: Takes row numbers [N] and column numbers [M], returns the statistic of that sample
            (not a number where it is undefined there; such replicates are left out).
        shape: (N, M).
        rng: The source of randomness.
        replicates: Number of resamples.
        level: Coverage.
    """
    N, M = shape
    values = [measure(rng.integers(N, size=N), rng.integers(M, size=M)) for _ in range(replicates)]
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def pair_mean(values: np.ndarray, mask: np.ndarray) -> Measure:
    """Return the measure "mean of values [N, M] over the pairs of mask [N, M]"."""
    values, mask = values * mask, mask.astype(float)

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        # how often each was drawn does for a mean, and is much faster than gathering the pairs
        row_weights, weights = (
            np.bincount(drawn, minlength=size).astype(float)
            for drawn, size in zip((rows, columns), values.shape, strict=True)
        )
        pairs = row_weights @ (mask @ weights)
        return row_weights @ (values @ weights) / pairs if pairs else np.nan

    return measure


def rank_agreement(first: np.ndarray, second: np.ndarray) -> Measure:
    """Return the measure "Spearman's rho between the row means of two matrices [N, M]"."""

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        weights = np.bincount(columns, minlength=first.shape[1]).astype(float)
        return spearmanr((first @ weights)[rows], (second @ weights)[rows]).statistic

    return measure


def pair_agreement(first: np.ndarray, second: np.ndarray) -> Measure:
    """Return the measure "Spearman's rho between two matrices [N, M], over all pairs"."""

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        pairs = np.ix_(rows, columns)
        return spearmanr(first[pairs].ravel(), second[pairs].ravel()).statistic

    return measure


def pairs_agree(
    compared: dict[str, tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> pd.DataFrame:
    """Return the rank agreement over all pairs of named pairs of matrices, with intervals."""
    measures = {
        (name, "Spearman"): (pair_agreement(*both), both[0].shape, both[0].size)
        for name, both in compared.items()
    }
    return with_intervals(measures, rng)


def with_intervals(
    measures: dict[tuple[str, str], tuple[Measure, tuple[int, int], int]], rng: np.random.Generator
) -> pd.DataFrame:
    """Return estimates with 95 % intervals over training examples and queries.

    Args:
        measures: By (quantity, unit): the measure, its matrices' shape (N, M), and how many things
            n it is over; those over none are left out.
        rng: For the bootstrap.

    Returns:
        One row each: quantity, unit, estimate, low, high, n.
    """
    rows = []
    for (quantity, unit), (measure, shape, n) in measures.items():
        if n:
            low, high = crossed_interval(measure, shape, rng)
            estimate = float(measure(*map(np.arange, shape)))
            rows.append((quantity, unit, estimate, low, high, n))
    return pd.DataFrame(rows, columns=["quantity", "unit", "estimate", "low", "high", "n"])


def findings(
    means: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
    agreements: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return means over pairs and rank agreements of row means, with intervals.

    Args:
        means: By (quantity, unit): values [N, M] and the mask [N, M] of the pairs that count.
        agreements: By (quantity, unit): two matrices [N, M].
        rng: For the bootstrap.
    """
    measures = {
        name: (pair_mean(values, mask), values.shape, int(mask.sum()))
        for name, (values, mask) in means.items()
    }
    measures |= {
        name: (rank_agreement(*both), both[0].shape, len(both[0]))
        for name, both in agreements.items()
    }
    return with_intervals(measures, rng)
