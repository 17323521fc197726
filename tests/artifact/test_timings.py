"""What the benchmark's timings say."""

import numpy as np
import pandas as pd
import pytest

from icprobe.artifact.benchmark import timings


def timed(*rows):
    """Return a table of timings from (method, m, seconds, low, high)."""
    table = pd.DataFrame(rows, columns=["method", "m", "seconds", "low", "high"])
    return table.assign(lengths="grid", n=4, repeats=3)


def test_findings_are_ratios_of_the_same_work():
    table = timed(
        ("icprobe, probing", 1, 2.0, 1.0, 4.0),
        ("icprobe, gradient products", 1, 6.0, 4.0, 8.0),
        ("lm-eval, batch 1", 1, 9.0, 9.0, 9.0),
        ("lm-eval, batch 8", 1, 8.0, 8.0, 12.0),
        ("kronfluence, batch 4", 1, 12.0, 12.0, 12.0),
        ("icprobe, gradient products", 3, 6.0, 6.0, 6.0),
    )
    found = timings.findings(table).set_index("quantity")[["estimate", "low", "high", "n"]]
    assert {name: row.tolist() for name, row in found.iterrows()} == {
        "gradient products over probing, grid, M = 1": [3, 1, 8, 4],
        "lm-eval over probing, grid, M = 1": [4, 2, 12, 4],  # the fastest batch size
        "kronfluence over gradient products, grid, M = 1": [2, 1.5, 3, 4],
        "others' gradient products over others' probing, grid, M = 1": [1.5, 1, 1.5, 4],
    }
    once = timings.findings(table.assign(repeats=1)).set_index("quantity")
    once = once.loc["gradient products over probing, grid, M = 1"]
    assert once["estimate"] == 3 and np.isnan([once["low"], once["high"]]).all()


def test_timings_are_of_the_model_and_of_the_largest_pool(tiny, tmp_path):
    lm = tiny()
    assert timings.read(None, lm).empty
    key = dict.fromkeys(timings.KEY, "any")
    key |= {"model": lm.identity["name"], "dtype": "float32", "n": 4, "m": 1}
    rows = [key, {**key, "n": 2}, {**key, "dtype": "bfloat16"}, {**key, "model": "another", "n": 9}]
    pd.DataFrame(rows).to_csv(tmp_path / "cost.csv", index=False)
    found = timings.read(str(tmp_path / "cost.csv"), lm)
    assert found["dtype"].tolist() == ["float32", "bfloat16"] and (found["n"] == 4).all()
    (tmp_path / "cost.csv").write_text("quantity,estimate\n")
    with pytest.raises(ValueError, match=r"cost\.csv .* method, model, .* m$"):
        timings.read(str(tmp_path / "cost.csv"), lm)


def test_accuracy_per_second():
    names = ("probing", "gradient products", "query set", "hidden states")
    table = timed(*((f"icprobe, {name}", 3, k, k, k) for k, name in enumerate(names, 1)))
    effects = pd.DataFrame(
        [
            (level, name, value, value - 0.1, value + 0.1)
            for level in ("per query", "per example")
            for name, value in (
                ("gain", 0.2), ("product", 0.8), ("hidden states", 0.3), ("random", 0),
                ("product, projected", 0.7),
            )
        ],
        columns=["level", "first", "estimate", "low", "high"],
    )  # fmt: skip
    points = timings.accuracy_per_second(table, effects, "per query").set_index("method")
    assert points["seconds"].to_dict() == {"gain": 1, "product": 2, "hidden states": 4}
    assert points["estimate"].to_dict() == {"gain": 0.2, "product": 0.8, "hidden states": 0.3}
    points = timings.accuracy_per_second(table, effects, "per example").set_index("method")
    assert points.loc["product, query set", ["seconds", "estimate"]].tolist() == [3, 0.8]


@pytest.mark.parametrize(
    ("seconds", "between"),
    [
        ([15, 15, 15], [10, 20]),
        ([5, 50, 5], [10, 20]),  # only the first crossing counts, if it is of the largest size
        ([0, 50, 50], [np.nan, 1]),
        ([30, 30, 30], [20, np.nan]),
    ],
)
def test_crossings(seconds, between):
    sizes, names = [1, 10, 20], ("projected gradients", "gradient products")
    table = timed(
        *(("icprobe, probing", m, float(m), m, m) for m in sizes),
        *(("icprobe, projected", m, s, s, s) for m, s in zip(sizes, seconds, strict=True)),
        ("icprobe, projected", 2, 0.1, 0.1, 0.1),  # probing was not timed there
    )
    counted = pd.DataFrame(
        [
            *(("probing", m, 1.0) for m in (1, 2, 3)),
            *(("probing, nothing shared", m, 3.0 * m) for m in (1, 2, 3)),
            *((name, m, 5.0) for name in names for m in (1, 2, 3)),
        ],
        columns=["method", "m", "operations"],
    )
    found = timings.crossings(table, {"grid": counted}).set_index("against")
    assert found.index.tolist() == ["projected"]  # the only one that was timed
    np.testing.assert_array_equal(found.loc["projected", ["cheaper", "dearer"]].tolist(), between)
    assert np.isnan(found["operations"].item()) and found["nothing_shared"].item() == 2
