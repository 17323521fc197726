"""Run one notebook with every combination of some parameters' values, and collect a table of each.

    ./run_all.sh python -m icprobe.sweep NOTEBOOK [--profile PROFILE] [-p NAME VALUE VALUE ...] ...
        [--table findings] [--output figures/sweep] [--fresh]

Each combination has a folder of its own below the output folder, for its figures, tables and
executed copy, and all share one folder of finished scores, so nothing is scored twice. Names and
values are checked before anything runs. A combination that is finished is not run again: after an
interruption, or with more values, the same command goes on.
"""

import argparse
import itertools
import logging
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from icprobe import paths, provenance, runner
from icprobe.parameters import ParameterError
from icprobe.runner import Notebook, UsageError, say
from icprobe.scores import store

log = logging.getLogger("icprobe.sweep")

OPTIONS = ("-p", "--parameter", "--profile", "--table", "--output", "--fresh", "-h", "--help")
# what a sweep sets itself, and how to say it
OWN = {"output_dir": "--output", "profile": "--profile", "fresh": "--fresh"}


@dataclass(frozen=True)
class Combination:
    """One point of the grid.

    Attributes:
        swept: Its values by name, of the parameters that differ or are set with -p.
        parameters: All that the notebook is given.
        folder: Where its results go; of the same values always the same one.
        copy: The executed copy, which is there once it is finished.
    """

    swept: dict[str, object]
    parameters: dict[str, object]
    folder: Path
    copy: Path

    @property
    def name(self) -> str:
        """Its values, for messages."""
        return (
            ", ".join(f"{name} {value!r}" for name, value in self.swept.items()) or "as it stands"
        )


