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
from icprobe.finetuning.training_runs import RunResult, TrainingRun

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

    The first ones stay the same when S grows.

    Raises:
        ValueError: If there are too few subsets to rank, or the fraction is not between 0 and 1, or
            leaves nobody in or nobody out.
    """
    if type(S) is not int or S < statistics.MIN_OBSERVATIONS:
        raise ValueError(
            f"subsets is {S!r}, expected 0 for none, or at least "
            f"{statistics.MIN_OBSERVATIONS}: a rank correlation over fewer says nothing"
        )
    if not 0 < fraction < 1 or not 0 < round(fraction * N) < N:
        raise ValueError(
            f"subset_share is {fraction!r}, expected a fraction between 0 and 1 that takes some of "
            f"{N} examples and leaves some"
        )
    size = round(fraction * N)
    drawn = [np.random.default_rng([seed, s]).permutation(N)[:size] for s in range(S)]
    return [tuple(sorted(rows.tolist())) for rows in drawn]


def training_runs(subsets: Sequence[tuple[int, ...]], seeds: int) -> list[TrainingRun]:
    """Return the trainings on each subset with each seed, subset by subset.

    Raises:
        ValueError: If there are no seeds.
    """
    if type(seeds) is not int or seeds < 1:
        raise ValueError(f"subset_seeds is {seeds!r}, expected a whole number from 1")
    return [
        TrainingRun(f"subset {s}", rows, seed)
        for s, rows in enumerate(subsets)
        for seed in range(seeds)
    ]


def measured(results: Sequence[RunResult], S: int) -> np.ndarray:
    """Return queries' nats per token after each of `training_runs`: [S, seeds, M]."""
    values = np.stack([result.measures[MEASURE] for result in results])
    return values.reshape(S, len(results) // S, -1)


def predicted(scores: np.ndarray, subsets: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the sums of scores [N, M] over each subset's members: [S, M]."""
    return np.stack([scores[list(rows)].sum(axis=0, dtype=np.float64) for rows in subsets])


def scores(
    methods: Mapping[str, np.ndarray],
    subsets: Sequence[tuple[int, ...]],
    measured: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Return each method's LDS with 95 % intervals over subsets and queries.

    Args:
        methods: By name, scores [N, M], positive = helps.
        subsets: S of them.
        measured: [S, seeds, M].
        rng: For the bootstrap.
        resamples: How many.

    Returns:
        One row a method: method, estimate, low, high, subsets, seeds, queries (those for which the
        method's predictions differ at all; the others are left out of its average). And a row for
        each of `DIFFERENCES`, "<one> less <other>", of the same resamples.
    """
    S, seeds, M = measured.shape
    sums = [predicted(tau, subsets) for tau in methods.values()]
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
    """Return about the highest LDS that noise-free predictions could have.

    The average over queries of the root of the reliability of their seeds' mean: the mean Spearman
    correlation over subsets of two single seeds, stepped up to all of them (Spearman and Brown),
    zero where it is negative. Not a number with one seed.

    Args:
        measured: [S, seeds, M].
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
