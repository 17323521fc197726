"""One page to send to a colleague: `<output_dir>/report.html`, from what lies in the folder.

    python -m icprobe.report figures/laptop

The runner makes it after every run. It joins claims, figures, tables and what made them; titles and
captions are the notebooks' own text. Images are inside, and nothing is loaded from elsewhere.
Everything comes from files, so that the page can be made anew: `run.json` (see provenance.py),
`run.csv`, `claims.json`, `NN_*.png` and `NN_*.csv`, executed copies. What is missing is said.
"""

import argparse
import base64
import csv
import html
import itertools
import json
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import jinja2
import nbformat
import numpy as np
import pandas as pd
from markupsafe import Markup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from icprobe import paths, provenance
from icprobe.artifact import claims

FILE = "report.html"
PAGE = Path(__file__).parent / "page"
ROWS = 60  # of a table that are shown; the file has the rest
SHORT = 12  # rows of a table that is not folded away
# how much of a square is filled: a verdict is never told by its colour alone
MARKS = {
    claims.REPRODUCED: "full",
    claims.PARTLY: "half",
    claims.NOT: "empty",
    claims.NOT_TESTABLE: "none",
    claims.NOT_RUN: "none",
}
NUMBER = re.compile(r"(\d+)_")
FENCE = re.compile(r"\s{0,3}(```|~~~)")
HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")
EMPHASISED = re.compile(r"\*[^*].*[^*]\*", re.DOTALL)


class _Renderer(IPythonRenderer):
    """Markdown as HTML that loads nothing: tags are shown as text, formulas as code."""

    def __init__(self):
        super().__init__(escape=True, allow_harmful_protocols=False, exclude_anchor_links=True)

    def block_math(self, body: str) -> str:
        return f"<pre><code>{self.escape_html(body.strip())}</code></pre>"

    def inline_math(self, body: str) -> str:
        return f"<code>{self.escape_html(body)}</code>"

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return text

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """Relative links start at the notebook's folder, and would lead nowhere from the page."""
        return super().link(text, url, title) if url.startswith(("http://", "https://")) else text

    def table(self, text: str) -> str:
        return f'<div class="wide" tabindex="0"><table>{text}</table></div>'


_MARKDOWN = MarkdownWithMath(_Renderer())


@dataclass
class Section:
    """A section of a notebook: its heading, and text, figures and tables in their order.

    Attributes:
        title: The heading as markdown, "" for what stands before the first.
        items: Markdown (str), or the name of a figure or table (`Stem`).
    """

    title: str = ""
    items: list = field(default_factory=list)


class Stem(str):
    """The name of a figure and table without its suffix, such as 03_conditions."""

    __slots__ = ()


@dataclass
class Story:
    """A notebook as the page tells it.

    Attributes:
        title: Its title as markdown.
        question: The text between the title and the first table, as markdown.
        sections: Its sections, with what was found of their figures and tables.
        closing: The text after the last code cell, as markdown.
    """

    title: str
    question: str
    sections: list[Section]
    closing: str


def write(output_dir: str | Path, root: Path = paths.ROOT) -> Path:
    """Write <output_dir>/report.html from what lies in the folder.

    Args:
        output_dir: Folder of results.
        root: Folder of the checkout, for notebooks of which the folder has no executed copy.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = paths.resolve(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    text = render(folder, root)
    with paths.replacing(folder / FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / FILE


def render(folder: Path, root: Path) -> str:
    """Return the page's HTML; see `write`."""
    missing = []
    record = _record(folder, missing)
    judged = _claims(folder, missing)
    notebooks = [
        _notebook(name, number, record, judged, folder, root, missing)
        for number, name in _names(folder, root, record)
    ]
    skipped = [
        one["number"] for one in notebooks if one["has_results"] and one["status"] == "skipped"
    ]
    if skipped:
        missing.append(
            f"{', '.join(skipped)} was skipped by the last run: its figures, tables and claims are "
            "those of an earlier one."
        )
    uncopied = [one["number"] for one in notebooks if one["has_results"] and not one["executed"]]
    if uncopied:
        missing.append(f"No executed copies of {', '.join(uncopied)}; texts are the checkout's.")
    newest = max(record["runs"], default=None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"date": _date, "inline": _inline, "markdown": _block}
    longer = folder.with_name(f"{folder.name}_long")
    return environment.get_template(FILE).render(
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        profile=record["runs"][newest]["profile"] if newest else folder.name,
        newest=record["runs"].get(newest),
        claims=judged,
        with_results={notebook["number"] for notebook in notebooks if notebook["has_results"]},
        verdicts=_counted(judged),
        marks=MARKS,
        notebooks=notebooks,
        runs=record["runs"],
        fresh_minutes=any(notebook["fresh_minutes"] for notebook in notebooks),
        sources=_grouped(notebooks, "sources"),
        missing=list(dict.fromkeys(missing)),
        longer=_relative(longer, folder) if longer.is_dir() else None,
        rows=ROWS,
    )