def split_grid(argv: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Take every `-p NAME VALUE VALUE ...` out of `argv`; return the rest, and values as text.

    Values end at the next option. Values given twice count once.

    Raises:
        UsageError: If a name has no value or is there twice.
    """
    rest, grid = [], {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word not in ("-p", "--parameter"):
            rest.append(word)
            continue
        values = []
        while words and words[0].partition("=")[0] not in OPTIONS:
            values.append(words.pop(0))
        name, *values = values or [""]
        if not values:
            raise UsageError(f"-p {name}".rstrip() + ": write -p NAME VALUE VALUE ...")
        if name in grid:
            raise UsageError(f"-p {name}: write all its values after one -p")
        grid[name] = list(dict.fromkeys(values))
    return rest, grid


def find(notebooks: list[Notebook], wanted: str) -> Notebook:
    """Return the notebook of this number, name or path.

    Raises:
        UsageError: If there is none.
    """
    for notebook in notebooks:
        if Path(wanted).stem in (notebook.name, str(notebook.number), f"{notebook.number:02}"):
            return notebook
    names = ", ".join(notebook.name for notebook in notebooks)
    raise UsageError(f"there is no notebook '{wanted}'. There are: {names}")


def combinations(
    notebook: Notebook,
    grid: dict[str, list[str]],
    profile: dict[str, object],
    source: str,
    output: str,
    fresh: bool,
    root: Path,
) -> list[Combination]:
    """Return all combinations of the grid's values, checked.

    Args:
        notebook: What is to be run.
        grid: Values by parameter, as text, see `split_grid`.
        profile: What the profile says.
        source: File name of the profile, for messages.
        output: Folder of all results; a relative path starts at the root.
        fresh: Whether the notebook is to reuse nothing, either.
        root: Of the checkout.

    Raises:
        UsageError: If a name is unknown or not the sweep's to set, or values are wrong; names all.
    """
    for name in grid.keys() & OWN.keys():
        raise UsageError(f"-p {name}: a sweep sets this itself, see {OWN[name]}")
    if "output_dir" not in notebook.declared:
        raise UsageError(f"{notebook.name} has no output_dir, so combinations would share one")
    found, wrong, known = [], {}, {}
    usual = notebook.defaults | runner.merged(profile, notebook)
    for texts in itertools.product(*grid.values()):
        overrides = dict(zip(grid, texts, strict=True))
        try:
            (given,) = runner.plan([notebook], [notebook], profile, source, overrides, False)
        except UsageError as error:
            wrong |= dict.fromkeys(map(str.strip, str(error).splitlines()))
            continue
        if "fresh" in notebook.declared:  # scores are shared: what one made is there for the next
            given["fresh"] = fresh
        swept = {name: given[name] for name in grid}
        place = Path(output) / notebook.name / _folder_name(notebook.defaults | given, usual, known)
        given["output_dir"] = str(place)
        at = root / place.expanduser()
        copy = at / "notebooks" / notebook.path.name
        found.append(Combination(swept, given, at, copy))
    if wrong:
        raise UsageError("\n       ".join(wrong))
    return found


def _folder_name(values: dict[str, object], usual: dict[str, object], known: dict) -> str:
    """Return the name of a combination's folder: what is not as usual, and a hash of what counts.

    That is all values, and what the model's and the data's names stand for, as far as it can be
    told. Where things are and what is reused changes no result, and so no name.
    """
    sources = provenance.sources(values, known)
    sources = {name: one for name, one in sources.items() if "unknown" not in one}
    values = {k: v for k, v in values.items() if k not in ("output_dir", "scores_dir", "fresh")}
    others = "_".join(f"{k} {v}" for k, v in values.items() if v != usual[k])
    readable = re.sub(r"[^a-zA-Z0-9.]+", "-", others)[:60].strip("-")
    return store.key(readable or "unchanged", {**values, "sources": sources})


def run(
    notebook: Notebook, planned: list[Combination], fresh: bool, log_file: Path, root: Path
) -> dict[int, str]:
    """Run all combinations that are not finished; return why others are not, by their number.

    A combination that fails does not stop the rest; an interruption by the user does.

    Args:
        notebook: What is run.
        planned: The combinations.
        fresh: Run finished ones, too.
        log_file: Where kernels write their own messages.
        root: Of the checkout: the kernels' working directory.
    """
    unfinished = {}
    for k, one in enumerate(planned):
        say(f"[{k + 1}/{len(planned)}] {notebook.name}: {one.name}")
        if one.copy.exists() and not fresh:
            say("      finished before")
            continue
        one.copy.unlink(missing_ok=True)
        one.copy.parent.mkdir(parents=True, exist_ok=True)
        log.info("parameters: %s", one.parameters)
        row = runner.execute(notebook, one.parameters, one.copy, log_file, root)
        if row.status == "done":
            say(f"      done in {row.minutes:.2f} minutes")
            continue
        unfinished[k] = row.error or row.status
        if row.status == "interrupted":
            break
    return unfinished


def collect(notebook: Notebook, planned: list[Combination], table: str) -> pd.DataFrame:
    """Return a table's rows of all finished combinations, what was swept in the first columns.

    Raises:
        UsageError: If a finished combination has no such table; names those it has.
    """
    number = notebook.name.partition("_")[0]
    found = []
    for one in planned:
        if not one.copy.exists():
            continue
        file = one.folder / f"{number}_{table}.csv"
        if not file.exists():
            names = sorted(f.stem.partition("_")[2] for f in one.folder.glob(f"{number}_*.csv"))
            raise UsageError(
                f"--table {table}: {notebook.name} wrote no {file.name}. It wrote: "
                f"{', '.join(names) or 'none'}"
            )
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)  # numbers stay as written
        taken = {n: f"{n} (parameter)" if n in frame else n for n in one.swept}
        for k, (name, value) in enumerate(one.swept.items()):
            frame.insert(
                k, taken[name], [value if isinstance(value, str) else repr(value)] * len(frame)
            )
        found.append(frame)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _arguments(argv: list[str], root: Path) -> argparse.Namespace:
    known = ", ".join(sorted(path.stem for path in (root / "notebooks/profiles").glob("*.yaml")))
    parser = argparse.ArgumentParser(
        prog="python -m icprobe.sweep",
        usage="%(prog)s NOTEBOOK [--profile PROFILE] [-p NAME VALUE VALUE ...] ... "
        "[--table TABLE] [--output FOLDER] [--fresh]",
        description="Run one notebook with every combination of some parameters' values, and "
        "collect one of its tables in a single file, with the values as first columns.",
        epilog="-p NAME VALUE VALUE ... gives a parameter's values, and may be repeated: all "
        "combinations are run. One value sets it for all of them (such as scores_dir, else the "
        "profile's, where all combinations share finished scores). NOTEBOOK stands before -p. "
        "Run the same command again to go on after an interruption or a failure: finished "
        "combinations are kept. Exit code: 0 all finished, 1 some did not, 2 wrong arguments, "
        "130 interrupted.",
    )
    parser.add_argument("notebook", metavar="NOTEBOOK", help="number or name, such as 01")
    parser.add_argument(
        "--profile", default="laptop", metavar="PROFILE", help=f"{known} (default laptop)"
    )
    parser.add_argument(
        "--table", default="findings", help="01_TABLE.csv is collected (default findings)"
    )
    parser.add_argument(
        "--output", default="figures/sweep", metavar="FOLDER", help="default figures/sweep"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run finished combinations again, reusing no scores"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, root: Path = paths.ROOT) -> int:
    """Run the command line; return the exit code: 0, 1 some failed, 2 usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        rest, grid = split_grid(argv)
        args = _arguments(rest, root)
        profile = runner.read_profile(root, args.profile)
        notebooks = runner.find_notebooks(root)
        notebook = find(notebooks, args.notebook)
        source = f"{args.profile}.yaml"
        runner.plan(notebooks, [notebook], profile, source, {}, False)  # names in all the profile
        shared = runner.merged(profile, notebook)
        planned = combinations(notebook, grid, shared, source, args.output, args.fresh, root)
    except (UsageError, ParameterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    folder = root / Path(args.output).expanduser()
    log_file = folder / "logs" / time.strftime("%Y%m%d-%H%M%S.log")
    with runner.logging_to(log_file):
        log.info("%s", shlex.join(["python -m icprobe.sweep", *argv]))
        say(f"{len(planned)} combination(s), results in {paths.shown(folder / notebook.name)}")
        unfinished = run(notebook, planned, args.fresh, log_file, root)
        for k, error in unfinished.items():
            say(f"\nnot finished: {planned[k].name}\n{error}")
        try:
            rows = collect(notebook, planned, args.table)
        except UsageError as error:
            say(f"\nerror: {error}")
            return 1
        if len(rows):
            file = folder / f"{notebook.number:02}_{args.table}.csv"
            with paths.replacing(file) as temporary:
                rows.to_csv(temporary, index=False)
            say(f"\ntable: {paths.shown(file)}, {len(rows)} rows")
        say(f"log: {paths.shown(log_file)}")
    if "interrupted" in unfinished.values():
        return 130
    return 1 if unfinished else 0


if __name__ == "__main__":
    runner.command(start=main)
