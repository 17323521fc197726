"""What is measured of score matrices [N, M], as functions of the rows and columns of a sample.

Agreement is Spearman's rank correlation over training examples. What is ranked is up to the level:

- "example": the mean over all queries, as published: one ranking of the pool;
- "query": each query's own scores, the correlation then averaged over queries, so that queries
  whose scores lie higher than others' do not make an agreement;
- labels [M] that put queries into sets, such as their tasks: each set's mean, then averaged over
  sets by their size ("example" is one set, "query" is M sets);
- "pair": all pairs in one ranking.
"""

from collections.abc import Callable, Sequence

import numpy as np

from icprobe.statistics.bootstrap import Measure
from icprobe.statistics.ranks import partial, rank_correlations

# takes row and column numbers, returns agreements [G, C, A, B] of sets of queries, and weights [C]
OfSets = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


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


def agreements(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    level: str | np.ndarray,
    groups: np.ndarray | None = None,
    given: Sequence[np.ndarray] = (),
) -> Measure:
    """Return the measure "agreement of each of A matrices with each of B, in each of G groups".

    It returns [G, A, B], not a number where there is no agreement to speak of. Ties have their mean
    rank. Each matrix is ranked once, so a table of many agreements costs little more than one.

    Args:
        first: A matrices [N, M].
        second: B matrices [N, M].
        level: See this module.
        groups: [N, M] whole numbers: pairs are ranked within their group (0 to G - 1), negative
            ones do not count. Sets of queries with fewer than `ranks.MIN_OBSERVATIONS` training
            examples in a group, or equal scores throughout, are left out of its average.
        given: Covariates [N, M]: with them, agreements are partial rank correlations.

    Raises:
        ValueError: If the level is unknown, or a set's queries are not all in the same groups.
    """
    of_sets = by_set(first, second, level, groups, given)
    return lambda rows, columns: average_over_sets(*of_sets(rows, columns))


def by_set(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    level: str | np.ndarray,
    groups: np.ndarray | None = None,
    given: Sequence[np.ndarray] = (),
    count: int | None = None,
) -> OfSets:
    """Return what `agreements` averages; `count` is G if the last groups may have no pairs."""
    matrices = np.stack([*first, *second, *given]).astype(float)
    A, K = len(first), len(first) + len(second)
    M = matrices.shape[2]
    count = count or group_count(groups)
    all_pairs = isinstance(level, str) and level == "pair"
    sets = None if all_pairs else membership(level, M)
    if groups is not None:
        groups = groups_of_sets(groups, sets)

    def found(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if sets is None:
            values = matrices[:, rows][:, :, columns].reshape(len(matrices), -1, 1)
            weights, labels = np.ones(1), None
        else:
            drawn = sets * np.bincount(columns, minlength=M)[:, None]
            weights = drawn.sum(0)
            kept = weights > 0
            weights = weights[kept]
            # sums rank as means do, and ties of whole numbers stay ties
            values = (matrices @ drawn[:, kept])[:, rows]
            labels = None if groups is None else groups[np.ix_(rows, kept)]
        rho = rank_correlations(values, labels, count)
        if given:
            n = values.shape[1] if labels is None else np.equal.outer(range(count), labels).sum(1)
            rho = partial(rho, K, n)
        return rho[..., :A, A:K], weights

    return found


def contrasts(of_sets: OfSets) -> Measure:
    """Return the measure of groups' agreements [G], then of the first minus the others [G - 1]."""

    def measure(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        rho, weights = of_sets(rows, columns)
        # a difference is an average over the sets of queries that have both agreements
        return average_over_sets(np.concatenate([rho, rho[:1] - rho[1:]]), weights)[:, 0, 0]

    return measure


def with_differences(
    measure: Measure, names: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> Measure:
    """Return the measure of values by name [K], then of each pair's first minus its second."""
    first, second = ([names.index(pair[k]) for pair in pairs] for k in (0, 1))

    def measured(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        values = measure(rows, columns)
        return np.concatenate([values, values[first] - values[second]])

    return measured


def of_row_sums(
    statistic: Callable[[np.ndarray, np.ndarray], float], first: np.ndarray, second: np.ndarray
) -> Measure:
    """Return the measure "statistic of the row sums of two matrices [N, M]"."""

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        weights = np.bincount(columns, minlength=first.shape[1]).astype(float)
        return statistic(*((matrix @ weights)[rows] for matrix in (first, second)))

    return measure


def in_common(first: np.ndarray, second: np.ndarray, k: int, end: str = "top") -> float:
    """Return the fraction in common of the k best (or with "bottom" the k worst) by scores [N].

    Where the k-th place is tied, it is the expectation over random orders of the tied.
    """
    sign = {"top": 1, "bottom": -1}[end]
    return float(_chosen(sign * first, k) @ _chosen(sign * second, k)) / k


def _chosen(values: np.ndarray, k: int) -> np.ndarray:
    """Return the probability [N] that each value is among the k highest, ties broken at random."""
    threshold = np.partition(values, -k)[-k]
    above, tied = values > threshold, values == threshold
    return above + tied * ((k - above.sum()) / tied.sum())


def membership(level: str | np.ndarray, M: int) -> np.ndarray:
    """Return which query is in which set: [M, C] of zeros and ones."""
    if isinstance(level, str):
        known = {"example": np.zeros(M), "query": np.arange(M)}
        if level not in known:
            raise ValueError(f"level is {level!r}, expected 'example', 'query', 'pair' or labels")
        level = known[level]
    labels = np.unique(level, return_inverse=True)[1]
    return np.equal.outer(labels, np.arange(labels.max() + 1)).astype(float)


def group_count(groups: np.ndarray | None) -> int:
    """Return the number of groups, at least one."""
    return 1 if groups is None else max(1, int(groups.max()) + 1)


def groups_of_sets(groups: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Return the groups [N, C] of pairs of a training example and a set of queries."""
    of_sets = groups[:, sets.argmax(0)]
    if not np.array_equal(of_sets[:, sets.argmax(1)], groups):
        raise ValueError("the queries of a set must be in the same groups for every row")
    return of_sets


def average_over_sets(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return averages over sets of queries: [G, ...] from [G, C, ...] and weights [C]."""
    known = np.isfinite(values)
    weights = weights.reshape(-1, *[1] * (values.ndim - 2))
    with np.errstate(invalid="ignore"):
        return (np.where(known, values, 0) * weights).sum(1) / (known * weights).sum(1)
