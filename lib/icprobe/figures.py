"""One style and every plot; each is saved as .png and .pdf with where it came from inside.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; differences around zero are
shown on a scale from orange (hurts) to purple (helps), whose ends also differ in grey print.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import spearmanr

from icprobe import __version__, paths

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#555555"
SERIES = [BLUE, ORANGE, GREEN, PINK, GREY, "#56B4E9", "#D55E00", "black"]
MARKERS = "osD^vPX*"
DIVERGING = "PuOr"

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text in PDFs stays text
}


def save(figure: Figure, name: str, output_dir: str | Path, profile: str, seed: int) -> Figure:
    """Save a figure as <output_dir>/<name>.png and .pdf, profile and seed in the metadata.

    Returns the figure, closed: as the last line of a cell it is shown once, whatever pyplot's mode.
    """
    folder = paths.resolve(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    source = f"icprobe {__version__}, profile {profile}, seed {seed}"
    # without a date, the same numbers give the same file
    pdf = {"Title": name, "Subject": source, "CreationDate": None}
    with mpl.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", metadata={"Title": name, "Description": source})
        figure.savefig(folder / f"{name}.pdf", metadata=pdf)
    plt.close(figure)
    return figure


def _looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each name; after eight, they are the same again."""
    looks = itertools.cycle(zip(SERIES, MARKERS, strict=True))
    return dict(zip(names, looks, strict=False))


def discard(name: str, output_dir: str | Path) -> None:
    """Remove the figure and table of this name that an earlier run left."""
    for kind in ("png", "pdf", "csv"):
        (paths.resolve(output_dir) / f"{name}.{kind}").unlink(missing_ok=True)


def save_table(frame: pd.DataFrame, name: str, output_dir: str | Path) -> None:
    """Save a table as <output_dir>/<name>.csv."""
    with paths.replacing(paths.resolve(output_dir) / f"{name}.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g")


