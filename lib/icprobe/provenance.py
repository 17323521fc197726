"""What a run was made with, and `run.json`, which keeps that beside the results.

A folder of results may come from several runs (`--only 06`), so `run.json` has, for each notebook,
its last one:

    {"runs": {STARTED: see `of_run`}, "notebooks": {NAME: {"run": STARTED, "status": ..., ...}}}
"""

import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from icprobe import __version__, machine, paths

FILE = "run.json"
# what `of_run` says
SAID = (
    "started", "command", "profile", "icprobe", "python", "system", "processor", "cores", "memory",
    "gpus", "git", "packages",
)  # fmt: skip
# results, which a run changes: they say nothing about the code that made them
RESULTS = ("figures", "data/scores")


def of_run(command: str, profile: str, root: Path) -> dict:
    """Return what a run that starts now is made with.

    Args:
        command: As typed.
        profile: Its name.
        root: The folder of the checkout.

    Returns:
        JSON-able: started (local time, ISO 8601), command, profile, icprobe, python, system,
        processor, cores, memory (GiB), gpus, git (see `git_state`), packages (name: version).
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "profile": profile,
        "icprobe": __version__,
        "python": platform.python_version(),
        "system": _system(),
        "processor": machine.processor(),
        "cores": machine.usable_cores(),
        "memory": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "git": git_state(root),
        "packages": packages(),
    }


def git_state(root: Path) -> dict | None:
    """Return the checkout's revision and the files that differ from it, results aside.

    Args:
        root: The folder of the checkout.

    Returns:
        None where the folder is no checkout (an unpacked archive), or {"revision", "changed"}
        (names, untracked ones too), or {"error"} where git is missing or does not answer.
    """
    if not (root / ".git").exists():  # a repository further up is not this one's
        return None
    aside = [f":(exclude){folder}" for folder in RESULTS]
    try:
        revision = _output("git", "-C", str(root), "rev-parse", "HEAD")
        options = "--porcelain", "--no-renames", "-z", "--", ".", *aside
        status = _output("git", "-C", str(root), "status", *options)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return {"error": said.splitlines()[0]}
    changed = [entry[3:] for entry in status.split("\0") if entry]  # each is "XY name"
    return {"revision": revision.strip(), "changed": changed}


def packages() -> dict[str, str]:
    """Return the installed versions of what the package asks for (and kronfluence), by name."""
    try:
        asked = importlib.metadata.requires("icprobe") or []
    except importlib.metadata.PackageNotFoundError:
        asked = []
    names = [re.match(r"[\w.-]+", one).group() for one in asked if "extra ==" not in one]
    found = {}
    for name in sorted([*names, "kronfluence"], key=str.lower):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def sources(parameters: Mapping[str, object], known: dict | None = None) -> dict[str, dict]:
    """Return the identities of the model and the data that a notebook's parameters name.

    Nothing is loaded or downloaded: hashes are declared or those of local files.

    Args:
        parameters: All of a notebook's parameters.
        known: Takes the identities found, so that other notebooks of the run need not hash again.

    Returns:
        By what it is (model, training pool, queries, ...) its identity; {"source", "unknown": why}
        where that cannot be told, such as a hub name without network. Empty for a notebook that
        names neither.
    """
    wanted = {}
    if "model" in parameters:
        wanted["model"] = "model", (parameters["model"], parameters.get("dtype", "float32"))
    seed = parameters.get("seed", 0)
    for side, title, split, size in (
        ("train", "training pool", "train_split", "n_train"),
        ("queries", "queries", "query_split", "n_query"),
        ("evaluation", "evaluation queries", "evaluation_split", "n_evaluation"),
    ):
        if parameters.get(side) is not None:
            columns = parameters.get(split.replace("split", "columns"))
            one = parameters[side], parameters.get(split), parameters.get(size), seed, columns
            wanted[title] = "data", one
    pools = parameters.get("condition_pools")
    for suite, sizes in (pools if isinstance(pools, Mapping) else {}).items():
        for side, n in zip(("train", "query"), sizes, strict=False):
            wanted[f"suite {suite}, {side}"] = "data", (suite, side, n, seed)
    if not wanted:
        return {}

    from icprobe import data, lm  # they import torch, which takes seconds: only where it is needed

    identity = {"model": lm.identity, "data": data.identity}
    known = {} if known is None else known
    found = {}
    for title, (kind, arguments) in wanted.items():
        key = repr((kind, arguments))
        if key not in known:
            try:
                known[key] = identity[kind](*arguments)
            except Exception as error:  # a report is made also where a run failed by this source
                known[key] = {"source": str(arguments[0]), "unknown": str(error)}
        found[title] = known[key]
    return found


def read(folder: Path) -> dict:
    """Return what run.json in a folder says, see the module; empty where there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return {"runs": {}, "notebooks": {}}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for record in found["notebooks"].values():
            run = found["runs"][record["run"]]
            _ = record["status"], [run[key] for key in SAID]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{FILE} is damaged ({type(error).__name__}: {error})") from error
    return found


def update(folder: Path, run: dict, records: Mapping[str, dict]) -> None:
    """Take a run into run.json: its notebooks replace what earlier runs said of the same ones.

    A notebook that was "not run" replaces nothing. A damaged file is begun anew.

    Args:
        folder: Of the results.
        run: See `of_run`.
        records: By notebook, JSON-able, with its "status".
    """
    try:
        known = read(folder)
    except ValueError:
        known = {"runs": {}, "notebooks": {}}
    runs, notebooks = known["runs"], known["notebooks"]
    for name, record in records.items():
        if name not in notebooks or record["status"] != "not run":
            notebooks[name] = {"run": run["started"], **record}
    runs[run["started"]] = run
    used = {record["run"] for record in notebooks.values()}
    kept = {
        "runs": {started: runs[started] for started in sorted(runs) if started in used},
        "notebooks": dict(sorted(notebooks.items())),
    }
    with paths.replacing(folder / FILE) as temporary:
        temporary.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")


def _system() -> str:
    """Return the operating system in words, without the machine's name."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"] + ", "
    except (OSError, KeyError, AttributeError):
        name = ""
    return f"{name}{platform.platform(terse=not name)}"


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
