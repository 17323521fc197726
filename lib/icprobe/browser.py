"""A small browser of scores for notebooks: pick queries and a training example, read two tables.

Where nobody can pick (papermill, nbclient, plain Python, no ipywidgets), a few tables instead.
"""

import html
import importlib.util

import IPython
import numpy as np
import pandas as pd
from IPython.display import HTML

from icprobe import views
from icprobe.figures import tables

ALL = "all queries (mean)"
ANY = "all tasks"
WIDTH = 110  # characters of a text

# where nobody can pick: all queries, and so many of them
FEW = 2


def browse(scores: views.Scores, top: int = 5) -> object:
    """Return a browser of the scores to show as a cell's value, or tables where nobody could pick.

    Args:
        scores: N training examples, M queries and what methods say of each pair.
        top: How many at each end.

    Raises:
        ValueError: If top is not positive.
    """
    if top < 1:
        raise ValueError(f"top is {top}, expected at least 1")
    return Browser(scores, top).box if attended() else few(scores, top)


def attended() -> bool:
    """Return whether somebody sits at this notebook, with the widgets to pick something.

    The request that runs the cell says whether its front end answers questions on standard input:
    JupyterLab, VS Code and Colab do, nbclient and papermill do not.
    """
    if importlib.util.find_spec("ipywidgets") is None:
        return False
    kernel = getattr(IPython.get_ipython(), "kernel", None)
    if kernel is None:
        return False
    request = kernel.get_parent("shell") or {}
    return bool(request.get("content", {}).get("allow_stdin", False))


def few(scores: views.Scores, top: int = 5) -> HTML:
    """Return the ranked training examples for all queries and for a few of them, of several tasks.

    Args:
        scores: N training examples, M queries.
        top: How many at each end.
    """
    firsts = scores.queries.drop_duplicates("task")["id"].head(FEW)
    shown = [_shown(side_by_side(scores, [*scores.methods], top=top), ALL)]
    for query in firsts:
        table = side_by_side(scores, [*scores.methods], query=query, top=top)
        shown.append(_shown(table, f"{query}: {_line(scores.queries, query)}"))
    return HTML("".join(shown))


def side_by_side(
    scores: views.Scores,
    methods: list[str],
    query: str | None = None,
    task: str | None = None,
    among: str | None = None,
    top: int = 5,
) -> pd.DataFrame:
    """Return the training examples that each method ranks highest and lowest, in words.

    Args:
        scores: N training examples, M queries.
        methods: The columns, by name.
        query: See `views.ranking`.
        task: See `views.ranking`.
        among: See `views.extremes`.
        top: How many at each end.

    Returns:
        Indexed "highest 1" to "lowest 1"; each cell has rank, score, their 95 % intervals where
        there are any, and the text. Cells of methods that measured fewer are empty.

    Raises:
        ValueError: If there is no such method, query or task.
    """
    columns = {}
    for method in methods:
        decimals = views.decimals(scores, method)
        found = views.extremes(scores, method, query, task, top, among)
        columns[_title(scores, method)] = pd.Series(
            {
                place: f"rank {row['rank']:.0f}{_ranks(row)}\n"
                f"{views.number(row['score'], decimals)}{_interval(row, decimals)}\n"
                f"{row['id']}: {tables.line(row, WIDTH)}"
                for place, row in found.iterrows()
            },
            dtype=object,
        )
    return _table(columns, ["highest", "lowest"], top)


def helped(scores: views.Scores, methods: list[str], example: str, top: int = 5) -> pd.DataFrame:
    """Return whom a training example helps and hurts most, by each method, in words.

    Args:
        scores: N training examples, M queries.
        methods: The columns, by name.
        example: The training example's id.
        top: How many queries of each kind.

    Returns:
        Indexed by end ("helps", "hurts") and place; each cell has the score, the example's rank for
        the query, and the query.

    Raises:
        ValueError: If there is no such training example.
    """
    found = views.helped(scores, example, top)
    columns = {}
    for method in methods:
        decimals = views.decimals(scores, method)
        columns[_title(scores, method)] = pd.Series(
            {
                (row["end"], row["place"]): f"{views.number(row['score'], decimals)}, "
                f"rank {row['rank']:.0f} of {row['ranked']}\n"
                f"{row['query']}: {tables.line(row, WIDTH)}"
                for _, row in found[found["method"] == method].iterrows()
            },
            dtype=object,
        )
    return _table(columns, ["helps", "hurts"], top)


