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

import hashlib
import json
import os
import platform
import re
import reprlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm  # as text, which a terminal shows too when a notebook runs there

from icprobe import __version__
from icprobe.paths import resolve, shown

FORMAT = 1
MANIFEST = "manifest.json"
COLUMNS = pa.schema({"train_id": pa.string(), "query_id": pa.string(), "score": pa.float32()})
OUR_FILE = re.compile(
    r"(?P<target>part-\d{5,}\.parquet|manifest\.json)(?P<tmp>\.[0-9a-f]{32}\.tmp)?"
)


class StoreError(ValueError):
    """A store or a part that is not what it should be, or cannot be written."""


class ScoresNotFound(StoreError, FileNotFoundError):  # noqa: N818 - reads like the built-in
    """No finished scores for the parameters asked for."""


@dataclass(frozen=True)
class ScoreStore:
    """The score matrix [N, M] of one method, in blocks of `block_size` training examples.

    Made by `open` or `find`. Several processes may use one store at the same time.

    Attributes:
        folder: where the manifest and the parts lie.
        method: name of the attribution method.
        identity: nested JSON-able dictionary of everything that determines the scores.
        train_ids: ids of the N rows.
        query_ids: ids of the M columns.
        block_size: training examples in one part (the last part may have fewer).
        description: unit and sign of a score, for readers of the manifest.
    """

    folder: Path
    method: str
    identity: dict
    train_ids: list[str]
    query_ids: list[str]
    block_size: int
    description: str = ""

    def __post_init__(self):
        if not isinstance(self.identity, dict):
            raise StoreError(f"identity must be a dictionary, not {_show(self.identity)}")
        if type(self.block_size) is not int or self.block_size < 1:
            raise StoreError(f"block_size must be a positive integer, not {self.block_size!r}")
        for name in ("train_ids", "query_ids"):
            _check_ids(name, getattr(self, name))

    @cached_property
    def name(self) -> str:
        """The folder's name, `<method>-<key>`."""
        return key(self.method, self.identity)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M)."""
        return len(self.train_ids), len(self.query_ids)

    @property
    def n_blocks(self) -> int:
        """Number of parts of the finished store."""
        return -(-len(self.train_ids) // self.block_size)

    @property
    def complete(self) -> bool:
        """Whether every block is finished."""
        return not self.missing()

    def rows(self, block: int) -> range:
        """Return the row numbers of a block.

        Raises:
            IndexError: there is no such block.
        """
        if not 0 <= block < self.n_blocks:
            raise IndexError(f"block {block} of a store with {self.n_blocks} blocks")
        start = block * self.block_size
        return range(start, min(start + self.block_size, len(self.train_ids)))

    def part(self, block: int) -> Path:
        """Return the path of a block's part, whether or not it is there."""
        return self.folder / f"part-{block:05d}.parquet"

    def finished(self, rows: range) -> bool:
        """Return whether the block of these rows, as `rows` gives them, is finished."""
        return self.part(rows.start // self.block_size).exists()

    def missing(self) -> list[int]:
        """Return the unfinished blocks; one look at the folder, no part is opened."""
        # Parts appear whole under their names, so a name is enough to know that a block is done.
        there = {path.name for path in self.folder.iterdir()}
        return [block for block in range(self.n_blocks) if self.part(block).name not in there]

    def fill(self, score_block: Callable[[range], np.ndarray], progress: bool = True) -> np.ndarray:
        """Compute the missing blocks, write each as soon as it is there, return all scores.

        Args:
            score_block: takes row numbers, a range of n of them, and returns their scores [n, M].
            progress: show a progress bar.

        Returns:
            float32 [N, M].

        Raises:
            StoreError: a part is damaged, scores are not finite or have the wrong shape, or the
                disk refuses a part. Finished blocks stay.
        """
        return fill_together([self], lambda rows: [score_block(rows)], progress)[0]

    def write(self, block: int, scores: np.ndarray) -> None:
        """Write the scores of one block; a block that is already finished is left as it is.

        Args:
            block: number of the block.
            scores: [len(rows(block)), M], converted to float32.

        Raises:
            StoreError: wrong shape, scores that are not finite in float32, or a disk that is
                full or read-only.
        """
        rows, M = self.rows(block), len(self.query_ids)
        with np.errstate(over="ignore"):  # beyond float32 becomes inf, refused below
            scores = np.asarray(scores, dtype=np.float32)
        if scores.shape != (len(rows), M):
            raise StoreError(
                f"block {block} must have shape {[len(rows), M]}, not {list(scores.shape)}"
            )
        bad = np.argwhere(~np.isfinite(scores))
        if len(bad):
            pairs = "; ".join(
                f"{scores[i, j]} for training example {self.train_ids[rows[i]]!r} "
                f"and query {self.query_ids[j]!r}"
                for i, j in bad[:3]
            )
            raise StoreError(f"{len(bad)} scores of block {block} are not finite: {pairs}")
        publish(self.part(block), self._encode(block, scores))

    def matrix(self) -> np.ndarray:
        """Read all scores, checking every part's checksums, ids and values.

        Returns:
            float32 [N, M].

        Raises:
            StoreError: unfinished blocks, or a part that is truncated, damaged or foreign.
        """
        scores = np.empty(self.shape, dtype=np.float32)
        for block, part in enumerate(self.blocks()):
            rows = self.rows(block)
            scores[rows.start : rows.stop] = part
        return scores

    def blocks(self) -> Iterator[np.ndarray]:
        """Read block after block, float32 [n, M] each; checks and errors as `matrix`."""
        missing = self.missing()
        if missing:
            raise StoreError(f"{shown(self.folder)} is incomplete: {self._progress(missing)}")
        for block in range(self.n_blocks):
            with self._blaming(block):
                part = self._decode(block)
            yield part

    def check(self) -> None:
        """Look at the footers of finished parts: cheap, so that damage shows before the work.

        Raises:
            StoreError: a part is truncated, foreign or of the wrong size.
        """
        for block in sorted(set(range(self.n_blocks)).difference(self.missing())):
            with self._blaming(block):
                self._check_footer(block, pq.read_metadata(self.part(block)))

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

    def _n_finished(self, missing: list[int]) -> int:
        return len(self.train_ids) - sum(len(self.rows(block)) for block in missing)

    def _progress(self, missing: list[int]) -> str:
        return f"{self._n_finished(missing)} of {len(self.train_ids)} rows are finished"

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

    def _ids(self, block: int) -> dict[str, list[str]]:
        """Return the id columns of a part: every query in order for each training example."""
        train_ids = [self.train_ids[row] for row in self.rows(block)]
        return {
            "train_id": [train_id for train_id in train_ids for _ in self.query_ids],
            "query_id": self.query_ids * len(train_ids),
        }

    def _tag(self, block: int) -> dict[bytes, bytes]:
        """Return the metadata that ties a part to its place in this store."""
        return {b"icprobe.store": self.name.encode(), b"icprobe.block": str(block).encode()}

    def _encode(self, block: int, scores: np.ndarray) -> bytes:
        table = pa.table({**self._ids(block), "score": scores.reshape(-1)}, schema=COLUMNS)
        buffer = pa.BufferOutputStream()
        with pq.ParquetWriter(
            buffer,
            COLUMNS,
            compression="zstd",
            use_dictionary=["train_id", "query_id"],
            write_page_checksum=True,
            write_statistics=False,  # a third of a small part, and nobody filters by them
            store_schema=False,
        ) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(self._tag(block))
        return buffer.getvalue().to_pybytes()

    def _decode(self, block: int) -> np.ndarray:
        """Read and check one part: float32 [len(rows(block)), M]."""
        with pq.ParquetFile(self.part(block), page_checksum_verification=True) as file:
            self._check_footer(block, file.metadata)
            table = file.read(use_threads=False)
        if not table.drop_columns("score").equals(pa.table(self._ids(block))):
            raise StoreError("its training or query ids are not those of the manifest")
        scores = table["score"].to_numpy()
        if not np.isfinite(scores).all():
            raise StoreError("it holds scores that are not finite")
        return scores.reshape(-1, len(self.query_ids))

    def _check_footer(self, block: int, footer: pq.FileMetaData) -> None:
        tag, found = self._tag(block), footer.metadata or {}
        if any(found.get(name) != value for name, value in tag.items()):
            owner = " block ".join(found.get(name, b"(unknown)").decode() for name in tag)
            raise StoreError(f"it belongs to {owner}")
        if not footer.schema.to_arrow_schema().equals(COLUMNS):
            raise StoreError(f"its columns are not {', '.join(COLUMNS.names)} (float32)")
        n_rows = len(self.rows(block)) * len(self.query_ids)
        if footer.num_rows != n_rows:
            raise StoreError(f"it has {footer.num_rows} rows instead of {n_rows}")

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


def fill_together(
    stores: Sequence[ScoreStore],
    score_block: Callable[[range], Sequence[np.ndarray]],
    progress: bool = True,
) -> list[np.ndarray]:
    """Fill stores of methods that come out of one computation, and return all scores.

    Args:
        stores: with the same rows, in blocks of the same size.
        score_block: see `one_by_one`.
        progress: show a progress bar.

    Returns:
        float32 [N, M] of each store.

    Raises:
        StoreError: as `compute`.
    """
    compute(stores, one_by_one(score_block), progress)
    return [kept.matrix() for kept in stores]


# takes the rows of blocks as they are handed out, and yields blocks as they are finished
ScoreBlocks = Callable[[Iterator[range]], Iterator[tuple[range, Sequence[np.ndarray | None]]]]


def one_by_one(score_block: Callable[[range], Sequence[np.ndarray | None]]) -> ScoreBlocks:
    """Return how to score all blocks in this process, one after the other.

    Args:
        score_block: takes row numbers and returns one matrix [n, M] for each store, or None for a
            store where these rows are `finished`.
    """
    return lambda wanted: ((rows, score_block(rows)) for rows in wanted)


def compute(stores: Sequence[ScoreStore], score_blocks: ScoreBlocks, progress: bool = True) -> None:
    """Compute the missing blocks of stores that are filled together; nothing is read back.

    Several processes that do so share the blocks: each skips what others have finished.

    Args:
        stores: with the same rows, in blocks of the same size.
        score_blocks: takes an iterator of row numbers, a block each, which it may read ahead; and
            yields, in any order, row numbers with one matrix [n, M] for each store, or None for a
            store where these rows are `finished`. Each block is written as it comes.
        progress: show a progress bar.

    Raises:
        StoreError: as `ScoreStore.fill`, or the stores' blocks differ.
    """
    first, label = stores[0], ", ".join(dict.fromkeys(kept.method for kept in stores))
    if any((s.train_ids, s.block_size) != (first.train_ids, first.block_size) for s in stores):
        raise StoreError(f"{label}: filled together, but their blocks are not the same")
    missing = sorted({block for kept in stores for block in kept.missing()})
    for kept in stores:
        n_reused = kept._n_finished(kept.missing())
        rows = f"{n_reused} of {len(kept.train_ids)} rows"
        print(f"{kept.method}: reused {rows} from {shown(kept.folder)}")
    if missing:
        for kept in stores:
            kept.check()
        N, M = first.shape
        pairs = {"total": N * M, "initial": first._n_finished(missing) * M, "unit": " pairs"}
        with tqdm(desc=label, disable=not progress, **pairs) as bar:
            left = missing[::-1]

            def wanted() -> Iterator[range]:
                while left:
                    rows = first.rows(left.pop())
                    if all(kept.finished(rows) for kept in stores):  # another process was faster
                        bar.update(len(rows) * M)
                    else:
                        yield rows

            for rows, matrices in score_blocks(wanted()):
                if all(kept.finished(rows) for kept in stores):
                    # another process goes through the same blocks: in another order, they share
                    np.random.default_rng().shuffle(left)
                for kept, scores in zip(stores, matrices, strict=True):
                    if scores is not None:
                        kept.write(rows.start // kept.block_size, scores)
                bar.update(len(rows) * M)
    for kept in stores:
        kept.tidy()


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
        scores_dir: folder of the store's folder; a relative one starts at the repository root.
        method: name of the attribution method; letters, digits, dots, dashes and underscores.
        identity: JSON-able, nested dictionary of everything that determines the scores.
        train_ids: N unique ids, in the order of the rows.
        query_ids: M unique ids, in the order of the columns.
        block_size: training examples in one part; a store that exists keeps its own.
        fresh: delete this store's files first, so that everything is computed anew. Not for use
            while another process fills the same store.
        description: unit and sign of a score, written to a new manifest.

    Raises:
        StoreError: empty or duplicate ids, a manifest that is damaged or made for something else
            (the fields that differ are named), or a folder that cannot be written.
    """
    folder = resolve(scores_dir) / key(method, identity)
    ids = _plain(list(train_ids)), _plain(list(query_ids))
    asked = ScoreStore(folder, method, _plain(identity), *ids, block_size, description)
    if fresh:
        asked.clear()
    if not (folder / MANIFEST).exists():
        publish(folder / MANIFEST, asked._manifest())
    stored = load(folder)  # even if just written: another process may have been faster
    _require_same(
        stored,
        method=method,
        identity=asked.identity,
        train_ids=asked.train_ids,
        query_ids=asked.query_ids,
    )
    stored.tidy()
    return stored


def find(scores_dir: str | Path, method: str, identity: dict, made_by: str = "") -> ScoreStore:
    """Return the complete store of these parameters; needs neither the model nor the data.

    Args:
        scores_dir: folder of the store's folder; a relative one starts at the repository root.
        method: name of the attribution method.
        identity: the identity the scores were made with.
        made_by: how to make the scores, for the error message, such as "run
            notebooks/01_icp_scoring.ipynb with profile=laptop".

    Raises:
        ScoresNotFound: there is no such store (the message names the nearest ones and the fields
            that differ), or it is incomplete.
        StoreError: its manifest is damaged.
    """
    scores_dir = resolve(scores_dir)
    folder = scores_dir / key(method, identity)
    hint = f"\nTo make them: {made_by}" if made_by else ""
    if not (folder / MANIFEST).exists():
        nearest = _nearest(scores_dir, method, identity)
        raise ScoresNotFound(f"no {method} scores at {shown(folder)}{nearest}{hint}")
    stored = load(folder)
    _require_same(stored, method=method, identity=_plain(identity))
    missing = stored.missing()
    if missing:
        progress = stored._progress(missing)
        raise ScoresNotFound(f"incomplete scores: {progress} in {shown(folder)}{hint}")
    return stored


def find_all(scores_dir: str | Path, method: str) -> Iterator[ScoreStore]:
    """Yield all complete stores of a method, whatever they were made with.

    Raises:
        StoreError: a manifest is damaged.
    """
    for manifest in sorted(resolve(scores_dir).glob(f"{method}-*/{MANIFEST}")):
        kept = load(manifest.parent)
        if kept.method == method and kept.complete:
            yield kept


def load(folder: Path) -> ScoreStore:
    """Return the store in a folder, whatever made it.

    Raises:
        StoreError: its manifest is damaged.
        FileNotFoundError: there is no manifest.
    """
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


def _plain(value):
    """Return the value as JSON gives it back: lists for tuples, fields in order of name."""
    return json.loads(json.dumps(value, allow_nan=False, sort_keys=True))


def key(method: str, identity: dict) -> str:
    """Return `<method>-<hash of method and identity>`.

    Raises:
        StoreError: the method's name has other signs than letters, digits, dots, dashes.
    """
    if not re.fullmatch(r"\w[\w.-]*", method, re.ASCII):
        raise StoreError(f"{method!r} is no method name: letters, digits, dots, dashes only")
    canonical = json.dumps(_plain([method, identity]), sort_keys=True, separators=(",", ":"))
    return f"{method}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"


def _check_ids(name: str, ids: list[str]) -> None:
    if not ids:
        raise StoreError(f"{name} is empty")
    strange = [value for value in ids if not isinstance(value, str)]
    if strange:
        raise StoreError(f"{name} must be strings, not {_show(strange)}")
    if len(set(ids)) < len(ids):
        repeated = [value for value, count in Counter(ids).items() if count > 1]
        raise StoreError(f"duplicates in {name}: {_show(repeated)}")


def made_with() -> dict[str, str]:
    """Return versions of what made the scores: for readers only, never compared."""
    versions = {"python": platform.python_version(), "icprobe": __version__}
    for package in ("torch", "transformers", "pyarrow"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _require_same(stored: ScoreStore, **asked) -> None:
    differing = list(_differences({name: getattr(stored, name) for name in asked}, asked))
    if differing:
        manifest = shown(stored.folder / MANIFEST)
        raise StoreError(f"{manifest} is of other scores:{_listed(differing)}")


def _differences(stored, asked, path: str = "") -> Iterator[str]:
    """Yield a line for every leaf in which two JSON values differ, named by its dotted path."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in sorted(stored.keys() | asked.keys()):
            values = stored.get(name, ...), asked.get(name, ...)  # ... is not None: not there
            yield from _differences(*values, f"{path}.{name}" if path else name)
    elif isinstance(stored, list) and isinstance(asked, list) and len(stored) == len(asked):
        for index, values in enumerate(zip(stored, asked, strict=True)):
            yield from _differences(*values, f"{path}[{index}]")
    elif type(stored) is not type(asked) or stored != asked:  # 1, 1.0 and True are three things
        yield f"{path}: stored {_show(stored)}, asked {_show(asked)}"


def _show(value) -> str:
    if value is ...:
        return "nothing"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    count = f"{len(value)} values " if isinstance(value, list) else ""
    return count + short.repr(value)


def _listed(differing: list[str]) -> str:
    rest = [f"and {len(differing) - 10} more"] if len(differing) > 10 else []
    return "".join(f"\n  {line}" for line in differing[:10] + rest)


def _nearest(scores_dir: Path, method: str, identity: dict) -> str:
    """Describe the stores of this method that differ least from what was asked for."""
    found = []
    for manifest in scores_dir.glob(f"{method}-*/{MANIFEST}"):
        with suppress(StoreError):  # damaged, or of another format: not what the user looks for
            stored = load(manifest.parent)
            if stored.method == method:
                differing = list(_differences(stored.identity, _plain(identity), "identity"))
                found.append((len(differing), stored.folder.name, stored, differing))
    text = "" if found else f"\nThere are no {method} scores in {shown(scores_dir)}."
    for _, name, stored, differing in sorted(found, key=lambda entry: entry[:2])[:3]:
        text += f"\nNear: {name} ({stored._progress(stored.missing())}), where"
        text += _listed(differing)
    return text


def publish(path: Path, data: bytes) -> None:
    """Let a file appear whole under its name, at once; if it is there already, leave that one."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # a rename that fails where the target exists
        except FileExistsError:
            pass
        except OSError:  # no hard links on this file system, or swept by tidy(): target is there
            if not path.exists():
                temporary.replace(path)
    except OSError as error:
        raise StoreError(
            f"cannot write {shown(path)}: {error.strerror or error}. Finished parts stay; run "
            "again when this is solved."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
