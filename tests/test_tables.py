"""Numbers as people read them."""

import numpy as np
import pandas as pd

from icprobe import tables


def test_columns_have_the_digits_of_their_kind():
    frame = pd.DataFrame({
        "condition": ["same task", "neither"],
        "estimate": [0.416, np.nan],
        "rankings": [48.0, np.nan],
        "p": [0.00042, 0.5],
        "pairs": [1920, 7],
    })  # fmt: skip
    shown = tables.wrapped(frame).data
    for text in (">0.42<", ">48<", ">0.0004<", ">0.5000<", ">1920<", ">–<", ">same task<"):
        assert text in shown
    assert "nan" not in shown


def test_in_words_an_interval_that_there_is_not_is_said():
    table = pd.DataFrame({"quantity": ["a", "b"], "estimate": [0.5, 0.25]})
    said = tables.in_words(table.assign(low=[0.125, np.nan], high=[0.75, np.nan]))
    assert said["a"] == "0.50 (0.12 to 0.75)"
    assert said["b"] == "0.25 (in too few rankings for an interval)"


def test_compared_needs_an_interval_without_zero():
    table = pd.DataFrame(
        {"quantity": list("abc"), "low": [0.1, -0.2, -0.1], "high": [0.2, -0.1, 0.1]}
    )
    said = [tables.compared(table, quantity) for quantity in "abc"]
    assert said == ["better than", "worse than", "neither measurably better nor worse than"]
