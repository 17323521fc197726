"""Choose training examples within a budget: best or worst by scores, at random, or all.

The mean over queries of scores [N, M] ranks the N examples of the pool, positive = helps. A
selection is the row numbers of the chosen ones, in the order of the pool.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass
from scipy import stats

from icprobe.data import COLUMNS, paths

LENGTH_BINS = 10  # of a pool, within which a length-matched random choice is made
MIN_IN_BIN = 10  # examples: in smaller ones hardly anything is left to chance
TOP, BOTTOM, IN_TURN = "top", "bottom", "in turn"
WRITTEN = "written.json"  # the names of the files that `write` left in a folder
UNITS = ("examples", "tokens")  # of a budget


@dataclass(frozen=True, kw_only=True, config={"strict": True})
class Budget:
    """How much may be chosen: a fraction of the pool's examples, or of its tokens.

    Attributes:
        fraction: Above 0, up to 1 (the whole pool).
        unit: "examples" or "tokens" (of prompt and completion).

    Raises:
        pydantic.ValidationError: A ValueError, if a field is out of range; names it.
    """

    fraction: float = Field(gt=0, le=1)
    unit: Literal[UNITS] = "examples"

    def examples(self, N: int) -> int:
        """Return k, the number of examples of a pool of N; at least one."""
        return max(1, round(self.fraction * N))


def select(
    pool: datasets.Dataset,
    scores: np.ndarray | pd.DataFrame,
    n: int | None = None,
    fraction: float | None = None,
    columns: Sequence[int] | None = None,
) -> datasets.Dataset:
    """Return the examples with the highest mean scores, best first, ready to train on with TRL.

    Args:
        pool: N training examples.
        scores: [N, M], positive = helps; a data frame's index has the pool's ids, in their order.
        n: How many examples; either this or fraction is given.
        fraction: What fraction of the pool.
        columns: Numbers of the queries whose mean counts; all by default.

    Returns:
        Rows of the pool, with a column score, their mean; ties are broken at random, always alike.

    Raises:
        ValueError: If ids differ (names the first), n or fraction is out of range, or as `values`.
    """
    if isinstance(scores, pd.DataFrame) and list(scores.index) != list(pool["id"]):
        pairs = itertools.zip_longest(pool["id"], scores.index)
        row, (ours, other) = next(both for both in enumerate(pairs) if len({*both[1]}) > 1)
        raise ValueError(f"row {row} of the scores is {other!r}, expected the pool's id {ours!r}")
    if (n is None) == (fraction is None):
        raise ValueError(f"n is {n!r} and fraction is {fraction!r}, expected just one of them")
    if n is not None and (type(n) is not int or not 0 < n <= len(pool)):
        raise ValueError(f"n is {n!r}, expected a whole number from 1 to {len(pool)}")
    budget = Budget(fraction=fraction if n is None else n / len(pool))
    mean = values(scores, len(pool), columns)
    rows = best(mean, np.ones(len(pool)), budget, np.random.default_rng(0))
    rows = rows[np.argsort(-mean[rows], kind="stable")]
    return pool.add_column("score", mean).select(rows)


def values(scores: np.ndarray, N: int, columns: Sequence[int] | None = None) -> np.ndarray:
    """Return what ranks the pool: the mean of scores over the queries that may select, [N].

    Args:
        scores: [N, M].
        N: Size of the pool.
        columns: Which queries; all by default.

    Raises:
        ValueError: If the scores do not cover the pool or the queries, or are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) != N:
        raise ValueError(f"scores have shape {scores.shape}, expected [{N}, M], a row an example")
    columns = np.arange(scores.shape[1]) if columns is None else np.asarray(columns, dtype=int)
    if not len(columns) or columns.min() < 0 or columns.max() >= scores.shape[1]:
        raise ValueError(
            f"there are scores of {scores.shape[1]} queries, and asked for are {len(columns)} "
            f"queries up to number {max(columns, default=-1)}"
        )
    chosen = scores[:, columns]
    if not np.isfinite(chosen).all():
        row, column = np.argwhere(~np.isfinite(chosen))[0]
        raise ValueError(f"the score of row {row} and query {columns[column]} is not finite")
    # ties of whole numbers stay ties in a sum, and need not in a mean
    return chosen.sum(1) / len(columns)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks along the first axis: 1 = the highest, equal values share the better rank.

    Args:
        values: [N, ...], not a number where unknown: that has no rank, and takes none.
    """
    known = ~np.isnan(values)
    placed = stats.rankdata(np.where(known, -values, np.inf), method="min", axis=0)
    return np.where(known, placed, np.nan)


def ranking(scores: np.ndarray) -> pd.DataFrame:
    """Return what the scores say of each training example over all queries, in the pool's order.

    Args:
        scores: [N, M], positive = helps; not a number where a pair was not measured.

    Returns:
        N rows, each over the queries that were measured: score (mean), low and high (95 %,
        Student's t over queries; not a number for a single query), helped (fraction of queries with
        a positive score) and place (1 = the highest mean; equal ones share the better place).
    """
    scores = np.asarray(scores, dtype=np.float64)
    count = np.isfinite(scores).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(scores, axis=1) / count
        squares = np.nansum((scores - mean[:, None]) ** 2, axis=1)
        half = stats.t.ppf(0.975, count - 1) * np.sqrt(squares / (count - 1)) / np.sqrt(count)
        helped = (scores > 0).sum(axis=1) / count
    low, high, place = mean - half, mean + half, ranks(mean)
    return pd.DataFrame({"score": mean, "low": low, "high": high, "helped": helped, "place": place})


def named(known: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the scores of these names.

    Raises:
        ValueError: If a name is unknown; lists the known ones.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"rivals: {name!r} is unknown, there are: {', '.join(known)}")
    return {name: known[name] for name in names}


def best(
    values: np.ndarray, tokens: np.ndarray, budget: Budget, rng: np.random.Generator
) -> np.ndarray:
    """Return the row numbers of the highest values within a budget, ties in random order.

    With a budget of tokens, examples are taken from the highest down, and one that no longer fits
    is left out: no selection is above the budget, and none far below it.

    Args:
        values: [N].
        tokens: [N] length of each example.
        budget: See `Budget`.
        rng: Breaks ties.

    Raises:
        ValueError: If a budget of tokens is too small for any example, or there is none.
    """
    if not len(values):
        raise ValueError("there is no training example to choose from")
    order = np.lexsort((rng.random(len(values)), -values))
    if budget.unit == "examples":
        return np.sort(order[: budget.examples(len(values))])
    room, chosen = budget.fraction * tokens.sum(), []
    for row in order:
        if tokens[row] <= room:
            chosen.append(row)
            room -= tokens[row]
    if not chosen:
        raise ValueError(
            f"a fraction of {budget.fraction} of the pool's tokens is {room:.0f}, "
            f"its shortest example has {tokens.min()}"
        )
    return np.sort(chosen)


def in_turn(
    scores: np.ndarray, tokens: np.ndarray, budget: Budget, rng: np.random.Generator
) -> np.ndarray:
    """Return the row numbers that queries choose in turn, each its best example that is left.

    So every query has a say, where the mean over all of them goes to what helps most on average.

    Args:
        scores: [N, M] of the queries that may select.
        tokens: [N] length of each example.
        budget: See `Budget`; of tokens, an example that no longer fits is left out.
        rng: Orders the queries, and breaks ties.

    Raises:
        ValueError: As `best`.
    """
    order = [
        list(np.lexsort((rng.random(len(scores)), scores[:, j]))) for j in range(len(scores.T))
    ]
    left, chosen = set(range(len(scores))), []
    while left:
        for j in rng.permutation(len(order)):
            while order[j] and order[j][-1] not in left:
                order[j].pop()
            if order[j]:
                chosen.append(order[j].pop())
                left.remove(chosen[-1])
    # the first ones have the highest values: the budget is kept as for any ranking
    ranks = np.empty(len(scores))
    ranks[chosen] = np.arange(len(scores), 0, -1)
    return best(ranks, tokens, budget, rng)


def length_matched(rows: np.ndarray, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return random row numbers, as many of about each length as a selection has.

    The pool is cut into `LENGTH_BINS` equal parts by length (fewer where they would have less than
    `MIN_IN_BIN` examples), and as many are drawn from each as the selection has there (so from a
    part that it takes whole, the same).

    Args:
        rows: The selection.
        tokens: [N] length of each example.
        rng: Draws.
    """
    order = np.lexsort((rng.random(len(tokens)), tokens))
    bins = np.empty(len(tokens), dtype=int)
    parts = max(1, min(LENGTH_BINS, len(tokens) // MIN_IN_BIN))
    bins[order] = np.arange(len(tokens)) * parts // len(tokens)
    wanted = np.bincount(bins[rows], minlength=parts)
    drawn = [
        rng.choice(np.flatnonzero(bins == part), count, replace=False)
        for part, count in enumerate(wanted)
    ]
    return np.sort(np.concatenate(drawn))


def choose(
    methods: Mapping[str, np.ndarray],
    low: Sequence[str],
    matched: Sequence[str],
    tokens: np.ndarray,
    budget: Budget,
    seeds: int,
    turns: Mapping[str, np.ndarray] | None = None,
    lengths: np.ndarray | None = None,
) -> list[dict[str, np.ndarray]]:
    """Return all selections that are compared, by name, for each seed from 0 on.

    Args:
        methods: By name, what ranks the pool [N], see `values`: each gives a selection of its best.
        low: Methods whose worst are a selection, too.
        matched: Methods whose best a random selection is matched to in length.
        tokens: [N] length of each example.
        budget: Of all selections but the full pool; random ones of the same lengths have the same
            number of examples, and about the same tokens.
        seeds: How many. A seed breaks ties and draws; each selection has a stream of its own, so
            that leaving one out changes no other.
        turns: By name, scores [N, M] by which queries choose in turn, see `in_turn`.
        lengths: [N], in which random selections are matched, such as the number of tokens that are
            trained on; `tokens` by default.

    Returns:
        Row numbers by name: "full pool", "random", "<method>, top", "<method>, in turn", "<method>,
        bottom" and "random, as long as <method>".

    Raises:
        ValueError: If there are no seeds, or as `best`.
    """
    if type(seeds) is not int or seeds < 1:
        raise ValueError(f"seeds is {seeds!r}, expected a whole number from 1")
    lengths = tokens if lengths is None else lengths
    choice = methods, low, matched, tokens, budget, turns or {}, lengths
    return [_chosen(*choice, seed) for seed in range(seeds)]


def _chosen(methods, low, matched, tokens, budget, turns, lengths, seed) -> dict[str, np.ndarray]:
    """Return the selections of one seed; see `choose`."""

    def rng(name: str) -> np.random.Generator:
        return np.random.default_rng([seed, *name.encode()])

    def of_best(ranked: np.ndarray, name: str) -> np.ndarray:
        return best(ranked, tokens, budget, rng(name))

    N = len(tokens)
    found = {"full pool": np.arange(N), "random": of_best(np.zeros(N), "random")}
    for name, ranked in methods.items():
        found[f"{name}, {TOP}"] = of_best(ranked, name)
    for name, scores in turns.items():
        found[f"{name}, {IN_TURN}"] = in_turn(scores, tokens, budget, rng(f"{name} {IN_TURN}"))
    for name in low:
        found[f"{name}, {BOTTOM}"] = of_best(-methods[name], f"{name} {BOTTOM}")
    for name in matched:
        of_length = length_matched(found[f"{name}, {TOP}"], lengths, rng(f"as long as {name}"))
        found[f"random, as long as {name}"] = of_length
    return found


def overlaps(selections: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return which fraction of each selection (row) is in each other one (column)."""
    found = {
        other: {name: np.isin(rows, theirs).mean() for name, rows in selections.items()}
        for other, theirs in selections.items()
    }
    return pd.DataFrame(found)


def composition(selections: Mapping[str, np.ndarray], tasks: Sequence[str]) -> pd.DataFrame:
    """Return the fraction of each task (column) in each selection (row)."""
    tasks = np.asarray(tasks)
    return pd.DataFrame(
        {
            task: {name: (tasks[rows] == task).mean() for name, rows in selections.items()}
            for task in pd.unique(tasks)
        }
    )


def write(
    examples: datasets.Dataset,
    selections: Mapping[str, np.ndarray],
    ranked: Mapping[str, np.ndarray],
    folder: str | Path,
) -> None:
    """Write selections as JSON lines that TRL trains on as they are, in the place of earlier ones.

    `WRITTEN` in the folder lists them; of other files, none is removed or replaced.

    Args:
        examples: The pool, N rows.
        selections: Row numbers by name, see `choose`: of each, a file <name>.jsonl with small
            letters and underscores.
        ranked: By method, what ranks the pool [N]. Of its best and worst, lines have a score, and
            the best come first; other selections are in the order of the pool.
        folder: Where to; a relative path starts at the repository root.

    Raises:
        FileExistsError: If a file of somebody else has a selection's name.
    """
    folder = paths.resolve(folder)
    files = {
        name: f"{name.replace(',', '').replace(' ', '_').lower()}.jsonl" for name in selections
    }
    listed = folder / WRITTEN
    earlier = json.loads(listed.read_text("utf-8")) if listed.exists() else []
    foreign = [file for file in files.values() if file not in earlier and (folder / file).exists()]
    if foreign:
        raise FileExistsError(
            f"{folder}: {', '.join(foreign)} would be replaced, but {WRITTEN} does not list it: "
            "move it away"
        )
    with paths.replacing(listed) as temporary:  # first, so that an interruption leaves no orphan
        temporary.write_text(json.dumps(sorted({*earlier, *files.values()})), encoding="utf-8")
    for file in set(earlier) - set(files.values()):
        (folder / file).unlink(missing_ok=True)
    for name, rows in selections.items():
        method, _, end = name.rpartition(", ")
        values = ranked[method] if end in (TOP, BOTTOM) else None
        write_one(examples, rows, folder / files[name], values)
    with paths.replacing(listed) as temporary:
        temporary.write_text(json.dumps(sorted(files.values())), encoding="utf-8")


def write_one(
    examples: datasets.Dataset,
    rows: Sequence[int],
    file: str | Path,
    values: np.ndarray | None = None,
) -> Path:
    """Write one selection as JSON lines that TRL trains on as they are; return the file.

    Args:
        examples: The pool, N rows.
        rows: Row numbers of the selection.
        file: Where to; a relative path starts at the repository root.
        values: [N] what ranks the pool: lines then have a score, and the best come first.
    """
    file = paths.resolve(file)
    lines = []
    for row in sorted(map(int, rows), key=lambda row: 0 if values is None else -values[row]):
        line = {column: examples[row][column] for column in COLUMNS}
        line |= {} if values is None else {"score": float(values[row])}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with paths.replacing(file) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return file
