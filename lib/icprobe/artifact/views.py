"""What several methods say of the same pairs: rankings with intervals, and how far they agree.

The page of `explorer.py` shows these numbers.
"""

import itertools
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import pandas as pd
from scipy import stats

from icprobe import statistics
from icprobe.finetuning import selection
from icprobe.statistics import MIN_QUERIES

COLUMNS = ["id", "task", "prompt", "completion"]

# resamples of queries behind the intervals of ranks and agreements; enough for their ends
RESAMPLES = 400
SEED = 0  # every table is the same whenever it is made, and in whichever order


class Scores:
    """N training examples, M queries, and what methods say of pairs.

    Args:
        train: N rows with the columns id, task, prompt and completion.
        queries: M rows with the same columns.
        methods: By name, scores [N, M], positive = the training example helps the query. A method
            measured some examples with some queries, each with each; others are not a number.
        units: By the same names, such as "nats".
        marks: By a training example's id, what readers should know of it, such as "selected".
    """

    def __init__(
        self,
        train: datasets.Dataset | pd.DataFrame,
        queries: datasets.Dataset | pd.DataFrame,
        methods: Mapping[str, np.ndarray],
        units: Mapping[str, str],
        marks: Mapping[str, str] | None = None,
    ):
        self.train, self.queries = (
            pd.DataFrame({column: list(rows[column]) for column in COLUMNS})
            for rows in (train, queries)
        )
        self.methods = {name: np.asarray(scores, float) for name, scores in methods.items()}
        self.units, self.marks = units, marks or {}


def decimals(scores: Scores, method: str) -> int:
    """Return how many decimals show a method's scores at about three digits."""
    sizes = np.abs(scores.methods[method])
    sizes = sizes[np.isfinite(sizes)]
    typical = sizes.size and (np.percentile(sizes, 90) or sizes.max())
    return int(np.clip(2 - np.floor(np.log10(typical)), 0, 9)) if typical else 0


def ranking(scores: Scores, method: str, columns: Sequence[int]) -> pd.DataFrame:
    """Return what a method says of all training examples for some of the queries, by their numbers.

    Returns:
        N rows, in the pool's order, indexed by id. score: the mean over those of the queries that
        were measured; low and high: its 95 % interval over these queries (Student's t); queries:
        how many were measured; rank: 1 = the highest (equal scores share the better place);
        rank_low and rank_high: where it is in 95 % of resamples of the queries (of at least
        `MIN_QUERIES`; its range, no confidence interval: that would be longer). For a single query
        there are no intervals, for pairs not measured no numbers at all.
    """
    values = scores.methods[method][:, columns]
    table = selection.ranking(values).rename(columns={"place": "rank"}).drop(columns="helped")
    if scores.units[method] == "cosine":
        table[["low", "high"]] = table[["low", "high"]].clip(-1, 1)
    rows, asked = _measured(values)
    m, placed = asked.sum(), np.full((2, len(values)), np.nan)
    if m >= MIN_QUERIES:
        rng = np.random.default_rng(SEED)
        drawn = rng.multinomial(m, np.full(m, 1 / m), size=RESAMPLES).T.astype(float)  # how often
        ranks = selection.ranks(values[np.ix_(rows, asked)] @ drawn / m)
        ends = [2.5, 97.5]
        placed[:, rows] = np.percentile(ranks, ends, axis=1, method="closest_observation")
    table["queries"] = np.where(rows, m, 0)
    table["rank_low"] = np.minimum(placed[0], table["rank"])
    table["rank_high"] = np.maximum(placed[1], table["rank"])
    return table.set_index(pd.Index(scores.train["id"], name="id"))


def _measured(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows and columns have numbers."""
    known = np.isfinite(values)
    return known.any(1), known.any(0)


def agreements(scores: Scores, columns: Sequence[int]) -> pd.DataFrame:
    """Return how alike each two methods rank the training examples by the mean over some queries.

    Returns:
        One row for each two methods: first, second, estimate (Spearman), low, high (95 %), examples
        and queries (that both methods measured). Intervals of means are over training examples and
        queries, see `statistics.bootstrap_ci`; those of a single query over training examples, by
        Fisher's transformation with the variance of Bonett and Wright (2000). Not a number where
        fewer than `statistics.MIN_OBSERVATIONS` examples are left, or a method gives all of them
        the same score.
    """
    matrices = {name: matrix[:, columns] for name, matrix in scores.methods.items()}
    done, rows = {}, []  # methods that measured the same pairs share their resamples
    for first, second in itertools.combinations(matrices, 2):
        examples, queries = _measured(matrices[first] + matrices[second])  # NaN in either one
        key = examples.tobytes(), queries.tobytes()
        if key not in done:
            blocks = {name: matrix[np.ix_(examples, queries)] for name, matrix in matrices.items()}
            blocks = {name: block for name, block in blocks.items() if np.isfinite(block).all()}
            done[key] = list(blocks), _agreements(np.stack(list(blocks.values())))
        names, parts = done[key]
        at = names.index(first), names.index(second)
        rows.append((first, second, *(part[at] for part in parts), examples.sum(), queries.sum()))
    names = ["first", "second", "estimate", "low", "high", "examples", "queries"]
    return pd.DataFrame(rows, columns=names)


def _agreements(parts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return estimates, lower and upper ends [K, K] of the agreements of K methods [K, n, m]."""
    K, n, m = parts.shape
    if n < statistics.MIN_OBSERVATIONS or not m:
        return (np.full([K, K], np.nan),) * 3
    measure = statistics.agreements(parts, parts, level="example")
    if m > 1:
        rng = np.random.default_rng(SEED)
        return statistics.bootstrap_ci(
            lambda rows, asked: measure(rows, asked)[0], (n, m), rng, RESAMPLES, kind="fisher"
        )
    estimate = measure(np.arange(n), np.arange(m))[0]
    z = np.arctanh(np.clip(estimate, -1 + 1e-9, 1 - 1e-9))
    half = stats.norm.ppf(0.975) * np.sqrt((1 + estimate**2 / 2) / (n - 3))
    return estimate, np.tanh(z - half), np.tanh(z + half)