# ---------------------------------------------------------------------------- what the folder has


def _record(folder: Path, missing: list[str]) -> dict:
    """Return run.json, completed by run.csv and executed copies for runs that left none."""
    try:
        record = provenance.read(folder)
    except ValueError as error:
        missing.append(f"{error}; what made the results is not known.")
        record = {"runs": {}, "notebooks": {}}
    known = record["notebooks"]
    if not (folder / provenance.FILE).exists():
        missing.append(
            f"No {provenance.FILE}, which every run writes: machine, versions, revision, command, "
            "and hashes of model and data are not known."
        )
    for row in _csv(folder / "run.csv", missing):
        numbers = {key: float(row[key]) if row.get(key) else None for key in ("minutes", "gib")}
        more = {"status": row["status"], "scores": row.get("scores", "")}
        known.setdefault(row["notebook"], numbers | more)
    for copy in sorted((folder / "notebooks").glob("[0-9]*.ipynb")):
        name = copy.name.partition(".")[0]
        failed = copy.name.endswith(".failed.ipynb")
        entry = known.setdefault(name, {"status": "failed" if failed else "done"})
        if "parameters" in entry:
            continue
        run = (_read_notebook(copy, missing) or {}).get("metadata", {}).get("papermill", {})
        entry |= {"parameters": run.get("parameters", {}), "started": run.get("start_time")}
        if entry.get("minutes") is None and run.get("duration") and not failed:
            entry["minutes"] = run["duration"] / 60
    return record


def _csv(file: Path, missing: list[str]) -> list[dict]:
    """Return the rows of a small CSV file of a run; none where it is missing or damaged."""
    if not file.exists():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        for row in rows:  # as they have to be
            _ = row["notebook"], float(row["minutes"] or 0), float(row.get("gib") or 0)
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, csv.Error) as error:
        missing.append(f"{file.name} could not be read: {error}")
        return []
    return rows


