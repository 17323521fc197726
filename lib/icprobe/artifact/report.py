"""One page to send to a colleague: `<output_dir>/report.html`, from what lies in the folder.

    python -m icprobe.artifact.report figures/laptop

The runner writes it after every run: the verdicts of the claims, status and minutes of each
notebook, the executed copies without their code, and what made them (`run.json`, see
provenance.py). Everything is inside the file and no script runs; formulas stay TeX source, since
MathJax would have to be loaded.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

import jinja2
import nbformat
import yaml
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from icprobe.artifact import provenance
from icprobe.data import paths

FILE = "report.html"
PAGE = Path(__file__).parent / "page"
NUMBER = re.compile(r"\d+(?=_)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class _Renderer(IPythonRenderer):
    """Markdown below the page's heading; HTML tags and relative links become text."""

    def __init__(self):
        super().__init__(allow_harmful_protocols=False, exclude_anchor_links=True)

    def heading(self, text: str, level: int, **attributes) -> str:
        return super().heading(text, min(level + 1, 6), **attributes)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, url, title) if url.startswith(("http://", "https://")) else text

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return text


def write(output_dir: str | Path) -> Path:
    """Write <output_dir>/report.html from what lies in the folder; return its path.

    Whatever is missing or damaged is named on the page.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = paths.resolve(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    problems = []
    try:
        record = provenance.read(folder)
    except ValueError as error:
        problems.append(str(error))
        record = {"runs": {}, "notebooks": {}}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["yaml"] = lambda values: yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, width=100
    )
    text = environment.get_template(FILE).render(
        folder=folder.name,
        runs=record["runs"],
        claims=_claims(folder, problems),
        notebooks=[
            _notebook(name, record["notebooks"].get(name, {}), folder, problems)
            for name in _names(folder, record["notebooks"])
        ],
        problems=problems,
    )
    with paths.replacing(folder / FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / FILE


def _claims(folder: Path, problems: list[str]) -> list[dict]:
    """Return claims.json, each with its estimate and interval as text; [] if there is none."""
    file = folder / "claims.json"
    if not file.exists():
        return []
    try:
        judged = json.loads(file.read_text(encoding="utf-8"))
        for claim in judged:
            numbers = [claim[key] for key in ("estimate", "low", "high")]
            runs = "runs: " if claim["unit"] == "ratio of seconds" else ""  # no 95 % interval
            text = "–" if claim["estimate"] is None else f"{{:z.2f}} ({runs}{{:z.2f}} to {{:z.2f}})"
            claim["estimate"] = text.format(*numbers)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        problems.append(f"{file.name} could not be read ({type(error).__name__}: {error})")
        return []
    return judged


def _names(folder: Path, known: dict) -> list[str]:
    """Return the notebooks that ran into the folder, have a copy, or (their numbers) results."""
    copies = {file.name.partition(".")[0] for file in (folder / "notebooks").glob("*.ipynb")}
    names = {*known, *copies}
    files = (NUMBER.match(file.name) for file in folder.glob("[0-9]*_*") if file.is_file())
    numbers = {found.group() for found in files if found}
    return sorted(names | (numbers - {name.partition("_")[0] for name in names}))


def _notebook(name: str, entry: dict, folder: Path, problems: list[str]) -> dict:
    """Return what the page says of one notebook, whose entry in run.json may be empty."""
    copies = folder / entry.get("copies", "notebooks")
    whole, failed = (copies / f"{name}{suffix}.ipynb" for suffix in ("", ".failed"))
    copy = failed if failed.exists() else whole
    elsewhere = folder / entry["results"] if entry.get("results") else None
    number = name.partition("_")[0]
    return {
        "name": name,
        "entry": {"status": "not recorded", "minutes": None, "gib": None, "error": ""}
        | {"parameters": {}, **entry},
        "body": _body(copy, problems) if copy.exists() else "",
        "executed": _link(copy, folder) if copy.exists() else None,
        "partial": copy == failed,
        "files": {f.name: _link(f, folder) for f in sorted(folder.glob(f"{number}_*"))},
        "elsewhere": elsewhere and os.path.relpath(elsewhere, folder.parent),
        "page": _link(elsewhere / FILE, folder)
        if elsewhere and (elsewhere / FILE).exists()
        else "",
    }


def _body(copy: Path, problems: list[str]) -> Markup:
    """Return the texts and outputs of an executed copy as HTML."""
    try:
        notebook = nbformat.read(copy, as_version=4)
    except (OSError, ValueError, nbformat.validator.ValidationError) as error:
        problems.append(f"{copy.name} could not be read ({type(error).__name__}: {error})")
        return Markup()
    # without papermill's own remarks in HTML: the error itself stands below its cell
    notebook.cells = [
        c for c in notebook.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", "")
    ]
    heading = ""
    for cell in notebook.cells:  # a figure's alternative text is the heading above it
        if cell.cell_type == "markdown":
            heading = [heading, *HEADING.findall(cell.source)][-1]
        cell.metadata.setdefault("alt", heading)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    exporter.register_filter("markdown2html", MarkdownWithMath(_Renderer()).render)
    return Markup(exporter.from_notebook_node(notebook)[0])


def _link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m icprobe.artifact.report", description="Write a folder's report.html anew."
    )
    parser.add_argument("folder", metavar="FOLDER", help="such as figures/laptop")
    try:
        print(paths.shown(write(parser.parse_args(argv).folder)))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