def gain_distribution(gain: np.ndarray, score: np.ndarray) -> Figure:
    """Histograms of all gains [N, M] in nats and of the published score [N]."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
        # a few pairs gain tens of nats; the outer percent would flatten the rest
        low, high = np.percentile(gain, [0.5, 99.5])
        bins = np.linspace(low, high, 61)
        left.hist(np.clip(gain, low, high).ravel(), bins=bins, color=BLUE)
        left.axvline(0, color="black", linewidth=1)
        left.axvline(gain.mean(), color=ORANGE, linestyle="--", label=f"mean {gain.mean():+.2f}")
        left.set(xlabel="gain (nats; outer 1 % in the end bins)", ylabel="pairs")
        left.set_title("All pairs")
        left.legend()
        step = 1 / gain.shape[1]
        right.hist(score, bins=np.arange(-step / 2, 1 + step, step), color=GREEN)
        right.set(xlabel="published ICP score (share of queries helped)", ylabel="examples")
        right.set_title(f"Training examples: {len(np.unique(score))} distinct scores")
        right.set_xlim(max(0, score.min() - 0.05), 1)
    return figure


def task_heatmap(
    panels: dict[str, np.ndarray], train_tasks: Sequence[str], query_tasks: Sequence[str]
) -> Figure:
    """Mean scores by training task (row) and query task (column).

    `panels` has a matrix [N, M] for each label (a name with its unit); panels stand side by side.
    """
    tables = {
        label: task_means(scores, train_tasks, query_tasks) for label, scores in panels.items()
    }
    with mpl.rc_context(STYLE):
        rows, columns = next(iter(tables.values())).shape
        width = 2.6 + 0.62 * columns
        figure, row = plt.subplots(
            1, len(tables), figsize=(width * len(tables), 1.9 + 0.42 * rows), squeeze=False
        )
        for axes, (label, means) in zip(row[0], tables.items(), strict=True):
            # one task with huge scores would leave all others white
            _heatmap(axes, means, label, max(np.percentile(np.abs(means), 95), 1e-9))
            axes.set_xlabel("task of the query")
            axes.set_ylabel("task of the training example")
    return figure


def _heatmap(axes: plt.Axes, table: pd.DataFrame, label: str, limit: float) -> None:
    """Draw a table with its values on a scale from -limit to limit; what is unknown stays white."""
    extend = "both" if np.nanmax(np.abs(table)) > limit else "neither"
    image = axes.imshow(table, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    digits = 0 if limit >= 100 else 1 if limit > 1 else 2
    for (i, j), value in np.ndenumerate(table.to_numpy()):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.65 * limit else "black"
            text = f"{value:z.{digits}f}"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(table.shape[1]), table.columns, rotation=40, ha="right")
    axes.set_yticks(range(table.shape[0]), table.index)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, extend=extend, shrink=0.8)
    bar.set_label(label)


def task_means(
    scores: np.ndarray, train_tasks: Sequence[str], query_tasks: Sequence[str]
) -> pd.DataFrame:
    """Mean of scores [N, M] by training task (rows) and query task (columns), as they come."""
    frame = pd.DataFrame(scores, index=list(train_tasks), columns=list(query_tasks))
    by_row = frame.groupby(level=0, sort=False).mean()
    return by_row.T.groupby(level=0, sort=False).mean().T


def neutral_control(
    gain: np.ndarray, neutral: np.ndarray, same_task: np.ndarray, means: pd.DataFrame
) -> Figure:
    """Gain of each pair against its neutral control, all [N, M]: what is content, what is frame.

    `means` are rows of findings (quantity, estimate, low, high in nats) shown beside the pairs.
    """
    with mpl.rc_context(STYLE):
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
        left.set_xlabel("gain from its neutral twin (nats)")
        left.set_ylabel("gain from the demonstration (nats)")
        left.set_title("Pairs: above the line, content helps")
        left.legend(markerscale=1.5, loc="best")
        dot_intervals(right, means)
        right.set_xlabel("mean over pairs (nats), 95 % interval")
        right.set_title("Content and form")
    return figure


def dot_intervals(axes: plt.Axes, rows: pd.DataFrame) -> None:
    """Draw a dot with its interval for each row (quantity, estimate, low, high), top to bottom."""
    places = np.arange(len(rows))[::-1]
    errors = [rows["estimate"] - rows["low"], rows["high"] - rows["estimate"]]
    axes.errorbar(rows["estimate"], places, xerr=errors, fmt="o", color=BLUE, capsize=3)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(places, rows["quantity"])
    axes.set_ylim(-0.6, len(rows) - 0.4)


def length_against_score(tokens: np.ndarray, scores: dict[str, np.ndarray]) -> Figure:
    """Tokens of each training example [N] against each of its scores [N], with Spearman's rho."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(scores), figsize=(4.2 * len(scores), 3.2), squeeze=False)
        for ax, (name, values), colour in zip(
            axes[0], scores.items(), itertools.cycle((GREEN, BLUE, PINK, ORANGE)), strict=False
        ):
            rho = spearmanr(tokens, values).statistic
            ax.scatter(tokens, values, s=14, alpha=0.6, color=colour)
            ax.set(xlabel="tokens of the training example", ylabel=name)
            ax.set_title(f"Spearman {rho:+.2f} (n = {len(tokens)})")
    return figure


def ranked(table: pd.DataFrame, label: str, threshold: float | None = 0.0) -> Figure:
    """All training examples from the highest mean score to the lowest, with intervals.

    Args:
        table: See `selection.ranking`; with columns selected and copy (bool), which are marked.
        label: Of the score, with its unit.
        threshold: Where help ends and harm begins: drawn as a line, and those with an interval
            below it are counted; None where a score says nothing of harm.
    """
    table = table.sort_values("place")
    x, mean = table["place"].to_numpy(), table["score"].to_numpy()
    with mpl.rc_context(STYLE):
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


def layer_shares(shares: dict[str, float]) -> Figure:
    """Shares of the squared gradient norm by block (column) and kind of layer (row), in percent."""
    cells = {}
    for name, share in shares.items():
        number, kind = re.split(r"\.(\d+)\.", name, maxsplit=1)[1:]
        cells.setdefault(int(number), {})[kind] = 100 * share
    table = pd.DataFrame(cells)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 1.3 + 0.34 * len(table)))
        # one layer can have more than all others together
        image = axes.imshow(table, cmap="cividis", norm=PowerNorm(0.5, vmin=0), aspect="auto")
        axes.set_yticks(range(len(table)), table.index)
        step = max(1, len(table.columns) // 15)
        axes.set_xticks(range(0, len(table.columns), step), table.columns[::step])
        axes.set_xlabel("transformer block")
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image)
        bar.set_label("share of the squared\nnorm (%)")
    return figure


