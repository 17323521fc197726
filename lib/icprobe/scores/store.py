"""Resumable store of one score matrix [N, M]: a manifest and parquet parts in a folder.

    <scores_dir>/<method>-<key>/
        manifest.json        everything that determines the scores, and the ids of rows and columns
        part-00000.parquet   train_id, query_id, score of the first `block_size` training examples
        part-00001.parquet   ... of the next

The key is a hash of the method and of all its parameters (the identity): scores made in different
ways lie in different folders, never mixed and never overwritten. A file appears under its name
only when it is whole, and then never changes, so a run may be killed at any moment and started
again, and many processes may fill one store. Nothing in a file depends on when or in which order
it was written: in one environment, an interrupted and resumed run leaves the same bytes as an
uninterrupted one.
"""

import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa

from icprobe import __version__
from icprobe.data import paths
from icprobe.data.paths import resolve, shown
from icprobe.scores import parts
from icprobe.scores.keys import StoreError, differences, key, listed, plain

FORMAT = 1
MANIFEST = "manifest.json"
OUR_FILE = re.compile(
    r"(?P<target>part-\d{5,}\.parquet|manifest\.json)(?P<tmp>\.[0-9a-f]{32}\.tmp)?"
)


class ScoresNotFound(StoreError, FileNotFoundError):  # noqa: N818 - reads like the built-in
    """No finished scores for the parameters asked for."""


