"""Execute the notebooks in order with the parameters of a profile.

    python -m icprobe.runner [smoke|laptop|paper] [-p NAME VALUE ...] [--only 01,03] [--fresh]

`run_all.sh` calls this inside the right environment. Everything a user can get wrong is checked
before anything runs. Executed copies, one log per run, the table of minutes and memory, run.json
(what made the results, see provenance.py) and report.html go to `figures/<profile>/`, or to the
folder given with `-p output_dir FOLDER`.
"""

import argparse
import contextlib
import csv
import itertools
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
import psutil
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color
from traitlets import Unicode, default
from traitlets.config import Config

from icprobe import __version__, machine, paths, provenance
from icprobe.artifact import report
from icprobe.assets import Unavailable
from icprobe.parameters import (
    Parameter,
    ParameterError,
    did_you_mean,
    fits,
    is_notebook,
    problems,
)
from icprobe.parameters import read as read_parameters

log = logging.getLogger("icprobe.runner")

# begins the names of sections in profiles; papermill's -f makes a variable of each name
SECTION = "for_"


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to write instead."""


@dataclass(frozen=True)
class Notebook:
    """One notebook and the parameters it declares."""

    path: Path
    declared: dict[str, Parameter]

    @property
    def defaults(self) -> dict[str, object]:
        """The values in the parameters cell, by name."""
        return {name: parameter.default for name, parameter in self.declared.items()}

    @property
    def name(self) -> str:
        """File name without the suffix, such as `01_icp_scoring`."""
        return self.path.stem

    @property
    def number(self) -> int:
        """The number that the file name starts with."""
        return int(re.match(r"\d+", self.name).group())


@dataclass
class Row:
    """One line of the closing table."""

    notebook: str
    minutes: float | None = None
    status: str = "not run"
    gib: float | None = None  # peak memory
    reused: list[str] = field(default_factory=list)  # what it said of finished scores
    scores: str = ""  # reused, reused in part, fresh; "" where it keeps none
    error: str = ""  # why it stopped
    sources: dict[str, dict] = field(default_factory=dict)  # see `provenance.sources`


# ---------------------------------------------------------------- what there is, and what is asked


def find_notebooks(root: Path) -> list[Notebook]:
    """Return all numbered notebooks under `root`, in order."""
    found = sorted(filter(is_notebook, (root / "notebooks").glob("[0-9]*.ipynb")))
    if not found:
        raise UsageError(f"no notebooks in {root / 'notebooks'}")
    return [Notebook(path, read_parameters(path)) for path in found]


def select(notebooks: list[Notebook], only: str | None) -> list[Notebook]:
    """Return the notebooks whose numbers `only` lists (such as "01,03"), or all of them."""
    if only is None:
        return notebooks
    known = {notebook.number for notebook in notebooks}
    wanted = set()
    for number in only.split(","):
        if not number.strip().isdecimal() or int(number) not in known:
            names = ", ".join(notebook.name for notebook in notebooks)
            raise UsageError(f"--only {only}: there is no notebook '{number}'. There are: {names}")
        wanted.add(int(number))
    return [notebook for notebook in notebooks if notebook.number in wanted]


def read_profile(root: Path, profile: str) -> dict[str, object]:
    """Return what `notebooks/profiles/<profile>.yaml` says.

    That is the parameters of all notebooks and, in the section `for_<notebook>`, a mapping of those
    that one gets instead of these; see `merged`.
    """
    folder = root / "notebooks" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if profile not in known:
        close = did_you_mean(profile, known)
        raise UsageError(f"unknown profile '{profile}'.{close} There are: {', '.join(known)}")
    path = folder / f"{profile}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path.name} must be a mapping of parameter names to values")
    return values


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take every `-p NAME VALUE` out of `argv`; return the rest, and the overrides as text.

    Not left to argparse, which refuses values that start with a dash, such as -1e-3 or "---".
    """
    rest, overrides = [], {}
    words = iter(argv)
    for word in words:
        if word not in ("-p", "--parameter"):
            rest.append(word)
            continue
        name, value = next(words, None), next(words, None)
        if value is None:
            raise UsageError(f"-p {name or ''}".rstrip() + ": write -p NAME VALUE")
        overrides[name] = value
    return rest, overrides


