"""One value of each example, or of each pair, against another."""

import itertools
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from icprobe.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, looks, panel_grid, picture


def _with_margins(size: tuple[float, float]) -> tuple[Figure, Axes, Axes, Axes]:
    figure, places = plt.subplot_mosaic(
        [["top", "."], ["main", "side"]], figsize=size, width_ratios=[4, 1], height_ratios=[1, 4]
    )
    top, side = places["top"], places["side"]
    top.tick_params(labelbottom=False)
    side.tick_params(labelleft=False)
    top.set_ylabel("examples")
    side.set_xlabel("examples")
    return figure, places["main"], top, side


@picture
def scatter_with_margins(
    x: np.ndarray, y: np.ndarray, groups: Sequence[str], x_name: str, y_name: str
) -> Figure:
    """Two scores [N] of the same training examples, by group, with their histograms."""
    figure, main, top, side = _with_margins((6.4, 5))
    for group, (colour, marker) in looks(pd.unique(np.asarray(groups))).items():
        mine = np.asarray(groups) == group
        main.scatter(x[mine], y[mine], s=22, color=colour, marker=marker, alpha=0.8, label=group)
    top.hist(x, bins=25, color=GREY)
    side.hist(y, bins=25, color=GREY, orientation="horizontal")
    top.set_xlim(main.get_xlim())
    side.set_ylim(main.get_ylim())
    main.set(xlabel=x_name, ylabel=y_name)
    main.axhline(0, color="black", linewidth=0.6)
    main.axvline(0, color="black", linewidth=0.6)
    main.legend(loc="best", fontsize=9)
    return figure


@picture
def score_density(across: np.ndarray, upright: np.ndarray, step: float) -> Figure:
    """Density of two scores [N] of the same examples, with their histograms on the margins.

    `across` has steps of `step`, so its bins are these; the line is the median of `upright` there.
    """
    figure, main, top, side = _with_margins((6.6, 5.2))
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
    top.sharex(main)
    side.sharey(main)
    figure.colorbar(image, ax=side, fraction=0.3, label="examples in a cell")
    return figure


@picture
def length_against_score(tokens: np.ndarray, scores: dict[str, np.ndarray]) -> Figure:
    """Tokens of each training example [N] against each of its scores [N], with Spearman's rho."""
    figure, row = panel_grid(len(scores), (4.2, 3.2))
    colours = itertools.cycle((GREEN, BLUE, PINK, ORANGE))
    for ax, (name, values), colour in zip(row, scores.items(), colours, strict=False):
        rho = spearmanr(tokens, values).statistic
        ax.scatter(tokens, values, s=14, alpha=0.6, color=colour)
        ax.set(xlabel="tokens of the training example", ylabel=name)
        ax.set_title(f"Spearman {rho:+.2f} (n = {len(tokens)})")
    return figure


@picture
def against(panels: dict[str, tuple[str, np.ndarray, np.ndarray]]) -> Figure:
    """One estimate against another, all pairs, on axes that are logarithmic but around zero.

    `panels` has, by the name of the upright axis, the name and values [n, m] of the level one and
    the values [n, m] of the upright one.
    """
    figure, row = panel_grid(len(panels), (4.2, 3.6))
    colours = itertools.cycle((BLUE, PINK, GREEN, ORANGE))
    for axes, (name, (label, plain, other)), colour in zip(
        row, panels.items(), colours, strict=False
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


@picture
def overshoot(promised: np.ndarray, effect: np.ndarray, norm: np.ndarray, step: str) -> Figure:
    """Mean effect [N] of a step against its first order (nats); what is missing, by length [N]."""
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


@picture
def marked_scatters(
    panels: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], x_label: str, y_label: str,
    marked: str,
) -> Figure:  # fmt: skip
    """One value of each example against another, a panel a condition, with Spearman's rho.

    `panels` has, by title, x [N], y [N], and which examples are `marked` [N] bool.
    """
    figure, row = panel_grid(len(panels), (2.9, 3.4), (0.6, 0))
    for axes, (title, (x, y, mask)) in zip(row, panels.items(), strict=True):
        axes.scatter(x[~mask], y[~mask], s=14, color=BLUE, alpha=0.6, linewidths=0)
        axes.scatter(x[mask], y[mask], s=26, color=ORANGE, marker="x", label=marked)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"{title}\nSpearman {spearmanr(x, y).statistic:+.2f}", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(x_label)
    row[0].set_ylabel(y_label)
    if any(mask.any() for _, _, mask in panels.values()):
        figure.legend(*row[-1].get_legend_handles_labels(), loc="outside lower center")
    return figure
