"""Examples as `datasets.Dataset`: suites over BIG-bench, one's own files, hub data sets.

Every data set has the columns id, prompt, completion, task, content, type (all strings, id
unique) and options (the completions to choose from, or None), whatever else the source has beside
them. Prompt and completion are TRL's form, so a selected subset trains as it is. data/README.md
describes suites and files.
"""

import difflib
import hashlib
import itertools
import json
import re
import string
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

from icprobe import assets, paths

COLUMNS = ("id", "prompt", "completion", "task", "content", "type")
SPLITS = ("train", "query", "evaluation")
_ROWS_VERSION = 1  # raise it when the same suite text and seed begin to give other rows
_CANDIDATES = 80  # examples looked at per row that a task is to give: enough, and quick
_SHOWN = 20  # problems listed in one error

# a task with at most so many different answers is one of labels, and they are its options; label
# tasks of the suites have two to seven, all others at least twenty (object_counting's numbers)
_LABELS = 10


class DataError(ValueError):
    """Data or a suite are not as they should be; the message names file, place and reason."""


def load(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str | None] | None = None,
) -> datasets.Dataset:
    """Load examples.

    Args:
        source: A suite's name (data/suites/NAME.yaml), a .jsonl or .parquet file (relative paths
            start at the repository root), or a hub name `owner/name`, optionally `@revision`.
        split: "train", "query" or "evaluation" of a suite. A file, and a hub data set with a
            single split, is used whole whatever is asked for; other hub data sets need the name
            of one of their splits.
        limit: How many examples to take; all by default. Suites take turns over their tasks, so
            that every prefix is balanced; files and hub data sets are sampled without
            replacement, in the order of the source.
        seed: Which examples a limit takes, and their order in a suite. It never moves an example
            from one split of a suite to another.
        columns: For files and hub data sets, what makes each column: another column's name, or
            a template with columns in braces, such as {"completion": " {output}"}; None leaves a
            column of the source out, such as options of another form.

    Returns:
        One row per example: id, prompt, completion, task, content, type, options, and other
        columns of the source. Where a file does not say, id is "<stem>-00012" for its line (row)
        12, task is the stem, content and type are "unknown". Options are different completions,
        this example's among them, or None where the answer is free.

    Raises:
        DataError: If anything is wrong with the data; all problems are listed together.
        assets.AssetError: If something must be fetched and cannot be.
    """
    return load_with_identity(source, split, limit, seed, columns)[0]


def load_with_identity(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str | None] | None = None,
) -> tuple[datasets.Dataset, dict]:
    """Return the rows of `load` and their `identity`; the hash is of the bytes that were parsed."""
    kind = _kind(source)
    asked = source, split, limit, seed, columns
    if kind == "suite":
        _check_split(source, split, columns)
        content = _suite_file(source).read_bytes()
        table = _dataset(_suite_rows(_parse_suite(source, content), split, seed), str(source))
        size = _checked_limit(limit, len(table), source)
        return table.select(range(size)), _identity(kind, _sha256(content), *asked)
    if kind == "file":
        content = paths.resolve(source).read_bytes()
        table, version = _parse_file(paths.resolve(source), content, columns), _sha256(content)
    else:
        version = assets.hub_revision(str(source), "dataset")
        table = _load_hub(*version, split, columns)
    size = _checked_limit(limit, len(table), source)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(table))[:size])
    return table.select(chosen), _identity(kind, version, *asked)


def identity(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str | None] | None = None,
) -> dict:
    """Return what determines the rows that `load` gives, without loading or downloading them.

    Args:
        source: As for `load`, like all others.
        split: See `load`.
        limit: See `load`.
        seed: See `load`.
        columns: See `load`.

    Returns:
        JSON-able: source, version, limit, seed, and the hash of the suite's text and of the
        archive, the hash of the file, or the hub revision.

    Raises:
        DataError: If there is no such source or split.
        assets.AssetError: If the hub revision is neither given nor cached, and cannot be asked.
    """
    kind = _kind(source)
    if kind == "suite":
        _check_split(source, split, columns)
    if kind == "hub":
        version = assets.hub_revision(str(source), "dataset")
    else:
        file = _suite_file(source) if kind == "suite" else paths.resolve(source)
        with file.open("rb") as stream:
            version = hashlib.file_digest(stream, "sha256").hexdigest()
    return _identity(kind, version, source, split, limit, seed, columns)


