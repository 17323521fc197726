"""Tables of findings (quantity, unit, estimate, low, high, n), and what they say in words."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from icprobe.statistics.bootstrap import Measure, with_intervals
from icprobe.statistics.measures import agreement, pair_mean

# two matrices [N, M]
Pair = tuple[np.ndarray, np.ndarray]


def pairs_agree(compared: Mapping[str, Pair], rng: np.random.Generator) -> pd.DataFrame:
    """Return the rank agreement over all pairs of named pairs of matrices, with intervals."""
    rows = [
        _finding((name, "Spearman"), agreement(*both, "pair"), both[0], both[0].size, rng)
        for name, both in compared.items()
    ]
    return pd.concat(rows, ignore_index=True)


def findings(
    means: Mapping[tuple[str, str], Pair],
    agreements: Mapping[tuple[str, str], Pair],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return means over pairs and rank agreements of row means, with intervals.

    Args:
        means: By (quantity, unit): values [N, M] and the mask [N, M] of the pairs that count;
            those with no pairs are left out.
        agreements: By (quantity, unit): two matrices [N, M].
        rng: For the bootstrap.
    """
    rows = [
        _finding(name, pair_mean(values, mask), values, int(mask.sum()), rng)
        for name, (values, mask) in means.items()
        if mask.any()
    ]
    rows += [
        _finding(name, agreement(*both, "example"), both[0], len(both[0]), rng)
        for name, both in agreements.items()
    ]
    return pd.concat(rows, ignore_index=True)


def _finding(
    name: tuple[str, str], measure: Measure, matrix: np.ndarray, n: int, rng: np.random.Generator
) -> pd.DataFrame:
    row = dict(zip(("quantity", "unit"), name, strict=True))
    kind = "fisher" if row["unit"] == "Spearman" else "percentile"
    return with_intervals([row], measure, matrix.shape, rng, kind=kind).assign(n=n)


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
