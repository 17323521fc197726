"""Statistics of score matrices [N, M]: agreement of two methods, with intervals.

Agreement is Spearman's rank correlation over training examples. What is ranked is up to the level:

- "example": the mean over all queries, as published: one ranking of the pool;
- "query": each query's own scores, the correlation then averaged over queries, so that queries
  whose scores lie higher than others' do not make an agreement;
- labels [M] that put queries into sets, such as their tasks: each set's mean, then averaged over
  sets by their size ("example" is one set, "query" is M sets);
- "pair": all pairs in one ranking.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, norm, permutation_test, rankdata

# observations below which a rank correlation says nothing
LEAST = 4

# share of the resamples that must have a statistic for its interval to be one
DEFINED = 0.9

# takes row numbers [N] and column numbers [M], returns the statistic(s) of that sample
Measure = Callable[[np.ndarray, np.ndarray], float | np.ndarray]


def estimated(
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
        kind: See `ends`.

    Returns:
        The measure of all there is, lower and upper end; or arrays of them for a measure that
        returns an array.

    Raises:
        ValueError: If there are fewer than two resamples.
    """
    estimate = measure(*map(np.arange, shape))
    return (estimate, *ends(estimate, resampled(measure, shape, rng, resamples), kind))


def resampled(
    measure: Measure, shape: tuple[int, int], rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """Return the measure of resamples of rows and columns: [resamples, ...].

    Arguments and errors are those of `estimated`.
    """
    if resamples < 2:
        raise ValueError(f"there are {resamples} resamples, expected at least 2")
    N, M = shape
    draws = ((rng.integers(N, size=N), rng.integers(M, size=M)) for _ in range(resamples))
    return np.array([measure(*drawn) for drawn in draws])


def ends(estimate: np.ndarray, values: np.ndarray, kind: str | np.ndarray = "percentile") -> tuple:
    """Return lower and upper ends [...] of 95 % intervals from resampled values [resamples, ...].

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
    known = ~np.isnan(estimate) & (np.isfinite(values).mean(axis=0) >= DEFINED)
    found = np.where(known, found, np.nan)
    return found[0], found[1]


def _artanh(rho: np.ndarray) -> np.ndarray:
    """Return Fisher's transformation, finite where rho is one."""
    return np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))


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
    level: str | np.ndarray = "query",
    groups: np.ndarray | None = None,
    given: Sequence[np.ndarray] = (),
    count: int | None = None,
) -> Measure:
    """Return the measure "agreement of each of A matrices with each of B, in each of G groups".

    Ties have their mean rank. All agreements come from one ranking of each matrix, so a table of
    many costs little more than one.

    Args:
        first: A matrices [N, M].
        second: B matrices [N, M].
        level: "example", "query", "pair", or labels [M]; see this module.
        groups: [N, M] whole numbers: pairs are ranked within their group (0 to G - 1), negative
            ones do not count; all are in one group by default. Sets of queries that fill a group
            with fewer than `LEAST` training examples, or with equal scores throughout, are left
            out of its average.
        given: Covariates [N, M]: with them, agreements are partial rank correlations, what is left
            among pairs alike in the covariates. Each covariate that varies costs an observation.
        count: G, where there may be more groups than the last that has pairs.

    Returns:
        The measure; it returns [G, A, B], not a number where there is no agreement to speak of.

    Raises:
        ValueError: If the level is unknown, or a set's queries are not all in the same groups.
    """
    of_sets = by_set(first, second, level, groups, given, count)
    return lambda rows, columns: _average(*of_sets(rows, columns))


