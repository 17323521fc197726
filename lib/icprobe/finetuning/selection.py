"""Choose training examples within a budget: best or worst by scores, at random, or all.

The mean over queries of scores [N, M] ranks the N examples of the pool, positive = helps. A
selection is the row numbers of the chosen ones, in the order of the pool.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
from scipy import stats

from icprobe.data import COLUMNS, paths

LENGTH_BINS = 10  # of a pool, within which a length-matched random choice is made
MIN_IN_BIN = 10  # examples: in smaller ones hardly anything is left to chance
TOP, BOTTOM, IN_TURN = "top", "bottom", "in turn"
WRITTEN = "written.json"  # the names of the files that `write` left in a folder


class Budget(NamedTuple):
    """How much may be chosen: a fraction of the pool's examples, or of its tokens."""

    fraction: float
    unit: str = "examples"


def select(
    pool: datasets.Dataset,
    scores: np.ndarray | pd.DataFrame,
    n: int | None = None,
    fraction: float | None = None,
    columns: Sequence[int] | None = None,
) -> datasets.Dataset:
    """Return the examples with the highest mean scores, best first, ready to train on with TRL.

    Rows of the pool get a column score, the mean; ties are broken at random, always alike.

    Args:
        pool: N training examples.
        scores: [N, M], positive = helps; a data frame's index has the pool's ids, in their order.
        n: How many examples; either this or fraction is given.
        fraction: What fraction of the pool.
        columns: Numbers of the queries whose mean counts; all by default.

    Raises:
        ValueError: If ids differ (names the first), or another argument is out of range.
    """
    if isinstance(scores, pd.DataFrame) and list(scores.index) != list(pool["id"]):
        pairs = itertools.zip_longest(pool["id"], scores.index)
        row, (ours, other) = next(both for both in enumerate(pairs) if len({*both[1]}) > 1)
        raise ValueError(f"row {row} of the scores is {other!r}, expected the pool's id {ours!r}")
    if (n is None) == (fraction is None):
        raise ValueError(f"n is {n!r} and fraction is {fraction!r}, expected just one of them")
    if n is not None and (type(n) is not int or not 0 < n <= len(pool)):
        raise ValueError(f"n is {n!r}, expected a whole number from 1 to {len(pool)}")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}, expected above 0, up to 1")
    budget = Budget(fraction if n is None else n / len(pool))
    mean = values(scores, len(pool), columns)
    rows = best(mean, np.ones(len(pool)), budget, np.random.default_rng(0))
    rows = rows[np.argsort(-mean[rows], kind="stable")]
    return pool.add_column("score", mean).select(rows)


def values(scores: np.ndarray, N: int, columns: Sequence[int] | None = None) -> np.ndarray:
    """Return what ranks a pool of N: the mean [N] of scores [N, M] over some queries, or all."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) != N:
        raise ValueError(f"scores have shape {scores.shape}, expected [{N}, M], a row an example")
    M = scores.shape[1]
    columns = list(range(M) if columns is None else map(int, columns))
    if not columns or min(columns) < 0 or max(columns) >= M:
        raise ValueError(f"columns are {columns}, expected some from 0 to {M - 1}")
    chosen = scores[:, columns]
    if not np.isfinite(chosen).all():
        row, column = np.argwhere(~np.isfinite(chosen))[0]
        raise ValueError(f"the score of row {row} and query {columns[column]} is not finite")
    # ties of whole numbers stay ties in a sum, and need not in a mean
    return chosen.sum(1) / len(columns)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks along the first axis: 1 = the highest, equal values share the better rank.

    What is not a number has no rank, and takes none.
    """
    known = ~np.isnan(values)
    placed = stats.rankdata(np.where(known, -values, np.inf), method="min", axis=0)
    return np.where(known, placed, np.nan)


def ranking(scores: np.ndarray) -> pd.DataFrame:
    """Return what scores [N, M] say of each training example over all queries, in N rows.

    Columns, over the queries that are numbers: score (mean), low and high (95 %, Student's t over
    queries; not a number for a single one), helped (fraction of queries with a positive score) and
    place (1 = the highest mean; equal ones share the better place).
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


def best(
    values: np.ndarray, tokens: np.ndarray, budget: Budget, rng: np.random.Generator
) -> np.ndarray:
    """Return the row numbers of the highest values [N] within a budget, ties in random order.

    Of a budget of tokens [N], examples are taken from the highest down, and one that no longer fits
    is left out: no selection is above the budget, and none far below it. If no example fits, that
    is a ValueError; a budget of examples takes at least one.
    """
    order = np.lexsort((rng.random(len(values)), -values))
    if budget.unit == "examples":
        return np.sort(order[: max(1, round(budget.fraction * len(values)))])
    room, chosen = budget.fraction * tokens.sum(), []
    for row in order:
        if tokens[row] <= room:
            chosen.append(row)
            room -= tokens[row]
    if not chosen:
        raise ValueError(
            f"budget is {budget.fraction} of the pool's tokens, {room:.0f}, and its shortest "
            f"example has {tokens.min()}"
        )
    return np.sort(chosen)


def in_turn(
    scores: np.ndarray, tokens: np.ndarray, budget: Budget, rng: np.random.Generator
) -> np.ndarray:
    """Return the row numbers that queries choose in turn, each its best example that is left.

    So every query has a say, where the mean of scores [N, M] over all of them goes to what helps
    most on average. Queries come in a new random order each time; else as `best`.
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
    earliness = np.empty(len(scores))
    earliness[chosen] = np.arange(len(scores), 0, -1)
    return best(earliness, tokens, budget, rng)


