"""Examples as `datasets.Dataset`, from suites over BIG-bench, files, or hub data sets."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from icprobe.data import assets, cache, paths
from icprobe.data.base import COLUMNS, DataError, close_names, listed, make_dataset, plain_text
from icprobe.data.files import load_hub, parse_file
from icprobe.data.suites import SPLITS, parse_suite, suite_file, suite_rows, suites

if TYPE_CHECKING:
    import datasets

_ROWS_VERSION = 1  # raise it when the same suite text and seed begin to give other rows


@dataclass(frozen=True)
class Source:
    """Where examples come from, and which of them; the fields are the arguments of `load`."""

    name: str | Path
    split: str | None = None
    limit: int | None = None
    seed: int = 0
    columns: Mapping[str, str | None] | None = None

    def load(self) -> tuple[datasets.Dataset, dict]:
        """Return the rows, and their identity: the hash is of the bytes that were parsed."""
        kind = _kind(self.name)
        if kind == "hub":
            version = assets.hub_revision(str(self.name), "dataset")
            table = load_hub(*version, self.split, self.columns)
        else:
            file = self._file(kind)
            content = file.read_bytes()
            version = hashlib.sha256(content).hexdigest()
            if kind == "file":
                table = parse_file(file, content, self.columns)
            else:
                rows = suite_rows(parse_suite(self.name, content), self.split, self.seed)
                table = make_dataset(rows, str(self.name))
        limit = self.limit
        if limit is not None and not 0 < limit <= len(table):
            raise DataError(
                f"{self.name}: {limit} examples asked for, {len(table)} are there (None takes all)"
            )
        chosen = np.arange(len(table))[:limit]
        if kind != "suite":  # whose rows are in a random order already
            chosen = np.sort(np.random.default_rng(self.seed).permutation(len(table))[:limit])
        return table.select(chosen), self._identity(kind, version)

    def identity(self) -> dict:
        """Return what determines the rows, without loading or downloading them."""
        kind = _kind(self.name)
        if kind == "hub":
            return self._identity(kind, assets.hub_revision(str(self.name), "dataset"))
        return self._identity(kind, cache.sha256(self._file(kind)))

    def _identity(self, kind: str, version: str | tuple[str, str]) -> dict:
        """Return the identity of a suite or a file with this hash, or a hub's (name, revision)."""
        who = {"source": str(self.name), "version": _ROWS_VERSION, "limit": self.limit}
        if kind == "suite":
            who |= {"seed": self.seed, "split": self.split, "sha256": version}
            return {**who, "archive_sha256": assets.BIGBENCH.sha256}
        who |= {"seed": None if self.limit is None else self.seed}
        who |= {"columns": dict(self.columns or {})}
        if kind == "file":
            return {**who, "source": paths.resolve(self.name).name, "sha256": version}
        name, revision = version
        return {**who, "source": name, "revision": revision, "split": self.split}

    def _file(self, kind: str) -> Path:
        if kind == "file":
            return paths.resolve(self.name)
        if self.split not in SPLITS:
            raise DataError(
                f"suite {self.name}: split should be one of {SPLITS}, got {self.split!r}"
            )
        if self.columns:
            raise DataError(f"suite {self.name}: columns are for files and hub data sets")
        return suite_file(self.name)


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
    return Source(source, split, limit, seed, columns).load()[0]


def identity(*source, **options) -> dict:
    """Return what determines the rows that `load` gives, without loading or downloading them.

    Takes what `load` takes. JSON-able: source, version, limit, seed, and the hash of the suite's
    text and of the archive, the hash of the file, or the hub revision.

    Raises:
        DataError: If there is no such source or split.
        assets.AssetError: If the hub revision is neither given nor cached, and cannot be asked.
    """
    return Source(*source, **options).identity()


def check_disjoint(
    train: datasets.Dataset,
    queries: datasets.Dataset,
    warn: bool = False,
    names: tuple[str, str] = ("training example", "query"),
) -> None:
    """Raise DataError if a query is also a training example (equal text but for white space).

    The message lists the ids, and calls the two kinds of rows by `names`. With `warn`, it is a
    warning, for data where repetitions may be meant.
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
    """Tell whether `source` names a suite; DataError if it is no file and no hub name, either."""
    return _kind(source) == "suite"


def _kind(source: str | Path) -> str:
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
