"""The claims table: rules by hand, and never a verdict without a result."""

import json

import pandas as pd
import pytest

from icprobe.artifact import claims
from icprobe.artifact.claims import NOT, NOT_RUN, NOT_TESTABLE, PARTLY, REPRODUCED
from icprobe.data import paths


@pytest.mark.parametrize(
    ("rule", "low", "verdict"),
    [
        ({"above": 0.3, "partly": 0}, [0.31], REPRODUCED),
        ({"above": 0.3, "partly": 0}, [0.3], PARTLY),
        ({"above": 0.3, "partly": 0}, [0], NOT),
        ({"above": 0.85}, [0.86], REPRODUCED),
        ({"above": 0.85}, [0.85], NOT),
        ({"all_above": 0}, [0.1, 0.1], REPRODUCED),
        ({"all_above": 0}, [-0.1, 0.1], PARTLY),
        ({"all_above": 0}, [-0.1, 0], NOT),
        ({"all_above": 1}, [1.1, 1.2], REPRODUCED),
        ({"all_above": 1}, [0.9, 1], NOT),
        ({"weakens": 0}, [0.1, 0.1, 0.2], REPRODUCED),
        ({"weakens": 0}, [0.1, -0.1, 0.2], PARTLY),
        ({"weakens": 0}, [0.1, -0.3, -0.1], NOT),
        ({"weakens": 0}, [-0.1, 0.1, 0.2], NOT),
    ],
)
def test_rules_by_hand(rule, low, verdict):
    assert claims.verdict(rule, low) == verdict


def findings(folder, notebook, low=0.4, high=0.6, without=(), table="findings"):
    rows = {
        (name, claim.unit)
        for claim in claims.CLAIMS
        if (claim.notebook, claim.table) == (notebook, table)
        for name in (*claim.quantities, claim.shown)
        if name and name not in without
    }
    frame = pd.DataFrame(sorted(rows), columns=["quantity", "unit"])
    frame = frame.assign(estimate=0.5, low=low, high=high, n=7)
    frame.to_csv(folder / f"{notebook}_{table}.csv", index=False)


def test_without_results_nothing_is_reproduced(tmp_path):
    table = claims.write(tmp_path)
    assert set(table["verdict"]) == {NOT_RUN}
    assert table[["estimate", "low", "high", "n"]].isna().all(axis=None)


def test_verdicts_come_from_the_findings_that_are_there(tmp_path):
    findings(tmp_path, "03")
    table = claims.write(tmp_path).set_index("id")
    assert table.loc["C1", "verdict"] == REPRODUCED
    assert table.loc["C1", ["estimate", "low", "high", "n"]].tolist() == [0.5, 0.4, 0.6, 7]
    assert table.loc[["C3", "C4", "C5", "rho > 0.85"], "verdict"].tolist() == [NOT_RUN] * 4
    findings(tmp_path, "07")
    assert claims.write(tmp_path).set_index("id").loc["rho > 0.85", "verdict"] == NOT
    written = json.loads((tmp_path / "claims.json").read_text())
    assert [record["id"] for record in written] == [claim.id for claim in claims.CLAIMS]


def test_a_claim_may_show_another_row_than_it_is_judged_by(tmp_path):
    """C3 is judged by the room within the margin, and shows the difference."""
    findings(tmp_path, "04")
    file = tmp_path / "04_findings.csv"
    frame = pd.read_csv(file)
    room = frame["quantity"].str.endswith("room within the margin")
    shown = frame["quantity"] == "ICP score, top less product, top"
    frame.loc[shown, ["estimate", "low", "high"]] = 0.02, -0.05, 0.07
    for low, verdict in ((0.03, REPRODUCED), (-0.01, PARTLY)):
        frame.loc[room, "low"] = low
        frame.to_csv(file, index=False)
        row = claims.write(tmp_path).set_index("id").loc["C3"]
        assert row["verdict"] == verdict
        assert row[["estimate", "low", "high"]].tolist() == [0.02, -0.05, 0.07]
    assert claims.write(tmp_path).set_index("id").loc["P8", "verdict"] == NOT_RUN
    findings(tmp_path, "04", table="lds")
    assert claims.write(tmp_path).set_index("id").loc["P8", "verdict"] == REPRODUCED


@pytest.mark.parametrize(
    "lacking", [{"low": float("nan")}, {"without": ["ICP score against product, same task"]}]
)
def test_what_data_cannot_show_is_not_testable(tmp_path, lacking):
    findings(tmp_path, "03", **lacking)
    row = claims.write(tmp_path).set_index("id").loc["C1"]
    assert row["verdict"] == NOT_TESTABLE and pd.isna(row["estimate"])


def test_an_interval_that_holds_the_threshold_says_what_else_it_allows(tmp_path):
    for low, high, verdict, allowed in (
        (-0.1, 0.4, NOT, REPRODUCED), (-0.1, 0.2, NOT, PARTLY), (0.1, 0.4, PARTLY, REPRODUCED),
        (0.4, 0.5, REPRODUCED, REPRODUCED), (-0.2, -0.1, NOT, NOT),
    ):  # fmt: skip
        findings(tmp_path, "03", low, high)
        row = claims.write(tmp_path).set_index("id").loc["C1"]
        assert (row["verdict"], row["verdict_at_upper_end"]) == (verdict, allowed)


def test_committed_claims_are_those_of_the_committed_findings():
    folder = paths.REFERENCE_FIGURES / "laptop"
    committed = json.loads((folder / "claims.json").read_text())
    assert committed == json.loads(json.dumps(claims.judge(folder)))
    assert NOT_TESTABLE not in [claim["verdict"] for claim in committed]  # all rows are there
