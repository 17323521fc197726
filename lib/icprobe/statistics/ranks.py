"""Ranks and rank correlations of many variables at once, within groups of observations."""

import numpy as np

# observations below which a rank correlation says nothing
MIN_OBSERVATIONS = 4


def rank_correlations(values: np.ndarray, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return Spearman's rho between K variables in each group: [G, m, K, K].

    Arguments are those of `standard_ranks`. Not a number for a variable that does not vary, or
    with fewer than `MIN_OBSERVATIONS` observations.
    """
    ranks = standard_ranks(values, groups, count)
    if groups is None:
        return (ranks @ ranks.transpose(0, 2, 1))[None]
    masks = np.equal.outer(np.arange(count), groups.T)[:, :, None]
    of_groups = (np.where(mask, ranks, 0) for mask in masks)
    rho = np.stack([mine @ mine.transpose(0, 2, 1) for mine in of_groups])
    # of none, the sum would be zero
    rho[group_sizes(values, groups, count) < MIN_OBSERVATIONS] = np.nan
    return rho


def group_sizes(values: np.ndarray, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return how many observations each group has: [G, m], of `standard_ranks`'s arguments."""
    if groups is None:
        return np.full((1, values.shape[2]), values.shape[1])
    return np.equal.outer(np.arange(count), groups).sum(1)


def standard_ranks(values: np.ndarray, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return ranks within their group, centred and scaled to unit length there: [m, K, n].

    So the sum over a group of the products of two variables is their rank correlation.

    Args:
        values: [K, n, m], n observations of K variables in each of m columns.
        groups: [n, m] from 0 to count - 1, or negative; None for one group of all.
        count: G.

    Returns:
        Zero in negative groups; not a number in groups of fewer than `MIN_OBSERVATIONS`, or
        without variance.
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
            scale = np.where((scale > 0) & (size >= MIN_OBSERVATIONS), scale, np.nan)
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


def partial(rho: np.ndarray, k: int, sizes: np.ndarray) -> np.ndarray:
    """Return the correlations [..., k, k] of the first k of K variables, given the others.

    `sizes` [...] are the numbers of observations; not a number where the covariates leave fewer
    than `MIN_OBSERVATIONS` of them.
    """
    varying = np.isfinite(np.einsum("...aa->...a", rho)[..., k:]).sum(-1)
    # a covariate that does not vary explains nothing; a variable that does not vary stays unknown
    known = np.where(np.isnan(rho), 0, rho)
    cross, among = known[..., :k, k:], known[..., k:, k:]
    explained = cross @ np.linalg.pinv(among, hermitian=True) @ np.swapaxes(cross, -2, -1)
    left = rho[..., :k, :k] - explained
    spread = np.einsum("...aa->...a", left)
    enough = (sizes - varying >= MIN_OBSERVATIONS)[..., None]
    scale = np.sqrt(np.where((spread > 1e-12) & enough, spread, np.nan))
    return left / (scale[..., :, None] * scale[..., None, :])
