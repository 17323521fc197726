"""Reliabilities, noise ceilings and permutation p-values of rankings."""

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import permutation_test, rankdata

from icprobe.statistics.bootstrap import confidence_interval
from icprobe.statistics.measures import average_over_sets, group_count, groups_of_sets, membership
from icprobe.statistics.ranks import rank_correlations, standard_ranks

# what `noise_ceiling` returns
CEILING = ("reliability", "ceiling", "disattenuated")


def noise_ceiling(
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    level: str | np.ndarray = "example",
    groups: np.ndarray | None = None,
    splits: int = 100,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Return how far two methods' rankings [N, M] could agree, given the noise of so few queries.

    The queries are halved at random (within each set of the level), and four rankings correlated:
    either method's on either half, averaged over halvings and over sets, by their size.

    - reliability: one method with itself, stepped up from half to all M queries of a set by
      Spearman and Brown's k r / (1 + (k - 1) r), k = M / (M // 2): how well the first method's mean
      over queries would agree with that over as many new ones.
    - ceiling: the root of both methods' reliabilities, the most that the two could agree if their
      errors were independent (on the same queries they may agree more or less).
    - disattenuated: the agreement of rankings free of noise. The two methods on different halves
      share no query, so nothing that a query does to both counts as agreement; this is divided by
      the root of the two self-agreements (Spearman 1904). It is an estimate and may exceed one.

    The last two are not numbers where a reliability is not positive, and none is where a set has
    fewer than two queries. `level` and `groups` are those of `measures.agreements`; `rows`
    are those of a resample of the training examples. Queries cannot be resampled: one drawn twice
    could be in both halves. Returns the numbers named by `CEILING`: [3, G].
    """
    sets, count = membership(level, first.shape[1]), group_count(groups)
    sizes = sets.sum(0)
    if sizes.min() < 2:
        return np.full((len(CEILING), count), np.nan)
    rows = np.arange(len(first)) if rows is None else rows
    labels = None if groups is None else groups_of_sets(groups, sets)[rows]
    matrices = np.stack([first, second])[:, rows].astype(float)
    rho = []
    for _ in range(splits):
        halves = _halves(sets, rng)
        values = np.concatenate([matrices @ half for half in halves])
        rho.append(rank_correlations(values, labels, count))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        mean = np.nanmean(rho, axis=0)  # [G, C, 4, 4]
    own = mean[:, :, [0, 1], [2, 3]]  # a method with itself
    k = (sizes / (sizes // 2))[:, None]
    with np.errstate(divide="ignore"):
        stepped_up = average_over_sets(k * own / (1 + (k - 1) * own), sizes)
    own = average_over_sets(own, sizes)
    across = average_over_sets((mean[:, :, 0, 3] + mean[:, :, 1, 2]) / 2, sizes)
    # no ceiling can be told from rankings that do not repeat at all
    repeats = (own > 0) & (stepped_up > 0)
    ceiling, root = (np.sqrt(np.where(repeats, x, np.nan).prod(1)) for x in (stepped_up, own))
    return np.stack([stepped_up[:, 0], ceiling, across / root])


def _halves(sets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Halve each set of queries at random (one of an odd number stays out): [2, M, C]."""
    halves = np.zeros((2, *sets.shape))
    for column, members in enumerate(sets.T):
        drawn = rng.permutation(np.flatnonzero(members))
        half = len(drawn) // 2
        halves[0, drawn[:half], column] = halves[1, drawn[half : 2 * half], column] = 1
    return halves


def with_ceiling(
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    level: str | np.ndarray = "example",
    groups: np.ndarray | None = None,
    resamples: int = 100,
) -> pd.DataFrame:
    """Return `noise_ceiling` with intervals over training examples (_low, _high), a row a group."""
    estimate = noise_ceiling(first, second, rng, level, groups)
    N = len(first)
    values = [  # fewer halvings will do: what they add to the spread is little
        noise_ceiling(first, second, rng, level, groups, splits=10, rows=rng.integers(N, size=N))
        for _ in range(resamples)
    ]
    low, high = confidence_interval(estimate, np.array(values))
    found = dict(zip(CEILING, estimate, strict=True))
    for name, *ends in zip(CEILING, low, high, strict=True):
        found |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
    return pd.DataFrame(found)


def reliability(scores: np.ndarray, rng: np.random.Generator, splits: int = 100) -> float:
    """Return how well row means [N] over so many queries would agree with those of new queries."""
    return float(noise_ceiling(scores, scores, rng, splits=splits)[0, 0])


def p_value(
    first: np.ndarray, second: np.ndarray, rng: np.random.Generator, permutations: int = 9999
) -> float:
    """Return the two-sided permutation p-value of Spearman's rho between row means of [N, M]."""
    x, y = (rankdata(matrix.mean(1)) for matrix in (first, second))
    y = (y - y.mean()) / len(y)

    def statistic(x: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.moveaxis(x, axis, -1) @ y  # monotone in rho

    test = permutation_test(
        (x,), statistic, permutation_type="pairings", vectorized=True, n_resamples=permutations,
        rng=rng, batch=max(1, 2**22 // len(x)),
    )  # fmt: skip
    return float(test.pvalue)


def p_values_within(
    first: np.ndarray,
    second: np.ndarray,
    tasks: np.ndarray,
    rng: np.random.Generator,
    level: str | np.ndarray,
    groups: np.ndarray,
    permutations: int = 4999,
) -> np.ndarray:
    """Return two-sided permutation p-values [G] of the agreement of two [N, M] in each group.

    The null hypothesis is that the methods agree on an example's task at most: training examples
    exchange their rows of the first matrix within their task. What tasks alone make of the
    statistic, its mean under these exchanges, is where both sides are counted from. Rows of the
    same one of `tasks` [N] must be in the same groups.
    """
    codes = np.unique(tasks, return_inverse=True)[1]
    statistic = _agreement_of_order(first, second, level, groups)
    start = np.argsort(codes, kind="stable")

    def exchanged() -> np.ndarray:
        order = np.empty(len(first), dtype=int)
        order[start] = np.lexsort((rng.random(len(first)), codes))
        return order

    with np.errstate(invalid="ignore"):
        observed = statistic(np.arange(len(first)))
        null = np.array([statistic(exchanged()) for _ in range(permutations)])
    centre = null.mean(0)
    # the observed order is one of the equally likely ones
    beyond = np.abs(null - centre) >= np.abs(observed - centre) - 1e-12
    return np.where(np.isnan(observed), np.nan, (1 + beyond.sum(0)) / (1 + permutations))


def _agreement_of_order(
    first: np.ndarray, second: np.ndarray, level: str | np.ndarray, groups: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of an order [N] of the first's rows, in their groups: agreements [G]."""
    sets = membership(level, first.shape[1])
    values = np.stack([first, second]).astype(float) @ sets
    ranks = standard_ranks(values, groups_of_sets(groups, sets), group_count(groups))
    known = np.isfinite(ranks).all((2, 3))  # [G, C]
    ranks = np.where(known[:, :, None, None], ranks, 0)
    # [C, N], each pair in its only group, and [G, C, N]: ranks in a group move with their rows
    ours, theirs = ranks[:, :, 0].sum(0), ranks[:, :, 1]
    weights = sets.sum(0)

    def statistic(order: np.ndarray) -> np.ndarray:
        rho = np.einsum("cn,gcn->gc", ours[:, order], theirs)
        return rho @ weights / (known @ weights)

    return statistic