def against(panels: dict[str, tuple[str, np.ndarray, np.ndarray]]) -> Figure:
    """One estimate against another, all pairs, on axes that are logarithmic but around zero.

    `panels` has, by the name of the upright axis, the name and values [n, m] of the level one and
    the values [n, m] of the upright one.
    """
    with mpl.rc_context(STYLE):
        figure, row = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
        for axes, (name, (label, plain, other)), colour in zip(
            row[0], panels.items(), itertools.cycle((BLUE, PINK, GREEN, ORANGE)), strict=False
        ):
            x, y = plain.ravel(), other.ravel()
            axes.scatter(x, y, s=10, alpha=0.4, color=colour, linewidths=0, rasterized=True)
            for axis, set_scale, values in (
                (axes.xaxis, axes.set_xscale, x),
                (axes.yaxis, axes.set_yscale, y),
            ):
                end = float(f"{np.abs(values).max():.0e}")
                # linear up to the median magnitude
                set_scale("asinh", linear_width=np.median(np.abs(values)) or 1.0)
                axis.set_ticks([-end, -end / 10, 0, end / 10, end])
                axis.set_major_formatter("{x:g}")
            axes.axhline(0, color="black", linewidth=0.8)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set(xlabel=label, ylabel=name)
            rho = spearmanr(x, y).statistic
            axes.set_title(f"Spearman {rho:+.2f} (n = {len(x)} pairs)")
    return figure


