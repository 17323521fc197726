"""Execute the notebooks in order with the parameters of a profile.

    python -m icprobe.runner [smoke|laptop|paper] [-p NAME VALUE ...] [--only 01,03] [--fresh]

`run_all.sh` calls this inside the right environment. Everything a user can get wrong is checked
before anything runs. Executed copies, one log per run and the table of minutes go to
`figures/<profile>/`, or to the folder given with `-p output_dir FOLDER`.
"""

import argparse
import ast
import contextlib
import csv
import difflib
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
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color
from traitlets import Unicode, default
from traitlets.config import Config

from icprobe import __version__, machine, paths
from icprobe.assets import Unavailable

log = logging.getLogger("icprobe.runner")


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to write instead."""


@dataclass(frozen=True)
class Notebook:
    """One notebook and the parameters it declares, with their defaults."""

    path: Path
    defaults: dict[str, object]

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


# ---------------------------------------------------------------- what there is, and what is asked


def read_parameters(path: Path) -> dict[str, object]:
    """Return the names and defaults in the notebook's cell tagged `parameters`.

    Raises:
        UsageError: there is not exactly one such cell, or it holds anything but literals.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except nbformat.reader.NotJSONError:
        raise UsageError(f"{path.name} is not a notebook (it is not valid JSON)") from None
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise UsageError(f"{path.name} has {len(cells)} cells tagged 'parameters', it needs one")
    try:
        body = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise UsageError(f"{path.name}, parameters cell: {error}") from None
    defaults = {}
    for line in body:
        try:
            (target,) = line.targets
            defaults[target.id] = ast.literal_eval(line.value)
        except (AttributeError, TypeError, ValueError):
            raise UsageError(
                f"{path.name}, parameters cell: expected NAME = literal, found "
                f"'{ast.unparse(line)}'"
            ) from None
    return defaults


def find_notebooks(root: Path) -> list[Notebook]:
    """Return all numbered notebooks under `root`, in order."""
    found = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
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
    """Return the parameters in `notebooks/profiles/<profile>.yaml`."""
    folder = root / "notebooks" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if profile not in known:
        close = _did_you_mean(profile, known)
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
    """Return the parameters for each chosen notebook; every name and type is checked first.

    Args:
        notebooks: All notebooks: a name in the profile must be declared by one of them.
        chosen: The notebooks to run: an override must be declared by one of these.
        profile: Values from the profile; each notebook gets those that it declares.
        source: File name of the profile, for messages.
        overrides: Values as typed after -p; they win over the profile.
        fresh: Pass `fresh=True` to each notebook that declares it.
    """
    for name in profile:
        _check_declared(name, notebooks, notebooks, source)
    for name in overrides:
        _check_declared(name, chosen, notebooks, "-p")
    for notebook in notebooks:
        _matching(profile, notebook, source)
    planned = []
    for notebook in chosen:
        parameters = _matching(profile, notebook, source)
        if fresh and "fresh" in notebook.defaults:
            parameters["fresh"] = True
        parsed = {
            name: parse(text, notebook.defaults[name])
            for name, text in overrides.items()
            if name in notebook.defaults
        }
        planned.append(parameters | _matching(parsed, notebook, "-p"))
    return planned


def parse(text: str, default: object) -> object:
    """Return what was typed after -p as the type of the notebook's default, where that is possible.

    A default of str keeps the text as it is. Anything that does not fit comes back as the most
    natural type, so that the type check can say what was given.
    """
    if isinstance(default, str):
        return text
    if isinstance(default, list | dict) or (default is None and text.startswith(("[", "{"))):
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def _matching(values: dict[str, object], notebook: Notebook, source: str) -> dict[str, object]:
    """Return those of `values` that the notebook declares, with their types checked."""
    return {
        name: _typed(name, value, notebook, source)
        for name, value in values.items()
        if name in notebook.defaults
    }


def _typed(name: str, value: object, notebook: Notebook, source: str) -> object:
    """Return `value` if it has the type of the declared default.

    An int will do for a float. None, "no limit" in many parameters, is for the notebook to judge.
    """
    default = notebook.defaults[name]
    if default is None or type(value) is type(default):
        return value
    if value is None and not isinstance(default, bool):
        return None
    if type(default) is float and type(value) is int:
        return float(value)  # 1 and 1.0 must not make two different score stores
    expected, given = type(default).__name__, type(value).__name__
    message = (
        f"{source}: {name} is {given} {value!r}, but {notebook.name} expects {expected} "
        f"(its default is {default!r})"
    )
    if type(default) in (int, float) and isinstance(value, str) and _is_number(value):
        message += f". YAML reads it as text: write {_yaml_number(value)}"
    raise UsageError(message)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _yaml_number(text: str) -> str:
    """Return `text` as PyYAML wants it: 1e-4 needs a dot and a signed exponent, 1.0e-4."""
    mantissa, _, exponent = text.lower().partition("e")
    if not exponent:
        return f"{text} without quotes"
    return f"{mantissa}{'' if '.' in mantissa else '.0'}e{int(exponent):+d}"


