"""The claims table: what the paper says, what was measured here, and a verdict by a fixed rule.

Claims and rules are data: claims.yaml. They see the tables that notebooks wrote, nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from icprobe.data import paths

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced"
NOT_TESTABLE, NOT_RUN = "not testable here", "not run"

INFORMED = "informative prior: "  # how quantities of 05's networks with such a prior begin


@dataclass(frozen=True)
class Claim:
    """One row of the table; claims.yaml explains the fields."""

    id: str
    statement: str
    test: str
    notebook: str
    quantities: Sequence[str]
    rule: Mapping[str, float]
    unit: str = "Spearman"
    shown: str = ""
    table: str = "findings"


_entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
CLAIMS = tuple(Claim(**entry) for entry in _entries)


def verdict(rule: Mapping[str, float], low: Sequence[float]) -> str:
    """Return the verdict of a rule on the lower ends of a claim's intervals, in their order.

    Reproduced if all are above the threshold (by `above`, the first). Else partly, by `all_above`
    if some are; by `weakens` if the first and others are; by `above` if the first is above
    `partly`.
    """
    name = next(kind for kind in ("above", "all_above", "weakens") if kind in rule)
    threshold = rule[name]
    low = np.asarray(low)[: 1 if name == "above" else None]
    holds = low > threshold
    some = {
        "all_above": holds.any(),
        "weakens": holds[0] and holds[1:].any(),
        "above": low[0] > rule.get("partly", threshold),
    }
    if holds.all():
        return REPRODUCED
    return PARTLY if some[name] else NOT


def judge(output_dir: str | Path) -> list[dict]:
    """Return one record per claim, from the tables in a folder.

    Returns:
        id, statement, test, notebook, estimate, low, high, unit, n, verdict, and
        verdict_at_upper_end: the verdict if the truth lay at the upper ends of the intervals. Where
        it is another, more data might change the verdict. Numbers, and this, are None where there
        is no table ("not run") or a quantity is not in it ("not testable here", such as in data
        with a single task).
    """
    folder, records = paths.resolve(output_dir), []
    for claim in CLAIMS:
        record = {key: getattr(claim, key) for key in ("id", "statement", "test", "notebook")}
        record |= dict.fromkeys(("estimate", "low", "high", "unit", "n"))
        record |= {"verdict": NOT_RUN, "verdict_at_upper_end": None}
        file = folder / f"{claim.notebook}_{claim.table}.csv"
        if file.exists():
            record |= _judged(claim, pd.read_csv(file))
        records.append(record)
    return records


def _judged(claim: Claim, table: pd.DataFrame) -> dict:
    found = table[table["unit"] == claim.unit].set_index("quantity")
    shown = claim.shown or claim.quantities[0]
    for name in {shown, *claim.quantities} - {*found.index}:
        print(f"{claim.id}: {claim.notebook}_{claim.table}.csv has no row {name!r}")
    rows = found.reindex([shown, *claim.quantities])
    if rows[["estimate", "low", "high"]].isna().any(axis=None):
        return {"verdict": NOT_TESTABLE}
    return {
        **rows.iloc[0][["estimate", "low", "high", "unit"]],
        "n": int(rows["n"].iloc[0]),
        "verdict": verdict(claim.rule, rows["low"].iloc[1:]),
        "verdict_at_upper_end": verdict(claim.rule, rows["high"].iloc[1:]),
    }


def write(output_dir: str | Path) -> pd.DataFrame:
    """Judge all claims and write <output_dir>/claims.json; return them as a table."""
    records = judge(output_dir)
    file = paths.resolve(output_dir) / "claims.json"
    with paths.replacing(file) as temporary:
        temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return pd.DataFrame(records)
