"""How far the two scores agree that the paper's authors published.

The ICP score [N] is a fraction of M queries, whose single answers are not known; the influence is a
matrix [N, M]. Both are positive where the training example helps.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, rankdata, spearmanr

from icprobe.statistics.bootstrap import bootstrap_ci, bootstrap_replicates, confidence_interval
from icprobe.statistics.inference import reliability
from icprobe.statistics.measures import in_common

# where the paper cuts the pool by ICP: the end, and the score beyond which an example belongs to it
CUTS = [("top", 0.8), ("top", 0.85), ("top", 0.9), ("bottom", 0.5)]
# units of overlaps in findings
IN_COMMON, REPEATED = "share of both sets", "share of both sets, simulated"
BOTH = "ICP score against mean influence"


def findings(
    icp: np.ndarray,
    influence: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
    splits: int = 50,
) -> pd.DataFrame:
    """Return how far the two scores agree: quantity, unit, estimate, low, high, n.

    Intervals resample training examples, and queries for the influences. The ICP score is published
    as a fraction only, so its queries cannot be resampled with them. Agreement "these queries"
    resamples examples alone, agreement by query resamples queries alone. Overlaps have n = k, and
    by chance would be k / N; those of `repeated_overlaps` have the unit `REPEATED`.
    """
    N, M = influence.shape
    reliable, sizes = reliability(influence, rng, splits), cut_sizes(icp)
    mean_influence = influence.mean(axis=1, dtype=float)
    exact = influence.astype(float)  # once, for products with weights

    def measure(rows: np.ndarray, columns: np.ndarray) -> list[float]:
        mean = exact @ (np.bincount(columns, minlength=M) / M)
        found = agreement(icp[rows], mean[rows], M, sizes, reliable)
        return [*found.values(), spearmanr(icp[rows], mean_influence[rows]).statistic]

    whole = agreement(icp, mean_influence, M, sizes, reliable)
    whole[f"{BOTH}, these queries", "Spearman"] = whole[BOTH, "Spearman"]
    kinds = np.array(["fisher" if name == BOTH else "percentile" for name, _ in whole])
    replicates = bootstrap_replicates(measure, (N, M), rng, resamples)
    ends = confidence_interval([*whole.values()], replicates, kinds)
    table = [
        (*name, estimate, low, high, sizes.get(name[0], (None, N))[1])
        for (name, estimate), low, high in zip(whole.items(), *ends, strict=True)
    ]
    table.insert(1, table.pop())
    for name, values in repeated_overlaps(icp, M, rng).items():
        table.append((name, REPEATED, values.mean(), *_percentiles(values), sizes[name][1]))
    rho = by_query(icp, influence)
    for name, unit, statistic in (
        ("ICP score against influence on one query, median", "Spearman", np.median),
        ("queries on whose influence it agrees negatively", "share", lambda x: (x < 0).mean()),
    ):
        found = bootstrap_ci(lambda _, j, of=statistic: of(rho[j]), (1, M), rng)
        table.append((name, unit, *map(float, found), M))
    name = ("reliability of the mean influence, split-half", "Spearman")
    table.append((*name, reliable, *reliability_interval(influence, rng), N))
    return pd.DataFrame(table, columns=["quantity", "unit", "estimate", "low", "high", "n"])


def _percentiles(values: np.ndarray) -> np.ndarray:
    return np.percentile(values, [2.5, 97.5])


def agreement(
    icp: np.ndarray,
    influence: np.ndarray,
    M: int,
    sizes: Mapping[str, tuple[str, int]],
    reliable: float,
) -> dict[tuple[str, str], float]:
    """Return the agreement of both scores in one sample, by (quantity, unit).

    `influence` [N] is the mean over M queries, `reliable` its reliability, `sizes` are `cut_sizes`.
    """
    ranks = rankdata(icp), rankdata(influence)
    pearson, spearman = (float(np.corrcoef(*both)[0, 1]) for both in ((icp, influence), ranks))
    kr21 = share_reliability(icp, M)
    ceiling = (max(kr21, 0) * reliable) ** 0.5
    over = f"{BOTH} over the ceiling, at most"
    return {
        (BOTH, "Spearman"): spearman,
        (BOTH, "Kendall"): float(kendalltau(icp, influence).statistic),
        (BOTH, "Pearson"): pearson,
        **{
            (name, IN_COMMON): in_common(icp, influence, k, end) for name, (end, k) in sizes.items()
        },
        ("reliability of the ICP score, at least (KR-21)", "Pearson"): kr21,
        ("noise ceiling, at least", "correlation"): ceiling,
        (over, "Spearman"): spearman / ceiling if ceiling else np.nan,
        (over, "Pearson"): pearson / ceiling if ceiling else np.nan,
    }


def cut_sizes(icp: np.ndarray) -> dict[str, tuple[str, int]]:
    """Return by name the end ("top" or "bottom") and size k of the sets that the paper cuts off."""
    sizes = {}
    for end, cut in CUTS:
        k = int((icp > cut).sum() if end == "top" else (icp <= cut).sum())
        sign = ">" if end == "top" else "<="
        if k:
            sizes[f"in common, ICP score {sign} {cut:g}"] = (end, k)
    return sizes


def overlap_curve(
    icp: np.ndarray, mean_influence: np.ndarray, end: str, points: int = 60
) -> pd.Series:
    """Return the fraction in common of the k best (or worst) by each score, for k from 100 to N."""
    N = len(icp)
    sizes = np.unique(np.geomspace(min(100, N), N, points).astype(int)).tolist()
    return pd.Series({k: in_common(icp, mean_influence, k, end) for k in sizes})


def by_query(icp: np.ndarray, influence: np.ndarray) -> np.ndarray:
    """Return Spearman's rho [M] between the ICP score [N] and the influence on each query [N]."""
    ranks = rankdata(icp)
    return np.array([np.corrcoef(ranks, rankdata(one))[0, 1] for one in influence.T])