def _check_declared(
    name: str, chosen: list[Notebook], notebooks: list[Notebook], source: str
) -> None:
    if any(name in notebook.defaults for notebook in chosen):
        return
    elsewhere = [notebook.name for notebook in notebooks if name in notebook.defaults]
    if elsewhere:
        raise UsageError(
            f"{source} {name}: none of the notebooks chosen with --only declares it "
            f"({', '.join(elsewhere)} does)"
        )
    declared = sorted({name for notebook in notebooks for name in notebook.defaults})
    raise UsageError(
        f"{source} {name}: no notebook declares this parameter."
        f"{_did_you_mean(name, declared)} There are: {', '.join(declared)}"
    )


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known)
    return f" Did you mean {' or '.join(close)}?" if close else ""


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
    minute while a cell runs. It also takes the notebook's prints (`write`, `flush`) for the log.
    """

    def __init__(self, name: str, cells: int, stream: TextIO):
        self.name, self.cells, self.stream = name, cells, stream
        self.cell = 0
        self.source = ""
        self.printed = ""  # the last line, shown beside the cell
        self._unfinished = ""  # text since the last line break, such as a progress bar
        self._started = time.monotonic()
        self._redrawn = stream.isatty()
        self._clear = "\r\x1b[K" if self._redrawn else ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_showing, daemon=True)

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
        self._show()

    def write(self, text: str) -> None:
        """Take what the notebook prints."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._log_line(line)
            if ": reused " in line:  # what a run did not compute is worth a line of its own
                self.stream.write(f"{self._clear}      {_visible(line)}\n")
        for line in [*lines, self._unfinished]:
            self.printed = _visible(line) or self.printed

    def flush(self) -> None:
        """Do nothing; papermill calls this after each write."""

    def _log_line(self, line: str) -> None:
        if _visible(line):
            log.info("    | %s", _visible(line))

    def _keep_showing(self) -> None:
        while not self._stop.wait(1 if self._redrawn else 60):
            self._show()

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
    status, report = "failed", ""
    try:
        with progress:
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

    row = Row(notebook.name, progress.minutes, status)
    if status == "done":
        partial.replace(copy)
        failed.unlink(missing_ok=True)
        return row
    if status == "skipped":
        partial.unlink(missing_ok=True)
        say(f"\nSKIPPED: {notebook.name}\n\n{_indent(report)}\n")
        return Row(notebook.name, None, status)  # what it took says nothing about the notebook
    if partial.exists():
        partial.replace(failed)
    if status == "failed":
        head = _indent("\n".join(progress.source.splitlines()[:6]))
        say(f"\nFAILED: {notebook.name}, cell In [{progress.cell}]\n\n{head}\n\n{report}\n")
    say(f"half-executed copy: {paths.shown(failed)}")
    return row


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
    lines = [f"{'notebook':<{width}}  minutes  status"]
    for row in rows:
        minutes = "-" if row.minutes is None else f"{row.minutes:.2f}"
        lines.append(f"{row.notebook:<{width}}  {minutes:>7}  {row.status}")
    return "\n".join(lines)


def write_csv(path: Path, records: list[dict[str, object]]) -> None:
    """Write records as a CSV file, by way of a temporary name."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    temporary.replace(path)


def run_records(rows: list[Row]) -> list[dict[str, object]]:
    """Return the records of run.csv."""
    return [
        {
            "notebook": row.notebook,
            "minutes": "" if row.minutes is None else f"{row.minutes:.2f}",
            "status": row.status,
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
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    # results made with another output_dir must not overwrite those of the profile
    folder = root / Path(overrides.get("output_dir", f"figures/{args.profile}")).expanduser()
    log_file = folder / "logs" / time.strftime("%Y%m%d-%H%M%S.log")
    with logging_to(log_file):
        command = shlex.join(["./run_all.sh", *argv])
        log.info("%s\nicprobe %s, Python %s", command, __version__, platform.python_version())
        say(f"profile {args.profile}: {len(chosen)} notebook(s), results in {paths.shown(folder)}")
        rows = run(chosen, planned, folder, log_file, root)
        say(f"\n{table(rows)}\n\nlog: {paths.shown(log_file)}")
    statuses = {row.status for row in rows}
    if statuses <= {"done", "skipped"}:
        # only a fresh run of the profile as it stands may say how long its notebooks take
        anew = args.fresh or profile.get("fresh", False)
        if anew and not overrides and "done" in statuses:
            write_csv(folder / "logs" / "timing.csv", timing_records(rows))
        return 0
    return 130 if "interrupted" in statuses else 1


def command(root: Path = paths.ROOT) -> None:
    """Set up this process for running notebooks, run the command line, and exit."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # as papermill's own command does
    os.environ.pop("MPLBACKEND", None)  # kernels choose theirs, so that figures show in the copies
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no kernel is left behind
    try:
        sys.exit(main(root=root))
    except KeyboardInterrupt:  # between two notebooks
        sys.exit(130)


if __name__ == "__main__":
    command()
