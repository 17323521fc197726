"""Execute the notebooks in order with the parameters of a profile.

    python -m icprobe.artifact.runner [PROFILE] [-p NAME VALUE ...] [--only 01,03] [--fresh]

`run_all.sh` calls this inside the right environment. Everything a user can get wrong is checked
before anything runs (plan.py). Executed copies, one log per run, the table of minutes and memory,
run.json (what made the results, see provenance.py) and report.html go to `figures/<profile>/`, or
to the folder given with `-p output_dir FOLDER`.
"""

import argparse
import contextlib
import csv
import logging
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import papermill
import psutil
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color
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


@dataclass
class Row:
    """What became of one notebook: a line of the closing table.

    Attributes:
        notebook: Its name.
        minutes: How long it took.
        status: not run, done, skipped, failed or interrupted.
        gib: Peak memory.
        error: Why it stopped.
        sources: The model and the data, see `provenance.sources`.
    """

    notebook: str
    minutes: float | None = None
    status: str = "not run"
    gib: float | None = None
    error: str = ""
    sources: dict[str, dict] = field(default_factory=dict)


# ---------------------------------------------------------------------------- running one notebook


class KernelManager(AsyncKernelManager):
    """Starts kernels whose own messages, such as a traceback when interrupted, go to the log."""

    log_file = Unicode(os.devnull, help="the log").tag(config=True)

    async def start_kernel(self, **options: object) -> None:
        """Start the kernel; called by nbclient."""
        with Path(self.log_file).open("a", encoding="utf-8") as messages:
            await super().start_kernel(stderr=messages, **options)


class PeakMemory:
    """Watches how much memory the processes below this one hold: the kernel, what it started.

    Attributes:
        gib: The most that was seen.
    """

    def __init__(self):
        self.gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            held = 0.0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    held += process.memory_info().rss / 2**30
                    # in this order: a peak may not be a number
                    self.gib = max(self.gib, provenance.peak_memory(process.pid))
            self.gib = max(self.gib, held)


def execute(notebook: Notebook, parameters: dict, copy: Path, log_file: Path, root: Path) -> Row:
    """Execute one notebook; the executed copy appears as `copy` only when all cells ran.

    A copy that stopped half way is kept as `<name>.failed.ipynb`, and `copy` stays as it was. A
    notebook that raised `Unavailable` is skipped. What is to be said about it has been said.
    """
    partial = copy.with_name(f"{notebook.name}.partial.ipynb")
    failed = copy.with_name(f"{notebook.name}.failed.ipynb")
    row = Row(notebook.name, status="failed")
    memory, started = PeakMemory(), time.monotonic()
    try:
        row.sources = provenance.sources(notebook.defaults | parameters)
        with memory, log_file.open("a", encoding="utf-8") as printed:
            papermill.execute_notebook(
                notebook.path,
                partial,
                parameters,
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
        row.status = "done"
        _mark_changes(row, provenance.sources(notebook.defaults | parameters))
    except KeyboardInterrupt:
        row.status = "interrupted"
        # nbclient's tasks for the cell are still open: asyncio would complain about each at exit
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    except PapermillExecutionError as error:
        if error.ename == Unavailable.__name__:  # raised in the kernel: only its name comes over
            row.status, row.error = "skipped", error.evalue
        else:
            row.error = _described(error)
        log.error("%s", error)
    except DeadKernelError:
        row.error = DEAD
    except Exception as error:  # whatever Jupyter itself raises, such as a kernel that won't start
        row.error = f"{type(error).__name__}: {error}"
        log.exception("could not run %s", notebook.name)
    # of a skipped one, time and memory say nothing about the notebook
    if row.status != "skipped":
        row.minutes, row.gib = (time.monotonic() - started) / 60, memory.gib or None
    _tell(row, partial, copy, failed)
    return row


def _mark_changes(row: Row, now: dict[str, dict]) -> None:
    """Mark sources that are no longer what the notebook started with, and say so."""
    for title, source in row.sources.items():
        if now[title] != source:
            row.sources[title] = source | {"changed": True}
            say(f"      {title}: changed while {row.notebook} ran; run.json has the state before")


def _tell(row: Row, partial: Path, copy: Path, failed: Path) -> None:
    """Give the executed copy its name, and say what became of the notebook."""
    if row.status == "done":
        partial.replace(copy)
        failed.unlink(missing_ok=True)
        say(f"      done in {row.minutes:.2f} minutes")
    elif row.status == "skipped":
        partial.unlink(missing_ok=True)
        say(f"\nSKIPPED: {row.notebook}\n\n{_indent(row.error)}\n")
    else:
        if row.status == "failed":
            say(f"\nFAILED: {row.notebook}\n\n{row.error}\n")
        else:
            say("\ninterrupted: the same command goes on where it stopped (without --fresh)")
        if partial.exists():
            partial.replace(failed)
            say(f"half-executed copy: {paths.shown(failed)}")


def _described(error: PapermillExecutionError) -> str:
    """Return the error, the beginning of its cell, and the end of its traceback."""
    traceback = strip_color("\n".join(error.traceback)).rstrip().splitlines()[-12:]
    source = error.source.splitlines()[:6]
    parts = (_indent("\n".join(lines)) for lines in (source, traceback))
    return "\n\n".join([f"{error.ename}: {error.evalue}", f"cell In [{error.exec_count}]", *parts])


def _indent(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


# ----------------------------------------------------------------------------------- the whole run


def say(text: str) -> None:
    """Print for the user, and write the same to the log."""
    print(text, flush=True)
    log.info("%s", text)


def table(rows: list[Row]) -> str:
    """Return the closing table."""
    width = max(len("notebook"), *(len(row.notebook) for row in rows))
    lines = [f"{'notebook':<{width}}  minutes    GiB  status"]
    for row in rows:
        minutes, gib = ("-" if x is None else f"{x:.2f}" for x in (row.minutes, row.gib))
        lines.append(f"{row.notebook:<{width}}  {minutes:>7}  {gib:>5}  {row.status}")
    return "\n".join(lines)


def run(
    chosen: list[Notebook], planned: list[dict], folder: Path, log_file: Path, root: Path
) -> list[Row]:
    """Execute the notebooks until one fails or the user interrupts; return all rows.

    A skipped notebook stops nothing.
    """
    copies = folder / "notebooks"
    copies.mkdir(parents=True, exist_ok=True)
    rows = [Row(notebook.name) for notebook in chosen]
    for i, (notebook, parameters) in enumerate(zip(chosen, planned, strict=True)):
        say(f"[{i + 1}/{len(chosen)}] {notebook.name}")
        log.info("parameters: %s", parameters)
        rows[i] = execute(notebook, parameters, copies / notebook.path.name, log_file, root)
        if rows[i].status not in ("done", "skipped"):
            break
    return rows


def write_up(
    rows: list[Row],
    chosen: list[Notebook],
    planned: list[dict],
    folder: Path,
    made: dict,
    root: Path,
) -> list[Path]:
    """Write run.json and report.html; return the latter's path, after those of other folders.

    A notebook whose `output_dir` is another folder, where it left results, has a page there, too.

    Args:
        rows: As `run` returns them.
        chosen: The notebooks.
        planned: What each was given.
        folder: Of this run's results.
        made: What the run was made with, see `provenance.of_run`.
        root: Of the checkout.
    """
    found = {folder: {}}
    for row, notebook, parameters in zip(rows, chosen, planned, strict=True):
        given = notebook.defaults | parameters
        record = {
            "status": row.status,
            "minutes": row.minutes and round(row.minutes, 3),
            "gib": row.gib and round(row.gib, 3),
            "error": row.error.partition("\n\n")[0],
            "parameters": given,
            "sources": row.sources,
        }
        own = root / Path(str(given.get("output_dir", folder))).expanduser()
        elsewhere = os.path.relpath(own, folder)
        found[folder][notebook.name] = record | ({} if elsewhere == "." else {"results": elsewhere})
        if elsewhere != "." and list(own.glob(f"{notebook.name.partition('_')[0]}_*")):
            copies = os.path.relpath(folder / "notebooks", own)
            found.setdefault(own, {})[notebook.name] = record | {"copies": copies}
    pages = []
    for place in reversed(found):  # the run's own page last: it links to the others
        provenance.update(place, made, found[place])
        pages.append(report.write(place))
    return pages


def write_timings(file: Path, rows: list[Row]) -> None:
    """Write how many minutes notebooks took, and the machine that took them."""
    where = [provenance.usable_cores(), provenance.processor(), __version__]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["notebook", "minutes", "cores", "processor", "icprobe"])
        for row in rows:
            if row.status == "done":
                writer.writerow([row.notebook, f"{row.minutes:.2f}", *where])


def log_to(file: Path) -> None:
    """Write all log messages to a file; warnings also appear in the terminal."""
    file.parent.mkdir(parents=True, exist_ok=True)
    to_file, to_terminal = logging.FileHandler(file, encoding="utf-8"), logging.StreamHandler()
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    to_terminal.setLevel(logging.WARNING)
    # failures are reported by `execute`, in full sentences
    to_terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_terminal], force=True)


