"""The user's cache: folders that are filled once, whole or not at all, and checked at each use.

Everything is written under a temporary name and moved when complete, so an interruption costs only
the step it hit. A folder's sha256.json has the hashes of its files: a file is used only if it still
has its hash; else, or if an older cache has no such note, the folder is filled again.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import platformdirs

from icprobe.data import paths

NOTE = "sha256.json"


def root() -> Path:
    """Return the cache folder: $ICPROBE_CACHE, else the user's usual place for caches."""
    chosen = os.environ.get("ICPROBE_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("icprobe"))
    return folder.absolute()


def filled(
    name: str, fill: Callable[[Path, Path], None], wanted: Collection[str] | None = None
) -> Path:
    """Return a folder of the cache with all wanted files, as they were written.

    Where one is not intact, `fill` makes all in the empty folder that is its first argument, and
    lets `keep` move it to the second. `wanted` are paths in the folder; None for all it has noted.
    """
    folder = root() / name
    if not damaged(folder, wanted):
        return folder
    with _locked(name):
        if file := damaged(folder, wanted):  # else another process was faster
            if file.exists():
                say(f"{file} is not known to be as it was written; replacing it")
            with temporary_folder(name) as temporary:
                fill(temporary, folder)
    return folder


def keep(source: Path, folder: Path) -> None:
    """Move all files of `source` into a folder of the cache and note their hashes."""
    noted = _noted(folder)
    for file in [file for file in source.rglob("*") if file.is_file()]:
        name = file.relative_to(source)
        noted[name.as_posix()] = sha256(file)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        file.replace(folder / name)
    with paths.replacing(folder / NOTE) as temporary:
        temporary.write_text(json.dumps(noted, indent=1, sort_keys=True))


def damaged(folder: Path, wanted: Collection[str] | None) -> Path | None:
    """Return the first wanted file that is not there with the hash noted for it, or None."""
    noted = _noted(folder)
    if wanted is None and not noted:
        return folder
    for name in noted if wanted is None else wanted:
        file = folder / name
        if name not in noted or not file.is_file():
            return file
        if _sha256_at(file, file.stat().st_mtime_ns) != noted[name]:
            return file
    return None


def _noted(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / NOTE).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


@functools.cache  # taken once a process, and again when the file was written since
def _sha256_at(file: Path, written: int) -> str:
    return sha256(file)


def sha256(file: Path) -> str:
    """Return a file's hash, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def say(message: str) -> None:
    """Tell the user, beside the progress bars."""
    print(f"icprobe: {message}", file=sys.stderr, flush=True)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Let one process at a time fill a part of the cache; the lock dies with its process."""
    (root() / "work").mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(root() / "work" / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"another process is fetching {name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yield an empty folder beside the final place, removing what a killed run has left."""
    work = root() / "work"
    for left in work.glob(f"{name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(".partial", f"{name}.", work) as folder:
        yield Path(folder)