def plan(
    notebooks: list[Notebook],
    chosen: list[Notebook],
    profile: dict[str, object],
    source: str,
    overrides: dict[str, str],
    fresh: bool,
) -> list[dict[str, object]]:
    """Return the parameters for each chosen notebook; all names and values are checked first.

    Args:
        notebooks: All notebooks: a name in the profile must be declared by one of them.
        chosen: The notebooks to run: an override must be declared by one of these.
        profile: What the profile says; each notebook gets the shared values that it declares, and
            those in its own section in their place.
        source: File name of the profile, for messages.
        overrides: Values as typed after -p; they win over the profile.
        fresh: Pass `fresh=True` to each notebook that declares it.

    Raises:
        UsageError: If a name is unknown, or values are wrong; names all of these.
    """
    _check_sections(profile, notebooks, source)
    for name in profile:
        if not _is_section(name):
            _check_declared(name, notebooks, notebooks, source)
    for name in overrides:
        _check_declared(name, chosen, notebooks, "-p")
    planned, wrong = {}, {}
    for notebook in notebooks:
        values = merged(profile, notebook)
        origin = dict.fromkeys(values, source)
        if notebook in chosen:
            if fresh and "fresh" in notebook.declared:
                values["fresh"] = True
            for name, text in overrides.items():
                if name in notebook.declared:
                    values[name] = parse(text, notebook.declared[name])
                    origin[name] = "-p"
        for name, problem in _problems(notebook, values).items():
            where = wrong.setdefault(f"{origin.get(name, notebook.path.name)}: {problem}", [])
            where.append(notebook.name)
        planned[notebook.name] = {n: notebook.declared[n].converted(x) for n, x in values.items()}
    if wrong:
        lines = [f"{problem} ({', '.join(where)})" for problem, where in wrong.items()]
        raise UsageError("\n       ".join(lines))
    return [planned[notebook.name] for notebook in chosen]


def merged(profile: dict[str, object], notebook: Notebook) -> dict[str, object]:
    """Return what a profile gives to a notebook: its section, and what it declares of the rest."""
    shared = {name: value for name, value in profile.items() if name in notebook.declared}
    return shared | profile.get(f"{SECTION}{notebook.name}", {})


def _problems(notebook: Notebook, values: dict[str, object]) -> dict[str, str]:
    """Return what is wrong with values for a notebook, by name."""
    defaults = notebook.defaults
    # what the cell says anyway needs no judging, for which there may be much to import
    others = [name for name in values if repr(values[name]) != repr(defaults[name])]
    return problems(notebook.declared, defaults | values, others)


def parse(text: str, parameter: Parameter) -> object:
    """Return what was typed after -p as a value of the parameter's type, where that is possible.

    Where text is allowed it is kept as it is. Anything that does not fit comes back as the most
    natural type, so that the check can say what was given.
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    kind = parameter.kind
    if kind is not object and fits(text, kind):
        nothing = text.lower() in ("none", "null") and fits(None, kind)
        return None if nothing else text
    if text.strip().startswith(("[", "{")):
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def _is_section(name: object) -> bool:
    """Tell whether a key of a profile is a notebook's section."""
    return str(name).startswith(SECTION)


def _check_sections(profile: dict[str, object], notebooks: list[Notebook], source: str) -> None:
    """Raise UsageError where a section of a profile is of no notebook, or has what it lacks."""
    known = {f"{SECTION}{notebook.name}": notebook for notebook in notebooks}
    for key, section in profile.items():
        if not _is_section(key):
            continue
        if key not in known:
            raise UsageError(
                f"{source} {key}: there is no such notebook.{did_you_mean(str(key), known)} "
                f"There are: {', '.join(known)}"
            )
        if not isinstance(section, dict):
            raise UsageError(f"{source} {key}: expected a mapping of its parameters to values")
        for name in section:
            if name not in known[key].declared:
                raise UsageError(
                    f"{source} {key}: it does not declare {name}."
                    f"{did_you_mean(str(name), known[key].declared)} "
                    f"There are: {', '.join(known[key].declared)}"
                )


def _check_declared(
    name: str, chosen: list[Notebook], notebooks: list[Notebook], source: str
) -> None:
    if any(name in notebook.defaults for notebook in chosen):
        return
    elsewhere = [notebook.name for notebook in notebooks if name in notebook.defaults]
    if elsewhere:
        raise UsageError(
            f"{source} {name}: none of the notebooks chosen with --only declares it "
            f"({', '.join(elsewhere)} {'does' if len(elsewhere) == 1 else 'do'})"
        )
    declared = sorted({name for notebook in notebooks for name in notebook.defaults})
    raise UsageError(
        f"{source} {name}: no notebook declares this parameter."
        f"{did_you_mean(name, declared)} There are: {', '.join(declared)}"
    )


