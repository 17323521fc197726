"""What a run was made with, and `run.json`, which keeps that beside the results.

A folder of results may come from several runs (`--only 06`), so `run.json` has, for each notebook,
its last one:

    {"runs": {STARTED: see `of_run`}, "notebooks": {NAME: {"run": STARTED, ...}}}

A notebook's record has its status (done, skipped, failed or interrupted), minutes, gib (peak
memory), error ("" where there is none), parameters, and sources (see `sources`).
"""

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil

from icprobe import __version__, data, models
from icprobe.data import cache, paths

FILE = "run.json"


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Return the name of the CPU model."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def peak_memory(pid: int | str = "self") -> float:
    """Return the most memory that a process has held, in GiB; not a number where none says."""
    # getrusage would count what the parent held when it started the process
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return math.nan
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) / 2**20 if found else math.nan


def of_run(command: str, profile: str, root: Path) -> dict:
    """Return what a run of the checkout in `root` that starts now is made with, JSON-able."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "profile": profile,
        "icprobe": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": usable_cores(),
        "memory": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "git": git_state(root),
        "packages": dict(sorted((one.name, one.version) for one in metadata.distributions())),
    }


def git_state(root: Path) -> dict | None:
    """Return the checkout's revision and the files that differ from it, untracked ones too.

    None where the folder is no checkout (an unpacked archive), and {"error"} where git is missing
    or does not answer.
    """
    if not (root / ".git").exists():  # a repository further up is not this one's
        return None
    try:
        revision = _output("git", "-C", str(root), "rev-parse", "HEAD")
        options = "--porcelain", "--no-renames", "-z"
        status = _output("git", "-C", str(root), "status", *options)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return {"error": said.splitlines()[0]}
    changed = [entry[3:] for entry in status.split("\0") if entry]  # each is "XY name"
    return {"revision": revision.strip(), "changed": changed}


def sources(parameters: Mapping[str, object]) -> dict[str, dict]:
    """Return the identities of the model and of all data that a notebook's parameters name.

    Nothing is loaded or downloaded: hashes are declared or those of local files. Where one cannot
    be told, such as that of a hub name without network, it is {"source", "unknown": why}.
    """
    found = {}
    for title, identity, *arguments in _identities(parameters):
        try:
            found[title] = identity(*arguments)
        except Exception as error:  # a report is made also where a run failed by this source
            found[title] = {"source": str(arguments[0]), "unknown": str(error)}
    return found


def _identities(given: Mapping[str, object]) -> Iterator[tuple]:
    """Yield each source's title, the function that returns its identity, and its arguments."""
    if "model" in given:
        yield "model", models.identity, given["model"], given.get("dtype", "float32")
    seed = given.get("seed", 0)
    for title, source, prefix, size in (
        ("training pool", "train", "train", "n_train"),
        ("queries", "queries", "query", "n_query"),
        ("evaluation queries", "evaluation", "evaluation", "n_evaluation"),
    ):
        if given.get(source) is not None:
            split, columns = (given.get(f"{prefix}_{one}") for one in ("split", "columns"))
            yield title, data.identity, given[source], split, given.get(size), seed, columns
    pools = given.get("condition_pools")
    for suite, sizes in (pools if isinstance(pools, Mapping) else {}).items():
        for side, n in zip(("train", "query"), sizes, strict=False):
            yield f"suite {suite}, {side}", data.identity, suite, side, n, seed
    if given.get("compared"):
        yield "timings", _files, given["compared"]
    if given.get("published_dir"):
        yield "published scores", _files, given["published_dir"]


def _files(source: str) -> dict:
    """Return the SHA-256 of a file, or of a folder's files by name (Git's own aside)."""
    place = paths.resolve(source)
    found = [place] if place.is_file() else sorted(place.rglob("*"))
    files = [file for file in found if file.is_file() and ".git" not in file.parts]
    hashes = {str(file.relative_to(place.parent)): cache.sha256(file) for file in files}
    return {"source": source, "sha256": hashes}


def read(folder: Path) -> dict:
    """Return what run.json in a folder says, see the module; empty where there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return {"runs": {}, "notebooks": {}}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for entry in record["notebooks"].values():
            record["runs"][entry["run"]]
        return record
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{paths.shown(file)} is damaged, remove it: {error!r}") from None


def update(folder: Path, run: dict, records: Mapping[str, dict]) -> None:
    """Take a run, see `of_run`, into run.json: its notebooks replace those of earlier runs.

    A damaged file is begun anew.
    """
    try:
        known = read(folder)
    except ValueError:
        known = {"runs": {}, "notebooks": {}}
    new = {name: {"run": run["started"], **record} for name, record in records.items()}
    notebooks = dict(sorted((known["notebooks"] | new).items()))
    used = {record["run"] for record in notebooks.values()}
    runs = known["runs"] | {run["started"]: run}
    kept = {"runs": {key: runs[key] for key in sorted(used)}, "notebooks": notebooks}
    with paths.replacing(folder / FILE) as temporary:
        temporary.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")


def _gpus() -> list[str]:
    """Return the NVIDIA GPUs that the driver names; none where there is no driver."""
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        found = _output("nvidia-smi", query, "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.splitlines() if line.strip()]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout
