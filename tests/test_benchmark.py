"""The benchmark on a tiny model: methods agree with float64, tables keep what they should."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_tiny

from icprobe import benchmark, costs, icp
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
    exact = {
        gives: METHODS[plain].run(precise, train, queries)
        for gives, plain in benchmark.PLAIN.items()
    }
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


def test_the_plain_loop_in_float64_is_one_pass_a_pair(pairs):
    _, precise, train, queries = pairs
    found = METHODS[benchmark.PLAIN[NATS]].run(precise, train, queries)
    expected = [
        [
            language_model.token_log_likelihoods(precise, q, icp.context(precise, t)).sum()
            for q in queries
        ]
        for t in train
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


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


def test_a_profile_says_where_time_goes(pairs):
    lm, _, train, queries = pairs
    threads = torch.get_num_threads()
    found = benchmark.profile(lm, OURS[:1], train, queries).set_index("method").loc[OURS[0]]
    assert (found >= 0).all() and 0.99 < found.sum() < 1.2  # the profiler's clock is another
    assert found["matrix products"] > 0 and found["attention"] > 0
    assert torch.get_num_threads() == threads


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
        row = {"method": "a", "model": "x", "lengths": "grid", "dtype": "float32", "n": 1, "m": m}
        return pd.DataFrame([{**row, "seconds": seconds}])

    both = benchmark.merged(benchmark.merged(table(1.0, 2), table(2.0, 1)), table(3.0, 2))
    assert both[["m", "seconds"]].to_numpy().tolist() == [[1, 2.0], [2, 3.0]]


def timings(*rows):
    """Return a table of timings from (method, m, seconds, low, high)."""
    table = pd.DataFrame(rows, columns=["method", "m", "seconds", "low", "high"])
    return table.assign(lengths="grid", dtype="float32", n=4)


def test_findings_are_ratios_of_the_same_work():
    table = timings(
        ("icprobe, probing", 1, 2.0, 1.0, 4.0),
        ("icprobe, gradient products", 1, 6.0, 4.0, 8.0),
        ("lm-eval, batch 1", 1, 9.0, 9.0, 9.0),
        ("lm-eval, batch 8", 1, 8.0, 8.0, 12.0),
        ("kronfluence, batch 4", 1, 12.0, 12.0, 12.0),
        ("icprobe, gradient products", 3, 6.0, 6.0, 6.0),
    )
    others = table.assign(dtype="bfloat16", seconds=1.0), table.assign(n=2, seconds=1.0)
    found = benchmark.findings(pd.concat([table, *others]), "float32").set_index("quantity")
    numbers = found[["estimate", "low", "high", "n"]]
    probing = numbers.loc["gradient products over probing, grid, M = 1"]
    assert probing.tolist() == [3, 1, 8, 4]
    fastest = numbers.loc["lm-eval over probing, grid, M = 1"]
    assert fastest.tolist() == [4, 2, 12, 4]
    library = numbers.loc["kronfluence over gradient products, grid, M = 1"]
    assert library.tolist() == [2, 1.5, 3, 4]
    assert "kronfluence over probing, grid, M = 1" not in found.index
    untimed = [f"gradient products over probing, long, M = {m}" for m in benchmark.CLAIMED]
    assert found.loc[untimed, "estimate"].isna().all()


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
    names = ("probing", "gradient products", "query set", "hidden states")
    table = timings(*((f"icprobe, {name}", 3, k, k, k) for k, name in enumerate(names, 1)))
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
    points = benchmark.bought(table, effects, "per query").set_index("method")
    assert points["seconds"].to_dict() == {"gain": 1, "product": 2, "hidden states": 4}
    assert points["estimate"].to_dict() == {"gain": 0.2, "product": 0.8, "hidden states": 0.3}
    points = benchmark.bought(table, effects, "per example").set_index("method")
    assert points.loc["product, query set", ["seconds", "estimate"]].tolist() == [3, 0.8]
