"""What every data set here has: its columns, and errors that list all problems."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

COLUMNS = ("id", "prompt", "completion", "task", "content", "type")
SHOWN = 20  # problems listed in one error


class DataError(ValueError):
    """Data or a suite are not as they should be; the message names file, place and reason."""


def make_dataset(rows: list[dict], where: str) -> datasets.Dataset:
    """Make the data set, the six columns and the options first."""
    import datasets  # here, as it takes a second: not all that names a path reads data
    import pyarrow

    extra = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    columns = {key: [row.get(key) for row in rows] for key in [*COLUMNS, "options", *extra]}
    for key, values in columns.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise DataError(f"{where}: column {key!r} mixes kinds of values: {error}") from error
    return datasets.Dataset.from_dict(columns)


def plain_text(row: Mapping[str, str]) -> str:
    """Return prompt and completion with white space as single spaces: equal texts are one."""
    return " ".join((row["prompt"] + row["completion"]).split())


def listed(lines: list[str]) -> str:
    """Join the first lines and say how many are left out."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(f"  {line}" for line in [*lines[:SHOWN], *more])


def close_names(name: str, known: Iterable[str]) -> str:
    """Return "; close: ..." with similar names, and "; there are: ..." with all if they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 3, 0.5)
    every = known if len(known) <= 5 else []
    said = {"close": near, "there are": every}
    return "".join(f"; {word}: {', '.join(names)}" for word, names in said.items() if names)