def _arguments(argv: list[str], root: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        usage="run_all.sh [PROFILE] [-p NAME VALUE ...] [--only 01,03] [--fresh]",
        description="Execute the notebooks in order with the parameters of a profile.",
        epilog="-p NAME VALUE sets one parameter and may be repeated.",
        add_help=False,
    )
    known = ", ".join(plan.profiles(root))
    parser.add_argument(
        "profile", nargs="?", default="laptop", metavar="PROFILE", help=f"{known} (default laptop)"
    )
    parser.add_argument("--only", metavar="01,03", help="run these notebooks only")
    parser.add_argument("--fresh", action="store_true", help="reuse nothing, compute all anew")
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this, and the parameters of the notebooks"
    )
    found = parser.parse_args(argv)
    if found.help:
        parser.print_help()
    return found


def main(argv: list[str] | None = None, root: Path = paths.ROOT) -> int:
    """Run the command line; return the exit code: 0, 1 failed, 2 usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    # the kernel named python3 must be this environment's, not one that the user registered
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        rest, overrides = plan.split_overrides(argv)
        args = _arguments(rest, root)
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
    log_to(log_file)
    made = provenance.of_run(shlex.join(["./run_all.sh", *argv]), args.profile, root)
    log.info("%s\nicprobe %s, Python %s", made["command"], __version__, made["python"])
    say(f"profile {args.profile}: {len(chosen)} notebook(s), results in {paths.shown(folder)}")
    rows = run(chosen, planned, folder, log_file, root)
    say(f"\n{table(rows)}\n\nlog: {paths.shown(log_file)}")
    try:
        for page in write_up(rows, chosen, planned, folder, made, root):
            say(f"report: {paths.shown(page)}")
    except Exception as error:  # the results are there, with or without a page
        log.exception("no report")
        say(f"no report could be written: {type(error).__name__}: {error}")
    statuses = {row.status for row in rows}
    if not statuses <= {"done", "skipped"}:
        return 130 if "interrupted" in statuses else 1
    # only a fresh run of the profile as it stands may say how long its notebooks take
    if (args.fresh or profile.get("fresh", False)) and not overrides and "done" in statuses:
        write_timings(root / "figures" / args.profile / "logs" / "timing.csv", rows)
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
