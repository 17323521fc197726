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
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class _Renderer(IPythonRenderer):
    """Markdown below the page's heading; HTML tags and relative links become text."""

    def __init__(self):
        super().__init__(allow_harmful_protocols=False, exclude_anchor_links=True)

    def heading(self, text: str, level: int, **attributes) -> str:
        """Return a heading one level below the notebook's own."""
        return super().heading(text, min(level + 1, 6), **attributes)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """Return a link to a web page; of any other, its text."""
        return super().link(text, url, title) if url.startswith(("http://", "https://")) else text

    def image(self, text: str, url: str, title: str | None = None) -> str:
        """Return an image's alternative text."""
        return text


def write(output_dir: str | Path) -> Path:
    """Write <output_dir>/report.html from what lies in the folder; return its path.

    Raises FileNotFoundError if there is no such folder, ValueError if its run.json is damaged.
    """
    folder = paths.resolve(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    record, claims = provenance.read(folder), folder / "claims.json"
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
        claims=json.loads(claims.read_text(encoding="utf-8")) if claims.exists() else [],
        notebooks=[_notebook(name, entry, folder) for name, entry in record["notebooks"].items()],
    )
    with paths.replacing(folder / FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / FILE


def _notebook(name: str, entry: dict, folder: Path) -> dict:
    """Return what the page says of one notebook, from its entry in run.json."""
    whole, failed = (folder / "notebooks" / f"{name}{kind}.ipynb" for kind in ("", ".failed"))
    copy = failed if failed.exists() else whole
    results = paths.resolve(entry["parameters"].get("output_dir", folder))
    return {
        "name": name,
        "entry": entry,
        "body": _body(copy) if copy.exists() else "",
        "executed": _link(copy, folder) if copy.exists() else None,
        "partial": copy == failed,
        "elsewhere": None if results == folder else str(entry["parameters"]["output_dir"]),
        "files": {f.name: _link(f, folder) for f in sorted(results.glob(f"{name[:2]}_*"))},
    }


def _body(copy: Path) -> Markup:
    """Return the texts and outputs of an executed copy as HTML."""
    notebook = nbformat.read(copy, as_version=4)
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
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
