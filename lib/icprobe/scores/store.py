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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
    """The score matrix [N, M] of one method, in blocks of `block_size` training examples.

    Made by `open` or `find`. Several processes may use one store at the same time.

    Attributes:
        folder: Where the manifest and the parts lie.
        method: Name of the attribution method.
        identity: Nested JSON-able dictionary of everything that determines the scores.
        train_ids: Ids of the N rows.
        query_ids: Ids of the M columns.
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

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M)."""
        return len(self.train_ids), len(self.query_ids)

    @property
    def n_blocks(self) -> int:
        return -(-len(self.train_ids) // self.block_size)

    def rows(self, block: int) -> range:
        """Return the row numbers of a block."""
        start = block * self.block_size
        return range(start, min(start + self.block_size, len(self.train_ids)))

    def part(self, block: int) -> Path:
        """Return the path of a block's part, whether or not it is there."""
        return self.folder / f"part-{block:05d}.parquet"

    def finished(self, block: int) -> bool:
        # Parts appear whole under their names, so a name is enough to know that a block is done.
        return self.part(block).exists()

    def missing(self) -> list[int]:
        """Return the unfinished blocks; one look at the folder, no part is opened."""
        there = {path.name for path in self.folder.iterdir()}
        return [block for block in range(self.n_blocks) if self.part(block).name not in there]

    def n_finished(self) -> int:
        """Return how many rows are finished."""
        return len(self.train_ids) - sum(len(self.rows(block)) for block in self.missing())

    def write(self, block: int, scores: np.ndarray) -> None:
        """Write the scores [n, M] of one block; one that is already finished is left as it is.

        Raises:
            StoreError: Wrong shape, scores that are not finite in float32, or a disk that is
                full or read-only.
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
            pairs = "; ".join(
                f"{scores[i, j]} for training example {self.train_ids[rows[i]]!r} "
                f"and query {self.query_ids[j]!r}"
                for i, j in bad[:3]
            )
            raise StoreError(
                f"{self.method}: {len(bad)} scores of block {block} are not finite: {pairs}"
            )
        publish(self.part(block), parts.encode(scores, self._place(block)))

    def matrix(self) -> np.ndarray:
        """Read all scores, float32 [N, M], checking every part's checksums, ids and values.

        Raises:
            StoreError: Unfinished blocks, or a part that is truncated, damaged or foreign.
        """
        if self.missing():
            raise StoreError(f"{shown(self.folder)} is incomplete: {self.progress()}")
        scores = np.empty(self.shape, dtype=np.float32)
        for block in range(self.n_blocks):
            rows = self.rows(block)
            with self._blaming(block):
                scores[rows.start : rows.stop] = parts.decode(self.part(block), self._place(block))
        return scores

    def check(self) -> None:
        """Look at the footers of finished parts: cheap, so that damage shows before the work.

        Raises:
            StoreError: A part is truncated, foreign or of the wrong size.
        """
        for block in sorted(set(range(self.n_blocks)).difference(self.missing())):
            with self._blaming(block):
                parts.check_footer(pq.read_metadata(self.part(block)), self._place(block))

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
        """Return how many rows are finished, for messages."""
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

    @contextmanager
    def _blaming(self, block: int) -> Iterator[None]:
        """Name the part in whatever goes wrong while reading it, and say what to do."""
        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as error:
            # With an errno it is the system's fault (permissions, open files), not the part's.
            if getattr(error, "errno", None):
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise StoreError(
                f"{shown(self.part(block))} is damaged or foreign: {reason}. "
                "Delete this file and run again; only its rows will be computed."
            ) from error


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

    Args:
        scores_dir: Folder of the store's folder; a relative one starts at the repository root.
        method: Name of the attribution method; letters, digits, dots, dashes and underscores.
        identity: JSON-able, nested dictionary of everything that determines the scores.
        train_ids: N unique ids, in the order of the rows.
        query_ids: M unique ids, in the order of the columns.
        block_size: Training examples in one part; a store that exists keeps its own.
        fresh: Delete this store's files first, so that everything is computed anew. Not for use
            while another process fills the same store.
        description: Unit and sign of a score, written to a new manifest.

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
    same = ("method", "identity", "train_ids", "query_ids")
    found = list(differences(*({name: getattr(s, name) for name in same} for s in (stored, asked))))
    if found:
        raise StoreError(f"{shown(folder / MANIFEST)} is of other scores:{listed(found)}")
    stored.tidy()
    return stored


def find(
    folders: Sequence[str | Path], method: str, identity: dict, how_to_make: str = ""
) -> ScoreStore:
    """Return the complete store of these parameters; needs neither the model nor the data.

    Args:
        folders: Where stores lie; the first folder that has it complete counts.
        method: Name of the attribution method.
        identity: The identity the scores were made with.
        how_to_make: For the error message, such as "run notebook 01".

    Raises:
        ScoresNotFound: There is no such store (the message names the nearest ones and the fields
            that differ), or it is incomplete.
        StoreError: Its manifest is damaged.
    """
    folders, name = [resolve(folder) for folder in folders], key(method, identity)
    hint = f"\nTo make them: {how_to_make}" if how_to_make else ""
    there = [load(one / name) for one in folders if (one / name / MANIFEST).exists()]
    for stored in there:
        if not stored.missing():
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
        if kept.method == method and not kept.missing():
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


def _nearest(folders: Sequence[Path], method: str, identity: dict) -> str:
    """Describe the stores of this method that differ least from what was asked for."""
    found = []
    for manifest in (path for f in folders for path in f.glob(f"{method}-*/{MANIFEST}")):
        with suppress(StoreError):  # damaged, or of another format: not what the user looks for
            stored = load(manifest.parent)
            if stored.method == method:
                differing = list(differences(stored.identity, plain(identity), "identity"))
                found.append((len(differing), stored.folder.name, stored, differing))
    text = "" if found else f"\nThere are no {method} scores in {shown(folders[0])}."
    for _, name, stored, differing in sorted(found, key=lambda entry: entry[:2])[:3]:
        text += f"\nNear: {name} ({stored.progress()}), where{listed(differing)}"
    return text


def publish(path: Path, data: bytes) -> None:
    """Let a file appear whole under its name, at once; if it is there already, leave that one.

    Raises:
        StoreError: The disk is full or read-only.
    """
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