def _claims(folder: Path, missing: list[str]) -> list[dict]:
    """Return claims.json with each estimate in words."""
    file = folder / "claims.json"
    if not file.exists():
        judging = {claim.notebook for claim in claims.CLAIMS}
        if any(list(folder.glob(f"{number}_*.csv")) for number in judging):
            missing.append("No claims.json: no claim is judged here.")
        return []
    try:
        judged = json.loads(file.read_text(encoding="utf-8"))
        for claim in judged:
            claim["shown"] = _estimate(claim)
            _ = claim["id"], claim["statement"], claim["test"], claim["verdict"], claim["notebook"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        missing.append(f"claims.json could not be read ({type(error).__name__}: {error})")
        return []
    return judged


def _estimate(claim: dict) -> str:
    """Return a claim's estimate and interval, as the README has them; "" where there is none."""
    if claim["estimate"] is None:
        return ""
    ends = (claim[end] for end in ("estimate", "low", "high"))
    runs = "runs: " if claim["unit"] == "ratio of seconds" else ""
    return "{:z.2f} ({}{:z.2f} to {:z.2f})".format(*(next(ends), runs, *ends))


def _counted(judged: list[dict]) -> list[tuple[str, int]]:
    """Return how many claims have each verdict, those that there are."""
    counts = Counter(claim["verdict"] for claim in judged)
    return [(verdict, counts[verdict]) for verdict in MARKS if counts[verdict]]


def _names(folder: Path, root: Path, record: dict) -> list[tuple[str, str]]:
    """Return number and name of each notebook that ran into the folder or has results there."""
    known = {_number(name): name for name in record["notebooks"] if NUMBER.match(name)}
    ours = {_number(path.stem): path.stem for path in (root / "notebooks").glob("[0-9]*.ipynb")}
    for file in folder.glob("[0-9]*_*"):
        number = _number(file.name)
        if file.is_file() and number:
            known.setdefault(number, ours.get(number, number))
    return sorted(known.items())


def _number(name: str) -> str:
    found = NUMBER.match(name)
    return found.group(1) if found else ""


def _notebook(
    name: str,
    number: str,
    record: dict,
    judged: list[dict],
    folder: Path,
    root: Path,
    missing: list[str],
) -> dict:
    """Return what the page says of one notebook."""
    entry = record["notebooks"].get(name, {"status": "not recorded"})
    copies = folder / entry.get("copies", "notebooks")
    copy, failed = (copies / f"{name}{kind}.ipynb" for kind in ("", ".failed"))
    source = copy if copy.exists() else root / "notebooks" / f"{name}.ipynb"
    files = sorted(folder.glob(f"{number}_*"))
    stems = {file.stem for file in files if file.suffix in (".png", ".csv")}
    others = [f for f in files if f.is_file() and f.suffix not in (".png", ".csv", ".pdf")]
    story = _story(source, number, stems, missing)
    elsewhere = folder / entry["results"] if entry.get("results") else None
    if not stems and elsewhere is None and entry["status"] != "not recorded":
        missing.append(f"{name}: no results in this folder ({entry['status']}).")
    timed = {row["notebook"]: row["minutes"] for row in _csv(folder / "timing.csv", missing)}
    return {
        "name": name,
        "number": number,
        "title": story.title or name,
        "question": story.question,
        "closing": story.closing,
        "sections": [
            {
                "id": f"n{number}-{place}",
                "title": section.title,
                "items": _items(section, folder),
            }
            for place, section in enumerate(story.sections, 1)
        ],
        "has_results": bool(stems or others),
        "others": [(file.name, _relative(file, folder)) for file in others],
        "claims": [claim for claim in judged if claim["notebook"] == number],
        "executed": _relative(copy, folder) if copy.exists() else None,
        "half_executed": _relative(failed, folder) if failed.exists() else None,
        "elsewhere": _elsewhere(elsewhere, folder),
        "status": entry["status"],
        "error": entry.get("error", ""),
        "verdict": _verdict(folder / f"{number}_verdict.csv", missing),
        "minutes": entry.get("minutes"),
        "gib": entry.get("gib"),
        "scores": entry.get("scores", ""),
        "reused": entry.get("reused", []),
        "fresh_minutes": timed.get(name),
        "started": entry.get("run") or entry.get("started"),
        "parameters": entry.get("parameters", {}),
        "shown_parameters": {k: repr(v) for k, v in entry.get("parameters", {}).items()},
        "sources": entry.get("sources", {}),
    }


def _verdict(file: Path, missing: list[str]) -> str:
    """Return what a notebook that judges says in words (Markdown); "" for others."""
    if not file.exists():
        return ""
    try:
        return pd.read_csv(file)["in words"].iloc[0]
    except (ValueError, KeyError, IndexError) as error:
        missing.append(f"{file.name} could not be read ({type(error).__name__}: {error})")
        return ""


def _elsewhere(results: Path | None, folder: Path) -> dict | None:
    """Return where results in another folder are: its name, and a link if it is there."""
    if results is None:
        return None
    page = results / FILE
    found = page if page.exists() else results if results.is_dir() else None
    name = os.path.relpath(results, folder.parent)
    return {"name": name, "link": found and _relative(found, folder)}


def _relative(path: Path, folder: Path) -> str:
    """Return a path as a link from the page."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())


# ------------------------------------------------------------------------- what the notebooks say


def _read_notebook(path: Path, missing: list[str]) -> nbformat.NotebookNode | None:
    """Return a notebook; None where there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # whatever nbformat raises
        missing.append(f"{path.name} could not be read: {error}")
        return None


def _story(source: Path, number: str, stems: set[str], missing: list[str]) -> Story:
    """Return a notebook's text around the figures and tables that there are.

    A section is kept if some of its figures or tables are in the folder, with the text before the
    last of them, and a caption in italics right after it. Files that no cell names come last.

    Args:
        source: The notebook.
        number: Of the notebook, as in file names.
        stems: Names of figures and tables in the folder.
        missing: Takes what is to be said about what is not there.
    """
    notebook = _read_notebook(source, missing)
    if notebook is None and stems:
        missing.append(f"{number}: there is no notebook {source.name}, so no titles and captions.")
    cells = [] if notebook is None else notebook.cells
    code = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and cell.source.strip()]
    last = code[-1] if code else -1
    sections, closing, placed = [Section()], [], set()
    named = re.compile(rf"""["']({number}_\w+)["']""")
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            for title, text in _parts(cell.source):
                if i > last:
                    closing += [f"**{title}**", text] if title else [text]
                elif title is not None:
                    sections.append(Section(title, [text] if text else []))
                elif text:
                    sections[-1].items.append(text)
        elif cell.cell_type == "code":
            found = [Stem(stem) for stem in named.findall(cell.source)]
            new = [stem for stem in dict.fromkeys(found) if stem in stems - placed]
            sections[-1].items += new
            placed.update(new)
    title, question = "", ""
    if len(sections) > 1 and not sections[0].items:
        first = sections[1]
        title = first.title
        question = "\n\n".join(text for text in first.items if not isinstance(text, Stem))
        question = re.split(r"^\s*\|", question, maxsplit=1, flags=re.MULTILINE)[0].strip()
        first.title, first.items = "", [item for item in first.items if isinstance(item, Stem)]
    if stems - placed:
        names = ", ".join(sorted(stems - placed))
        more = [
            "No cell of the notebook names these: they may come from an earlier version of it."
        ] * bool(cells)
        sections.append(Section("Further files", [*more, *map(Stem, sorted(stems - placed))]))
        if cells:
            missing.append(f"{number}: no cell of {source.name} names {names}.")
    kept = [_until_last_output(section) for section in sections]
    return Story(title, question, [s for s in kept if s.items], "\n\n".join(closing))


