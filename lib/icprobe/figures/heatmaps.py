"""Tables as pictures: a colour for each cell, and what it stands for."""

import re
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from icprobe.figures.style import DIVERGING, panel_grid, picture

OUTSIDE = "outside"  # the column of layers that are in no numbered block


def _cells(
    axes: Axes,
    table: pd.DataFrame,
    texts: np.ndarray,
    dark: np.ndarray,
    rotation: int = 40,
    **scale,
) -> AxesImage:
    """Draw a table of numbers [rows, columns], each cell with its text, white where it is dark."""
    image = axes.imshow(table, aspect="auto", **scale)
    for (i, j), text in np.ndenumerate(texts):
        colour = "white" if dark[i, j] else "black"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(table.shape[1]), table.columns, rotation=rotation, ha="right")
    axes.set_yticks(range(table.shape[0]), table.index)
    axes.spines[:].set_visible(False)
    return image


def _by_task(axes: Axes, table: pd.DataFrame, label: str, limit: float) -> None:
    """Draw a table by task on a scale from -limit to limit; what is unknown stays white."""
    values = table.to_numpy()
    digits = 0 if limit >= 100 else 1 if limit > 1 else 2
    texts = np.vectorize(lambda x: f"{x:z.{digits}f}" if np.isfinite(x) else "", otypes="O")(values)
    scale = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}
    image = _cells(axes, table, texts, np.abs(values) > 0.65 * limit, **scale)
    extend = "both" if np.nanmax(np.abs(values)) > limit else "neither"
    axes.figure.colorbar(image, extend=extend, shrink=0.8).set_label(label)
    axes.set_xlabel("task of the query")
    axes.set_ylabel("task of the training example")


@picture
def task_heatmap(
    panels: dict[str, np.ndarray], train_tasks: Sequence[str], query_tasks: Sequence[str]
) -> Figure:
    """Mean scores by training task (row) and query task (column).

    `panels` has a matrix [N, M] for each label (a name with its unit); panels stand side by side.
    """
    size = 2.6 + 0.62 * len(set(query_tasks)), 1.9 + 0.42 * len(set(train_tasks))
    figure, row = panel_grid(len(panels), size)
    for axes, (label, scores) in zip(row, panels.items(), strict=True):
        frame = pd.DataFrame(scores, index=list(train_tasks), columns=list(query_tasks))
        by_row = frame.groupby(level=0, sort=False).mean()
        means = by_row.T.groupby(level=0, sort=False).mean().T
        # one task with huge scores would leave all others white
        _by_task(axes, means, label, max(np.percentile(np.abs(means), 95), 1e-9))
    return figure


@picture
def agreement_by_task(table: pd.DataFrame, label: str) -> Figure:
    """Agreement by task of the training example (rows) and of the query (columns)."""
    rows, columns = table.shape
    figure, axes = plt.subplots(figsize=(3 + 0.6 * columns, 1.9 + 0.42 * rows))
    _by_task(axes, table, label, 1.0)
    return figure


@picture
def agreement_heatmaps(table: pd.DataFrame) -> Figure:
    """Agreement of methods with methods, a panel per level; below each value its interval.

    `table` has columns level, first, second, estimate, low, high.
    """
    levels, firsts, seconds = (pd.unique(table[name]) for name in ("level", "first", "second"))
    rows, columns = len(firsts), len(seconds)
    panel = 2.4 + 0.95 * columns, 0.3 + 0.5 * rows
    figure, panels = panel_grid(len(levels), panel, (0, 1.2), columns=1, sharex=True)
    for axes, level in zip(panels, levels, strict=True):
        mine = table[table["level"] == level]
        names = {"index": "first", "columns": "second", "values": "estimate"}
        estimate = mine.pivot_table(**names, aggfunc="first", sort=False, dropna=False)
        # not every level has every pair
        estimate = estimate.reindex(index=firsts, columns=seconds)
        texts = np.full((rows, columns), "", dtype=object)
        for row in mine.itertuples():
            known = np.isfinite(row.estimate)
            place = estimate.index.get_loc(row.first), estimate.columns.get_loc(row.second)
            texts[place] = f"{row.estimate:.2f}\n{row.low:.2f} to {row.high:.2f}" if known else "–"
        dark = np.abs(estimate.to_numpy()) > 0.55
        scale = {"cmap": DIVERGING, "vmin": -1, "vmax": 1}
        image = _cells(axes, estimate, texts, dark, rotation=35, **scale)
        axes.set_title(level)
    figure.colorbar(image, ax=panels, shrink=0.6, label="Spearman")
    return figure


@picture
def shares(panels: dict[str, pd.DataFrame]) -> Figure:
    """Tables of shares from 0 to 1 as heat maps in percent, one above the other, by title."""
    heights = [2.1 + 0.3 * len(table) for table in panels.values()]
    columns = max(table.shape[1] for table in panels.values())
    figure, column = plt.subplots(
        len(panels), 1, figsize=(3.4 + 0.55 * columns, sum(heights)), height_ratios=heights,
        squeeze=False,
    )  # fmt: skip
    for axes, (title, table) in zip(column[:, 0], panels.items(), strict=True):
        texts = table.map(lambda share: f"{100 * share:.0f}").to_numpy()
        scale = {"cmap": "Blues", "vmin": 0, "vmax": 1}
        image = _cells(axes, table, texts, table.to_numpy() > 0.6, **scale)
        axes.set_title(title)
    percent = PercentFormatter(1, decimals=0, symbol=None)
    places = column[:, 0].tolist()
    figure.colorbar(image, ax=places, label="percent", shrink=0.5, format=percent)
    return figure


@picture
def layer_shares(shares: dict[str, float]) -> Figure:
    """Shares of the squared gradient norm by block (column) and kind of layer (row), in percent.

    `shares` are by the layers' names. Those outside the numbered blocks have a column of their own.
    """
    cells = {}
    for name, share in shares.items():
        before, *found = re.split(r"\.(\d+)\.", name, maxsplit=1)
        block, kind = (int(found[0]), found[1]) if found else (OUTSIDE, before)
        cells.setdefault(block, {})[kind] = 100 * share
    outside = {OUTSIDE: cells.pop(OUTSIDE)} if OUTSIDE in cells else {}
    table = pd.DataFrame(cells | outside)
    figure, axes = plt.subplots(figsize=(9, 1.3 + 0.34 * len(table)))
    # one layer can have more than all others together
    image = axes.imshow(table, cmap="cividis", norm=PowerNorm(0.5, vmin=0), aspect="auto")
    axes.set_yticks(range(len(table)), table.index)
    step = max(1, len(cells) // 15)
    ticks = [*range(0, len(cells), step), *range(len(cells), table.shape[1])]
    axes.set_xticks(ticks, table.columns[ticks])
    axes.set_xlabel("transformer block")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image)
    bar.set_label("share of the squared\nnorm (%)")
    return figure
