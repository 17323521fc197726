"""Figures: names as they stand, layers anywhere, files that are whole or not there."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from icprobe import figures
from icprobe.figures.style import literal

MONEY = "from $5 to $7"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def shown(figure):
    """Return the texts of a figure, as matplotlib shows them, and whether any is a formula."""
    figure.canvas.draw()
    texts = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
    return {text for text, _ in texts}, any(formula for _, formula in texts)


def dots(**columns):
    return pd.DataFrame({"estimate": [0.1, 0.2], "low": [0.0, 0.1], "high": [0.2, 0.3], **columns})


SCORES = np.random.default_rng(0).normal(size=(4, 2))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.task_heatmap({"gain": SCORES}, ["a", MONEY] * 2, [MONEY, "b"]),
        lambda: figures.agreement_by_task(pd.DataFrame(SCORES[:2], ["a", MONEY]), "rho"),
        lambda: figures.agreement_heatmaps(dots(level=MONEY, first=["a", MONEY], second=MONEY)),
        lambda: figures.shares({MONEY: pd.DataFrame({MONEY: [0.5]}, [MONEY])}),
        lambda: figures.layer_shares({f"h.0.{MONEY}": 1.0}),
        lambda: figures.scatter_with_margins(*SCORES.T, ["a", MONEY] * 2, "x", "y"),
        lambda: figures.intervals({MONEY: dots(row=[MONEY, "b"], series=[MONEY, "c"])}, "rho"),
        lambda: figures.bands({MONEY: dots(x=[1, 2], series=MONEY)}, "x", "y"),
    ],
)
def test_names_are_no_formulas(draw):
    texts, formula = shown(draw())
    assert MONEY in texts and not formula


def test_a_label_of_the_callers_own_may_be_a_formula():
    figure = figures.bands({"a": dots(x=[1, 2], series="b")}, "$10^3$", "y")
    assert shown(figure)[1]


def test_what_holds_no_text_stays_as_it_is():
    frame = pd.DataFrame({"a": [1.5, np.nan], "b": [True, False]})
    pd.testing.assert_frame_equal(literal(frame), frame)
    named = pd.DataFrame({"$": ["$", None]}, index=["x", "$"])
    found = literal(named)
    assert named.loc["x", "$"] == "$" and found.index.tolist() == ["x", r"\$"]
    assert found[r"\$"].iloc[0] == r"\$" and found[r"\$"].isna().tolist() == [False, True]
    assert literal({"$": (1, ["$"])}) == {r"\$": [1, [r"\$"]]}


def test_layers_outside_of_blocks_have_their_own_column():
    """Such as OPT-350m's, before the first block and after the last."""
    blocks = {f"model.decoder.layers.{i}.fc1": 0.1 for i in range(2)}
    outside = {f"model.decoder.project_{end}": 0.4 for end in ("in", "out")}
    figure = figures.layer_shares({**outside, **blocks})
    axes = figure.axes[0]
    image = np.ma.filled(axes.images[0].get_array(), np.nan)
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == ["0", "1", "outside"]
    assert image[rows.index("fc1")].tolist() == pytest.approx([10, 10, np.nan], nan_ok=True)
    for name in outside:
        assert image[rows.index(name), 2] == pytest.approx(40)
    alone = figures.layer_shares(outside)
    assert alone.axes[0].images[0].get_array().shape == (2, 1)


def test_a_table_has_six_digits_and_a_figure_says_what_made_it(tmp_path):
    folder = tmp_path / "new"
    figures.save_table(pd.DataFrame({"a": [1 / 3]}), "01_a", folder)
    assert (folder / "01_a.csv").read_text() == "a\n0.333333\n"
    figures.save(Figure(), "01_a", folder, "laptop", 3)
    assert b"profile laptop, seed 3" in (folder / "01_a.png").read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == ["01_a.csv", "01_a.pdf", "01_a.png"]
    figures.discard("01_a", folder)
    figures.discard("01_a", folder)
    assert not list(folder.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path):
    figures.save_table(pd.DataFrame({"a": [1]}), "01_a", tmp_path)
    figures.save(Figure(), "01_b", tmp_path, "laptop", 0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    class Unsaid:
        def __str__(self):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        figures.save_table(pd.DataFrame({"a": ["x" * 10**6, Unsaid()]}), "01_a", tmp_path)
    broken = Figure()
    broken.text(0, 0, "$\\nonsense$")
    with pytest.raises(ValueError, match="nonsense"):
        figures.save(broken, "01_b", tmp_path, "laptop", 0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