def projection_error(errors: pd.DataFrame) -> Figure:
    """Error and rank agreement of projected gradients by size (columns size, error, spearman)."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
        left.loglog(errors["size"], errors["error"], marker="o", color=BLUE, label="measured")
        slope = errors["error"].iloc[0] * (errors["size"].iloc[0] / errors["size"]) ** 0.5
        left.loglog(errors["size"], slope, linestyle="--", color=GREY, label="1 / √size")
        left.set_ylabel("root mean square error\n(share of that of the products)")
        left.legend()
        ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2) if tick > errors["error"].min() / 2]
        left.set_yticks(ticks, [str(tick) for tick in ticks])
        right.semilogx(errors["size"], errors["spearman"], marker="o", color=BLUE)
        right.set_ylabel("Spearman with the exact\nproducts, mean over queries")
        for axes in (left, right):
            axes.set_xlabel("size of the projection, each side of a layer")
            axes.set_xticks(errors["size"], [str(size) for size in errors["size"]])
            axes.minorticks_off()
    return figure


def scatter_with_margins(
    x: np.ndarray, y: np.ndarray, groups: Sequence[str], x_name: str, y_name: str
) -> Figure:
    """Two scores [N] of the same training examples, by group, with their histograms."""
    with mpl.rc_context(STYLE):
        figure, places = plt.subplot_mosaic(
            [["top", "."], ["main", "side"]], figsize=(6.4, 5), width_ratios=[4, 1],
            height_ratios=[1, 4],
        )  # fmt: skip
        main, top, side = places["main"], places["top"], places["side"]
        for group, (colour, marker) in _looks(pd.unique(np.asarray(groups))).items():
            mine = np.asarray(groups) == group
            main.scatter(
                x[mine], y[mine], s=22, color=colour, marker=marker, alpha=0.8, label=group
            )
        top.hist(x, bins=25, color=GREY)
        side.hist(y, bins=25, color=GREY, orientation="horizontal")
        top.set_xlim(main.get_xlim())
        side.set_ylim(main.get_ylim())
        top.tick_params(labelbottom=False)
        side.tick_params(labelleft=False)
        top.set_ylabel("examples")
        side.set_xlabel("examples")
        main.set(xlabel=x_name, ylabel=y_name)
        main.axhline(0, color="black", linewidth=0.6)
        main.axvline(0, color="black", linewidth=0.6)
        main.legend(loc="best", fontsize=9)
    return figure


def agreement_heatmaps(table: pd.DataFrame) -> Figure:
    """Agreement of methods with methods, a panel per level; below each value its interval.

    `table` has columns level, first, second, estimate, low, high.
    """
    levels = list(pd.unique(table["level"]))
    with mpl.rc_context(STYLE):
        firsts, seconds = (pd.unique(table[side]) for side in ("first", "second"))
        rows, columns = len(firsts), len(seconds)
        figure, panels = plt.subplots(
            len(levels), 1, figsize=(2.4 + 0.95 * columns, 1.2 + (0.3 + 0.5 * rows) * len(levels)),
            squeeze=False, sharex=True,
        )  # fmt: skip
        for axes, level in zip(panels[:, 0], levels, strict=True):
            mine = table[table["level"] == level]
            names = {"index": "first", "columns": "second", "values": "estimate"}
            grid = mine.pivot_table(**names, aggfunc="first", sort=False, dropna=False)
            grid = grid.reindex(index=firsts, columns=seconds)  # not every level has every pair
            image = axes.imshow(grid, cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
            for row in mine.itertuples():
                place = grid.columns.get_loc(row.second), grid.index.get_loc(row.first)
                colour = "white" if abs(row.estimate) > 0.55 else "black"
                known = np.isfinite(row.estimate)
                text = f"{row.estimate:.2f}\n{row.low:.2f} to {row.high:.2f}" if known else "–"
                axes.text(*place, text, ha="center", va="center", color=colour, fontsize=8)
            axes.set_xticks(range(columns), grid.columns, rotation=35, ha="right")
            axes.set_yticks(range(rows), grid.index)
            axes.spines[:].set_visible(False)
            axes.set_title(level)
        figure.colorbar(image, ax=panels, shrink=0.6, label="Spearman")
    return figure


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
    first = pd.concat(panels.values())
    names, series = list(pd.unique(first["row"])), list(pd.unique(first["series"]))
    with mpl.rc_context(STYLE):
        width = 2 + 2.7 * len(panels)
        height = 1.3 + len(names) * (0.16 + 0.14 * len(series))
        figure, row = plt.subplots(
            1, len(panels), figsize=(width, height), sharex=isinstance(label, str), sharey=True,
            squeeze=False,
        )  # fmt: skip
        for axes, (title, frame) in zip(row[0], panels.items(), strict=True):
            for number, (name, (colour, marker)) in enumerate(_looks(series).items()):
                mine = frame[frame["series"] == name]
                shift = 0.7 * ((number + 0.5) / len(series) - 0.5)
                places = -np.array([names.index(one) for one in mine["row"]]) - shift
                errors = [mine["estimate"] - mine["low"], mine["high"] - mine["estimate"]]
                axes.errorbar(
                    mine["estimate"], places, xerr=errors, fmt=marker,
                    color=colour, markersize=5, capsize=2, label=name,
                )  # fmt: skip
                bare = mine["low"].isna().to_numpy()
                hollow = {"marker": marker, "s": 25, "facecolor": "white", "edgecolor": colour}
                axes.scatter(mine["estimate"][bare], places[bare], zorder=3, **hollow)
                if "ceiling" in mine:
                    axes.scatter(
                        mine["ceiling"], places, marker="|", s=90, color=colour, linewidths=2
                    )
            axes.axvline(reference, color="black", linewidth=1)
            axes.set_title(title)
            axes.set_xlabel(labels_of[title])
            axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        row[0][0].set_yticks(-np.arange(len(names)), names)
        row[0][0].set_ylim(-len(names) + 0.4, 0.6)
        if "group" in first:
            _mark_groups(row[0], first.groupby("row", sort=False)["group"].first())
        if len(series) > 1 or "ceiling" in first:
            handles, labels = row[0][0].get_legend_handles_labels()
            if len(series) == 1:
                handles, labels = [], []  # the title says it
            if "ceiling" in first:
                bar = {"marker": "|", "markersize": 11, "markeredgewidth": 2, "linestyle": ""}
                handles.append(Line2D([], [], color="black", **bar))
                labels.append("upright bar: its noise ceiling")
            if (first["low"].isna() & first["estimate"].notna()).any():
                ring = {"marker": "o", "markersize": 5, "markerfacecolor": "white"}
                handles.append(Line2D([], [], color="black", linestyle="", **ring))
                labels.append("hollow: too few rankings for an interval")
            longest = 0.6 + 0.08 * max(map(len, labels))  # inches
            columns = max(1, min(3, len(labels), int(width / longest)))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def _mark_groups(panels: Sequence[plt.Axes], groups: pd.Series) -> None:
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


def agreement_by_task(table: pd.DataFrame, label: str) -> Figure:
    """Agreement by task of the training example (rows) and of the query (columns)."""
    with mpl.rc_context(STYLE):
        rows, columns = table.shape
        figure, axes = plt.subplots(figsize=(3 + 0.6 * columns, 1.9 + 0.42 * rows))
        _heatmap(axes, table, label, 1.0)
        axes.set_xlabel("task of the query")
        axes.set_ylabel("task of the training example")
    return figure


def overshoot(promised: np.ndarray, effect: np.ndarray, norm: np.ndarray, step: str) -> Figure:
    """Mean effect [N] of a step against its first order (nats); what is missing, by length [N]."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
        dots = {"s": 18, "color": BLUE, "alpha": 0.7}
        left.scatter(promised, effect, **dots)
        left.axline((0, 0), slope=1, color="black", linewidth=1, label="as promised")
        left.set_xlabel("what the small step promises (nats, mean over queries)")
        left.set_ylabel(f"effect of {step}\n(nats, mean over queries)")
        left.axhline(0, color=GREY, linewidth=0.6)
        left.legend()
        right.scatter(norm**2, promised - effect, **dots)
        right.set_xscale("log")
        right.axhline(0, color="black", linewidth=1)
        right.set_xlabel("squared length of the example's gradient (median 1)")
        right.set_ylabel("missing: promise less effect (nats)")
        rho = pd.Series(norm).corr(pd.Series(promised - effect), method="spearman")
        right.set_title(f"Spearman {rho:+.2f} (n = {len(norm)})")
    return figure


