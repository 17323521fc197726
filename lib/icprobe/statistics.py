"""Statistics of score matrices [N, M]: estimates with intervals."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import permutation_test, rankdata

# pairs of a query below which its rank correlation says nothing
LEAST = 4

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


def rank_agreement(
    first: np.ndarray, second: np.ndarray, given: Sequence[np.ndarray] = ()
) -> Measure:
    """Return the measure "Spearman's rho between the row means of two matrices [N, M]".

    Ties have their mean rank. With `given`, matrices [N, M] of covariates, it is the partial rank
    correlation: what is left of the agreement among examples alike in the covariates' means.
    """
    matrices = (first, second, *given)

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        weights = np.bincount(columns, minlength=first.shape[1]).astype(float)
        means = np.stack([(matrix @ weights)[rows] for matrix in matrices])
        return float(_correlations(means[..., None])[0])

    return measure


def query_agreement(
    first: np.ndarray,
    second: np.ndarray,
    mask: np.ndarray | None = None,
    given: Sequence[np.ndarray] = (),
) -> Measure:
    """Return the measure "Spearman's rho over the training examples, averaged over queries".

    Each query ranks its own pairs, so that queries whose scores lie higher than others' do not
    make an agreement.

    Args:
        first: [N, M].
        second: [N, M].
        mask: [N, M] bool, the pairs that count; queries with fewer than `LEAST` of them, or with
            equal scores throughout, are left out of the average.
        given: Covariates [N, M], see `rank_agreement`.
    """
    matrices = np.stack([first, second, *given]).astype(float)
    if mask is not None:
        # ranks of the pairs that count are the same whatever comes after them
        matrices[:, ~mask] = np.inf

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        drawn, counts = np.unique(columns, return_counts=True)
        pairs = np.ix_(rows, drawn)
        counted = None if mask is None else mask[pairs]
        rho = _correlations(matrices[:, *pairs], counted)
        known = np.isfinite(rho)
        return np.average(rho[known], weights=counts[known]) if known.any() else np.nan

    return measure


def pair_agreement(
    first: np.ndarray, second: np.ndarray, given: Sequence[np.ndarray] = ()
) -> Measure:
    """Return the measure "Spearman's rho between two matrices [N, M], over all pairs".

    For `given` see `rank_agreement`.
    """
    matrices = (first, second, *given)

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        pairs = np.ix_(rows, columns)
        values = np.stack([matrix[pairs].ravel() for matrix in matrices])
        return float(_correlations(values[..., None])[0])

    return measure


def overlap(first: np.ndarray, second: np.ndarray, k: int, end: str = "top") -> Measure:
    """Return the measure "share of the k best row means of one matrix that the other's have too".

    Where the k-th place is tied, the expectation over random orders of the tied is taken. Chance
    gives k / N.

    Args:
        first: [N, M].
        second: [N, M].
        k: How many of the N; in a resample, as many.
        end: "top" or "bottom".

    Raises:
        ValueError: If k is not between 1 and N, or the end is unknown.
    """
    if not 1 <= k <= len(first):
        raise ValueError(f"k is {k}, expected 1 to {len(first)}")
    if end not in ("top", "bottom"):
        raise ValueError(f"end is {end!r}, expected 'top' or 'bottom'")
    sign = 1 if end == "top" else -1

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        weights = sign * np.bincount(columns, minlength=first.shape[1]).astype(float)
        chosen = [_chosen((matrix @ weights)[rows], k) for matrix in (first, second)]
        return float(chosen[0] @ chosen[1]) / k

    return measure


def _chosen(values: np.ndarray, k: int) -> np.ndarray:
    """Return the probability [N] that each value is among the k highest, ties broken at random."""
    threshold = np.partition(values, -k)[-k]
    above, tied = values > threshold, values == threshold
    return above + tied * ((k - above.sum()) / tied.sum())


def _correlations(values: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Return rank correlations [m] of the first two of k variables, given the others.

    Args:
        values: [k, n, m], n observations of k variables in each of m columns; infinite where they
            are not counted.
        counted: [n, m] bool; all by default.

    Returns:
        [m]; not a number where a variable does not vary (given the others), or fewer than `LEAST`
        observations are counted.
    """
    ranks = rankdata(values, axis=1)
    weights = np.ones(values.shape[1:]) if counted is None else counted.astype(float)
    n = weights.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks -= (ranks * weights).sum(1, keepdims=True) / n
        covariance = np.einsum("anm,bnm,nm->mab", ranks, ranks, weights)
        scale = np.sqrt(np.einsum("maa->ma", covariance))
        correlation = covariance / (scale[:, :, None] * scale[:, None, :])
    known = (n >= LEAST) & np.isfinite(correlation).all((1, 2))
    left = correlation[known]
    if len(values) > 2:  # what a regression on the others leaves of the first two
        slopes = left[:, :2, 2:] @ np.linalg.pinv(left[:, 2:, 2:], hermitian=True)
        left = left[:, :2, :2] - slopes @ left[:, 2:, :2]
    spread = left[:, 0, 0] * left[:, 1, 1]
    rho = np.full(len(n), np.nan)
    rho[known] = np.where(
        spread > 1e-12, left[:, 0, 1] / np.sqrt(np.maximum(spread, 1e-12)), np.nan
    )
    return rho


def reliability(scores: np.ndarray, rng: np.random.Generator, splits: int = 200) -> float:
    """Return how well row means [N] over so many queries would agree with those of new queries.

    Split-half: the queries are halved at random, the halves' row means correlated (Spearman), and
    the average over splits stepped up to all queries by Spearman and Brown's 2 r / (1 + r). The
    square root of two scores' reliabilities' product is the most that they can agree, the noise
    ceiling; their agreement over it is the disattenuated correlation.

    Args:
        scores: [N, M].
        rng: Draws the halves.
        splits: Number of random halvings.

    Raises:
        ValueError: If there are fewer than two queries.
    """
    M = scores.shape[1]
    if M < 2:
        raise ValueError("reliability over queries needs at least two queries")
    halves = np.zeros((M, splits, 2))
    for split in range(splits):
        order = rng.permutation(M)
        halves[order[: M // 2], split, 0] = 1
        halves[order[M // 2 : 2 * (M // 2)], split, 1] = 1
    means = np.einsum("nm,msh->hns", scores.astype(float), halves, optimize=True)
    r = np.nanmean(_correlations(means))
    return float(2 * r / (1 + r))


def p_value(
    first: np.ndarray, second: np.ndarray, rng: np.random.Generator, resamples: int = 9999
) -> float:
    """Return the two-sided permutation p-value of Spearman's rho between row means of [N, M]."""
    x, y = (rankdata(matrix.mean(1)) for matrix in (first, second))
    y = (y - y.mean()) / len(y)

    def statistic(x: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.moveaxis(x, axis, -1) @ y  # monotone in rho

    test = permutation_test(
        (x,), statistic, permutation_type="pairings", vectorized=True, n_resamples=resamples,
        rng=rng, batch=max(1, 2**22 // len(x)),
    )  # fmt: skip
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values adjusted for their number by Holm's step-down method, in their order."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)[np.argsort(order)]


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
