"""Where things are: the repository root, relative paths resolved against it, files that are whole.

Notebooks may run from any working directory (Jupyter starts a kernel in notebooks/, papermill in
the caller's), so a relative path in a parameter always means "from the repository root".
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SUITES = ROOT / "data" / "suites"
NOTEBOOKS = ROOT / "notebooks"
SOURCES = ("benchmarks", "data", "docs", "lib", "notebooks", "tests")

# results of the committed run: read, and never written to but by `./run_all.sh publish`
REFERENCE_FIGURES = ROOT / "figures" / "reference"
REFERENCE_SCORES = ROOT / "data" / "scores" / "reference"
REFERENCE_NETWORKS = ROOT / "data" / "networks"


def resolve(path: str | Path) -> Path:
    """Return `path` as an absolute path; relative ones start at the repository root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else ROOT / path


def is_reference(path: str | Path) -> bool:
    """Tell whether a path is that of reference results, or within them."""
    path = resolve(path).resolve()
    folders = REFERENCE_FIGURES, REFERENCE_SCORES, REFERENCE_NETWORKS
    return any(path.is_relative_to(folder.resolve()) for folder in folders)


def is_source(path: str | Path) -> bool:
    """Tell whether results at `path` could damage the repository: its root or above, or sources.

    Sources are in `SOURCES`, but for the scores that runs keep; so is the reference.
    """
    path, root = resolve(path).resolve(), ROOT.resolve()
    if root.is_relative_to(path) or is_reference(path):
        return True
    if path.is_relative_to(root / "data" / "scores"):
        return False
    first, *below = path.relative_to(root).parts if path.is_relative_to(root) else ["", ""]
    return first in SOURCES or first.startswith(".") or (first == "figures" and not below)


def shown(path: str | Path) -> str:
    """Return `path` for messages: relative to the repository root where it lies inside."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@contextmanager
def replacing(file: Path, keep: bool = False) -> Iterator[Path]:
    """Yield a name to write a file under; once it is whole, it appears as `file`, at once.

    The folder is made. `keep` leaves a file that is there already, instead of replacing it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if keep:
            _link(temporary, file)
        else:
            temporary.replace(file)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _link(temporary: Path, file: Path) -> None:
    try:
        os.link(temporary, file)  # a rename that fails where the target exists
    except FileExistsError:
        pass
    except OSError:  # no hard links on this file system, or somebody removed the temporary
        if not file.exists():
            temporary.replace(file)