def _identity(
    kind: str,
    version: str | tuple[str, str],
    source: str | Path,
    split: str | None,
    limit: int | None,
    seed: int,
    columns: Mapping[str, str | None] | None,
) -> dict:
    """Return the identity of a suite or a file with this hash, or of a hub (name, revision)."""
    who = {"source": str(source), "version": _ROWS_VERSION, "limit": limit, "seed": seed}
    if kind == "suite":
        archive = assets.BIGBENCH.sha256
        return {**who, "split": split, "sha256": version, "archive_sha256": archive}
    who |= {"seed": None if limit is None else seed, "columns": dict(columns or {})}
    if kind == "file":
        return {**who, "source": paths.resolve(source).name, "sha256": version}
    name, revision = version
    return {**who, "source": name, "revision": revision, "split": split}


def check_disjoint(
    train: datasets.Dataset,
    queries: datasets.Dataset,
    warn: bool = False,
    names: tuple[str, str] = ("training example", "query"),
) -> None:
    """Make sure that no query is also a training example (equal text but for white space).

    Args:
        train: Training examples.
        queries: Queries.
        warn: Warn instead of raising, for data where repetitions may be meant.
        names: What rows of the two are called in messages, where they are something else.

    Raises:
        DataError: If texts are equal; the message lists the ids.
    """
    known = {plain_text(row): row["id"] for row in train.select_columns(list(COLUMNS))}
    same = [(row["id"], known[plain_text(row)]) for row in queries if plain_text(row) in known]
    if same:
        one, other = names
        pairs = _listed([f"{other} {query!r} = {one} {theirs!r}" for query, theirs in same])
        texts = "1 text is" if len(same) == 1 else f"{len(same)} texts are"
        message = f"{texts} both {other} and {one}:\n{pairs}"
        if not warn:
            raise DataError(f"{message}\nTake what is on both sides out of one of them.")
        warnings.warn(message, stacklevel=2)


def suites() -> list[str]:
    """Return the names of all suites."""
    return sorted(file.stem for file in paths.SUITES.glob("*.yaml"))


def is_suite(source: str | Path) -> bool:
    """Tell whether `source` names a suite, whose splits are disjoint by construction."""
    return _kind(source) == "suite"


def _kind(source: str | Path) -> str:
    """Tell whether `source` is a "suite", a "file" or a "hub" name."""
    name, path = str(source), paths.resolve(source)
    if re.fullmatch(r"[\w-]+", name) and _suite_file(name).is_file():
        return "suite"
    if path.suffix in {".jsonl", ".parquet"}:
        if path.is_file():
            return "file"
        beside = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"{name}: no such file, looked for {path}{_close(path.name, beside)}")
    if path.exists() or Path(name).is_absolute() or name.startswith("."):
        raise DataError(f"{name}: data files end in .jsonl or .parquet")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return "hub"
    raise DataError(f"{name!r} is no suite, no file and no hub name{_close(name, suites())}")


# ------------------------------------------------------------------------------------- suites


@dataclass(frozen=True)
class Task:
    """One task of a suite; the fields are the keys of its YAML, with defaults filled in."""

    bigbench: str
    content: str
    type: str
    instruction: str
    label: str
    input_chars: list[int]
    completion_chars: list[int]
    passage: str
    drop: str
    balance: bool
    splits: dict[str, int]

    def example(self, raw: dict) -> dict[str, str]:
        """Return prompt, completion and passage of one entry of a task.json."""
        lines = (line.rstrip() for line in raw["input"].strip().splitlines())
        text = "\n".join(line for line in lines if not (self.drop and re.match(self.drop, line)))
        found = re.search(self.passage, text)
        return {
            "prompt": f"{self.instruction}\n{text}\n{self.label}",
            "completion": f" {_target(raw)}",
            "passage": re.sub(r"\W+", " ", found[0] if found else text).strip().casefold(),
        }

    def fits(self, example: dict[str, str]) -> bool:
        """Tell whether input and completion are within the length limits (in characters)."""
        frame = len(self.instruction) + len(self.label) + 2
        lengths = len(example["prompt"]) - frame, len(example["completion"]) - 1
        limits = self.input_chars, self.completion_chars
        return all(low <= n <= high for n, (low, high) in zip(lengths, limits, strict=True))


@dataclass(frozen=True)
class Suite:
    """A suite: named tasks and the seed that deals their passages out to the splits."""

    name: str
    description: str
    seed: int
    splits: dict[str, int]
    tasks: dict[str, Task]