def agreement_by_similarity(
    panels: dict[str, dict[str, tuple[pd.DataFrame, tuple[float, float, float]]]], label: str
) -> Figure:
    """Agreement from the least to the most similar part of the pool, a panel per pool.

    `panels` has, by pool and by similarity, one row per bin (estimate, low, high), and the slope of
    a line through them with the ends of its interval.
    """
    with mpl.rc_context(STYLE):
        figure, row = plt.subplots(
            1, len(panels), figsize=(1 + 3 * len(panels), 3.9), sharey=True, squeeze=False
        )
        for axes, (title, frames) in zip(row[0], panels.items(), strict=True):
            for number, (name, (frame, slope)) in enumerate(frames.items()):
                if np.isfinite(slope).all():
                    name += "\n{:+.2f} a part ({:+.2f} to {:+.2f})".format(*slope)
                colour, marker = SERIES[number], "os"[number % 2]
                places = np.arange(1, len(frame) + 1) + 0.08 * (number - 0.5)
                errors = [frame["estimate"] - frame["low"], frame["high"] - frame["estimate"]]
                axes.errorbar(
                    places, frame["estimate"], yerr=errors, fmt=marker + "-",
                    color=colour, capsize=3, label=name,
                )  # fmt: skip
            axes.axhline(0, color="black", linewidth=1)
            axes.set_xticks(range(1, len(frame) + 1))
            axes.set_title(title)
            axes.set_xlabel("least to most similar part of the pool")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), fontsize=8)
        row[0][0].set_ylabel(label)
    return figure


def score_density(across: np.ndarray, upright: np.ndarray, step: float) -> Figure:
    """Density of two scores [N] of the same examples, with their histograms on the margins.

    `across` has steps of `step`, so its bins are these; the line is the median of `upright` there.
    """
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplot_mosaic(
            [["top", "."], ["main", "side"]], figsize=(6.6, 5.2),
            width_ratios=[4, 1], height_ratios=[1, 4],
        )  # fmt: skip
        main, top, side = grid["main"], grid["top"], grid["side"]
        edges = np.arange(across.min() - step / 2, across.max() + step, step)
        levels = np.linspace(upright.min(), upright.max(), 71)
        counts, *_ = np.histogram2d(across, upright, [edges, levels])
        image = main.pcolormesh(
            edges, levels, np.where(counts, counts, np.nan).T, norm=LogNorm(), cmap="cividis",
            rasterized=True,
        )  # fmt: skip
        medians = pd.Series(upright).groupby(np.rint(across / step)).agg(["median", "size"])
        medians = medians[medians["size"] >= 20]  # fewer would only wag its ends
        line = {"color": "#D55E00", "linewidth": 2, "label": "median (of at least 20)"}
        main.plot(medians.index * step, medians["median"], **line)
        main.legend(loc="lower right")
        main.set(xlabel="ICP score (share of queries helped)")
        main.set_ylabel("mean influence over queries\n(sum of signed logarithms, no unit)")
        top.hist(across, bins=edges, color=GREEN)
        side.hist(upright, bins=levels, color=BLUE, orientation="horizontal")
        top.sharex(main), side.sharey(main)
        top.tick_params(labelbottom=False), side.tick_params(labelleft=False)
        top.set_ylabel("examples"), side.set_xlabel("examples")
        figure.colorbar(image, ax=side, fraction=0.3, label="examples in a cell")
    return figure


