"""Write docs/parameters.md and the notebooks' parameters cells from settings.py.

    ./run_all.sh python docs/parameters.py

A test fails where they differ.
"""

import json

import nbformat

from icprobe.artifact import plan, settings
from icprobe.artifact.parameters import Parameters, schemas, type_in_words
from icprobe.data import paths

FILE = paths.ROOT / "docs" / "parameters.md"
PROFILES = ("smoke", "paper")  # laptop is the defaults
HEAD = """# Parameters of the notebooks

Written by `./run_all.sh python docs/parameters.py` from `lib/icprobe/artifact/settings.py`, which
also checks values: change that file, not this one.
How to set a parameter stands in the [README](../README.md#change-a-parameter). The laptop profile
is the defaults; of the others, the values that differ are shown.
"""


def cell(parameters: type[Parameters]) -> str:
    """Return the source of a notebook's parameters cell, a line for each."""
    lines = [
        f'{name}: "{type_in_words(schema)}" = {literal(parameters.model_fields[name].default)}'
        f"  # {schema['description']}"
        for name, schema in schemas(parameters).items()
    ]
    return "\n".join(lines)


def literal(value: object) -> str:
    """Return a value as Python, with double quotes as ruff writes them."""
    return repr(value) if value is None or isinstance(value, bool) else json.dumps(value)


def page() -> str:
    """Return docs/parameters.md."""
    profiles = {name: plan.read_profile(paths.ROOT, name) for name in PROFILES}
    tables = (_table(name, one, profiles) for name, one in settings.NOTEBOOKS.items())
    return "\n".join([HEAD, *tables])


def _table(notebook: str, parameters: type[Parameters], profiles: dict[str, dict]) -> str:
    titles = ["parameter", "type", "laptop (default)", *profiles, "meaning"]
    lines = [f"## {notebook}\n", _row(titles), _row(["---"] * len(titles))]
    given = [plan.merged(one, notebook, parameters.model_fields) for one in profiles.values()]
    for name, schema in schemas(parameters).items():
        default = parameters.model_fields[name].default
        values = [f"`{literal(one[name])}`" if one.get(name, default) != default else ""
                  for one in given]  # fmt: skip
        cells = [f"`{name}`", type_in_words(schema, ranges=True), f"`{literal(default)}`", *values]
        lines.append(_row([*cells, schema["description"]]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(one.replace('|', chr(92) + '|') for one in cells)} |"


def main() -> None:
    """Write the page and the cells."""
    FILE.write_text(page(), encoding="utf-8")
    for name, one in settings.NOTEBOOKS.items():
        file = paths.NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(file, as_version=4)
        for part in notebook.cells:
            if "parameters" in part.metadata.get("tags", []):
                part.source = cell(one)
        nbformat.write(notebook, file)


if __name__ == "__main__":
    main()