def read_suite(name: str) -> Suite:
    """Read and check data/suites/NAME.yaml.

    Raises:
        DataError: If a key is unknown, missing or of the wrong kind; names file and key.
    """
    return _parse_suite(name, _suite_file(name).read_bytes())


def _parse_suite(name: str | Path, content: bytes) -> Suite:
    """Check what a suite's file holds; for errors see `read_suite`."""
    where = paths.shown(_suite_file(name))
    try:
        suite = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not readable as YAML: {error}") from error
    frame = {"instruction": str, "label": str}
    lengths = {"input_chars": list, "completion_chars": list}
    choices = {"passage": str, "drop": str, "balance": bool}
    top = {"description": str, "seed": int, "splits": dict, "types": dict, "tasks": dict}
    _check_keys(where, suite, {**top, **lengths}, choices)
    for key, settings in suite["types"].items():
        _check_keys(f"{where}: types.{key}", settings, frame)
    _check_splits(where, suite["splits"])
    tasks = {}
    for key in sorted(suite["tasks"]):  # sorted: the order in the file must not matter
        at, own = f"{where}: tasks.{key}", suite["tasks"][key]
        required = {"bigbench": str, "content": str, "type": str}
        _check_keys(at, own, required, {**frame, **lengths, **choices, "splits": dict})
        if own["type"] not in suite["types"]:
            raise DataError(
                f"{at}.type: no type {own['type']!r}{_close(own['type'], suite['types'])}"
            )
        shared = {key: suite[key] for key in [*lengths, *choices, "splits"] if key in suite}
        merged = {"passage": r"(?s).+", "drop": "", "balance": False, **shared}
        tasks[key] = Task(**{**merged, **suite["types"][own["type"]], **own})
        _check_values(at, tasks[key])
    return Suite(name, suite["description"], suite["seed"], suite["splits"], tasks)


def _check_keys(where: str, given: object, required: dict, optional: dict | None = None) -> None:
    """Raise DataError unless `given` is a mapping with these keys and kinds of values."""
    known = {**required, **(optional or {})}
    if not isinstance(given, dict):
        raise DataError(f"{where}: expected a mapping, got {given!r}")
    for key, value in given.items():
        if key not in known:
            raise DataError(f"{where}: unknown key {key!r}{_close(str(key), known)}")
        if type(value) is not known[key]:
            raise DataError(f"{where}: {key} should be {known[key].__name__}, got {value!r}")
    for key in required:
        if key not in given:
            raise DataError(f"{where}: missing key {key!r}")


def _check_values(where: str, task: Task) -> None:
    """Raise DataError unless a task's limits, splits and expression make sense."""
    for key in ("input_chars", "completion_chars"):
        limits = getattr(task, key)
        if [type(n) for n in limits] != [int, int] or not 0 < limits[0] <= limits[1]:
            raise DataError(f"{where}: {key} should be two numbers, 0 < least <= most: {limits!r}")
    _check_splits(where, task.splits)
    if not task.label.strip() or task.label != task.label.rstrip():
        raise DataError(f"{where}: label {task.label!r} is empty or ends in white space")
    for key in ("passage", "drop"):
        try:
            re.compile(getattr(task, key))
        except re.error as error:
            raise DataError(f"{where}: {key} is no regular expression: {error}") from error


def _check_splits(where: str, splits: dict) -> None:
    """Raise DataError unless there is a number for each split, and no other."""
    if set(splits) != set(SPLITS) or any(type(n) is not int or n < 1 for n in splits.values()):
        raise DataError(f"{where}: splits should give a number > 0 for each of {SPLITS}: {splits}")


def _suite_rows(suite: Suite, split: str, seed: int) -> list[dict]:
    """Return all rows of one split, taking turns over the tasks."""
    files = assets.bigbench_tasks({task.bigbench for task in suite.tasks.values()})
    pools: dict[str, dict[str, list[dict]]] = {split: {} for split in SPLITS}
    prompts: set[str] = set()
    for name, task in suite.tasks.items():
        raw = json.loads(files[task.bigbench].read_bytes())["examples"]
        for part, rows in _deal(suite, name, raw, prompts).items():
            pools[part][name] = rows
    _check_pools(suite, pools)
    ordered = []
    for name, rows in pools[split].items():
        order = _rng(seed, name).permutation(len(rows))
        ordered.append(_take_turns([rows[i] for i in order], suite.tasks[name].balance))
    return _interleave(ordered)


