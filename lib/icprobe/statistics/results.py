"""Tables of findings (quantity, unit, estimate, low, high, n), and what they say in words."""

import numpy as np
import pandas as pd

from icprobe.statistics.bootstrap import Measure, bootstrap_ci
from icprobe.statistics.measures import agreement, pair_mean


def pairs_agree(
    compared: dict[str, tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> pd.DataFrame:
    """Return the rank agreement over all pairs of named pairs of matrices, with intervals."""
    measures = {
        (name, "Spearman"): (agreement(*both, level="pair"), both[0].shape, both[0].size)
        for name, both in compared.items()
    }
    return with_intervals(measures, rng)


def with_intervals(
    measures: dict[tuple[str, str], tuple[Measure, tuple[int, int], int]], rng: np.random.Generator
) -> pd.DataFrame:
    """Return estimates with 95 % intervals over training examples and queries.

    Args:
        measures: By (quantity, unit): the measure, its matrices' shape (N, M), and how many things
            n it is over; those over none are left out.
        rng: For the bootstrap.

    Returns:
        One row each: quantity, unit, estimate, low, high, n.
    """
    rows = []
    for (quantity, unit), (measure, shape, n) in measures.items():
        if n:
            kind = "fisher" if unit == "Spearman" else "percentile"
            numbers = map(float, bootstrap_ci(measure, shape, rng, kind=kind))
            rows.append((quantity, unit, *numbers, n))
    return pd.DataFrame(rows, columns=["quantity", "unit", "estimate", "low", "high", "n"])


def findings(
    means: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
    agreements: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return means over pairs and rank agreements of row means, with intervals.

    Args:
        means: By (quantity, unit): values [N, M] and the mask [N, M] of the pairs that count.
        agreements: By (quantity, unit): two matrices [N, M].
        rng: For the bootstrap.
    """
    measures = {
        name: (pair_mean(values, mask), values.shape, int(mask.sum()))
        for name, (values, mask) in means.items()
    }
    measures |= {
        name: (agreement(*both, level="example"), both[0].shape, len(both[0]))
        for name, both in agreements.items()
    }
    return with_intervals(measures, rng)


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