def _parts(source: str) -> Iterator[tuple[str | None, str]]:
    """Cut a markdown cell at its headings: heading (None before the first), and the text below."""
    title, lines, fenced = None, [], False
    for line in source.splitlines():
        fenced ^= bool(FENCE.match(line))
        heading = None if fenced else HEADING.match(line)
        if not heading:
            lines.append(line)
            continue
        if title is not None or "".join(lines).strip():
            yield title, "\n".join(lines).strip()
        title, lines = heading.group(2), []
    if title is not None or "".join(lines).strip():
        yield title, "\n".join(lines).strip()


def _until_last_output(section: Section) -> Section:
    """Return a section up to its last figure or table, and a caption below that."""
    outputs = [i for i, item in enumerate(section.items) if isinstance(item, Stem)]
    end = outputs[-1] + 1 if outputs else 0
    below = section.items[end : end + 1] if outputs else []
    caption = [text for text in below if EMPHASISED.fullmatch(text)]
    return Section(section.title, [*section.items[:end], *caption])


def _block(text: str) -> Markup:
    """Return markdown as HTML."""
    return Markup(_MARKDOWN.render(text))


def _inline(text: str) -> Markup:
    """Return a line of markdown as HTML, without the paragraph around it."""
    return Markup(re.sub(r"^<p>(.*)</p>\s*$", r"\1", _MARKDOWN.render(text), flags=re.DOTALL))


# ------------------------------------------------------------------------------ figures and tables


def _items(section: Section, folder: Path) -> list[dict]:
    """Return a section's text, figures and tables as the template takes them.

    Figures that no text parts stand together, before their tables.
    """
    found = []
    for named, items in itertools.groupby(section.items, lambda item: isinstance(item, Stem)):
        items = list(items)
        if not named:
            found += [{"kind": "text", "text": text} for text in items]
            continue
        pictures, files = ([folder / f"{stem}.{kind}" for stem in items] for kind in ("png", "csv"))
        found += [_figure(file, section.title, folder) for file in pictures if file.exists()]
        found += [_table(file, folder) for file in files if file.exists()]
    return found


