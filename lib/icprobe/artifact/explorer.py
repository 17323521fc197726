"""One page for the browser: pick a query or a training example and see what each method says.

The page is one file that opens from disk and loads nothing: a content security policy forbids it to
ask for more than is inside, or to run other code. Whatever comes from data stands in JSON that
nothing executes, and the page's code puts it in as text. All numbers are those of `views.py`.
"""

import base64
import hashlib
import html
import importlib.metadata
import importlib.resources
import itertools
import json
import os
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, Plot, Span, TapTool
from bokeh.plotting import figure
from bokeh.resources import Resources
from IPython import get_ipython
from IPython.display import IFrame

from icprobe.artifact import views
from icprobe.data import paths
from icprobe.finetuning import selection

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#555555"  # Okabe and Ito's, as in figures
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

MOST_EXAMPLES = 1000  # that a page holds

_TOOLTIP = f"""
<div style="max-width: 340px; font: 14px/1.4 {FONT}; color: #1a1a1a; white-space: normal">
  <div><b>@id</b> &middot; @task</div>
  <div>@prompt <b>&#9656;@completion</b></div>
  <div style="color: {GREY}">@numbers</div>
</div>"""


def write(scores: views.Scores, file: str | Path, title: str, description: str = "") -> Path:
    """Write the page to a file, such as `figures/mine/explorer.html`; return it.

    Of more than `MOST_EXAMPLES` training examples, the page holds those whose scores are the most
    extreme for any query, task or all queries, by any method, and says so. Ranks and agreements are
    always among all N. The description says what the scores are of, such as the model and the data.
    """
    file = paths.resolve(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    page = importlib.resources.files("icprobe.artifact") / "page"
    tables = importlib.resources.files("itables") / "html"
    parts = {name: (page / f"explorer.{name}").read_text("utf-8") for name in ("html", "js", "css")}
    bokeh = Resources(mode="inline", components=["bokeh"]).js_raw[0]
    for end in ("</script", "<!--"):
        if end in (bokeh + parts["js"]).lower():
            raise ValueError(f"a script has {end!r} inside and cannot be part of a page")
    content = string.Template(parts["html"]).substitute(
        allowed=f"{_digest(bokeh)} {_digest(parts['js'])}",
        title=html.escape(title),
        description=html.escape(description),
        css=parts["css"],
        js=parts["js"],
        tables_css=(tables / "dt_bundle.css").read_text("utf-8"),
        tables_js=_json((tables / "dt_bundle.js").read_text("utf-8")),
        bokeh_js=bokeh,
        data=_json(_content(scores) | {"plot": json_item(_plot(), "scatter")}),
        licences=_licences(),
    )
    with paths.replacing(file) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return file


def frame(file: str | Path) -> IFrame | None:
    """Return a page in a frame for a notebook in `notebooks/`; None where nobody looks at it.

    A request that could be asked for input comes from JupyterLab, others from papermill.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    request = (kernel.get_parent("shell") if kernel else None) or {}
    if not request.get("content", {}).get("allow_stdin", False):
        return None
    return IFrame(os.path.relpath(paths.resolve(file), paths.NOTEBOOKS), "100%", 900)


def _json(content: object) -> str:
    """Return JSON that may stand inside a script element: nothing in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _digest(code: str) -> str:
    """Return what lets a page run this code, and no other, in its content security policy."""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest())
    return f"'sha256-{digest.decode()}'"


def _licences() -> str:
    """Return the licences of the libraries inside the page, as HTML."""
    shown = []
    names = {"itables": "DataTables and jQuery, bundled by itables", "bokeh": "Bokeh"}
    for name, what in names.items():
        found = importlib.metadata.distribution(name)
        texts = [file.read_text("utf-8") for file in found.files if "licenses/" in str(file)]
        text = html.escape("\n".join(texts))
        shown.append(f"<h3>{what} {found.version}</h3>\n<pre>{text}</pre>")
    return "\n".join(shown)


def _content(scores: views.Scores) -> dict:
    """Return all that the page shows."""
    choices = _choices(scores.queries)
    kept, depth = _kept(scores, [choice["columns"] for choice in choices])
    for choice in choices:
        columns = choice.pop("columns")
        choice["methods"] = [
            _packed(views.ranking(scores, name, columns), kept) for name in scores.methods
        ]
        agreed = views.agreements(scores, columns)
        choice["agreements"] = json.loads(agreed.to_json(orient="values", double_precision=4))
    train = scores.train.iloc[kept]
    marks = [scores.marks.get(name, "") for name in train["id"]]
    return {
        "examples": len(scores.train),
        "depth": depth,
        "methods": [
            {"name": name, "unit": scores.units[name], "decimals": views.decimals(scores, name)}
            for name in scores.methods
        ],
        "train": train.assign(mark=marks).to_dict("list"),
        "queries": scores.queries.to_dict("list"),
        "choices": choices,
    }


