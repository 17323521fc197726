"""Headline numbers of matrices that were made to have them."""

import numpy as np
import pytest

from icprobe.statistics import method_findings


def test_findings_have_intervals_around_them():
    rng = np.random.default_rng(0)
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
