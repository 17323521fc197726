"""What findings say in words."""

import numpy as np
import pandas as pd

from icprobe import statistics


def test_an_interval_that_there_is_not_is_said():
    table = pd.DataFrame({"quantity": ["a", "b"], "estimate": [0.5, 0.25]})
    said = statistics.as_text(table.assign(low=[0.125, np.nan], high=[0.75, np.nan]))
    assert said["a"] == "0.50 (0.12 to 0.75)"
    assert said["b"] == "0.25 (in too few rankings for an interval)"


def test_compared_needs_an_interval_without_zero():
    table = pd.DataFrame(
        {"quantity": list("abc"), "low": [0.1, -0.2, -0.1], "high": [0.2, -0.1, 0.1]}
    )
    said = [statistics.compared(table, quantity) for quantity in "abc"]
    assert said == ["better than", "worse than", "neither measurably better nor worse than"]