@dataclass(frozen=True)
class ScoreStore:
    """The score matrix [N, M] of one method; made by `open` or `find`.

    Attributes:
        identity: Nested JSON-able dictionary of everything that determines the scores.
        block_size: Training examples in one part (the last part may have fewer).
        description: Unit and sign of a score, for readers of the manifest.
        parts_of: Name of the store that the parts were written for, where it has been renamed.
    """

    folder: Path
    method: str
    identity: dict
    train_ids: list[str]
    query_ids: list[str]
    block_size: int
    description: str = ""
    parts_of: str = ""

    def __post_init__(self):
        for ids in (self.train_ids, self.query_ids):
            if not ids or len(set(ids)) < len(ids):
                raise StoreError(f"ids are {ids[:3]}..., expected some, each once")
        if type(self.block_size) is not int or self.block_size < 1:
            raise StoreError(f"block_size is {self.block_size!r}, expected an integer from 1")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M)."""
        return len(self.train_ids), len(self.query_ids)

    @property
    def n_blocks(self) -> int:
        """The number of parts of the finished store."""
        return -(-len(self.train_ids) // self.block_size)

    def rows(self, block: int) -> range:
        """Return the row numbers of a block."""
        start = block * self.block_size
        return range(start, min(start + self.block_size, len(self.train_ids)))

    def part(self, block: int) -> Path:
        """Return the path of a block's part, whether or not it is there."""
        return self.folder / f"part-{block:05d}.parquet"

    def finished(self, block: int) -> bool:
        """Tell whether a block is done."""
        # Parts appear whole under their names, so a name is enough to know that a block is done.
        return self.part(block).exists()

    def missing(self) -> list[int]:
        """Return the unfinished blocks; one look at the folder, no part is opened."""
        there = {path.name for path in self.folder.iterdir()}
        return [block for block in range(self.n_blocks) if self.part(block).name not in there]

    @property
    def complete(self) -> bool:
        """Whether every block is done."""
        return not self.missing()

    def n_finished(self) -> int:
        """Return how many of the N rows are done."""
        return len(self.train_ids) - sum(len(self.rows(block)) for block in self.missing())

    def write(self, block: int, scores: np.ndarray) -> None:
        """Write the scores [n, M] of one block; one that is already finished is left as it is.

        Raises StoreError for a wrong shape, scores that are not finite in float32, or a disk that
        is full or read-only.
        """
        rows, M = self.rows(block), len(self.query_ids)
        with np.errstate(over="ignore"):  # beyond float32 becomes inf, refused below
            scores = np.asarray(scores, dtype=np.float32)
        if scores.shape != (len(rows), M):
            raise StoreError(
                f"{self.method}: scores of block {block} must have shape {[len(rows), M]}, not "
                f"{list(scores.shape)}"
            )
        bad = np.argwhere(~np.isfinite(scores))
        if len(bad):
            i, j = bad[0]
            raise StoreError(
                f"{self.method}: {len(bad)} scores of block {block} are not finite, such as for "
                f"training example {self.train_ids[rows[i]]!r} and query {self.query_ids[j]!r}"
            )
        publish(self.part(block), parts.encode(scores, self._place(block)))

    def matrix(self) -> np.ndarray:
        """Read all scores, float32 [N, M].

        Raises StoreError for unfinished blocks, or a part that is truncated, damaged or foreign.
        """
        if not self.complete:
            raise StoreError(f"{shown(self.folder)} is incomplete: {self.progress()}")
        return np.concatenate([self._read(block) for block in range(self.n_blocks)])

    def _read(self, block: int) -> np.ndarray:
        """Read a part; name it in whatever goes wrong, and say what to do."""
        try:
            return parts.decode(self.part(block), self._place(block))
        except (OSError, ValueError, pa.ArrowException) as error:
            # With an errno it is the system's fault (permissions, open files), not the part's.
            if getattr(error, "errno", None):
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise StoreError(
                f"{shown(self.part(block))} is damaged or foreign: {reason}. "
                "Delete this file and run again; only its rows will be computed."
            ) from error

    def check(self) -> None:
        """Read finished parts, so that damage shows before the work."""
        for block in filter(self.finished, range(self.n_blocks)):
            self._read(block)

    def tidy(self) -> None:
        """Remove temporary files that killed processes left behind, without harming live ones."""
        # A temporary whose target exists is of no use to anybody: its writer is dead, or will
        # find the target there and leave it. So nobody's clock, host or process id matters.
        names = {path.name for path in self.folder.iterdir()}
        for match in filter(None, map(OUR_FILE.fullmatch, names)):
            if match["tmp"] and match["target"] in names:
                with suppress(OSError):  # swept by somebody else, or a read-only store
                    (self.folder / match[0]).unlink()

    def clear(self) -> None:
        """Delete this store's parts, temporaries and manifest; other files stay."""
        ours = [path for path in self.folder.glob("*") if OUR_FILE.fullmatch(path.name)]
        # The manifest goes last: without it, leftover parts could be read with another block size.
        for path in sorted(ours, key=lambda path: (path.name == MANIFEST, path.name)):
            path.unlink(missing_ok=True)

    def progress(self) -> str:
        """Say how many rows are done."""
        return f"{self.n_finished()} of {len(self.train_ids)} rows are finished"

    def _place(self, block: int) -> parts.Place:
        train_ids = [self.train_ids[row] for row in self.rows(block)]
        return parts.Place(self.parts_of or self.folder.name, block, train_ids, self.query_ids)

    def _manifest(self) -> bytes:
        fields = {
            "format": FORMAT,
            "method": self.method,
            "description": self.description,
            "block_size": self.block_size,
            "identity": self.identity,
            "made_with": made_with(),
            "train_ids": self.train_ids,
            "query_ids": self.query_ids,
        }
        return (json.dumps(fields, indent=1) + "\n").encode()


def open(
    scores_dir: str | Path,
    method: str,
    identity: dict,
    train_ids: Sequence[str],
    query_ids: Sequence[str],
    block_size: int = 8,
    fresh: bool = False,
    description: str = "",
) -> ScoreStore:
    """Create a store, or return to the one these parameters have already made.

    One that exists keeps its block size. With `fresh`, its files are deleted first, so that
    everything is computed anew; not for use while another process fills the same store.

    Raises:
        StoreError: A manifest that is damaged or made for something else (the fields that differ
            are named), or a folder that cannot be written or is of the reference.
    """
    folder = resolve(scores_dir) / key(method, identity)
    if paths.is_reference(folder):
        raise StoreError(f"{shown(folder)}: reference scores are only read, take another folder")
    ids = list(train_ids), list(query_ids)
    asked = ScoreStore(folder, method, plain(identity), *ids, block_size, description)
    if fresh:
        asked.clear()
    if not (folder / MANIFEST).exists():
        publish(folder / MANIFEST, asked._manifest())
    stored = load(folder)  # even if just written: another process may have been faster
    _check_same(stored, identity=asked.identity, train_ids=ids[0], query_ids=ids[1])
    stored.tidy()
    return stored


