"""Examples as `datasets.Dataset`, from suites over BIG-bench, files, or hub data sets."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from icprobe.data import assets, cache, paths
from icprobe.data.base import COLUMNS, DataError, close_names, listed, make_dataset, plain_text
from icprobe.data.files import load_hub, parse_file
from icprobe.data.suites import check_split, parse_suite, suite_file, suite_rows, suites

if TYPE_CHECKING:
    import datasets

_ROWS_VERSION = 1  # raise it when the same suite text and seed begin to give other rows


def load(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str | None] | None = None,
) -> datasets.Dataset:
    """Load examples.

    Args:
        source: A suite's name (data/suites/NAME.yaml), a .jsonl or .parquet file (relative paths
            start at the repository root), or a hub name `owner/name`, optionally `@revision`.
        split: "train", "query" or "evaluation" of a suite. A file, and a hub data set with a
            single split, is used whole whatever is asked for; other hub data sets need the name
            of one of their splits.
        limit: How many examples to take; all by default. Suites take turns over their tasks, so
            that every prefix is balanced; files and hub data sets are sampled without
            replacement, in the order of the source.
        seed: Which examples a limit takes, and their order in a suite. It never moves an example
            from one split of a suite to another.
        columns: For files and hub data sets, what makes each column: another column's name, or
            a template with columns in braces, such as {"completion": " {output}"}; None leaves a
            column of the source out, such as options of another form.

    Returns:
        One row per example: id, prompt, completion, task, content, type, options, and other
        columns of the source. Where a file does not say, id is "<stem>-00012" for its line (row)
        12, task is the stem, content and type are "unknown". Options are different completions,
        this example's among them, or None where the answer is free.

    Raises:
        DataError: If anything is wrong with the data; all problems are listed together.
        assets.AssetError: If something must be fetched and cannot be.
    """
    return load_with_identity(source, split, limit, seed, columns)[0]


def load_with_identity(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str | None] | None = None,
) -> tuple[datasets.Dataset, dict]:
    """Return the rows of `load` and their `identity`; the hash is of the bytes that were parsed."""
    kind = _kind(source)
    if kind == "hub":
        version = assets.hub_revision(str(source), "dataset")
        table = load_hub(*version, split, columns)
    else:
        file = _file(kind, source, split, columns)
        content = file.read_bytes()
        version = hashlib.sha256(content).hexdigest()
        if kind == "file":
            table = parse_file(file, content, columns)
        else:
            rows = suite_rows(parse_suite(source, content), split, seed)
            table = make_dataset(rows, str(source))
    if limit is not None and not 0 < limit <= len(table):
        raise DataError(
            f"{source}: {limit} examples asked for, {len(table)} are there (None takes all)"
        )
    chosen = np.arange(len(table))[:limit]
    if kind != "suite":  # whose rows are in a random order already
        chosen = np.sort(np.random.default_rng(seed).permutation(len(table))[:limit])
    return table.select(chosen), _identity(kind, version, source, split, limit, seed, columns)


def identity(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str | None] | None = None,
) -> dict:
    """Return what determines the rows that `load` gives, without loading or downloading them.

    Returns:
        JSON-able: source, version, limit, seed, and the hash of the suite's text and of the
        archive, the hash of the file, or the hub revision.

    Raises:
        DataError: If there is no such source or split.
        assets.AssetError: If the hub revision is neither given nor cached, and cannot be asked.
    """
    kind = _kind(source)
    if kind == "hub":
        version = assets.hub_revision(str(source), "dataset")
    else:
        version = cache.sha256(_file(kind, source, split, columns))
    return _identity(kind, version, source, split, limit, seed, columns)


def _identity(
    kind: str,
    version: str | tuple[str, str],
    source: str | Path,
    split: str | None,
    limit: int | None,
    seed: int,
    columns: Mapping[str, str | None] | None,
) -> dict:
    """Return the identity of a suite or a file with this hash, or of a hub (name, revision)."""
    who = {"source": str(source), "version": _ROWS_VERSION, "limit": limit, "seed": seed}
    if kind == "suite":
        archive = assets.BIGBENCH.sha256
        return {**who, "split": split, "sha256": version, "archive_sha256": archive}
    who |= {"seed": None if limit is None else seed, "columns": dict(columns or {})}
    if kind == "file":
        return {**who, "source": paths.resolve(source).name, "sha256": version}
    name, revision = version
    return {**who, "source": name, "revision": revision, "split": split}


def _file(kind: str, source: str | Path, split: str | None, columns: object) -> Path:
    """Return the file that a suite or a file is read from."""
    if kind == "file":
        return paths.resolve(source)
    check_split(source, split, columns)
    return suite_file(source)


def check_disjoint(
    train: datasets.Dataset,
    queries: datasets.Dataset,
    warn: bool = False,
    names: tuple[str, str] = ("training example", "query"),
) -> None:
    """Make sure that no query is also a training example (equal text but for white space).

    Args:
        train: Training examples.
        queries: Queries.
        warn: Warn instead of raising, for data where repetitions may be meant.
        names: What rows of the two are called in messages, where they are something else.

    Raises:
        DataError: If texts are equal; the message lists the ids.
    """
    known = {plain_text(row): row["id"] for row in train.select_columns(list(COLUMNS))}
    same = [(row["id"], known[plain_text(row)]) for row in queries if plain_text(row) in known]
    if same:
        one, other = names
        pairs = listed([f"{other} {query!r} = {one} {theirs!r}" for query, theirs in same])
        texts = "1 text is" if len(same) == 1 else f"{len(same)} texts are"
        message = f"{texts} both {other} and {one}:\n{pairs}"
        if not warn:
            raise DataError(f"{message}\nTake what is on both sides out of one of them.")
        warnings.warn(message, stacklevel=2)


def is_suite(source: str | Path) -> bool:
    """Tell whether `source` names a suite, whose splits are disjoint by construction."""
    return _kind(source) == "suite"


def _kind(source: str | Path) -> str:
    """Tell whether `source` is a "suite", a "file" or a "hub" name."""
    name, path = str(source), paths.resolve(source)
    if re.fullmatch(r"[\w-]+", name) and suite_file(name).is_file():
        return "suite"
    if path.suffix in {".jsonl", ".parquet"}:
        if path.is_file():
            return "file"
        beside = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"{name}: no such file, looked for {path}{close_names(path.name, beside)}")
    if path.exists() or Path(name).is_absolute() or name.startswith("."):
        raise DataError(f"{name}: data files end in .jsonl or .parquet")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return "hub"
    raise DataError(f"{name!r} is no suite, no file and no hub name{close_names(name, suites())}")
