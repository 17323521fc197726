"""Tables of findings (quantity, unit, estimate, low, high, n), and what they say in words."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from icprobe.statistics.bootstrap import Measure, with_intervals
from icprobe.statistics.measures import agreements, pair_mean

# two matrices [N, M]
Pair = tuple[np.ndarray, np.ndarray]


def pairs_agree(compared: Mapping[str, Pair], rng: np.random.Generator) -> pd.DataFrame:
    """Return the rank agreement over all pairs of named pairs of matrices, with intervals."""
    rows = [
        _finding((name, "Spearman"), agreements([one], [other], "pair"), one, one.size, rng)
        for name, (one, other) in compared.items()
    ]
    return pd.concat(rows, ignore_index=True)


def findings(
    means: Mapping[tuple[str, str], Pair],
    agreeing: Mapping[tuple[str, str], Pair],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return means over pairs and rank agreements of row means, with intervals.

    Both are by (quantity, unit). `means` has values [N, M] and the mask [N, M] of the pairs that
    count (without any, there is no row), `agreeing` has two matrices [N, M].
    """
    rows = [
        _finding(name, pair_mean(values, mask), values, int(mask.sum()), rng)
        for name, (values, mask) in means.items()
        if mask.any()
    ]
    rows += [
        _finding(name, agreements([one], [other], "example"), one, len(one), rng)
        for name, (one, other) in agreeing.items()
    ]
    return pd.concat(rows, ignore_index=True)


def _finding(
    name: tuple[str, str], measure: Measure, matrix: np.ndarray, n: int, rng: np.random.Generator
) -> pd.DataFrame:
    quantity, unit = name
    row = [{"quantity": quantity, "unit": unit}]
    kind = "fisher" if unit == "Spearman" else "percentile"
    return with_intervals(row, measure, matrix.shape, rng, kind=kind).assign(n=n)


def as_text(findings: pd.DataFrame) -> dict[str, str]:
    """Return "estimate (low to high)" by quantity, for sentences."""
    return {
        row.quantity: f"{row.estimate:.2f} ({row.low:.2f} to {row.high:.2f})"
        if np.isfinite(row.low)
        else f"{row.estimate:.2f} (in too few rankings for an interval)"
        for row in findings.itertuples()
    }


def compared(findings: pd.DataFrame, difference: str) -> str:
    """Return "better than", "worse than" or neither, as a difference's interval has it."""
    row = findings.set_index("quantity").loc[difference]
    if row["low"] > 0:
        return "better than"
    return "worse than" if row["high"] < 0 else "neither measurably better nor worse than"
