"""Linear datamodelling score: how well scores predict what training on a *subset* does.

A counterfactual check (Park et al. 2023): models are trained on S random subsets of the pool.
Scores tau [N, M] predict that a query j does better after subset s, the larger the sum of its
members' scores; with y_sj what query j really has after training on it,

    LDS_j = Spearman over s of ( sum_{i in s} tau_ij ,  y_sj )

averaged over all queries that have scores: no selection is involved, so none has to be held out.
Training is noisy: with several seeds a subset, y_sj is their mean, and how far its own seeds agree
bounds what any score can reach.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from icprobe import statistics
from icprobe.finetuning.training_runs import RunResult

MEASURE = "nats_per_token"

# of LDS: does probing say more than plain similarity, and gradients more than probing?
DIFFERENCES = (
    ("gain", "words (TF-IDF)"),
    ("gain", "hidden states"),
    ("product", "gain"),
    ("cosine", "gain"),
)


def subsets(N: int, S: int, fraction: float, seed: int = 0) -> list[tuple[int, ...]]:
    """Return S random subsets of a pool of N as row numbers, each with a fraction of it.

    The first ones stay the same when S grows. A fraction that leaves nobody in, or nobody out, is a
    ValueError.
    """
    size = round(fraction * N)
    if not 0 < size < N:
        raise ValueError(
            f"subset_share is {fraction!r}, expected a fraction that takes some of {N} examples "
            "and leaves some"
        )
    drawn = [np.random.default_rng([seed, s]).permutation(N)[:size] for s in range(S)]
    return [tuple(sorted(rows.tolist())) for rows in drawn]


def measured(results: Mapping[str, Sequence[RunResult]]) -> np.ndarray:
    """Return queries' nats per token after each training, by subset and seed: [S, seeds, M]."""
    return np.array([[run.measures[MEASURE] for run in runs] for runs in results.values()])


def scores(
    methods: Mapping[str, np.ndarray],
    subsets: Sequence[tuple[int, ...]],
    measured: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Return each method's LDS with 95 % intervals over subsets and queries.

    Methods are scores [N, M] by name, positive = helps; measured is [S, seeds, M] of S subsets.

    One row a method: method, estimate, low, high, subsets, seeds, queries (those for which the
    method's predictions differ at all; the others are left out of its average). And a row for each
    of `DIFFERENCES`, "<one> less <other>", of the same resamples.
    """
    S, seeds, M = measured.shape
    sums = [
        np.stack([tau[list(rows)].sum(axis=0, dtype=np.float64) for rows in subsets])
        for tau in methods.values()
    ]
    measure = statistics.agreements(sums, [measured.mean(1)], "query")
    names = list(methods)
    pairs = [pair for pair in DIFFERENCES if set(pair) <= set(names)]
    found = statistics.with_differences(lambda *drawn: measure(*drawn)[0, :, 0], names, pairs)
    kind = np.repeat(["fisher", "normal"], [len(names), len(pairs)])
    rows = [{"method": name} for name in names]
    rows += [{"method": f"{first} less {second}"} for first, second in pairs]
    differing = {
        name: int((np.ptp(total, axis=0) > 0).sum())
        for name, total in zip(names, sums, strict=True)
    }
    queries = [*differing.values(), *(min(differing[a], differing[b]) for a, b in pairs)]
    table = statistics.with_intervals(rows, found, (S, M), rng, resamples, kind)
    return table.assign(subsets=S, seeds=seeds, queries=queries)


def ceiling(measured: np.ndarray) -> float:
    """Return about the highest LDS that noise-free predictions of [S, seeds, M] could have.

    The average over queries of the root of the reliability of their seeds' mean: the mean Spearman
    correlation over subsets of two single seeds, stepped up to all of them (Spearman and Brown),
    zero where it is negative. Not a number with one seed.
    """
    seeds = measured.shape[1]
    if seeds < 2:
        return float("nan")
    ranks = rankdata(measured, axis=0)
    ranks -= ranks.mean(axis=0)
    with np.errstate(invalid="ignore"):
        ranks /= np.sqrt((ranks**2).sum(axis=0))
    rho = np.einsum("sam,sbm->abm", ranks, ranks)
    single = np.maximum(rho[np.triu_indices(seeds, 1)].mean(axis=0), 0)
    reliability = seeds * single / (1 + (seeds - 1) * single)
    return float(np.nanmean(np.sqrt(reliability)))


def findings(table: pd.DataFrame) -> pd.DataFrame:
    """Return LDS (see `scores`) as findings: quantity, unit, estimate, low, high, n = subsets."""
    named = table.assign(quantity="LDS of " + table["method"], unit="Spearman", n=table["subsets"])
    columns = ["quantity", "unit", "estimate", "low", "high", "n", "seeds", "queries", "ceiling"]
    return named[columns]