def correlation_by_query(rho: np.ndarray, all_queries: float) -> Figure:
    """Histogram of each query's rank correlation [M], beside that of the mean over all queries."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.2))
        low = np.floor(20 * min(rho.min(), 0)) / 20
        axes.hist(rho, bins=np.arange(low, 1.001, 0.05), color=BLUE)
        axes.axvline(0, color="black", linewidth=1)
        for value, style, name in (
            (np.median(rho), "--", "median of these"),
            (all_queries, "-", "of the means over all queries"),
        ):
            axes.axvline(value, color=ORANGE, linestyle=style, label=f"{name}: {value:.2f}")
        axes.set(xlabel="Spearman of ICP score and influence on one query", ylabel="queries")
        axes.legend(loc="upper left", frameon=True, framealpha=1, edgecolor="none")
    return figure


def overlap_curves(curves: dict[str, pd.Series], cuts: dict[str, pd.DataFrame], N: int) -> Figure:
    """Share in common of two scores' sets of k examples, by k, against chance k / N.

    Args:
        curves: By name, the share at each k (the index).
        cuts: By name, rows (label, estimate, low, high, n = k) drawn as dots with intervals.
        N: Size of the pool.
    """
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.4))
        k = np.geomspace(min(curve.index.min() for curve in curves.values()), N, 100)
        axes.plot(k, k / N, color=GREY, linestyle=":", label="chance, k / N")
        for (name, curve), colour, style in zip(
            curves.items(), (BLUE, PINK), ("-", "--"), strict=False
        ):
            axes.plot(curve.index, curve, color=colour, linestyle=style, label=name)
        for (name, rows), colour, marker in zip(
            cuts.items(), (ORANGE, GREEN), ("o", "s"), strict=False
        ):
            # not as error bars: an interval of few resamples may miss its estimate
            axes.vlines(rows["n"], rows["low"], rows["high"], color=colour, linewidth=2)
            axes.plot(rows["n"], rows["estimate"], marker, color=colour, label=name)
        axes.set_xscale("log")
        axes.set(xlabel=f"k, size of each set (of {N:,})", ylabel="share in common", ylim=(0, 1.02))
        above = axes.secondary_xaxis("top")
        above.set_xticks(rows["n"], rows["label"])
        above.set_xlabel("where the paper cuts by ICP score")
        above.minorticks_off()
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def shares(panels: dict[str, pd.DataFrame]) -> Figure:
    """Tables of shares from 0 to 1 as heat maps in percent, one above the other, by title."""
    with mpl.rc_context(STYLE):
        heights = [len(table) for table in panels.values()]
        columns = max(table.shape[1] for table in panels.values())
        figure, column = plt.subplots(
            len(panels), 1, figsize=(3.4 + 0.55 * columns, sum(2.1 + 0.3 * n for n in heights)),
            height_ratios=[2.1 + 0.3 * n for n in heights], squeeze=False,
        )  # fmt: skip
        for axes, (title, table) in zip(column[:, 0], panels.items(), strict=True):
            image = axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (i, j), share in np.ndenumerate(table.to_numpy()):
                colour = "white" if share > 0.6 else "black"
                axes.text(
                    j, i, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=8
                )
            axes.set_xticks(range(table.shape[1]), table.columns, rotation=40, ha="right")
            axes.set_yticks(range(len(table)), table.index)
            axes.set_title(title)
            axes.spines[:].set_visible(False)
        percent = PercentFormatter(1, decimals=0, symbol=None)
        places = column[:, 0].tolist()
        figure.colorbar(image, ax=places, label="percent", shrink=0.5, format=percent)
    return figure


def learning_curves(curves: dict[str, list[pd.DataFrame]], batch_size: int) -> Figure:
    """Training loss by examples seen, a panel a selection: one line a seed.

    `curves` has, by selection, a frame (step, loss in nats per token of the batch) for each seed.
    """
    with mpl.rc_context(STYLE):
        columns = min(4, len(curves))
        rows = -(-len(curves) // columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(2.7 * columns, 2.1 * rows), sharey=True, squeeze=False
        )
        for axes, (name, runs) in zip(grid.flat, curves.items(), strict=False):
            colours, styles = itertools.cycle(SERIES), itertools.cycle(("-", "--", ":"))
            for run, colour, style in zip(runs, colours, styles, strict=False):
                axes.plot(
                    run["step"] * batch_size, run["loss"], style, color=colour, marker=".",
                    linewidth=1,
                )  # fmt: skip
            axes.set_title(name, fontsize=9)
        grid[0, 0].set_ylim(bottom=0)
        for axes in grid.flat[len(curves) :]:
            axes.set_visible(False)
        figure.supxlabel("examples seen (one line a seed)", fontsize=10)
        figure.supylabel("training loss (nats per token of the batch)", fontsize=10)
    return figure


def equivalence(table: pd.DataFrame, margin: float) -> Figure:
    """Differences of selections against the margin of equivalence, as shares of a whole.

    `table` has first, second, share, share_low, share_high (95 %, thin), tost_low, tost_high (90 %,
    thick; within the shaded margin means equivalent), verdict.
    """
    with mpl.rc_context(STYLE):
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
        right = axes.secondary_yaxis("right")
        right.set_yticks(places, table["verdict"])
        right.tick_params(length=0)
        right.spines[:].set_visible(False)
        axes.set_xlabel(
            "difference, share of what the full pool brings\n"
            f"(shaded: margin of {margin:g}; thick: 90 % interval, thin: 95 %)"
        )
    return figure


def budgets(table: pd.DataFrame, label: str) -> Figure:
    """Gain of selections by their size (columns method, examples, estimate, low, high)."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        methods = pd.unique(table["method"])
        for number, (method, (colour, marker)) in enumerate(_looks(methods).items()):
            mine = table[table["method"] == method].sort_values("examples")
            places = mine["examples"] * 1.03 ** (number - (len(methods) - 1) / 2)
            errors = [mine["estimate"] - mine["low"], mine["high"] - mine["estimate"]]
            axes.errorbar(
                places, mine["estimate"], yerr=errors, fmt=marker + "-", color=colour, capsize=3,
                markersize=5, label=method,
            )  # fmt: skip
        axes.set_xscale("log")
        sizes = sorted(table["examples"].unique())
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.axhline(0, color="black", linewidth=1)
        axes.set(xlabel="examples trained on", ylabel=label)
        axes.legend(loc="best")
    return figure