def _figure(png: Path, title: str, folder: Path) -> dict:
    """Return a figure with its picture inside."""
    content = png.read_bytes()
    is_png = content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) >= 24
    width, height = _size(content) if is_png else (0, 0)
    pdf = png.with_suffix(".pdf")
    heading = html.unescape(_inline(title).striptags()) if title else ""
    words = png.stem.partition("_")[2].replace("_", " ")
    return {
        "kind": "figure",
        "name": png.stem,
        "alt": ": ".join(filter(None, (heading, words))),
        "data": base64.b64encode(content).decode("ascii") if is_png else None,
        "width": width,
        "height": height,
        "png": _relative(png, folder),
        "pdf": _relative(pdf, folder) if pdf.exists() else None,
    }


def _size(png: bytes) -> tuple[int, int]:
    """Return width and height of a picture on the page, where an inch has 96 pixels."""
    width, height = struct.unpack(">II", png[16:24])
    found = re.search(rb"pHYs(.{4}).{4}\x01", png[:4096], re.DOTALL)  # pixels a metre
    inch = struct.unpack(">I", found.group(1))[0] * 0.0254 if found else 96
    return round(width / inch * 96), round(height / inch * 96)


def _table(file: Path, folder: Path) -> dict:
    """Return the first rows of a table, numbers rounded."""
    base = {"kind": "table", "name": file.name, "link": _relative(file, folder)}
    try:
        # "None" and "NA" are names here; only an empty cell is unknown
        frame = pd.read_csv(file, nrows=ROWS, keep_default_na=False, na_values=[""])
        with file.open(newline="", encoding="utf-8") as stream:
            length = sum(bool(row) for row in csv.reader(stream)) - 1
    except (OSError, ValueError, csv.Error) as error:  # pandas' errors are ValueErrors
        return base | {"error": str(error)}
    columns = [_column(frame[name]) for name in frame]
    return base | {
        "error": None,
        "columns": [(name, numeric) for name, (numeric, _) in zip(frame, columns, strict=True)],
        "cells": [
            [(text, numeric) for (numeric, _), text in zip(columns, row, strict=True)]
            for row in zip(*(texts for _, texts in columns), strict=True)
        ],
        "length": length,
        "folded": length > SHORT,
    }


def _column(values: pd.Series) -> tuple[bool, list[str]]:
    """Return whether a column is one of numbers, and its cells as text."""
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if not numeric or pd.api.types.is_integer_dtype(values):
        return numeric, ["–" if pd.isna(value) else str(value) for value in values]
    known = values[np.isfinite(values)]
    whole = bool((known % 1 == 0).all() and known.abs().max() > 1)
    return True, [_rounded(value, whole) for value in values]


def _rounded(value: float, whole: bool = False) -> str:
    """Return a number with two decimals, with fewer if it is large and more if it is small."""
    if not np.isfinite(value):
        return "–" if np.isnan(value) else f"{value}"
    size = abs(value)
    if size >= 1e6:
        text = f"{value:.3g}"
    elif whole or size >= 100:
        text = f"{value:.0f}"
    elif 0 < size < 0.1:
        text = f"{value:.2g}"
    else:
        text = f"{value:.2f}"
    return re.sub(r"e\+?(-?)0*", r"e\1", text)


# --------------------------------------------------------------------------------- what made them


def _date(started: str) -> str:
    """Return the start of a run for reading."""
    time = datetime.fromisoformat(started)
    return f"{time.day} {time:%B %Y, %H:%M}"


def _grouped(notebooks: list[dict], key: str) -> list[tuple[list[str], dict]]:
    """Return the different values of a key that there are, each with its notebooks' numbers."""
    groups = {}
    for notebook in notebooks:
        if notebook[key]:
            same = groups.setdefault(json.dumps(notebook[key]), ([], notebook[key]))
            same[0].append(notebook["number"])
    return list(groups.values())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m icprobe.report",
        description="Make report.html anew from the results in a folder.",
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