def length_matched(rows: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return random row numbers, as many of about each length [N] as a selection has.

    The pool is cut into `LENGTH_BINS` equal parts by length (fewer where they would have less than
    `MIN_IN_BIN` examples), and as many are drawn from each as the selection has there.
    """
    order = np.lexsort((rng.random(len(lengths)), lengths))
    bins = np.empty(len(lengths), dtype=int)
    parts = max(1, min(LENGTH_BINS, len(lengths) // MIN_IN_BIN))
    bins[order] = np.arange(len(lengths)) * parts // len(lengths)
    wanted = np.bincount(bins[rows], minlength=parts)
    drawn = [
        rng.choice(np.flatnonzero(bins == part), count, replace=False)
        for part, count in enumerate(wanted)
    ]
    return np.sort(np.concatenate(drawn))


def choose(
    methods: Mapping[str, np.ndarray],
    contrasted: Sequence[str],
    turns: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    lengths: np.ndarray,
    budget: Budget,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return the row numbers of all selections that are compared, by name.

    These are "full pool", "random", "<method>, top" (the best), "<method>, in turn" and, of
    contrasted methods, "<method>, bottom" (the worst) and "random, as long as <method>" (as many as
    its best, alike in lengths [N], and about as many tokens [N], of which a budget of tokens is).
    A method is what ranks the pool [N], see `values`; in turns, scores [N, M].

    The seed breaks ties and draws. Each selection has a stream of its own, so that leaving one out
    changes no other.
    """

    def rng(name: str) -> np.random.Generator:
        return np.random.default_rng([seed, *name.encode()])

    N = len(tokens)
    found = {"full pool": np.arange(N)}
    found["random"] = best(np.zeros(N), tokens, budget, rng("random"))
    for name, ranked in methods.items():
        found[f"{name}, {TOP}"] = best(ranked, tokens, budget, rng(name))
    for name, scores in turns.items():
        found[f"{name}, {IN_TURN}"] = in_turn(scores, tokens, budget, rng(f"{name} {IN_TURN}"))
    for name in contrasted:
        worst = best(-methods[name], tokens, budget, rng(f"{name} {BOTTOM}"))
        found[f"{name}, {BOTTOM}"] = worst
    for name in contrasted:
        of_length = length_matched(found[f"{name}, {TOP}"], lengths, rng(f"as long as {name}"))
        found[f"random, as long as {name}"] = of_length
    return found


def overlaps(
    selections: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Return which fraction of each selection (row) is in each other one (column)."""
    found = {
        other: {name: np.isin(rows, theirs).mean() for name, rows in selections.items()}
        for other, theirs in others.items()
    }
    return pd.DataFrame(found)


def write(
    examples: datasets.Dataset,
    selections: Mapping[str, np.ndarray],
    ranked: Mapping[str, np.ndarray],
    folder: str | Path,
) -> None:
    """Write each selection to <name>.jsonl, in the place of those that were written here earlier.

    `WRITTEN` in the folder lists them; of other files, none is removed, and one with the name of a
    selection is a FileExistsError. Lines of a method's best and worst have a score: what ranks the
    pool [N] by it.
    """
    folder = paths.resolve(folder)
    files = {
        name: f"{name.replace(',', '').replace(' ', '_').lower()}.jsonl" for name in selections
    }
    listed = folder / WRITTEN
    earlier = _earlier(listed) if listed.exists() else set()
    foreign = [file for file in files.values() if file not in earlier and (folder / file).exists()]
    if foreign:
        raise FileExistsError(
            f"{folder}: {', '.join(foreign)} would be replaced, but {WRITTEN} does not list it: "
            "move it away"
        )
    for file in earlier - set(files.values()):
        (folder / file).unlink(missing_ok=True)
    with paths.replacing(listed) as temporary:  # first, so that an interruption leaves no orphan
        temporary.write_text(json.dumps(sorted(files.values())), encoding="utf-8")
    for name, rows in selections.items():
        method, _, end = name.rpartition(", ")
        values = ranked[method] if end in (TOP, BOTTOM) else None
        write_one(examples, rows, folder / files[name], values)


def _earlier(file: Path) -> set[str]:
    """Return the names that `write` left; ValueError if they are not of its files."""
    try:
        names = json.loads(file.read_text("utf-8"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(
        re.fullmatch(r"[^/\\]+\.jsonl", f"{n}") for n in names
    ):
        raise ValueError(
            f"{file} is damaged or foreign, expected a list of .jsonl files beside it: remove it, "
            "and those of an earlier run"
        )
    return set(names)


def write_one(
    examples: datasets.Dataset,
    rows: Sequence[int],
    file: str | Path,
    values: np.ndarray | None = None,
) -> Path:
    """Write a selection as JSON lines that TRL trains on as they are; return the file.

    With values [N], lines have them as a score, and the best come first.
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