def contrasts(
    first: np.ndarray,
    second: np.ndarray,
    level: str | np.ndarray,
    groups: np.ndarray,
    count: int | None = None,
) -> Measure:
    """Return the measure of each group's agreement [G], then of the first less each other [G - 1].

    Arguments are those of `agreements`. A difference is an average over the sets of queries that
    have both agreements, so it is not always the difference of two averages.
    """
    of_sets = by_set([first], [second], level, groups, (), count)

    def measure(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        rho, weights = of_sets(rows, columns)
        return _average(np.concatenate([rho, rho[:1] - rho[1:]]), weights)[:, 0, 0]

    return measure


def by_set(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    level: str | np.ndarray,
    groups: np.ndarray | None,
    given: Sequence[np.ndarray],
    count: int | None,
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a function of row and column numbers: agreements of sets [G, C, A, B], weights [C].

    Arguments are those of `agreements`, which averages them; not numbers where there are none.
    """
    matrices = np.stack([*first, *second, *given]).astype(float)
    A, B = len(first), len(second)
    M = matrices.shape[2]
    sets = None if isinstance(level, str) and level == "pair" else _membership(level, M)
    count = count or _count(groups)
    if groups is not None and sets is not None:
        groups = _of_sets(groups, sets)

    def found(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if sets is None:
            values = matrices[:, rows][:, :, columns].reshape(len(matrices), -1, 1)
            labels = None if groups is None else groups[np.ix_(rows, columns)].reshape(-1, 1)
            weights = np.ones(1)
        else:
            drawn = sets * np.bincount(columns, minlength=M)[:, None]
            sizes = drawn.sum(0)
            kept = sizes > 0
            weights = sizes[kept]
            # sums rank as means do, and ties of whole numbers stay ties
            values = (matrices @ drawn[:, kept])[:, rows]
            labels = None if groups is None else groups[np.ix_(rows, kept)]
        rho = _rank_correlations(values, labels, count)
        if given:
            rho = _partial(rho, A + B, _sizes(values, labels, count))
        return rho[..., :A, A : A + B], weights

    return found


def rankings(
    first: np.ndarray, second: np.ndarray, level: str | np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Return how many sets of queries have an agreement to average in each group: [G].

    Arguments are those of `agreements`; both methods must tell training examples apart there.
    """
    sets = _membership(level, first.shape[1])
    values = np.stack([first, second]).astype(float) @ sets
    rho = _rank_correlations(values, _of_sets(groups, sets), _count(groups))
    return np.isfinite(rho[:, :, 0, 1]).sum(1)


def agreement(
    first: np.ndarray,
    second: np.ndarray,
    level: str | np.ndarray = "query",
    mask: np.ndarray | None = None,
    given: Sequence[np.ndarray] = (),
) -> Measure:
    """Return the measure "agreement of two matrices [N, M], over the pairs of mask [N, M]".

    See `agreements` for the other arguments.
    """
    groups = None if mask is None else np.where(mask, 0, -1)
    if mask is not None and not mask.any():
        return lambda rows, columns: np.nan
    measure = agreements([first], [second], level, groups, given)
    return lambda rows, columns: float(measure(rows, columns)[0, 0, 0])


def kendall(first: np.ndarray, second: np.ndarray) -> Measure:
    """Return the measure "Kendall's tau-b between the row means of two matrices [N, M]"."""

    def measure(rows: np.ndarray, columns: np.ndarray) -> float:
        weights = np.bincount(columns, minlength=first.shape[1]).astype(float)
        return float(
            kendalltau(*((matrix @ weights)[rows] for matrix in (first, second))).statistic
        )

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


def _membership(level: str | np.ndarray, M: int) -> np.ndarray:
    """Return which query is in which set: [M, C] of zeros and ones."""
    if isinstance(level, str):
        known = {"example": np.zeros(M), "query": np.arange(M)}
        if level not in known:
            raise ValueError(f"level is {level!r}, expected 'example', 'query', 'pair' or labels")
        level = known[level]
    labels = np.unique(level, return_inverse=True)[1]
    return np.equal.outer(labels, np.arange(labels.max() + 1)).astype(float)


def _count(groups: np.ndarray | None) -> int:
    """Return the number of groups, at least one."""
    return 1 if groups is None else max(1, int(groups.max()) + 1)


def _of_sets(groups: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Return the groups [N, C] of pairs of a training example and a set of queries."""
    of_sets = groups[:, sets.argmax(0)]
    if not np.array_equal(of_sets[:, sets.argmax(1)], groups):
        raise ValueError("the queries of a set must be in the same groups for every row")
    return of_sets


def _rank_correlations(values: np.ndarray, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return Spearman's rho between K variables in each group: [G, m, K, K].

    Arguments are those of `_standard_ranks`. Not a number for a variable that does not vary, or
    with fewer than `LEAST` observations.
    """
    ranks = _standard_ranks(values, groups, count)
    if groups is None:
        return (ranks @ ranks.transpose(0, 2, 1))[None]
    masks = np.equal.outer(np.arange(count), groups.T)[:, :, None]
    of_groups = (np.where(mask, ranks, 0) for mask in masks)
    rho = np.stack([mine @ mine.transpose(0, 2, 1) for mine in of_groups])
    rho[_sizes(values, groups, count) < LEAST] = np.nan  # of none, the sum would be zero
    return rho


def _sizes(values: np.ndarray, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return how many observations each group has: [G, m], of `_standard_ranks`'s arguments."""
    if groups is None:
        return np.full((1, values.shape[2]), values.shape[1])
    return np.equal.outer(np.arange(count), groups).sum(1)


def _standard_ranks(values: np.ndarray, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return ranks within their group, less their mean and over their length there: [m, K, n].

    So the sum over a group of the products of two variables is their rank correlation.

    Args:
        values: [K, n, m], n observations of K variables in each of m columns.
        groups: [n, m] from 0 to count - 1, or negative; None for one group of all.
        count: G.

    Returns:
        Zero in negative groups; not a number in groups of fewer than `LEAST`, or without variance.
    """
    n, m = values.shape[1:]
    labels = None if groups is None else np.ascontiguousarray(groups.T)
    ranks = _ranks(np.ascontiguousarray(values.transpose(2, 0, 1)), labels)
    standard = np.zeros(ranks.shape)
    for group in range(count):
        mask = np.ones((m, 1, n)) if labels is None else (labels == group)[:, None].astype(float)
        size = mask.sum(2, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            centred = (ranks - (ranks * mask).sum(2, keepdims=True) / size) * mask
            scale = np.sqrt((centred**2).sum(2, keepdims=True))
            scale = np.where((scale > 0) & (size >= LEAST), scale, np.nan)
            standard += np.where(mask > 0, centred / scale, 0)
    return standard


def _ranks(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Return mean ranks along the last axis of values [m, K, n], those of a group [m, n] together.

    Ranks start anywhere: in one group they are those of the group alone, plus a constant. Most of
    a bootstrap's time is spent here; scipy's rankdata, group by group, takes two to ten times it.
    """
    order = np.argsort(values, axis=-1)
    new = np.ones(values.shape, dtype=bool)  # where a run of equal values in one group begins
    if groups is None:
        ordered = np.take_along_axis(values, order, -1)
        new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    else:
        # sorting small whole numbers is fast, and keeps the order of values within a group
        small = np.broadcast_to(groups.astype(np.int16)[:, None], values.shape)
        by_group = np.argsort(np.take_along_axis(small, order, -1), axis=-1, kind="stable")
        order = np.take_along_axis(order, by_group, -1)
        ordered, of_group = (np.take_along_axis(x, order, -1) for x in (values, small))
        new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
        new[..., 1:] |= of_group[..., 1:] != of_group[..., :-1]
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    ranks = np.empty(values.shape)
    if new.all():
        np.put_along_axis(ranks, order, place, -1)
        return ranks
    # ties share the mean of the first and the last place of their run
    begin = np.maximum.accumulate(np.where(new, place, 0), axis=-1)
    last = np.ones_like(new)
    last[..., :-1] = new[..., 1:]
    end = np.where(last, place, values.shape[-1])
    end = np.minimum.accumulate(end[..., ::-1], axis=-1)[..., ::-1]
    np.put_along_axis(ranks, order, (begin + end) / 2, -1)
    return ranks


def _partial(rho: np.ndarray, k: int, sizes: np.ndarray) -> np.ndarray:
    """Return the correlations [..., k, k] of the first k of K variables, given the others.

    `sizes` [...] are the numbers of observations; not a number where the covariates leave fewer
    than `LEAST` of them.
    """
    varying = np.isfinite(np.einsum("...aa->...a", rho)[..., k:]).sum(-1)
    # a covariate that does not vary explains nothing; a variable that does not vary stays unknown
    cross, among = np.nan_to_num(rho[..., :k, k:]), np.nan_to_num(rho[..., k:, k:])
    explained = cross @ np.linalg.pinv(among, hermitian=True) @ np.swapaxes(cross, -2, -1)
    left = rho[..., :k, :k] - explained
    spread = np.einsum("...aa->...a", left)
    enough = (sizes - varying >= LEAST)[..., None]
    scale = np.sqrt(np.where((spread > 1e-12) & enough, spread, np.nan))
    return left / (scale[..., :, None] * scale[..., None, :])


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
    sets = _membership(level, first.shape[1])
    if (sets.sum(0) < 2).any():
        raise ValueError("reliability over queries needs at least two queries")
    rows = np.arange(len(first)) if rows is None else rows
    labels = None if groups is None else _of_sets(groups, sets)[rows]
    count = _count(groups)
    matrices = np.stack([first, second])[:, rows].astype(float)
    rho = []
    for _ in range(splits):
        halves = _halves(sets, rng)
        values = np.concatenate([matrices @ half for half in halves])
        rho.append(_rank_correlations(values, labels, count))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        mean = np.nanmean(rho, axis=0)  # [G, C, 4, 4]
    sizes = sets.sum(0)
    own = mean[:, :, [0, 1], [2, 3]]  # a method with itself
    k = (sizes / (sizes // 2))[:, None]
    with np.errstate(divide="ignore"):
        stepped_up = _average(k * own / (1 + (k - 1) * own), sizes)
    own = _average(own, sizes)
    across = _average((mean[:, :, 0, 3] + mean[:, :, 1, 2]) / 2, sizes)
    # no ceiling can be told from rankings that do not repeat at all
    repeats = (own > 0) & (stepped_up > 0)
    root = np.sqrt(np.where(repeats, own, np.nan).prod(1))
    ceiling = np.sqrt(np.where(repeats, stepped_up, np.nan).prod(1))
    return Ceiling(*stepped_up.T, ceiling, across / root)


def _average(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return averages over sets of queries: [G, ...] from [G, C, ...] and weights [C]."""
    known = np.isfinite(values)
    weights = weights.reshape(-1, *[1] * (values.ndim - 2))
    with np.errstate(invalid="ignore"):
        return (np.where(known, values, 0) * weights).sum(1) / (known * weights).sum(1)


def _halves(sets: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Halve each set of queries at random (one of an odd number stays out): two [M, C]."""
    halves = np.zeros((2, *sets.shape))
    for column, members in enumerate(sets.T):
        drawn = rng.permutation(np.flatnonzero(members))
        half = len(drawn) // 2
        halves[0, drawn[:half], column] = halves[1, drawn[half : 2 * half], column] = 1
    return halves[0], halves[1]


def reliability(scores: np.ndarray, rng: np.random.Generator, splits: int = 200) -> float:
    """Return how well row means [N] over so many queries would agree with those of new queries.

    Split-half: the queries are halved at random, the halves' row means correlated (Spearman), and
    the average over splits stepped up to all queries; see `noise_ceiling`.

    Args:
        scores: [N, M].
        rng: Draws the halves.
        splits: Number of random halvings.

    Raises:
        ValueError: If there are fewer than two queries.
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
    sets = _membership(level, first.shape[1])
    weights = sets.sum(0)
    count = _count(groups)
    labels = None if groups is None else _of_sets(groups, sets)
    values = np.stack([first, second]).astype(float) @ sets
    # groups are the same for all that are exchanged, so their ranks are, too
    ours, theirs = _standard_ranks(values, labels, count).transpose(1, 0, 2)  # [C, N] each
    masks = np.ones((1, *ours.shape)) if groups is None else np.equal.outer(range(count), labels.T)
    undefined = (masks * np.isnan(ours * theirs)).sum(2) > 0
    known = ~undefined & (masks.sum(2) >= LEAST)

    def statistic(order: np.ndarray) -> np.ndarray:
        rho = np.einsum("gcn,cn->gc", masks, np.nan_to_num(ours[:, order] * theirs))
        return (rho * known) @ weights / (known @ weights)

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
        (name, "Spearman"): (agreement(*both, level="pair"), both[0].shape, both[0].size)
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
            kind = "fisher" if unit == "Spearman" else "percentile"
            rows.append((quantity, unit, *map(float, estimated(measure, shape, rng, kind=kind)), n))
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
        name: (agreement(*both, level="example"), both[0].shape, len(both[0]))
        for name, both in agreements.items()
    }
    return with_intervals(measures, rng)
