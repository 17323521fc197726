"""Estimates with their intervals."""

import itertools
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from icprobe.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    SERIES,
    errors,
    label_right,
    legend_below,
    looks,
    panel_grid,
    picture,
)


@picture
def intervals(
    panels: dict[str, pd.DataFrame], label: str | dict[str, str], reference: float = 0.0
) -> Figure:
    """Dots with intervals, a panel per name: rows by the column `row`, colours by `series`.

    Frames have columns row, series, estimate, low, high; the panels share rows and, if they have
    one label and not one each, scale. A column `ceiling` is drawn as a bar where it is known; rows
    of one `group` stand between lines; an estimate without an interval is hollow. The upright line
    is the reference, such as chance.
    """
    labels_of = label if isinstance(label, dict) else dict.fromkeys(panels, label)
    every = pd.concat(panels.values())
    names, series = list(pd.unique(every["row"])), list(pd.unique(every["series"]))
    height = 1.3 + len(names) * (0.16 + 0.14 * len(series))
    sharex = isinstance(label, str)
    figure, row = panel_grid(len(panels), (2.7, height), (2, 0), sharex=sharex, sharey=True)
    for axes, (title, frame) in zip(row, panels.items(), strict=True):
        _dots(axes, frame, names, series)
        axes.axvline(reference, color="black", linewidth=1)
        axes.set_title(title)
        axes.set_xlabel(labels_of[title])
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    row[0].set_yticks(-np.arange(len(names)), names)
    row[0].set_ylim(-len(names) + 0.4, 0.6)
    if "group" in every:
        _mark_groups(row, every.groupby("row", sort=False)["group"].first())
    if len(series) > 1 or "ceiling" in every:
        _explain(figure, row[0], every)
    return figure


def _dots(axes: Axes, frame: pd.DataFrame, names: list[str], series: list[str]) -> None:
    """Draw a panel's dots, intervals and ceilings, the series of a row one below the other."""
    for number, (name, (colour, marker)) in enumerate(looks(series).items()):
        mine = frame[frame["series"] == name]
        shift = 0.7 * ((number + 0.5) / len(series) - 0.5)
        places = -np.array([names.index(one) for one in mine["row"]]) - shift
        axes.errorbar(
            mine["estimate"], places, xerr=errors(mine), fmt=marker, color=colour, markersize=5,
            capsize=2, label=name,
        )  # fmt: skip
        bare = mine["low"].isna().to_numpy()
        hollow = {"marker": marker, "s": 25, "facecolor": "white", "edgecolor": colour}
        axes.scatter(mine["estimate"][bare], places[bare], zorder=3, **hollow)
        if "ceiling" in mine:
            axes.scatter(mine["ceiling"], places, marker="|", s=90, color=colour, linewidths=2)


def _explain(figure: Figure, axes: Axes, every: pd.DataFrame) -> None:
    """Put a legend below: the series, and what bars and hollow marks mean where there are any."""
    handles = {}
    if len(pd.unique(every["series"])) > 1:  # else the title says it
        found, labels = axes.get_legend_handles_labels()
        handles = dict(zip(labels, found, strict=True))
    if "ceiling" in every and every["ceiling"].notna().any():
        bar = {"marker": "|", "markersize": 11, "markeredgewidth": 2, "linestyle": ""}
        handles["upright bar: its noise ceiling"] = Line2D([], [], color="black", **bar)
    if (every["low"].isna() & every["estimate"].notna()).any():
        ring = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linestyle": ""}
        handles["hollow: too few rankings for an interval"] = Line2D([], [], color="black", **ring)
    if handles:
        legend_below(figure, handles, 0.6, most=3)


def _mark_groups(panels: Sequence[Axes], groups: pd.Series) -> None:
    """Draw lines between groups of rows (their names top to bottom), and name them on the right."""
    groups = groups.to_numpy()
    starts = [0, *(np.flatnonzero(groups[1:] != groups[:-1]) + 1), len(groups)]
    for start, end in itertools.pairwise(starts):
        if start:
            for axes in panels:
                axes.axhline(0.5 - start, color=GREY, linewidth=0.8)
        place = {"x": 1.03, "y": 0.5 - (start + end) / 2}
        panels[-1].text(
            **place, s=groups[start], transform=panels[-1].get_yaxis_transform(),
            rotation=270, va="center", color=GREY,
        )  # fmt: skip