def find(
    folders: Sequence[str | Path], method: str, identity: dict, how_to_make: str = ""
) -> ScoreStore:
    """Return the complete store of these parameters, in the first folder that has it.

    Raises:
        ScoresNotFound: There is no such store (the message names the nearest ones and the fields
            that differ, and `how_to_make` it), or it is incomplete.
        StoreError: Its manifest is damaged.
    """
    folders, name = [resolve(folder) for folder in folders], key(method, identity)
    hint = f"\nTo make them: {how_to_make}" if how_to_make else ""
    there = [load(one / name) for one in folders if (one / name / MANIFEST).exists()]
    for stored in there:
        _check_same(stored, identity=plain(identity))
        if stored.complete:
            return stored
    if there:
        where = shown(there[0].folder)
        raise ScoresNotFound(f"incomplete scores: {there[0].progress()} in {where}{hint}")
    nearest = _nearest(folders, method, identity)
    raise ScoresNotFound(f"no {method} scores at {shown(folders[0] / name)}{nearest}{hint}")


def find_all(scores_dir: str | Path, method: str) -> Iterator[ScoreStore]:
    """Yield all complete stores of a method, whatever they were made with."""
    for manifest in sorted(resolve(scores_dir).glob(f"{method}-*/{MANIFEST}")):
        kept = load(manifest.parent)
        if kept.method == method and kept.complete:
            yield kept


def load(folder: Path) -> ScoreStore:
    """Return the store in a folder; raises StoreError if its manifest is damaged."""
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("format")
        if version != FORMAT:
            raise StoreError(f"format: stored {version!r}, asked {FORMAT!r}")
        fields.pop("made_with", None)
        return ScoreStore(folder=folder, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{shown(path)} cannot be used ({error!r}): restore it, or start this store anew "
            "(fresh=True)"
        ) from error


def made_with() -> dict[str, str]:
    """Return versions of what made the scores: for readers only, never compared."""
    versions = {"python": platform.python_version(), "icprobe": __version__}
    for package in ("torch", "transformers", "pyarrow"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _check_same(stored: ScoreStore, **asked: object) -> None:
    """Raise StoreError, with the fields that differ, where a manifest was changed."""
    found = list(differences({name: getattr(stored, name) for name in asked}, asked))
    if found:
        raise StoreError(f"{shown(stored.folder / MANIFEST)} is of other scores:{listed(found)}")


def _nearest(folders: Sequence[Path], method: str, identity: dict) -> str:
    """Describe the store of this method that differs least from what was asked for."""
    found = []
    for manifest in (path for f in folders for path in f.glob(f"{method}-*/{MANIFEST}")):
        with suppress(StoreError):  # damaged, or of another format: not what the user looks for
            stored = load(manifest.parent)
            if stored.method == method:
                differing = list(differences(stored.identity, plain(identity), "identity"))
                found.append((len(differing), stored.folder.name, stored, differing))
    if not found:
        return f"\nThere are no {method} scores in {shown(folders[0])}."
    *_, stored, differing = min(found, key=lambda one: one[:2])
    return f"\nNearest: {shown(stored.folder)} ({stored.progress()}), with{listed(differing)}"


def publish(path: Path, data: bytes) -> None:
    """Let a file appear whole under its name, at once; if it is there already, leave that one."""
    try:
        with paths.replacing(path, keep=True) as temporary, temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(
            f"cannot write {shown(path)}: {error.strerror or error}. Finished parts stay; run "
            "again when this is solved."
        ) from error
