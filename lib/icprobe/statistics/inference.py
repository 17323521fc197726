"""Reliabilities, noise ceilings and permutation p-values of rankings."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from scipy.stats import permutation_test, rankdata

from icprobe.statistics.bootstrap import confidence_interval
from icprobe.statistics.measures import average_over_sets, group_count, groups_of_sets, membership
from icprobe.statistics.ranks import MIN_OBSERVATIONS, rank_correlations, standard_ranks


@dataclass(frozen=True)
class Ceiling:
    """How far two methods' rankings can and do agree, given the noise of so few queries.

    Attributes:
        first: [G] reliability of the first method's mean over queries, see `reliability`.
        second: [G] of the second's.
        ceiling: [G] sqrt(first * second), the most that the two could agree if their errors were
            independent (on the same queries they may agree more or less); not a number where one
            of them is not positive.
        disattenuated: [G] agreement that two rankings free of noise would have; the same.
    """

    first: np.ndarray
    second: np.ndarray
    ceiling: np.ndarray
    disattenuated: np.ndarray


def noise_ceiling(
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    level: str | np.ndarray = "example",
    groups: np.ndarray | None = None,
    splits: int = 100,
    rows: np.ndarray | None = None,
) -> Ceiling:
    """Return reliabilities, the noise ceiling and the disattenuated agreement of row means.

    The queries are halved at random (within each set of the level), and four rankings correlated:
    either method's on either half, averaged over halvings. One method with itself gives its
    reliability, stepped up from half to all M queries of a set by Spearman and Brown's
    k r / (1 + (k - 1) r), k = M / (M // 2). The two methods on different halves share no query, so
    nothing that a query does to both counts as agreement, and over the root of the two
    self-agreements this is the disattenuated correlation (Spearman 1904). It is an estimate and
    may exceed one. Sets are averaged by their size.

    Args:
        first: [N, M].
        second: [N, M].
        rng: Draws the halves.
        level: "example", or labels [M] of sets of at least two queries.
        groups: See `agreements`.
        splits: Number of random halvings.
        rows: Row numbers [n] of a resample of the training examples; all by default. Queries cannot
            be resampled here: one drawn twice could be in both halves.

    Raises:
        ValueError: If a set has fewer than two queries.
    """
    sets = membership(level, first.shape[1])
    if (sets.sum(0) < 2).any():
        raise ValueError("reliability over queries needs at least two queries")
    rows = np.arange(len(first)) if rows is None else rows
    labels = None if groups is None else groups_of_sets(groups, sets)[rows]
    count = group_count(groups)
    matrices = np.stack([first, second])[:, rows].astype(float)
    rho = []
    for _ in range(splits):
        halves = _halves(sets, rng)
        values = np.concatenate([matrices @ half for half in halves])
        rho.append(rank_correlations(values, labels, count))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        mean = np.nanmean(rho, axis=0)  # [G, C, 4, 4]
    sizes = sets.sum(0)
    own = mean[:, :, [0, 1], [2, 3]]  # a method with itself
    k = (sizes / (sizes // 2))[:, None]
    with np.errstate(divide="ignore"):
        stepped_up = average_over_sets(k * own / (1 + (k - 1) * own), sizes)
    own = average_over_sets(own, sizes)
    across = average_over_sets((mean[:, :, 0, 3] + mean[:, :, 1, 2]) / 2, sizes)
    # no ceiling can be told from rankings that do not repeat at all
    repeats = (own > 0) & (stepped_up > 0)
    root = np.sqrt(np.where(repeats, own, np.nan).prod(1))
    ceiling = np.sqrt(np.where(repeats, stepped_up, np.nan).prod(1))
    return Ceiling(*stepped_up.T, ceiling, across / root)


def _halves(sets: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Halve each set of queries at random (one of an odd number stays out): two [M, C]."""
    halves = np.zeros((2, *sets.shape))
    for column, members in enumerate(sets.T):
        drawn = rng.permutation(np.flatnonzero(members))
        half = len(drawn) // 2
        halves[0, drawn[:half], column] = halves[1, drawn[half : 2 * half], column] = 1
    return halves[0], halves[1]


def with_ceiling(
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    level: str | np.ndarray = "example",
    groups: np.ndarray | None = None,
    resamples: int = 100,
) -> dict[str, np.ndarray]:
    """Return the fields of `Ceiling` [G], and their intervals over training examples.

    The ends of an interval have the field's name with _low and _high. Not numbers for one query.
    """
    N, M = first.shape
    if M < 2 and isinstance(level, str):  # one query has no halves
        unknown = np.full(1, np.nan)
        return {f.name + end: unknown for f in fields(Ceiling) for end in ("", "_low", "_high")}
    where = {"level": level, "groups": groups}
    found = vars(noise_ceiling(first, second, rng, **where))
    replicates = []
    for _ in range(resamples):  # fewer halvings will do: what they add to the spread is little
        rows = rng.integers(N, size=N)
        ceiling = noise_ceiling(first, second, rng, splits=10, rows=rows, **where)
        replicates.append(vars(ceiling))
    for name in tuple(found):
        both = confidence_interval(found[name], np.array([one[name] for one in replicates]))
        found |= dict(zip((f"{name}_low", f"{name}_high"), both, strict=True))
    return found


def reliability(scores: np.ndarray, rng: np.random.Generator, splits: int = 200) -> float:
    """Return how well row means [N] over so many queries would agree with those of new queries.

    Split-half: the queries are halved at random, the halves' row means correlated (Spearman), and
    the average over splits stepped up to all queries; see `noise_ceiling`, also for errors.
    """
    return float(noise_ceiling(scores, scores, rng, splits=splits).first[0])


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
    level: str | np.ndarray = "query",
    groups: np.ndarray | None = None,
    permutations: int = 4999,
) -> np.ndarray:
    """Return two-sided permutation p-values [G] of the agreement in each group.

    The null hypothesis is that the methods agree on an example's task at most: training examples
    exchange their rows of the first matrix within their task. What tasks alone make of the
    statistic, its mean under these exchanges, is where both sides are counted from.

    Args:
        first: [N, M].
        second: [N, M].
        tasks: [N] labels; rows with the same label exchange, and must be in the same groups.
        rng: Draws the permutations.
        level: See `agreements`.
        groups: See `agreements`.
        permutations: Number of permutations.

    Raises:
        ValueError: If rows with the same label are not in the same groups.
    """
    codes = np.unique(tasks, return_inverse=True)[1]
    if groups is not None:
        alike = groups[np.unique(codes, return_index=True)[1]][codes]
        if not np.array_equal(alike, groups):
            raise ValueError("rows that are exchanged must be in the same groups")
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
    first: np.ndarray, second: np.ndarray, level: str | np.ndarray, groups: np.ndarray | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of an order [N] of the first matrix's rows: the agreements [G].

    The order must keep rows in their groups: then ranks in a group stay the same, and are exchanged
    like the rows.
    """
    sets = membership(level, first.shape[1])
    weights = sets.sum(0)
    count = group_count(groups)
    labels = None if groups is None else groups_of_sets(groups, sets)
    values = np.stack([first, second]).astype(float) @ sets
    ours, theirs = standard_ranks(values, labels, count).transpose(1, 0, 2)  # [C, N] each
    masks = np.ones((1, *ours.shape)) if groups is None else np.equal.outer(range(count), labels.T)
    undefined = (masks * np.isnan(ours * theirs)).sum(2) > 0
    known = ~undefined & (masks.sum(2) >= MIN_OBSERVATIONS)

    def statistic(order: np.ndarray) -> np.ndarray:
        products = ours[:, order] * theirs
        # undefined sets do not count below
        rho = np.einsum("gcn,cn->gc", masks, np.where(np.isnan(products), 0, products))
        return (rho * known) @ weights / (known @ weights)

    return statistic