def _choices(queries: pd.DataFrame) -> list[dict]:
    """Return what can be picked: all queries, then by task its queries together, and each alone."""
    choices = [{"kind": "all", "task": None, "query": None, "columns": queries.index}]
    for task, rows in queries.groupby("task", sort=False):
        if len(rows) < len(queries):
            choices.append({"kind": "task", "task": task, "query": None, "columns": rows.index})
        choices += [
            {"kind": "query", "task": task, "query": row, "columns": [row]} for row in rows.index
        ]
    return choices


def _kept(scores: views.Scores, choices: list[Sequence[int]]) -> tuple[np.ndarray, int]:
    """Return which rows the page holds, in their order, and to which place both ends are whole.

    That is the largest place from either end down to which every ranking, by any method for any
    choice of queries, has all its examples on the page (0 if none, N if all are).
    """
    N = len(scores.train)
    if N <= MOST_EXAMPLES:
        return np.arange(N), N
    extreme = np.full(N, np.inf)
    for columns, matrix in itertools.product(choices, scores.methods.values()):
        rank = selection.ranking(matrix[:, columns])["place"].to_numpy()
        # places from the high and from the low end; those without a place say nothing
        extreme = np.fmin(extreme, np.fmin(rank, selection.ranks(rank)))
    order = np.argsort(extreme, kind="stable")
    return np.sort(order[:MOST_EXAMPLES]), int(min(extreme[order[MOST_EXAMPLES]] - 1, N))


def _packed(table: pd.DataFrame, kept: np.ndarray) -> dict:
    """Return a ranking of the kept rows, base64 of little-endian floats, without empty columns."""
    packed = {"ranked": int(table["rank"].count()), "queries": int(table["queries"].max())}
    for name in ("score", "low", "high", "rank", "rank_low", "rank_high"):
        if table[name].notna().any():
            numbers = table[name].to_numpy("<f4")[kept]
            packed[name] = base64.b64encode(numbers.tobytes()).decode("ascii")
    return packed


def _plot() -> Plot:
    """Return the scatter of two methods; the page's code fills its sources and names its axes."""
    plot = figure(
        name="plot", sizing_mode="stretch_width", height=430, x_axis_label=" ", y_axis_label=" ",
        tools="pan,box_zoom,reset", toolbar_location="above", active_drag=None,
    )  # fmt: skip
    plot.toolbar.logo = None
    for dimension in ("width", "height"):
        zero = Span(location=0, dimension=dimension, line_color="#999999", line_dash="dotted")
        plot.add_layout(zero)
    empty = {name: [] for name in ("x", "y", "row", "marker", "colour")}
    others = ColumnDataSource({"x": [], "y": []}, name="others")
    points = ColumnDataSource(
        empty | {name: [] for name in ("id", "task", "prompt", "completion", "numbers")},
        name="points",
    )
    picked = ColumnDataSource({"x": [], "y": []}, name="picked")
    plot.scatter("x", "y", source=others, size=5, color="#BBBBBB", alpha=0.5)
    drawn = plot.scatter(
        "x", "y", source=points, marker="marker", size=9, fill_color="colour", fill_alpha=0.65,
        line_color="black", line_width=0.4,
        # a tapped point is marked by a ring; Bokeh would dim all others
        nonselection_fill_alpha=0.65, nonselection_line_color="black",
    )  # fmt: skip
    plot.scatter(
        "x", "y", source=picked, size=18, fill_color=None, line_color="black", line_width=2.5
    )
    plot.add_tools(
        HoverTool(renderers=[drawn], tooltips=_TOOLTIP, limit=2), TapTool(renderers=[drawn])
    )
    plot.grid.grid_line_color = "#EEEEEE"
    plot.outline_line_color = None
    for axis in plot.axis:
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size, axis.major_label_text_font_size = "15px", "13px"
        axis.axis_line_color = axis.major_tick_line_color = "#777777"
        axis.minor_tick_line_color = None
    return plot
