"""Findings of matrices that were made to have them, and what they say in words."""

import numpy as np
import pandas as pd
import pytest

from icprobe import statistics
from icprobe.statistics import method_findings


def test_findings_have_intervals_around_them(rng):
    same_task = rng.random((30, 20)) < 0.3
    gain = rng.normal(size=(30, 20)) + 2 * same_task
    tokens = rng.integers(9, 99, 30)
    table = method_findings.probing(gain, np.full((30, 20), 0.5), same_task, tokens, rng)
    table = table.set_index("quantity")
    assert (table["low"] <= table["estimate"]).all() and (table["estimate"] <= table["high"]).all()
    row = table.loc["mean gain, same task"]
    assert row["estimate"] == pytest.approx(gain[same_task].mean()) and row["n"] == same_task.sum()
    assert row["low"] < 2 < row["high"]
    over = table.loc["mean gain over neutral, same task", "estimate"]
    assert over == pytest.approx(row["estimate"] - 0.5)
    table = method_findings.gradients(gain, gain, same_task, tokens, rng).set_index("quantity")
    assert table.loc["mean product against mean cosine", "estimate"] == pytest.approx(1)
    assert table.loc["mean product, same task", "estimate"] == row["estimate"]
    alone = method_findings.gradients(gain, gain, np.ones_like(same_task), tokens, rng)
    assert not alone["quantity"].str.contains("other tasks").any()


def test_words_follow_intervals():
    table = pd.DataFrame({"quantity": list("abcd"), "estimate": [0.5, -0.25, 0, 0.25]})
    table = table.assign(low=[0.125, -0.5, -0.1, np.nan], high=[0.75, -0.1, 0.1, np.nan])
    said = statistics.as_text(table)
    assert said["a"] == "0.50 (0.12 to 0.75)"
    assert said["d"] == "0.25 (in too few rankings for an interval)"
    said = [statistics.compared(table, quantity) for quantity in "abc"]
    assert said == ["better than", "worse than", "neither measurably better nor worse than"]
