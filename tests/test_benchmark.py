"""The benchmark on a tiny model: methods agree with float64, tables keep what they should."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import save_tiny

from icprobe import benchmark, costs
from icprobe import lm as language_model
from icprobe.benchmark import METHODS, NATS, PRODUCTS, SET, SIMILARITY

OURS = [name for name, method in METHODS.items() if method.run]


@pytest.fixture
def pairs(tiny, monkeypatch):
    """Return tiny models in float32 and float64, and three training examples by four queries."""
    monkeypatch.setattr(benchmark, "PROJECTION", 64)  # all of the layers: exact
    rows = [
        {"id": str(k), "prompt": f"{'abc' * (k + 1)}: ", "completion": f"{k * 7}!"}
        for k in range(7)
    ]
    lm = tiny("llama", bos=True)
    encoded = language_model.encode(lm, rows)
    return lm, tiny("llama", bos=True, dtype="float64"), encoded[:3], encoded[3:]


@pytest.mark.parametrize("name", OURS)
def test_methods_agree_with_float64(pairs, name):
    lm, precise, train, queries = pairs
    exact = benchmark.reference(precise, train, queries)
    found = METHODS[name].run(lm, train, queries)
    if METHODS[name].gives == SET:
        mean = exact[PRODUCTS].mean(1, keepdims=True)
        np.testing.assert_allclose(found, mean, rtol=1e-4)
    elif METHODS[name].gives == SIMILARITY:
        expected = METHODS[name].run(precise, train, queries)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    else:
        said = benchmark.errors(METHODS[name].gives, found, exact)
        assert said["error"] < 1e-4 and said["rank"] > 0.99


def test_a_run_of_its_own_gives_the_same_scores(pairs, tmp_path):
    lm, _, train, queries = pairs
    folder = save_tiny(tmp_path / "model", "llama", bos=True)
    work = tmp_path / "work.json"
    work.write_text(json.dumps(benchmark.exchange(str(folder), lm, train, queries)))
    took = benchmark.run("icprobe, probing", work, tmp_path / "scores.npy")
    assert took["seconds"] > 0 and took["peak"] > 0 and took["rate"] > 0
    direct = METHODS["icprobe, probing"].run(lm, train, queries)
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), direct, rtol=1e-5, atol=1e-4)


def test_what_fails_says_why(tmp_path):
    work = tmp_path / "work.json"
    work.write_text("{}")
    with pytest.raises(RuntimeError, match=r"icprobe, probing failed: (.|\n)*KeyError: 'model'"):
        benchmark.run("icprobe, probing", work, tmp_path / "scores.npy")


def test_wrong_scores_show():
    exact = {NATS: np.array([[-1.0, -2.0], [-3.0, -4.0]])}
    same = benchmark.errors(NATS, exact[NATS], exact)
    assert same == {"error": 0, "rank": pytest.approx(1)}
    wrong = benchmark.errors(NATS, -exact[NATS], exact)
    assert wrong == {"error": 2, "rank": pytest.approx(-1)}
    more = np.array([[-1.0, -4.0, 7.0], [-3.0, -2.0, 7.0]])  # the second query's ranks are turned
    assert benchmark.errors(NATS, more, exact) == {"error": 0.5, "rank": pytest.approx(0)}


def test_rows_replace_those_of_the_same_key():
    def table(seconds, m):
        row = {"method": "a", "lengths": "grid", "dtype": "float32", "n": 1, "m": m}
        return pd.DataFrame([{**row, "seconds": seconds}])

    both = benchmark.merged(benchmark.merged(table(1.0, 2), table(2.0, 1)), table(3.0, 2))
    assert both[["m", "seconds"]].to_numpy().tolist() == [[1, 2.0], [2, 3.0]]


def test_ratios_of_what_did_the_same_work():
    work = {"lengths": "grid", "dtype": "float32", "n": 1}
    rows = [
        {"method": "a", **work, "m": 1, "seconds": 2.0, "low": 1.0, "high": 4.0},
        {"method": "b", **work, "m": 1, "seconds": 6.0, "low": 4.0, "high": 8.0},
        {"method": "b", **work, "m": 2, "seconds": 9.0, "low": 9.0, "high": 9.0},
    ]
    (row,) = benchmark.ratios(pd.DataFrame(rows), "a", "b").to_dict("records")
    assert row == {**work, "m": 1, "estimate": 3, "low": 1, "high": 8}


def test_bad_input(tiny):
    with pytest.raises(ValueError, match=r"unknown methods \['magic'\]"):
        benchmark.compare("none", "float32", "cpu", "grid", 1, 1, ["magic"])
    with pytest.raises(ValueError, match="lengths is 'short', expected 'grid' or 'long'"):
        benchmark.examples(tiny(), "short", 1, 1)


def test_every_peer_has_what_it_needs():
    for name, method in METHODS.items():
        if method.peer:
            environment, script, *_ = method.peer
            assert (benchmark.PEERS / script).exists(), name
            needed = benchmark.PEERS / f"{environment}.txt"
            assert needed.exists() or environment == "kronfluence", name
        assert callable(method.needs) and method.needs is not costs.crossing


def test_what_a_second_buys():
    key = ["method", "lengths", "dtype", "n", "m"]
    names = ("probing", "gradient products", "hidden states")
    table = pd.DataFrame(
        [(f"icprobe, {name}", "grid", "float32", 4, m) for name in names for m in (1, 3)],
        columns=key,
    ).assign(seconds=[1.0, 2, 3, 4, 5, 6], low=1.0, high=8.0)
    effects = pd.DataFrame(
        [
            ("per query", name, step, value, value - 0.1, value + 0.1)
            for step in ("SGD 1e-4", "SGD 3e-3", "AdamW 1e-5")
            for name, value in (("gain", 0.2), ("cosine", 0.8), ("hidden states", 0.3))
        ],
        columns=["level", "first", "second", "estimate", "low", "high"],
    )
    points, sizes = benchmark.bought(table, effects)
    assert sizes == "N = 4, M = 3"
    assert points.set_index("method")["seconds"].to_dict() == {
        "gain": 2, "cosine": 4, "hidden states": 6,
    }  # fmt: skip
    found = benchmark.findings(table).set_index("quantity")["estimate"]
    assert found["gradient products over probing, grid, M = 3"] == 2
    assert found["hidden states over probing, grid, M = 1"] == 5