def _table(columns: dict[str, pd.Series], ends: list[str], top: int) -> pd.DataFrame:
    """Join columns of cells, indexed by end and place; rows without any cell are left out."""
    places = pd.MultiIndex.from_product([ends, range(1, top + 1)])
    joined = pd.DataFrame(
        {name: cells.to_dict() for name, cells in columns.items()}, index=places, dtype=object
    )
    joined = joined.dropna(how="all").fillna("")
    return joined.set_axis([f"{end} {place}" for end, place in joined.index])


def _title(scores: views.Scores, method: str) -> str:
    return f"{method} ({scores.units[method]})"


def _interval(row: pd.Series, decimals: int) -> str:
    if np.isnan(row["low"]):
        return ""
    return f" ({views.number(row['low'], decimals)} to {views.number(row['high'], decimals)})"


def _ranks(row: pd.Series) -> str:
    if np.isnan(row["rank_low"]):
        return ""
    return f" ({row['rank_low']:.0f} to {row['rank_high']:.0f})"


def _line(frame: pd.DataFrame, name: str) -> str:
    return tables.line(frame[frame["id"] == name].iloc[0], WIDTH)


class Browser:
    """The widgets: what is picked, and two tables that follow it.

    Attributes:
        queries: All of them, those of a task, or one.
        among: Training examples of one task, or of all.
        methods: One box per method, by name.
        example: The id of a training example; one can type to find it.
        ranked: Table of the training examples ranked highest and lowest.
        helped: Table of whom the training example helps and hurts.
        box: All of this, to show.
    """

    def __init__(self, scores: views.Scores, top: int = 5):
        import ipywidgets as widgets  # only here: it may be missing

        self.scores, self.top = scores, top
        wide = {"layout": widgets.Layout(width="99%"), "style": {"description_width": "11em"}}
        self.queries = widgets.Dropdown(options=self._choices(), description="Queries", **wide)
        # None would be no choice at all
        tasks = {ANY: ""} | {task: task for task in sorted(set(scores.train["task"]))}
        self.among = widgets.Dropdown(
            options=list(tasks.items()), description="Training examples of", **wide
        )
        self.methods = {
            name: widgets.Checkbox(value=True, description=_title(scores, name), indent=False)
            for name in scores.methods
        }
        best = views.extremes(scores, next(iter(scores.methods)), top=1)["id"].iloc[0]
        self.example = widgets.Combobox(
            value=best, options=scores.train["id"].tolist(), ensure_option=True,
            description="Training example", continuous_update=False, **wide,
        )  # fmt: skip
        self.ranked, self.helped = widgets.HTML(), widgets.HTML()
        for picked in (self.queries, self.among, *self.methods.values()):
            picked.observe(self._rank, "value")
        for picked in (self.example, *self.methods.values()):
            picked.observe(self._help, "value")
        boxes = widgets.HBox(list(self.methods.values()), layout=widgets.Layout(flex_flow="wrap"))
        self.box = widgets.VBox(
            [self.queries, self.among, boxes, self.ranked, self.example, self.helped]
        )
        self._rank()
        self._help()

    def _choices(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return labels and what they mean: all, then by task its queries together, and each."""
        found = [(ALL, ())]
        for task in self.scores.tasks:
            if len(self.scores.tasks) > 1:
                found.append((f"{task}: its queries (mean)", ("task", task)))
            for query in self.scores.queries["id"].iloc[self.scores.columns(task=task)]:
                found.append((f"{query}: {_line(self.scores.queries, query)}", ("query", query)))
        return found

    def _on(self) -> list[str]:
        return [name for name, box in self.methods.items() if box.value]

    def _rank(self, change: object = None) -> None:
        of = dict([self.queries.value]) if self.queries.value else {}
        table = side_by_side(
            self.scores, self._on(), **of, among=self.among.value or None, top=self.top
        )
        self.ranked.value = _shown(table, self.queries.label)

    def _help(self, change: object = None) -> None:
        if not self.example.value:  # cleared, to type another
            return
        example = self.example.value
        table = helped(self.scores, self._on(), example, self.top)
        text = _line(self.scores.train, example)
        self.helped.value = _shown(table, f"Whom {example} helps and hurts: {text}")


def _shown(table: pd.DataFrame, title: str) -> str:
    """Return a table below its title, as HTML."""
    body = tables.wrapped(table).data if table.size else "<p>Nothing was measured here.</p>"
    # widgets have the line height of their buttons
    return f"<div style='line-height: 1.4'><p><b>{html.escape(title)}</b></p>{body}</div>"
