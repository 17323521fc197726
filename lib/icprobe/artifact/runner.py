"""Execute the notebooks in order with the parameters of a profile.

    python -m icprobe.artifact.runner [PROFILE] [-p NAME VALUE ...] [--only 01,03] [--fresh]

`run_all.sh` calls this inside the right environment. Everything a user can get wrong is checked
before anything runs (plan.py). Executed copies, one log per run, minutes of fresh runs, run.json
(what made the results, see provenance.py) and report.html go to `figures/<profile>/`, or to the
folder given with `-p output_dir FOLDER`.
"""

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import psutil
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets import Unicode
from traitlets.config import Config

from icprobe import __version__
from icprobe.artifact import plan, provenance, report
from icprobe.artifact.plan import Notebook, UsageError
from icprobe.data import paths
from icprobe.data.assets import Unavailable

log = logging.getLogger("icprobe.runner")

DEAD = (
    "The kernel died: most often the machine ran out of memory. Close other programs,\n"
    "run a smaller profile (./run_all.sh smoke), or lower n_train and max_length with -p."
)


class KernelManager(AsyncKernelManager):
    """Starts kernels whose own messages, such as a traceback when interrupted, go to the log."""

    log_file = Unicode(os.devnull, help="the log").tag(config=True)

    async def start_kernel(self, **options: object) -> None:
        """Start the kernel; called by nbclient."""
        with Path(self.log_file).open("a", encoding="utf-8") as messages:
            await super().start_kernel(stderr=messages, **options)