def _deal(suite: Suite, name: str, raw: list[dict], prompts: set[str]) -> dict[str, list[dict]]:
    """Deal the examples of one task out to the splits, by passage.

    A passage (the text that several examples share) goes to one split as a whole, the same one in
    all tasks of the suite, so no query is about a text seen in training. Fresh passages come
    first: a second example of a passage is taken only when the first ones are used up.
    """
    task, dealt, uses = suite.tasks[name], defaultdict(list), defaultdict(int)
    labels = _labels(raw)
    order = _rng(suite.seed, name).permutation(len(raw))
    for i in order[: _CANDIDATES * sum(task.splits.values())].tolist():
        example = task.example(raw[i])
        if not task.fits(example) or example["prompt"] in prompts:
            continue
        prompts.add(example["prompt"])
        passage = example.pop("passage")
        kind = {"task": name, "content": task.content, "type": task.type}
        row = {"id": f"{name}-{i:05d}", **example, **kind, "options": _options(raw[i], labels)}
        dealt[_split_of(suite, passage)].append((uses[passage], row))
        uses[passage] += 1
    pools = {}
    for split in SPLITS:
        rows = [row for _, row in sorted(dealt[split], key=lambda pair: pair[0])]
        pools[split] = _take_turns(rows, task.balance)[: task.splits[split]]
        if len(pools[split]) < task.splits[split]:
            raise DataError(
                f"suite {suite.name}, task {name}: {len(rows)} rows fit the {split} split, "
                f"{task.splits[split]} are asked for"
            )
    return pools


