"""Files and hub data sets: reading rows, mapping columns, saying all that is wrong."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from icprobe.data import paths
from icprobe.data.base import COLUMNS, DataError, close_names, listed, make_dataset

if TYPE_CHECKING:
    import datasets


def parse_file(
    file: Path, content: bytes, columns: Mapping[str, str | None] | None
) -> datasets.Dataset:
    """Check what a .jsonl or .parquet file holds, see `data.load`."""
    where, problems = paths.shown(file), []
    if file.suffix == ".jsonl":
        rows = _parse_jsonl(content, problems)
    else:
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{where}: not readable as Parquet: {error}") from error
        rows = list(enumerate(table.to_pylist(), start=1))
    return _examples(rows, file.stem, where, columns, problems)


def _parse_jsonl(content: bytes, problems: list[tuple[int, str]]) -> list[tuple[int, dict]]:
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


def load_hub(
    name: str, revision: str, split: str | None, columns: Mapping[str, str | None] | None
) -> datasets.Dataset:
    """Load a hub data set at a revision, and check it."""
    import datasets

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
        defaults = {"id": f"{stem}-{number:05d}", "task": stem}
        for key, default in {**defaults, "content": "unknown", "type": "unknown"}.items():
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
        raise DataError(_as_text(problems, rows, examples, where))
    return make_dataset(examples, where)


def _as_text(
    problems: list[tuple[int, str]], rows: list[tuple[int, dict]], examples: list[dict], where: str
) -> str:
    """Return what is wrong with rows; what is wrong with all of them is said once."""
    absent = [
        key for key in ("prompt", "completion") if all(row.get(key) is None for row in examples)
    ]
    every = {f"{key}: missing" for key in absent if rows}
    left = [(number, problem) for number, problem in sorted(problems) if problem not in every]
    lines = listed([f"{where}:{number}: {problem}" for number, problem in left])
    if every:
        known = sorted({key for _, row in rows for key in row})
        said = (
            f"no row has {' and '.join(absent)}: say which of its columns {known} to use, such "
            'as {"prompt": "{question}", "completion": " {answer}"} (columns of load_data; in '
            "notebooks train_columns, query_columns or evaluation_columns)"
        )
        if not left:
            return f"{where}: {said}"
        lines += f"\n{said}"
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return f"{count} in {where}:\n{lines.lstrip()}"


def _check_columns(rows: list, where: str, columns: Mapping[str, str | None]) -> None:
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
                raise DataError(f"{where}: columns: no column {name!r}{close_names(name, known)}")


def _fields(value: str | None) -> list[str]:
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


def _reason(key: str, value: object) -> str | None:
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