def bands(
    panels: dict[str, pd.DataFrame],
    x_label: str | dict[str, str],
    y_label: str | dict[str, str],
    scales: tuple[str, str] = ("linear", "linear"),
    columns: int = 2,
) -> Figure:
    """Lines with shaded intervals: a panel a title, a line a series, all in one legend.

    Args:
        panels: By title, frames with columns x, series, estimate, low, high.
        x_label: Of all panels, or by title.
        y_label: The same.
        scales: Of both axes, such as "log".
        columns: Of panels.
    """
    x_labels, y_labels = (
        label if isinstance(label, dict) else dict.fromkeys(panels, label)
        for label in (x_label, y_label)
    )
    names = list(pd.unique(pd.concat(panels.values())["series"]))
    looks = itertools.cycle(itertools.product(("-", "--"), SERIES))
    styles = dict(zip(names, looks, strict=False))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        wide, high = (6.2, 3.4) if len(panels) == 1 else (3.7, 2.9)
        size = (1 + wide * columns, 0.6 + high * rows)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for axes, (title, frame) in zip(grid.flat, panels.items(), strict=False):
            for name, mine in frame.groupby("series", sort=False):
                style, colour = styles[name]
                axes.plot(
                    mine["x"], mine["estimate"], style, color=colour, marker=_looks(names)[name][1],
                    markersize=4, linewidth=1.4, label=name,
                )  # fmt: skip
                axes.fill_between(
                    mine["x"], mine["low"], mine["high"], color=colour, alpha=0.18, linewidth=0
                )
            axes.set(xscale=scales[0], yscale=scales[1], title=title)
            axes.set(xlabel=x_labels[title], ylabel=y_labels[title])
            if scales[0] == "log":
                axes.xaxis.set_major_formatter("{x:g}")
            if scales[1] == "linear":
                axes.axhline(0, color="black", linewidth=0.8)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        _one_legend(figure, grid.flat)
    return figure