@contextlib.contextmanager
def measuring(record: dict) -> Iterator[None]:
    """Note the minutes that pass, and the most memory (GiB) that processes below this one hold."""
    started, stop = time.monotonic(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            held, peaks = 0.0, [0.0]
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    held += process.memory_info().rss / 2**30
                    peaks.append(provenance.peak_memory(process.pid))
            record["gib"] = round(np.nanmax([record["gib"] or 0, held, *peaks]), 3)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        record["minutes"] = round((time.monotonic() - started) / 60, 3)


def execute(notebook: Notebook, given: dict, folder: Path, log_file: Path, root: Path) -> dict:
    """Execute a notebook, say what became of it, and return that as its record in run.json."""
    parameters = notebook.defaults | given
    record = {"status": "failed", "minutes": None, "gib": None, "error": ""}
    record |= {"parameters": parameters, "sources": provenance.sources(parameters)}
    copies = folder / "notebooks"
    copies.mkdir(parents=True, exist_ok=True)
    partial = copies / f"{notebook.name}.partial.ipynb"
    try:
        with measuring(record), log_file.open("a", encoding="utf-8") as printed:
            papermill.execute_notebook(
                notebook.path,
                partial,
                given,
                kernel_name="python3",
                language="python",
                cwd=root,
                kernel_manager_class=KernelManager,
                config=Config(KernelManager={"log_file": str(log_file)}),
                progress_bar={"desc": notebook.name, "leave": False},
                stdout_file=printed,
                stderr_file=sys.stderr if sys.stderr.isatty() else printed,  # progress bars
                coalesce_streams=True,  # a progress bar leaves one line in the copy
                iopub_timeout=60,  # a busy machine may need more than the usual 4 s
            )
        record["status"] = "done"
        if provenance.sources(parameters) != record["sources"]:
            record["error"] = "model or data changed while it ran: sources are those before"
    except KeyboardInterrupt:
        record |= {"status": "interrupted", "error": "the same command, without --fresh, goes on"}
        # nbclient's tasks for the cell are still open: asyncio would complain about each at exit
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    except PapermillExecutionError as error:
        record["error"] = f"{error.ename}: {error.evalue}"
        if error.ename == Unavailable.__name__:  # raised in the kernel: only its name comes over
            record |= {"status": "skipped", "error": error.evalue, "minutes": None, "gib": None}
        log.error("%s", error)
    except DeadKernelError:
        record["error"] = DEAD
    except Exception as error:  # whatever Jupyter itself raises, such as a kernel that won't start
        record["error"] = f"{type(error).__name__}: {error}"
        log.exception("could not run %s", notebook.name)
    _tell(record, notebook.name, partial)
    return record


def _tell(record: dict, name: str, partial: Path) -> None:
    """Say what became of a notebook; its copy gets its own name only if all cells ran."""
    whole, failed = (partial.with_name(f"{name}{kind}.ipynb") for kind in ("", ".failed"))
    if record["status"] == "done":
        say(f"      done in {record['minutes']:.2f} minutes")
        partial.replace(whole)
        failed.unlink(missing_ok=True)
    else:
        say(f"\n{record['status'].upper()}: {name}")
    if record["error"]:
        say(f"\n{record['error']}\n")
    if record["status"] == "skipped":
        partial.unlink(missing_ok=True)
    elif partial.exists():
        partial.replace(failed)
        say(f"half-executed copy: {paths.shown(failed)}")


def say(text: str) -> None:
    """Print for the user, and write the same to the log."""
    print(text, flush=True)
    log.info("%s", text)


def table(chosen: list[Notebook], records: dict[str, dict]) -> str:
    """Return the closing table."""
    rows = [{"notebook": x.name, "status": "not run"} | records.get(x.name, {}) for x in chosen]
    frame = pd.DataFrame(rows, columns=["notebook", "minutes", "gib", "status"])
    frame = frame.astype({"minutes": float, "gib": float}).rename(columns={"gib": "GiB"})
    return frame.to_string(index=False, na_rep="-", float_format="%.2f")


def run(
    chosen: list[Notebook], planned: list[dict], folder: Path, log_file: Path, root: Path
) -> dict[str, dict]:
    """Execute the notebooks until one fails or the user interrupts; return the records by name."""
    records = {}
    for i, (notebook, given) in enumerate(zip(chosen, planned, strict=True)):
        say(f"[{i + 1}/{len(chosen)}] {notebook.name}")
        log.info("parameters: %s", given)
        record = records[notebook.name] = execute(notebook, given, folder, log_file, root)
        if record["status"] not in ("done", "skipped"):
            break
    return records


def write_timings(file: Path, records: dict[str, dict]) -> None:
    """Write the minutes of notebooks and the machine; what is known of other notebooks stays."""
    where = {"cores": provenance.usable_cores(), "processor": provenance.processor()}
    made = pd.DataFrame(
        {"notebook": name, "minutes": round(record["minutes"], 2), **where, "icprobe": __version__}
        for name, record in records.items()
        if record["status"] == "done"
    )
    parts = [pd.read_csv(file), made] if file.exists() else [made]
    known = pd.concat(parts).drop_duplicates("notebook", keep="last").sort_values("notebook")
    with paths.replacing(file) as temporary:
        known.to_csv(temporary, index=False)


def _arguments(argv: list[str]) -> argparse.Namespace:
    usage = "run_all.sh [PROFILE] [-p NAME VALUE ...] [--only 01,03] [--fresh] [--help]"
    parser = argparse.ArgumentParser("run_all.sh", usage=usage, add_help=False)
    parser.add_argument("profile", nargs="?", default="laptop")
    parser.add_argument("--only")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, root: Path = paths.ROOT) -> int:
    """Run the command line; return the exit code: 0, 1 failed, 2 usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    # the kernel named python3 must be this environment's, not one that the user registered
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        rest, overrides = plan.split_overrides(argv)
        args = _arguments(rest)
        profile = plan.read_profile(root, args.profile)
        notebooks = plan.find_notebooks(root)
        chosen = plan.select(notebooks, args.only)
        if args.help:
            print(plan.help_on(chosen, profile))
            return 0
        source = f"{args.profile}.yaml"
        planned = plan.plan(notebooks, chosen, profile, source, overrides, args.fresh)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    # results made with another output_dir must not overwrite those of the profile
    usual = f"figures/{args.profile}"
    given = [one.defaults | new for one, new in zip(chosen, planned, strict=True)]
    own = {values.get("output_dir", usual) for values in given}
    place = overrides.get("output_dir", own.pop() if len(own) == 1 else usual)
    folder = root / Path(place).expanduser()
    log_file = folder / "logs" / time.strftime("%Y%m%d-%H%M%S.log")
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(log_file, encoding="utf-8")
    except OSError as error:
        print(f"error: output_dir {place} cannot be written: {error}", file=sys.stderr)
        return 2
    to_terminal = logging.StreamHandler()
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    to_terminal.addFilter(lambda one: one.levelno == logging.WARNING)  # errors are said in words
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_terminal], force=True)
    made = provenance.of_run(shlex.join(["./run_all.sh", *argv]), args.profile, root)
    say(f"profile {args.profile}: {len(chosen)} notebook(s), results in {paths.shown(folder)}")
    records = run(chosen, planned, folder, log_file, root)
    say(f"\n{table(chosen, records)}\n\nlog: {paths.shown(log_file)}")
    try:
        provenance.update(folder, made, records)
        say(f"report: {paths.shown(report.write(folder))}")
    except Exception as error:  # the results are there, with or without a page
        log.exception("no report")
        say(f"no report could be written: {type(error).__name__}: {error}")
    statuses = {record["status"] for record in records.values()}
    if not statuses <= {"done", "skipped"}:
        return 130 if "interrupted" in statuses else 1
    # only a fresh run of the profile as it stands may say how long its notebooks take
    if (args.fresh or profile.get("fresh", False)) and not overrides and "done" in statuses:
        write_timings(root / "figures" / args.profile / "logs" / "timing.csv", records)
    return 0


def command(root: Path = paths.ROOT) -> None:
    """Set up this process for running notebooks, run a command line, and exit."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # as papermill's own command does
    os.environ.pop("MPLBACKEND", None)  # kernels choose theirs, so that figures show in the copies
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no kernel is left behind
    try:
        sys.exit(main(root=root))
    except KeyboardInterrupt:  # between two notebooks
        sys.exit(130)


if __name__ == "__main__":
    command()
