"""Ranks and rank correlations of many variables at once, within groups of observations."""

import numpy as np

# observations below which a rank correlation says nothing
MIN_OBSERVATIONS = 4


def rank_correlations(values: np.ndarray, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return Spearman's rho between K variables in each group: [G, m, K, K]."""
    ranks = standard_ranks(values, groups, count)
    return ranks @ np.swapaxes(ranks, -2, -1)


def standard_ranks(values: np.ndarray, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return ranks within each of G groups, centred and scaled to unit length: [G, m, K, n].

    So the sum of the products of two variables is their rank correlation. Ranks are zero outside of
    their group, and not numbers in groups of fewer than `MIN_OBSERVATIONS` or where the variable
    does not vary. `values` [K, n, m] are n observations of K variables in each of m columns;
    `groups` [n, m] from 0 to count - 1, or negative, or None for one group of all.
    """
    n, m = values.shape[1:]
    if groups is None:
        labels, masks = None, np.ones((1, m, 1, n))
    else:
        labels = np.ascontiguousarray(groups.T)
        masks = np.equal.outer(np.arange(count), labels)[:, :, None].astype(float)
    ranks = _ranks(np.ascontiguousarray(values.transpose(2, 0, 1)), labels)
    sizes = masks.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = (ranks - (ranks * masks).sum(-1, keepdims=True) / sizes) * masks
        length = np.sqrt((centred**2).sum(-1, keepdims=True))
        known = (length > 0) & (sizes >= MIN_OBSERVATIONS)
        return centred / np.where(known, length, np.nan)


def _ranks(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Return mean ranks along the last axis of values [m, K, n], those of a group [m, n] together.

    Ranks start anywhere: in one group they are those of the group alone, plus a constant. Most of
    a bootstrap's time is spent here; scipy's rankdata takes twice as long.
    """
    order, keys = np.argsort(values, axis=-1), [values]
    if groups is not None:
        # sorting small whole numbers is fast, and keeps the order of values within a group
        small = np.broadcast_to(groups.astype(np.int16)[:, None], values.shape)
        by_group = np.argsort(np.take_along_axis(small, order, -1), axis=-1, kind="stable")
        order = np.take_along_axis(order, by_group, -1)
        keys.append(small)
    new = np.zeros(values.shape, dtype=bool)  # where a run of equal values in one group begins
    new[..., 0] = True
    for key in keys:
        ordered = np.take_along_axis(key, order, -1)
        new[..., 1:] |= ordered[..., 1:] != ordered[..., :-1]
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


def partial(rho: np.ndarray, k: int, n: int) -> np.ndarray:
    """Return the correlations [..., k, k] of the first k of K variables, given the others.

    Each covariate that varies costs one of the n observations.
    """
    varying = np.isfinite(np.einsum("...aa->...a", rho)[..., k:]).sum(-1)
    # a covariate that does not vary explains nothing; a variable that does not vary stays unknown
    known = np.where(np.isnan(rho), 0, rho)
    cross, among = known[..., :k, k:], known[..., k:, k:]
    explained = cross @ np.linalg.pinv(among, hermitian=True) @ np.swapaxes(cross, -2, -1)
    left = rho[..., :k, :k] - explained
    spread = np.einsum("...aa->...a", left)
    enough = (n - varying >= MIN_OBSERVATIONS)[..., None]
    scale = np.sqrt(np.where((spread > 1e-12) & enough, spread, np.nan))
    return left / (scale[..., :, None] * scale[..., None, :])