def durations(panels: dict[str, pd.DataFrame]) -> Figure:
    """Seconds of each method with their range, a panel a title, fastest at the top.

    `panels` has, by title, frames with columns method, seconds, low, high, floor (seconds that its
    operations take at least, a grey bar), ours and exact (bool; markers of estimates are hollow)
    and note, which stands at the right.
    """
    with mpl.rc_context(STYLE):
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        longest = max(len(frame) for frame in panels.values())
        size = (5.6 * columns, (0.9 + 0.3 * longest) * rows)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for axes, (title, frame) in zip(grid.flat, panels.items(), strict=False):
            frame = frame.sort_values("seconds", ascending=False)
            places = np.arange(len(frame))
            axes.barh(places, frame["floor"], height=0.5, color="#CCCCCC", label="least operations")
            for ours, exact in itertools.product((True, False), (True, False)):
                mine = ((frame["ours"] == ours) & (frame["exact"] == exact)).to_numpy()
                if not mine.any():
                    continue
                part = frame[mine]
                errors = [part["seconds"] - part["low"], part["high"] - part["seconds"]]
                colour = BLUE if ours else ORANGE
                label = ("this library" if ours else "others") + ("" if exact else ", an estimate")
                axes.errorbar(
                    part["seconds"], places[mine], xerr=errors, fmt="o" if ours else "s",
                    color=colour, markerfacecolor=colour if exact else "white", capsize=3,
                    label=label,
                )  # fmt: skip
            axes.set_yticks(places, frame["method"])
            axes.set_ylim(-0.6, len(frame) - 0.4)
            right = axes.secondary_yaxis("right")
            right.set_yticks(places, frame["note"])
            right.tick_params(length=0)
            right.spines[:].set_visible(False)
            axes.set_xlim(0, 1.08 * frame["high"].max())
            axes.set(title=title, xlabel="seconds")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        _one_legend(figure, grid.flat)
    return figure


def frontier(panels: dict[str, pd.DataFrame], x_label: str, y_label: str) -> Figure:
    """Agreement of methods against their cost, a panel a title, with a line at what is best so far.

    `panels` has, by title, frames with columns method, seconds, estimate, low, high. Points that
    take the same seconds are moved apart a little.
    """
    with mpl.rc_context(STYLE):
        size = (0.6 + 4.6 * len(panels), 4)
        figure, row = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        names = sorted(set(pd.concat(panels.values())["method"]))
        looks = _looks(names)
        for axes, (title, table) in zip(row[0], panels.items(), strict=True):
            table = table.sort_values(["seconds", "method"])
            best = table.groupby("seconds")["estimate"].max().cummax()
            axes.step(best.index, best, where="post", color="#999999", zorder=0)
            places = table["seconds"] * 1.06 ** table.groupby("seconds").cumcount()
            for place, point in zip(places, table.itertuples(), strict=True):
                colour, marker = looks[point.method]
                errors = [[point.estimate - point.low], [point.high - point.estimate]]
                axes.errorbar(
                    place, point.estimate, yerr=errors, fmt=marker, color=colour, capsize=3,
                    label=point.method,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.margins(x=0.15)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set(title=title, xlabel=x_label)
        row[0][0].set_ylabel(y_label)
        _one_legend(figure, row[0])
    return figure


def _one_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Put one legend below all panels, each label once, in as many columns as there is room for."""
    handles = {}
    for axes in panels:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    if handles:
        longest = 0.9 + 0.08 * max(map(len, handles))  # inches
        columns = max(1, min(len(handles), int(figure.get_size_inches()[0] / longest)))
        where = {"loc": "outside lower center", "ncols": columns}
        figure.legend(handles.values(), handles.keys(), **where)


def marked_scatters(
    panels: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], x_label: str, y_label: str,
    marked: str,
) -> Figure:  # fmt: skip
    """One value of each example against another, a panel a condition, with Spearman's rho.

    Args:
        panels: By title, x [N], y [N], and which examples are marked [N] bool.
        x_label: Of all panels.
        y_label: The same.
        marked: What marked examples are.
    """
    with mpl.rc_context(STYLE):
        figure, row = plt.subplots(
            1, len(panels), figsize=(0.6 + 2.9 * len(panels), 3.4), squeeze=False
        )
        for axes, (title, (x, y, mask)) in zip(row[0], panels.items(), strict=True):
            axes.scatter(x[~mask], y[~mask], s=14, color=BLUE, alpha=0.6, linewidths=0)
            axes.scatter(x[mask], y[mask], s=26, color=ORANGE, marker="x", label=marked)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(f"{title}\nSpearman {spearmanr(x, y).statistic:+.2f}", fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel(x_label)
        row[0][0].set_ylabel(y_label)
        if any(mask.any() for _, _, mask in panels.values()):
            figure.legend(*row[0][-1].get_legend_handles_labels(), loc="outside lower center")
    return figure
