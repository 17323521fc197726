"""One style for every figure, and the one way to save figures and tables.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; differences around zero are
shown on a scale from orange (hurts) to purple (helps), whose ends also differ in grey print.
"""

import functools
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icprobe import __version__

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


def picture(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that draws: in the common style, with names as they stand.

    Names come from data (tasks, methods, titles), and may hold a `$`, which begins a formula in
    matplotlib's text. A label given as a text of its own is the caller's, and may have one.
    """

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        args = [x if isinstance(x, str) else literal(x) for x in args]
        kwargs = {k: x if isinstance(x, str) else literal(x) for k, x in kwargs.items()}
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def literal(value: Any) -> Any:
    """Return texts, and whatever holds texts, with each `$` escaped for matplotlib."""
    if isinstance(value, str):
        return value.replace("$", r"\$")
    if isinstance(value, Mapping):
        return {literal(key): literal(one) for key, one in value.items()}
    if isinstance(value, pd.DataFrame):
        value = value.rename(index=literal, columns=literal)
        for name in value.select_dtypes(exclude=["number", "bool"]):
            value[name] = value[name].map(literal)
        return value
    if isinstance(value, pd.Series):
        return value if pd.api.types.is_numeric_dtype(value) else value.map(literal)
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "biuf" else np.array([*map(literal, value)])
    return [*map(literal, value)] if isinstance(value, Sequence) else value


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and a marker for each name; after eight, they are the same again."""
    known = itertools.cycle(zip(SERIES, MARKERS, strict=True))
    return dict(zip(names, known, strict=False))


def errors(rows: pd.DataFrame) -> list[pd.Series]:
    """Return how far the ends of intervals are from their estimates, as `errorbar` takes them."""
    return [rows["estimate"] - rows["low"], rows["high"] - rows["estimate"]]


def panel_grid(
    count: int,
    panel: tuple[float, float],
    margin: tuple[float, float] = (0, 0),
    columns: int | None = None,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many panels, in rows of at most so many columns, or in one row.

    `panel` and `margin` are width and height in inches, `options` those of `plt.subplots`.
    """
    columns = min(columns or count, count)
    rows = -(-count // columns)
    size = margin[0] + panel[0] * columns, margin[1] + panel[1] * rows
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def label_right(axes: Axes, places: Sequence[float], labels: Iterable[str]) -> None:
    """Write a label for each place on the right of the axes."""
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, labels)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)


def one_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Put one legend below all panels, each label once."""
    handles = {}
    for axes in panels:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    if handles:
        legend_below(figure, handles, 0.9, len(handles))


def legend_below(figure: Figure, handles: Mapping[str, Any], symbol: float, most: int) -> None:
    """Put a legend of handles by label below; a symbol has so many inches, a row most of them."""
    longest = symbol + 0.08 * max(map(len, handles))  # inches
    columns = max(1, min(most, len(handles), int(figure.get_size_inches()[0] / longest)))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def save(figure: Figure, name: str, output_dir: str | Path, profile: str, seed: int) -> Figure:
    """Save a figure as <output_dir>/<name>.png and .pdf, profile and seed in the metadata.

    Returns the figure, closed: as the last line of a cell it is shown once.
    """
    source = f"icprobe {__version__}, profile {profile}, seed {seed}"
    metadata = {
        "png": {"Title": name, "Description": source},
        # without a date, the same numbers give the same file
        "pdf": {"Title": name, "Subject": source, "CreationDate": None},
    }
    with mpl.rc_context(STYLE):
        for kind, facts in metadata.items():
            with _replacing(Path(output_dir) / f"{name}.{kind}") as temporary:
                figure.savefig(temporary, format=kind, metadata=facts)
    plt.close(figure)
    return figure


def save_table(frame: pd.DataFrame, name: str, output_dir: str | Path) -> None:
    """Save a table as <output_dir>/<name>.csv."""
    with _replacing(Path(output_dir) / f"{name}.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g")


def discard(name: str, output_dir: str | Path) -> None:
    """Remove the figure and table of this name that an earlier run left."""
    for kind in ("png", "pdf", "csv"):
        (Path(output_dir) / f"{name}.{kind}").unlink(missing_ok=True)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Yield a name to write a file under: once it is whole, it takes the place of `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