def share_reliability(share: np.ndarray, M: int) -> float:
    """Return a lower bound of the reliability of fractions [N] of M queries, from these alone.

    Kuder and Richardson's formula 21 (1937): M / (M - 1) (1 - m (M - m) / (M s^2)), with m and s^2
    the mean and variance of the number of queries helped. It takes what queries of equal hardness
    would scatter by chance, the binomial variance, for noise. Where some queries are harder than
    others, they scatter less, so the reliability (formula 20) is higher.
    """
    helped = share * M
    mean, variance = helped.mean(), helped.var()
    if not variance:
        return np.nan
    return float(M / (M - 1) * (1 - mean * (M - mean) / (M * variance)))


def repeated_overlaps(
    icp: np.ndarray, M: int, rng: np.random.Generator, repeats: int = 100
) -> dict[str, np.ndarray]:
    """Return how far ICP's sets would agree with those of ICP on M other queries, simulated.

    Each example helps each query with its own probability, as in `share_reliability`: the
    fractions, drawn together around their mean until the simulated ones vary as the published ones
    do. Returns overlaps [repeats] by the names of `cut_sizes`.
    """
    reliable = max(share_reliability(icp, M), 0)
    chances = np.clip(icp.mean() + reliable**0.5 * (icp - icp.mean()), 0, 1)
    sizes = cut_sizes(icp)
    found = {name: np.zeros(repeats) for name in sizes}
    for repeat in range(repeats):
        twice = [rng.binomial(M, chances) for _ in range(2)]
        for name, (end, k) in sizes.items():
            found[name][repeat] = in_common(*twice, k, end)
    return found


def reliability_interval(
    scores: np.ndarray, rng: np.random.Generator, resamples: int = 100, most: int = 5000
) -> np.ndarray:
    """Return a 95 % interval of the reliability of row means [N] over M queries.

    Half of the queries are drawn without replacement (else one query could be in both halves),
    which varies as much as all queries would if they were drawn anew, and their reliability is
    stepped up to M. At most `most` examples are ranked.
    """
    N, M = scores.shape
    values = []
    for _ in range(resamples):
        rows = rng.choice(N, min(N, most), replace=False)
        half = scores[np.ix_(rows, rng.permutation(M)[: M // 2])]
        r = reliability(half, rng, splits=10)
        values.append(2 * r / (1 + r))
    return _percentiles(values)
