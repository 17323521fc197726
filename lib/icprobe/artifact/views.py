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
    """N training examples, M queries, and what methods say of each pair.

    Args:
        train: N rows with the columns id, task, prompt and completion.
        queries: M rows with the same columns.
        methods: By name, scores [N, M], positive = the training example helps the query; not a
            number where a pair was not measured.
        units: By the same names, such as "nats".
        note: What readers should know of these scores.
        marks: By a training example's id, what readers should know of it, such as "selected".

    Raises:
        ValueError: If a column, method or unit is missing, an id is there twice or unknown, or a
            matrix is not [N, M], has an infinite number or no number at all.
    """

    def __init__(
        self,
        train: datasets.Dataset | pd.DataFrame,
        queries: datasets.Dataset | pd.DataFrame,
        methods: Mapping[str, np.ndarray],
        units: Mapping[str, str],
        note: str = "",
        marks: Mapping[str, str] | None = None,
    ):
        self.train = _frame("training examples", train)
        self.queries = _frame("queries", queries)
        self.methods = {name: np.asarray(scores, float) for name, scores in methods.items()}
        self.units, self.note, self.marks = dict(units), note, dict(marks or {})
        if not self.methods:
            raise ValueError("there are no methods, expected at least one")
        if self.methods.keys() != self.units.keys():
            raise ValueError(
                f"units are of {[*self.units]}, expected one of each {[*self.methods]}"
            )
        for example in self.marks.keys() - set(self.train["id"]):
            raise ValueError(f"marks: no training example has the id {example!r}")
        shape = len(self.train), len(self.queries)
        for name, matrix in self.methods.items():
            if matrix.shape != shape:
                raise ValueError(
                    f"scores of {name!r} are {list(matrix.shape)}, expected {list(shape)}: "
                    "training examples by queries"
                )
            if np.isinf(matrix).any():
                raise ValueError(f"scores of {name!r} have an infinite number")
            if np.isnan(matrix).all():
                raise ValueError(f"{name!r} has no score of any pair")


def _frame(name: str, rows: datasets.Dataset | pd.DataFrame) -> pd.DataFrame:
    """Return rows as a table with the columns that are shown."""
    frame = rows if isinstance(rows, pd.DataFrame) else rows.to_pandas()
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise ValueError(f"{name} have no column {missing[0]!r}, expected {COLUMNS}")
    if not len(frame):
        raise ValueError(f"there are no {name}")
    twice = frame["id"][frame["id"].duplicated()]
    if len(twice):
        raise ValueError(f"two {name} have the id {twice.iloc[0]!r}")
    return frame[COLUMNS].reset_index(drop=True)


def decimals(scores: Scores, method: str) -> int:
    """Return how many decimals show a method's scores at about three digits."""
    sizes = np.abs(scores.methods[method])
    typical = np.nanpercentile(sizes, 90) or np.nanmax(sizes)
    return int(np.clip(2 - np.floor(np.log10(typical)), 0, 9)) if typical else 0


def ranking(scores: Scores, method: str, columns: Sequence[int]) -> pd.DataFrame:
    """Return what a method says of all training examples for one query, or the mean over several.

    Args:
        scores: N training examples, M queries.
        method: Its name.
        columns: Which of the queries.

    Returns:
        N rows, in the pool's order, indexed by id. score: the query's, or the mean over those of
        the queries that were measured; low and high: its 95 % interval over these queries
        (Student's t); queries: how many were measured; rank: 1 = the highest (equal scores share
        the better place); rank_low and rank_high: where it is in 95 % of resamples of the queries
        (of at least `MIN_QUERIES`; its range, no confidence interval: that would be longer). For a
        single query there are no intervals, for pairs not measured no numbers at all.
    """
    values = scores.methods[method][:, columns]
    table = selection.ranking(values).rename(columns={"place": "rank"}).drop(columns="helped")
    if scores.units[method] == "cosine":
        table[["low", "high"]] = table[["low", "high"]].clip(-1, 1)
    table["queries"] = np.isfinite(values).sum(1)
    table["rank_low"], table["rank_high"] = _rank_range(values, table["rank"].to_numpy())
    return table.set_index(pd.Index(scores.train["id"], name="id"))


def _rank_range(values: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Return the ends [2, N] of where ranks by the mean are in 95 % of resamples of the queries.

    Args:
        values: [N, m], not a number where not measured.
        rank: [N] by the mean.
    """
    # queries that this method did not measure at all are none that it could have been asked for
    values = values[:, np.isfinite(values).any(0)]
    found = np.full((2, len(values)), np.nan)
    rows, m = np.isfinite(values).any(1), values.shape[1]
    if m < MIN_QUERIES:
        return found
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(m, np.full(m, 1 / m), size=RESAMPLES).T.astype(float)  # how often each
    known = np.isfinite(values[rows])
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (np.where(known, values[rows], 0) @ drawn) / (known @ drawn)
    placed = selection.ranks(means)
    some = np.isfinite(placed).mean(1) >= statistics.MIN_DEFINED_SHARE
    ends = np.nanpercentile(placed[some], [2.5, 97.5], axis=1, method="closest_observation")
    at = np.flatnonzero(rows)[some]
    found[:, at] = np.minimum(ends[0], rank[at]), np.maximum(ends[1], rank[at])
    found[:, ~(np.isfinite(values).sum(1) > 1)] = np.nan
    return found


def agreements(scores: Scores, columns: Sequence[int]) -> pd.DataFrame:
    """Return how alike each two methods rank the training examples: Spearman, with 95 % intervals.

    Args:
        scores: N training examples, M queries.
        columns: Which of the queries; examples are ranked by the mean over them.

    Returns:
        One row for each two methods: first, second, estimate, low, high, examples and queries (what
        both methods measured; all of these examples for all of these queries). Intervals of means
        are over training examples and queries, see `statistics.bootstrap_ci`; those of a single
        query over training examples, by Fisher's transformation with the variance of Bonett and
        Wright (2000). Not a number where fewer than `statistics.MIN_OBSERVATIONS` examples are
        left, or a method gives all of them the same score.
    """
    matrices = {name: matrix[:, columns] for name, matrix in scores.methods.items()}
    done, rows = {}, []  # methods that measured the same pairs share their resamples
    for first, second in itertools.combinations(matrices, 2):
        both = np.isfinite(matrices[first]) & np.isfinite(matrices[second])
        queries = both.any(0)
        examples = both[:, queries].all(1) & both.any(1)
        key, block = (examples.tobytes(), queries.tobytes()), np.ix_(examples, queries)
        if key not in done:
            names = [name for name in matrices if np.isfinite(matrices[name][block]).all()]
            done[key] = names, _agreements(np.stack([matrices[name][block] for name in names]))
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