def _split_of(suite: Suite, passage: str) -> str:
    """Return the split of a passage, by a seeded hash; shares follow the suite's split sizes."""
    digest = hashlib.blake2b(f"{suite.seed}:{passage}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest) / 2**64 * sum(suite.splits.values())
    edges = itertools.accumulate(suite.splits[split] for split in SPLITS)
    return next(split for split, edge in zip(SPLITS, edges, strict=True) if point < edge)


def _check_pools(suite: Suite, pools: dict[str, dict[str, list[dict]]]) -> None:
    """Raise DataError if a text of the suite is in two splits, or a prompt twice in one."""
    seen: dict[str, str] = {}
    for split, tasks in pools.items():
        rows = [row for rows in tasks.values() for row in rows]
        if len({row["prompt"] for row in rows}) < len(rows):
            raise DataError(f"suite {suite.name}: equal prompts in the {split} split")
        for row in rows:
            if seen.setdefault(plain_text(row), split) != split:
                raise DataError(f"suite {suite.name}: {row['id']} is in two splits")


def _target(raw: dict) -> str:
    """Return the answer: the best-scored option, else the first target that is not empty."""
    if raw.get("target_scores"):
        return max(raw["target_scores"], key=raw["target_scores"].get).strip()
    targets = raw["target"] if isinstance(raw["target"], list) else [raw["target"]]
    return next((target.strip() for target in targets if target.strip()), "")


def _labels(raw: list[dict]) -> list[str]:
    """Return all answers of a task without scored options, if they are few; else none."""
    if any(entry.get("target_scores") for entry in raw):
        return []
    answers = {_target(entry) for entry in raw}
    return sorted(answers) if len(answers) <= _LABELS else []


def _options(raw: dict, labels: list[str]) -> list[str] | None:
    """Return the completions to choose from: the scored options, else the task's labels."""
    answers = (answer.strip() for answer in raw.get("target_scores") or labels)
    options = [f" {answer}" for answer in dict.fromkeys(answers) if answer]
    return options if len(options) > 1 else None


def _take_turns(rows: list[dict], balance: bool) -> list[dict]:
    """Order rows so that the completions take turns, if they should."""
    if not balance:
        return rows
    groups = defaultdict(list)
    for row in rows:
        groups[row["completion"]].append(row)
    return _interleave([groups[completion] for completion in sorted(groups)])


def _interleave(groups: list[list[dict]]) -> list[dict]:
    """Take one of each group in turn, as long as it has one."""
    return [row for turn in itertools.zip_longest(*groups) for row in turn if row is not None]


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _suite_file(name: str | Path) -> Path:
    return paths.SUITES / f"{name}.yaml"


def _check_split(source: str | Path, split: str | None, columns: object) -> None:
    if split not in SPLITS:
        raise DataError(f"suite {source}: split should be one of {SPLITS}, got {split!r}")
    if columns:
        raise DataError(f"suite {source}: columns are for files and hub data sets")


# ------------------------------------------------------------------------- files and the hub


def _parse_file(
    file: Path, content: bytes, columns: Mapping[str, str | None] | None
) -> datasets.Dataset:
    """Check what a .jsonl or .parquet file holds."""
    where, problems = paths.shown(file), []
    if file.suffix == ".jsonl":
        rows = _parse_jsonl(content, problems)
    else:
        try:
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{where}: not readable as Parquet: {error}") from error
        rows = list(enumerate(table.to_pylist(), start=1))
    return _examples(rows, file.stem, where, columns, problems)


def _parse_jsonl(content: bytes, problems: list[tuple[int, str]]) -> list[tuple[int, dict]]:
    """Return (line number, object) of each line, adding (line number, reason) for a bad one."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while lines and not lines[-1].strip():  # blank lines are fine at the end only
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            problems.append((number, "not UTF-8"))
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}".replace(": line 1 column", " at column")  # of this line
            problems.append((number, reason if line.strip() else "blank line"))
        else:
            if isinstance(row, dict):
                rows.append((number, row))
            else:
                problems.append((number, "not a JSON object"))
    return rows


def _load_hub(
    name: str, revision: str, split: str | None, columns: Mapping[str, str | None] | None
) -> datasets.Dataset:
    """Load a hub data set at a revision, and check it."""
    try:
        parts = datasets.load_dataset(name, revision=revision)
    except ValueError as error:  # such as several configurations to choose from
        raise DataError(f"{name}: {error}\nExport what you need to a .jsonl file.") from error
    if len(parts) > 1 and split not in parts:
        raise DataError(f"{name}: split should be one of {sorted(parts)}, got {split!r}")
    table = parts[split] if split in parts else next(iter(parts.values()))
    rows = list(enumerate(table.to_list(), start=1))
    return _examples(rows, name.split("/")[-1], name, columns, [])


def _examples(
    rows: list[tuple[int, dict]],
    stem: str,
    where: str,
    columns: Mapping[str, str | None] | None,
    problems: list[tuple[int, str]],
) -> datasets.Dataset:
    """Map columns, fill defaults, and raise one DataError with everything that is wrong."""
    _check_columns(rows, where, columns or {})
    examples, first = [], {}
    for number, row in rows:
        mapped, odd = _mapped(row, columns or {})
        row = {**row, **mapped}
        for key, default in _defaults(stem, number).items():
            if row.get(key) is None:
                row[key] = default
        found = [f"{key}: {reason}" for key in COLUMNS if (reason := _reason(key, row.get(key)))]
        if reason := _options_reason(row.get("options"), row.get("completion")):
            found.append(
                f"options: {reason} (a column mapping {{'options': None}} leaves them out)"
            )
        found += odd
        if not found and first.setdefault(row["id"], number) != number:
            found = [f"id: {row['id']!r} is also the id of line {first[row['id']]}"]
        problems += [(number, problem) for problem in found]
        examples.append(row)
    if not (examples or problems):
        raise DataError(f"{where}: no examples")
    if problems:
        raise DataError(_in_words(problems, rows, examples, where))
    return _dataset(examples, where)


def _in_words(
    problems: list[tuple[int, str]], rows: list[tuple[int, dict]], examples: list[dict], where: str
) -> str:
    """Return what is wrong with rows; what is wrong with all of them is said once."""
    absent = [
        key for key in ("prompt", "completion") if all(row.get(key) is None for row in examples)
    ]
    every = {f"{key}: missing" for key in absent if rows}
    left = [(number, problem) for number, problem in sorted(problems) if problem not in every]
    listed = _listed([f"{where}:{number}: {problem}" for number, problem in left])
    if every:
        known = sorted({key for _, row in rows for key in row})
        listed += (
            f"\nNo row has {' and '.join(absent)}: say which of the columns {known} make it, "
            'such as {"prompt": "{question}", "completion": " {answer}"} '
            "(train_columns, query_columns or evaluation_columns)"
        )
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return f"{count} in {where}:\n{listed.lstrip()}"


def _check_columns(rows: list, where: str, columns: Mapping[str, str | None]) -> None:
    """Raise DataError if the mapping has a column that does not exist on either side."""
    known = {key for _, row in rows for key in row}
    made = (*COLUMNS, "options")
    for key, value in columns.items():
        if key not in made:
            raise DataError(f"{where}: columns: unknown column {key!r}; known: {made}")
        try:
            names = _fields(value)
        except ValueError as error:
            raise DataError(f"{where}: columns: {key}: {value!r} is no template: {error}") from None
        for name in names:
            if rows and name not in known:
                raise DataError(f"{where}: columns: no column {name!r}{_close(name, known)}")


def _fields(value: str | None) -> list[str]:
    """Return the column names in a mapping's value: a plain name, or the names in braces."""
    if value is None:
        return []
    if "{" not in value:
        return [value]
    return [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]


def _mapped(row: dict, columns: Mapping[str, str | None]) -> tuple[dict, list[str]]:
    """Return the mapped columns of a row, and what is wrong with the fields of templates.

    Fields should be texts or numbers; a template with a missing one gives None.
    """
    mapped, odd = {}, []
    for key, value in columns.items():
        if value is None or "{" not in value:
            mapped[key] = None if value is None else row.get(value)
            continue
        fields = {name: row.get(name) for name in _fields(value)}
        for name, field in fields.items():
            if isinstance(field, list | dict):
                kind = type(field).__name__
                odd.append(f"{key}: its column {name!r} is a {kind}, expected a text or a number")
        try:
            mapped[key] = None if None in fields.values() else _filled(value, fields)
        except (TypeError, ValueError) as error:
            odd.append(f"{key}: {value!r} does not fit {fields}: {error}")
    return mapped, odd


def _filled(template: str, fields: Mapping[str, object]) -> str:
    """Return a template's text; unlike `str.format`, a field is named by any text, dots and all."""
    text = ""
    for before, name, spec, conversion in string.Formatter().parse(template):
        text += before
        if name is not None:
            text += format(string.Formatter().convert_field(fields[name], conversion), spec)
    return text


def _defaults(stem: str, number: int) -> dict[str, str]:
    """Return what stands in columns that a source leaves out."""
    return {"id": f"{stem}-{number:05d}", "task": stem, "content": "unknown", "type": "unknown"}


def _reason(key: str, value: object) -> str | None:
    """Return what is wrong with a column's value, or None."""
    if value is None:
        return "missing"
    if not isinstance(value, str):
        return f"not a string but {type(value).__name__}"
    if key != "prompt" and not value.strip():  # an empty prompt makes a plain text
        return "empty"
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return "not valid Unicode"
    return None


def _options_reason(options: object, completion: object) -> str | None:
    """Return what is wrong with the completions to choose from, or None."""
    if options is None:
        return None
    if not isinstance(options, list):
        return f"not a list but {type(options).__name__}"
    for option in options:
        if reason := _reason("options", option):
            return f"one is {reason}"
    if len(options) < 2:
        return "fewer than two"
    if len(set(options)) < len(options):
        return "one is there twice"
    if completion not in [None, *options]:  # that it is missing is a problem of its own
        return "the completion is not among them (spaces count)"
    return None


def _dataset(rows: list[dict], where: str) -> datasets.Dataset:
    """Make the data set, the six columns and the options first."""
    extra = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    columns = {key: [row.get(key) for row in rows] for key in [*COLUMNS, "options", *extra]}
    for key, values in columns.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise DataError(f"{where}: column {key!r} mixes kinds of values: {error}") from error
    return datasets.Dataset.from_dict(columns)


def _checked_limit(limit: int | None, size: int, source: str | Path) -> int:
    """Return how many rows to take.

    Raises:
        DataError: If there are not as many.
    """
    if limit is None:
        return size
    if not 0 < limit <= size:
        raise DataError(f"{source}: {limit} examples asked for, {size} are there (None takes all)")
    return limit


def plain_text(row: Mapping[str, str]) -> str:
    """Return prompt and completion with white space as single spaces: equal texts are one."""
    return " ".join((row["prompt"] + row["completion"]).split())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _listed(lines: list[str]) -> str:
    """Join the first lines and say how many are left out."""
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(f"  {line}" for line in [*lines[:_SHOWN], *more])


def _close(name: str, known: Iterable[str]) -> str:
    """Return "; close: ..." with similar names, or with all if they are few."""
    known = sorted(known)
    near = known if len(known) <= 5 else difflib.get_close_matches(name, known, 3, 0.5)
    return f"; close: {', '.join(near)}" if near else ""
