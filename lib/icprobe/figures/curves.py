"""Lines and histograms: distributions, and what changes with a size."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from icprobe.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SERIES,
    errors,
    label_right,
    looks,
    one_legend,
    panel_grid,
    picture,
)


@picture
def gain_distribution(gain: np.ndarray, score: np.ndarray) -> Figure:
    """Histograms of all gains [N, M] in nats and of the published score [N]."""
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


@picture
def correlation_by_query(rho: np.ndarray, all_queries: float) -> Figure:
    """Histogram of each query's rank correlation [M], beside that of the mean over all queries."""
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


@picture
def projection_error(errors: pd.DataFrame) -> Figure:
    """Error and rank agreement of projected gradients by size (columns size, error, spearman)."""
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


@picture
def overlap_curves(curves: dict[str, pd.Series], cuts: dict[str, pd.DataFrame], N: int) -> Figure:
    """Share in common of two scores' sets of k examples, by k, against chance k / N.

    `curves` have, by name, the share at each k (the index); `cuts`, by name, rows (label, estimate,
    low, high, n = k) drawn as dots with intervals. N is the size of the pool.
    """
    figure, axes = plt.subplots(figsize=(7, 4.4))
    k = np.geomspace(min(curve.index.min() for curve in curves.values()), N, 100)
    axes.plot(k, k / N, color=GREY, linestyle=":", label="chance, k / N")
    lines = {"-": BLUE, "--": PINK}
    for (name, curve), (style, colour) in zip(curves.items(), lines.items(), strict=True):
        axes.plot(curve.index, curve, color=colour, linestyle=style, label=name)
    for (name, rows), colour, marker in zip(cuts.items(), (ORANGE, GREEN), "os", strict=True):
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


@picture
def learning_curves(curves: dict[str, list[pd.DataFrame]], batch_size: int) -> Figure:
    """Training loss by examples seen, a panel a selection: one line a seed.

    `curves` has, by selection, a frame (step, loss in nats per token of the batch) for each seed.
    """
    figure, grid = panel_grid(len(curves), (2.7, 2.1), columns=4, sharey=True)
    for axes, (name, runs) in zip(grid, curves.items(), strict=True):
        colours, styles = itertools.cycle(SERIES), itertools.cycle(("-", "--", ":"))
        for run, colour, style in zip(runs, colours, styles, strict=False):
            axes.plot(
                run["step"] * batch_size, run["loss"], style, color=colour, marker=".",
                linewidth=1,
            )  # fmt: skip
        axes.set_title(name, fontsize=9)
    grid[0].set_ylim(bottom=0)
    figure.supxlabel("examples seen (one line a seed)", fontsize=10)
    figure.supylabel("training loss (nats per token of the batch)", fontsize=10)
    return figure


@picture
def bands(
    panels: dict[str, pd.DataFrame],
    x_label: str | dict[str, str],
    y_label: str | dict[str, str],
    scales: tuple[str, str] = ("linear", "linear"),
    columns: int = 2,
) -> Figure:
    """Lines with shaded intervals: a panel a title, a line a series, all in one legend.

    `panels` has, by title, frames with columns x, series, estimate, low, high. Labels are of all
    panels, or by title; `scales` are those of both axes.
    """
    x_labels, y_labels = (
        label if isinstance(label, dict) else dict.fromkeys(panels, label)
        for label in (x_label, y_label)
    )
    names = pd.unique(pd.concat(panels.values())["series"])
    lines = itertools.cycle(itertools.product(("-", "--"), SERIES))
    styles = dict(zip(names, lines, strict=False))
    panel = (6.2, 3.4) if len(panels) == 1 else (3.7, 2.9)
    figure, grid = panel_grid(len(panels), panel, (1, 0.6), columns)
    for axes, (title, frame) in zip(grid, panels.items(), strict=True):
        for name, mine in frame.groupby("series", sort=False):
            style, colour = styles[name]
            axes.plot(
                mine["x"], mine["estimate"], style, color=colour, marker=looks(names)[name][1],
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
    one_legend(figure, grid)
    return figure


@picture
def budgets(table: pd.DataFrame, label: str) -> Figure:
    """Gain of selections by their size (columns method, examples, estimate, low, high)."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    methods = pd.unique(table["method"])
    for number, (method, (colour, marker)) in enumerate(looks(methods).items()):
        mine = table[table["method"] == method].sort_values("examples")
        places = mine["examples"] * 1.03 ** (number - (len(methods) - 1) / 2)
        axes.errorbar(
            places, mine["estimate"], yerr=errors(mine), fmt=marker + "-", color=colour, capsize=3,
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


@picture
def durations(panels: dict[str, pd.DataFrame]) -> Figure:
    """Seconds of each method with their range, a panel a title, fastest at the top.

    `panels` has, by title, frames with columns method, seconds, low, high, floor (seconds that its
    operations take at least, a grey bar), ours and exact (bool; markers of estimates are hollow)
    and note, which stands at the right.
    """
    height = 0.9 + 0.3 * max(len(frame) for frame in panels.values())
    figure, grid = panel_grid(len(panels), (5.6, height), columns=2)
    for axes, (title, frame) in zip(grid, panels.items(), strict=True):
        frame = frame.sort_values("seconds", ascending=False)
        places = np.arange(len(frame))
        axes.barh(places, frame["floor"], height=0.5, color="#CCCCCC", label="least operations")
        for ours, exact in itertools.product((True, False), (True, False)):
            mine = ((frame["ours"] == ours) & (frame["exact"] == exact)).to_numpy()
            if not mine.any():
                continue
            part = frame[mine]
            span = [part["seconds"] - part["low"], part["high"] - part["seconds"]]
            colour = BLUE if ours else ORANGE
            label = ("this library" if ours else "others") + ("" if exact else ", an estimate")
            axes.errorbar(
                part["seconds"], places[mine], xerr=span, fmt="o" if ours else "s",
                color=colour, markerfacecolor=colour if exact else "white", capsize=3,
                label=label,
            )  # fmt: skip
        axes.set_yticks(places, frame["method"])
        axes.set_ylim(-0.6, len(frame) - 0.4)
        label_right(axes, places, frame["note"])
        axes.set_xlim(0, 1.08 * frame["high"].max())
        axes.set(title=title, xlabel="seconds")
    one_legend(figure, grid)
    return figure


@picture
def frontier(panels: dict[str, pd.DataFrame], x_label: str, y_label: str) -> Figure:
    """Agreement of methods against their cost, a panel a title, with a line at what is best so far.

    `panels` has, by title, frames with columns method, seconds, estimate, low, high. Points that
    take the same seconds are moved apart a little.
    """
    figure, row = panel_grid(len(panels), (4.6, 4), (0.6, 0), sharey=True)
    of_method = looks(sorted(set(pd.concat(panels.values())["method"])))
    for axes, (title, table) in zip(row, panels.items(), strict=True):
        table = table.sort_values(["seconds", "method"])
        best = table.groupby("seconds")["estimate"].max().cummax()
        axes.step(best.index, best, where="post", color="#999999", zorder=0)
        places = table["seconds"] * 1.06 ** table.groupby("seconds").cumcount()
        for place, point in zip(places, table.itertuples(), strict=True):
            colour, marker = of_method[point.method]
            span = [[point.estimate - point.low], [point.high - point.estimate]]
            axes.errorbar(
                place, point.estimate, yerr=span, fmt=marker, color=colour, capsize=3,
                label=point.method,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.15)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel=x_label)
    row[0].set_ylabel(y_label)
    one_legend(figure, row)
    return figure
