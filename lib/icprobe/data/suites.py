"""Suites: balanced, disjoint splits of BIG-bench tasks; data/README.md says how to write one."""

import hashlib
import itertools
import json
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from icprobe.data import assets, paths
from icprobe.data.base import DataError, close_names

SPLITS = ("train", "query", "evaluation")
_CANDIDATES = 80  # examples looked at per row that a task is to give: enough, and quick
# a task with at most so many different answers is one of labels, and they are its options; label
# tasks of the suites have two to seven, all others at least twenty (object_counting's numbers)
_LABELS = 10


def suites() -> list[str]:
    """Return the names of all suites."""
    return sorted(file.stem for file in paths.SUITES.glob("*.yaml"))


Range = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Splits = Annotated[dict[Literal[SPLITS], PositiveInt], Field(min_length=len(SPLITS))]


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Frame(_Schema):
    """What stands before and after a task's input."""

    instruction: str
    label: Annotated[str, Field(pattern=r"\S$")]


class _Choice(_Schema):
    """Which of a task's entries are taken, for the whole suite or for one task."""

    input_chars: Range
    completion_chars: Range
    passage: re.Pattern = re.compile(r"(?s).+")
    drop: re.Pattern | None = None
    balance: bool = False
    splits: Splits


class Task(_Frame, _Choice):
    """One task of a suite: the keys of its YAML, with those of its type and of the suite."""

    bigbench: str
    content: str
    type: str

    def example(self, raw: dict) -> dict[str, str]:
        """Return prompt, completion and passage of one entry of a task.json."""
        lines = (line.rstrip() for line in raw["input"].strip().splitlines())
        text = "\n".join(line for line in lines if not (self.drop and self.drop.match(line)))
        found = self.passage.search(text)
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


class _File(_Choice):
    """A suite's YAML; tasks are checked when their defaults are filled in."""

    description: str
    seed: int
    types: dict[str, _Frame]
    tasks: dict[str, dict]


@dataclass(frozen=True)
class Suite:
    """A suite: named tasks and the seed that deals their passages out to the splits."""

    name: str
    seed: int
    splits: dict[str, int]
    tasks: dict[str, Task]


def read_suite(name: str) -> Suite:
    """Read data/suites/NAME.yaml; DataError names keys that are unknown, missing or wrong."""
    return parse_suite(name, suite_file(name).read_bytes())


def parse_suite(name: str | Path, content: bytes) -> Suite:
    """Check what a suite's file holds; for errors see `read_suite`."""
    where = paths.shown(suite_file(name))
    try:
        given = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not readable as YAML: {error}") from error
    file = _checked(_File, given, where)
    shared, tasks = file.model_dump(include=set(_Choice.model_fields)), {}
    for key, own in sorted(file.tasks.items()):  # sorted: the order in the file must not matter
        kind, at, frame = own.get("type"), f"{where}: tasks.{key}", {}
        if kind in file.types:
            frame = file.types[kind].model_dump()
        elif kind is not None:
            raise DataError(f"{at}.type: no type {kind!r}{close_names(str(kind), file.types)}")
        tasks[key] = _checked(Task, {**shared, **frame, **own}, at)
    return Suite(str(name), file.seed, file.splits, tasks)


def _checked(kind: type[BaseModel], given: object, where: str) -> BaseModel:
    """Return the model, or raise DataError with a line for each key that is wrong."""
    try:
        return kind.model_validate(given)
    except ValidationError as errors:
        lines = []
        for one in errors.errors():
            key = ".".join(str(part) for part in one["loc"] if part != "[key]")
            known = one["type"] in ("missing", "extra_forbidden")
            value = "" if known else f", got {one['input']!r}"
            lines.append(f"{where}: {key}: {one['msg']}{value}")
        raise DataError("\n".join(lines)) from None


def suite_rows(suite: Suite, split: str, seed: int) -> list[dict]:
    """Return all rows of a split, taking turns over the tasks."""
    files = assets.bigbench_tasks({task.bigbench for task in suite.tasks.values()})
    pools: dict[str, dict[str, list[dict]]] = {split: {} for split in SPLITS}
    prompts: set[str] = set()
    for name, task in suite.tasks.items():
        raw = json.loads(files[task.bigbench].read_bytes())["examples"]
        for part, rows in _deal(suite, name, raw, prompts).items():
            pools[part][name] = rows
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
    if not balance:
        return rows
    groups = defaultdict(list)
    for row in rows:
        groups[row["completion"]].append(row)
    return _interleave([groups[completion] for completion in sorted(groups)])


def _interleave(groups: list[list[dict]]) -> list[dict]:
    return [row for turn in itertools.zip_longest(*groups) for row in turn if row is not None]


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def suite_file(name: str | Path) -> Path:
    """Return the file of a suite, whether or not it is there."""
    return paths.SUITES / f"{name}.yaml"