@picture
def neutral_control(
    gain: np.ndarray, neutral: np.ndarray, same_task: np.ndarray, means: pd.DataFrame
) -> Figure:
    """Gain of each pair against its content-free control [N, M], and mean gains in nats.

    `means` are rows of findings (quantity, estimate, low, high), top to bottom.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for chosen, colour, marker, name, alpha in (
        (~same_task, GREY, ".", "other task", 0.35),
        (same_task, ORANGE, "x", "same task", 0.9),
    ):
        x, y = neutral[chosen], gain[chosen]
        thin = slice(None, None, 1 + len(x) // 20_000)  # more points would only be a blot
        left.scatter(
            x[thin], y[thin], s=12, marker=marker, alpha=alpha, color=colour,
            label=name, linewidths=0.9, rasterized=True,
        )  # fmt: skip
    left.axline((0, 0), slope=1, color="black", linewidth=1)
    left.set_xlabel("gain from its content-free control (nats)")
    left.set_ylabel("gain from the demonstration (nats)")
    left.set_title("Pairs: above the line, content helps")
    left.legend(markerscale=1.5, loc="best")
    places = np.arange(len(means))[::-1]
    right.errorbar(means["estimate"], places, xerr=errors(means), fmt="o", color=BLUE, capsize=3)
    right.axvline(0, color="black", linewidth=1)
    right.set_yticks(places, means["quantity"])
    right.set_ylim(-0.6, len(means) - 0.4)
    right.set_xlabel("mean over pairs (nats), 95 % interval")
    right.set_title("Content and form")
    return figure


@picture
def ranked(table: pd.DataFrame, label: str, threshold: float | None = 0.0) -> Figure:
    """All training examples from the highest mean score to the lowest, with intervals.

    `table` has place, score, low, high, and what is marked, selected and copy (bool). `threshold`
    is where harm begins: those with an interval below it are counted; None where a score says
    nothing of harm.
    """
    table = table.sort_values("place")
    x, mean = table["place"].to_numpy(), table["score"].to_numpy()
    figure, axes = plt.subplots(figsize=(8, 3.4))
    axes.fill_between(x, table["low"], table["high"], color="#CCCCCC", linewidth=0, step="mid")
    axes.step(x, mean, where="mid", color="black", linewidth=1, label="mean over queries")
    axes.fill_between([], [], color="#CCCCCC", label="95 % interval over queries")
    marks = {"selected": ("o", BLUE, "selected"), "copy": ("X", ORANGE, "copy of a query")}
    for column, (marker, colour, name) in marks.items():
        at = table[column].to_numpy(bool)
        axes.scatter(
            x[at], mean[at], s=28, marker=marker, color=colour, edgecolor="black",
            linewidth=0.5, zorder=3, label=f"{name} ({at.sum()})",
        )  # fmt: skip
    if threshold is not None:
        axes.axhline(threshold, color="black", linewidth=0.8, linestyle=":")
        harmful = int((table["high"] < threshold).sum())
        axes.set_title(f"{harmful} of {len(table)} with an interval below {threshold:g}")
    axes.set(xlabel="place among all training examples", ylabel=label)
    axes.set_xlim(0.5, len(table) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@picture
def agreement_by_similarity(
    panels: dict[str, dict[str, tuple[pd.DataFrame, tuple[float, float, float]]]], label: str
) -> Figure:
    """Agreement from the least to the most similar part of the pool, a panel per pool.

    `panels` has, by pool and by similarity, one row per bin (estimate, low, high), and the slope of
    a line through them with the ends of its interval.
    """
    figure, row = panel_grid(len(panels), (3, 3.9), (1, 0), sharey=True)
    for axes, (title, frames) in zip(row, panels.items(), strict=True):
        for number, (name, (frame, slope)) in enumerate(frames.items()):
            if np.isfinite(slope).all():
                name += "\n{:+.2f} a part ({:+.2f} to {:+.2f})".format(*slope)
            colour, marker = SERIES[number], "os"[number % 2]
            places = np.arange(1, len(frame) + 1) + 0.08 * (number - 0.5)
            axes.errorbar(
                places, frame["estimate"], yerr=errors(frame), fmt=marker + "-",
                color=colour, capsize=3, label=name,
            )  # fmt: skip
        axes.axhline(0, color="black", linewidth=1)
        axes.set_xticks(range(1, len(frame) + 1))
        axes.set_title(title)
        axes.set_xlabel("least to most similar part of the pool")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), fontsize=8)
    row[0].set_ylabel(label)
    return figure


@picture
def equivalence(table: pd.DataFrame, margin: float) -> Figure:
    """Differences of selections against the margin of equivalence, as shares of a whole.

    `table` has first, second, share, share_low, share_high (95 %, thin), tost_low, tost_high (90 %,
    thick; within the shaded margin means equivalent), verdict.
    """
    figure, axes = plt.subplots(figsize=(8.4, 1.5 + 0.34 * len(table)))
    places = -np.arange(len(table))
    axes.axvspan(-margin, margin, color="#56B4E9", alpha=0.25, linewidth=0)
    axes.hlines(places, table["share_low"], table["share_high"], color=BLUE, linewidth=1)
    ends = table[["tost_low", "tost_high"]].replace([np.inf, -np.inf], np.nan)
    axes.hlines(places, ends["tost_low"], ends["tost_high"], color=BLUE, linewidth=4)
    axes.plot(table["share"], places, "o", color="black", markersize=5)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(places, table["first"] + "  less  " + table["second"])
    axes.set_ylim(-len(table) + 0.4, 0.6)
    label_right(axes, places, table["verdict"])
    axes.set_xlabel(
        "difference, share of what the full pool brings\n"
        f"(shaded: margin of {margin:g}; thick: 90 % interval, thin: 95 %)"
    )
    return figure