# ---------------------------------------------------------------------------- running one notebook


class EnvironmentKernelManager(AsyncKernelManager):
    """Starts kernels with the Python that runs this module.

    A kernel named python3 in the user's Jupyter folders may belong to another environment; with no
    folder to search, jupyter_client falls back to ipykernel of the running interpreter.
    """

    log_file = Unicode(help="where the kernel's own messages go").tag(config=True)

    @default("kernel_spec_manager")
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    async def start_kernel(self, **options: object) -> None:
        """Start the kernel; called by nbclient."""
        with Path(self.log_file).open("a", encoding="utf-8") as messages:
            await super().start_kernel(stderr=messages, **options)


class Progress:
    """Shows which notebook and cell run, for how long, and the last line that the cell printed.

    In a terminal this is one line, redrawn every second; elsewhere one line per cell, and one a
    minute while a cell runs. It also takes the notebook's prints (`write`, `flush`) for the log,
    and looks once a second how much memory the kernel holds.
    """

    def __init__(self, name: str, cells: int, stream: TextIO):
        self.name, self.cells, self.stream = name, cells, stream
        self.cell = 0
        self.source = ""
        self.printed = ""  # the last line, shown beside the cell
        self.reused: list[str] = []  # lines that say which finished scores there were
        self.peak = 0  # bytes held by the kernel and what it started, the most that was seen
        self._unfinished = ""  # text since the last line break, such as a progress bar
        self._started = time.monotonic()
        self._redrawn = stream.isatty()
        self._clear = "\r\x1b[K" if self._redrawn else ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_watching, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._log_line(self._unfinished)
        self.stream.write(self._clear)
        self.stream.flush()

    @property
    def minutes(self) -> float:
        """Minutes since the notebook started."""
        return (time.monotonic() - self._started) / 60

    def start_cell(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """Note that a cell begins (called by nbclient before each code cell)."""
        self._log_line(self._unfinished)
        self._unfinished = self.printed = ""
        self.cell += 1
        defaults = "parameters" in cell.metadata.get("tags", [])
        self.source = "default parameters" if defaults else cell.source
        log.info("%s, cell %d of %d\n%s", self.name, self.cell, self.cells, _indent(cell.source))
        self._measure()
        self._show()

    def write(self, text: str) -> None:
        """Take what the notebook prints."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._log_line(line)
            if ": reused " in line:  # what a run did not compute is worth a line of its own
                self.reused.append(_visible(line))
                self.stream.write(f"{self._clear}      {_visible(line)}\n")
        for line in [*lines, self._unfinished]:
            self.printed = _visible(line) or self.printed

    def flush(self) -> None:
        """Do nothing; papermill calls this after each write."""

    def _log_line(self, line: str) -> None:
        if _visible(line):
            log.info("    | %s", _visible(line))

    def _keep_watching(self) -> None:
        for second in itertools.count(1):
            if self._stop.wait(1):
                return
            self._measure()
            if self._redrawn or second % 60 == 0:
                self._show()

    def _measure(self) -> None:
        """Note the memory of all processes below this one: the kernel, and what it started."""
        held = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                held += process.memory_info().rss
                peak = machine.peak_memory(process.pid) * 2**30
                self.peak = max(self.peak, peak)  # in this order: it may not be a number
        self.peak = max(self.peak, held)

    def _show(self) -> None:
        seconds = int(time.monotonic() - self._started)
        line = f"{self.name}  cell {self.cell}/{self.cells}  {seconds // 60}:{seconds % 60:02d}"
        line += f"  {self.printed or self.source.split(chr(10))[0]}"
        if self._redrawn:
            line = self._clear + line[: shutil.get_terminal_size().columns - 1]
        else:
            line += "\n"
        self.stream.write(line)
        self.stream.flush()


def _visible(line: str) -> str:
    """Return what a terminal would show of a line: the text after the last carriage return."""
    parts = [part for part in strip_color(line).split("\r") if part.strip()]
    return parts[-1].rstrip() if parts else ""


def execute(
    notebook: Notebook, parameters: dict[str, object], copy: Path, log_file: Path, root: Path
) -> Row:
    """Execute one notebook; the executed copy appears as `copy` only when all cells ran.

    A copy that stopped half way is kept as `<name>.failed.ipynb`, and `copy` stays as it was.

    Returns:
        The row for the table, with status done, skipped, failed or interrupted; what is to be said
        about it has been said. A notebook is skipped where it raised `Unavailable`.
    """
    partial = copy.with_name(f"{notebook.name}.partial.ipynb")
    failed = copy.with_name(f"{notebook.name}.failed.ipynb")
    cells = nbformat.read(notebook.path, as_version=4).cells
    code_cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in cells)
    # papermill adds a cell with the parameters it is given
    progress = Progress(notebook.name, code_cells + bool(parameters), sys.stderr)
    status, report, sources = "failed", "", {}
    try:
        with progress:
            sources = provenance.sources(notebook.defaults | parameters)
            papermill.execute_notebook(
                notebook.path,
                partial,
                parameters,
                kernel_name="python3",
                language="python",
                cwd=root,
                progress_bar=False,
                stdout_file=progress,
                stderr_file=progress,
                kernel_manager_class=EnvironmentKernelManager,
                config=Config(EnvironmentKernelManager={"log_file": str(log_file)}),
                on_cell_execute=progress.start_cell,
                coalesce_streams=True,  # a progress bar leaves one line in the copy
                iopub_timeout=60,  # a busy machine may need more than the usual 4 s
            )
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        # nbclient's tasks for the cell are still open: asyncio would complain about each at exit
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    except PapermillExecutionError as error:
        if error.ename == Unavailable.__name__:  # raised in the kernel: only its name comes over
            status, report = "skipped", error.evalue
        else:
            report = _describe_error(error)
        log.error("%s", error)
    except DeadKernelError:
        report = (
            "The kernel died: most often the machine ran out of memory. Close other programs,\n"
            "run a smaller profile (./run_all.sh smoke), or lower n_train and max_length with -p."
        )
    except Exception as error:  # whatever Jupyter itself raises, such as a kernel that won't start
        report = f"{type(error).__name__}: {error}"
        log.exception("could not run %s", notebook.name)

    row = Row(notebook.name, progress.minutes, status, progress.peak / 2**30 or None)
    row.reused, row.error = progress.reused, report
    row.sources = _unchanged(sources, notebook, parameters) if status == "done" else sources
    row.scores = _scores(progress.reused, "fresh" in notebook.defaults)
    if status == "done":
        partial.replace(copy)
        failed.unlink(missing_ok=True)
        return row
    if status == "skipped":
        partial.unlink(missing_ok=True)
        say(f"\nSKIPPED: {notebook.name}\n\n{_indent(report)}\n")
        # what it took says nothing about the notebook
        return Row(notebook.name, None, status, error=report, sources=sources)
    if partial.exists():
        partial.replace(failed)
    if status == "failed":
        head = _indent("\n".join(progress.source.splitlines()[:6]))
        say(f"\nFAILED: {notebook.name}, cell In [{progress.cell}]\n\n{head}\n\n{report}\n")
    say(f"half-executed copy: {paths.shown(failed)}")
    return row


def _unchanged(
    sources: dict[str, dict], notebook: Notebook, parameters: dict[str, object]
) -> dict[str, dict]:
    """Return what a notebook started with, marking and saying what was changed while it ran."""
    now = provenance.sources(notebook.defaults | parameters)
    changed = [title for title in sources if now[title] != sources[title]]
    for title in changed:
        say(f"      {title}: changed while {notebook.name} ran; run.json has it as it was before")
    marked = {title: sources[title] | {"changed": True} for title in changed}
    return sources | marked


def _scores(reused: list[str], keeps: bool) -> str:
    """Return whether a notebook reused scores, by its lines such as "icp: reused 0 of 132 rows".

    Args:
        reused: The lines.
        keeps: Whether the notebook computes what it keeps (it has a parameter `fresh`).
    """
    counts = [re.search(r": reused (\d+) of (\d+)", line) for line in reused]
    there, all_of_them = (sum(int(c.group(i)) if c else 1 for c in counts) for i in (1, 2))
    if not there:
        return "fresh" if keeps or reused else ""
    return "reused" if there == all_of_them else "reused in part"


def _describe_error(error: PapermillExecutionError) -> str:
    """Return the error's name, message and the end of its traceback, without colours."""
    lines = strip_color("\n".join(error.traceback)).rstrip().splitlines()
    return f"{error.ename}: {error.evalue}\n\n" + _indent("\n".join(lines[-12:]))


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


def write_csv(path: Path, records: list[dict[str, object]]) -> None:
    """Write records as a CSV file, by way of a temporary name."""
    with (
        paths.replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, records[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def run_records(rows: list[Row]) -> list[dict[str, object]]:
    """Return the records of run.csv."""
    return [
        {
            "notebook": row.notebook,
            "minutes": "" if row.minutes is None else f"{row.minutes:.2f}",
            "status": row.status,
            "gib": "" if row.gib is None else f"{row.gib:.2f}",
            "scores": row.scores,
        }
        for row in rows
    ]


def timing_records(rows: list[Row]) -> list[dict[str, object]]:
    """Return the records of logs/timing.csv: minutes, and the machine that took them."""
    where = {
        "cores": machine.usable_cores(),
        "processor": machine.processor(),
        "icprobe": __version__,
    }
    return [
        {"notebook": row.notebook, "minutes": f"{row.minutes:.2f}"} | where
        for row in rows
        if row.status == "done"
    ]


def run(
    chosen: list[Notebook],
    planned: list[dict[str, object]],
    folder: Path,
    log_file: Path,
    root: Path,
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
        write_csv(folder / "run.csv", run_records(rows))
        if rows[i].status == "done":
            say(f"      done in {rows[i].minutes:.2f} minutes")
        elif rows[i].status != "skipped":
            break
    return rows


def write_up(
    rows: list[Row],
    chosen: list[Notebook],
    planned: list[dict[str, object]],
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
            "scores": row.scores,
            "reused": row.reused,
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


@contextlib.contextmanager
def logging_to(path: Path):
    """Write all log messages to `path`; warnings also appear in the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    to_terminal = logging.StreamHandler()
    to_terminal.setLevel(logging.WARNING)
    # failures are reported by `execute`, in full sentences
    to_terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.INFO)
    root.addHandler(to_file)
    root.addHandler(to_terminal)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(to_file)
        root.removeHandler(to_terminal)
        to_file.close()


def _arguments(argv: list[str], root: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        usage="run_all.sh [PROFILE] [-p NAME VALUE ...] [--only 01,03] [--fresh]",
        description="Execute the notebooks in order with the parameters of a profile.",
        epilog="-p NAME VALUE sets one parameter and may be repeated.",
    )
    known = ", ".join(sorted(path.stem for path in (root / "notebooks/profiles").glob("*.yaml")))
    parser.add_argument(
        "profile", nargs="?", default="laptop", metavar="PROFILE", help=f"{known} (default laptop)"
    )
    parser.add_argument("--only", metavar="01,03", help="run these notebooks only")
    parser.add_argument("--fresh", action="store_true", help="reuse nothing, compute all anew")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, root: Path = paths.ROOT) -> int:
    """Run the command line; return the exit code: 0, 1 failed, 2 usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        rest, overrides = split_overrides(argv)
        args = _arguments(rest, root)
        profile = read_profile(root, args.profile)
        notebooks = find_notebooks(root)
        chosen = select(notebooks, args.only)
        source = f"{args.profile}.yaml"
        planned = plan(notebooks, chosen, profile, source, overrides, args.fresh)
    except (UsageError, ParameterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    # results made with another output_dir must not overwrite those of the profile
    usual = f"figures/{args.profile}"
    own = {profile.get(f"{SECTION}{one.name}", {}).get("output_dir", usual) for one in chosen}
    place = overrides.get("output_dir", own.pop() if len(own) == 1 else usual)
    folder = root / Path(place).expanduser()
    log_file = folder / "logs" / time.strftime("%Y%m%d-%H%M%S.log")
    with logging_to(log_file):
        command = shlex.join(["./run_all.sh", *argv])
        made = provenance.of_run(command, args.profile, root)
        log.info("%s\nicprobe %s, Python %s", command, __version__, platform.python_version())
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
    if statuses <= {"done", "skipped"}:
        # only a fresh run of the profile as it stands may say how long its notebooks take
        anew = args.fresh or profile.get("fresh", False)
        if anew and not overrides and "done" in statuses:
            minutes = root / "figures" / args.profile / "logs" / "timing.csv"
            minutes.parent.mkdir(parents=True, exist_ok=True)
            write_csv(minutes, timing_records(rows))
        return 0
    return 130 if "interrupted" in statuses else 1


def command(root: Path = paths.ROOT, start: Callable[..., int] = main) -> None:
    """Set up this process for running notebooks, run a command line, and exit."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # as papermill's own command does
    os.environ.pop("MPLBACKEND", None)  # kernels choose theirs, so that figures show in the copies
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no kernel is left behind
    try:
        sys.exit(start(root=root))
    except KeyboardInterrupt:  # between two notebooks
        sys.exit(130)


if __name__ == "__main__":
    command()
