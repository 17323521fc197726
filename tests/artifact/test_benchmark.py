"""The benchmark on a tiny model: methods agree with float64, and what fails is left out."""

import numpy as np
import pytest
import torch
from helpers import save_tiny

from icprobe import models
from icprobe.artifact.benchmark import comparison, methods, profiling, timings, work
from icprobe.artifact.benchmark.methods import METHODS, NATS, PRODUCTS
from icprobe.methods.gradient import losses

HERE = [name for name, method in METHODS.items() if method.run]


ROWS = [
    {"id": str(k), "prompt": f"{'abc' * (k + 1)}: ", "completion": f"{k * 7}!"} for k in range(7)
]


@pytest.fixture
def pairs(tiny, monkeypatch):
    """Return tiny models in float32 and float64, and three training examples by four queries."""
    monkeypatch.setattr(methods, "PROJECTION", 64)  # all of the layers: exact
    lm = tiny("llama", bos=True)
    encoded = models.encode(lm, ROWS)
    return lm, tiny("llama", bos=True, dtype="float64"), encoded[:3], encoded[3:]


@pytest.fixture
def saved(tiny, tmp_path, monkeypatch):
    """Return the folder of a tiny model, for which all examples are of `ROWS`."""
    encoded = models.encode(tiny("llama", bos=True), ROWS)
    monkeypatch.setattr(
        comparison, "examples", lambda lm, lengths, n, m: (encoded[:n], encoded[:m])
    )
    return str(save_tiny(tmp_path / "model", "llama", bos=True))


@pytest.mark.parametrize("name", HERE)
def test_methods_agree_with_float64(pairs, name):
    lm, precise, train, queries = pairs
    exact = {
        quantity: METHODS[plain].run(precise, train, queries)
        for quantity, plain in methods.PLAIN.items()
    }
    exact["mean gradient product"] = exact[PRODUCTS].mean(1, keepdims=True)
    exact["similarity"] = METHODS["icprobe, hidden states"].run(precise, train, queries)
    found = METHODS[name].run(lm, train, queries)
    said = comparison.errors(METHODS[name].quantity, found, exact)
    assert said["error"] < 1e-4 and said["rank"] > 0.99


def test_a_run_of_its_own_gives_the_same_scores(pairs, tmp_path):
    lm, _, train, queries = pairs
    folder = save_tiny(tmp_path / "model", "llama", bos=True)
    told = work.exchange(str(folder), lm, train, queries)
    took, scores = comparison.run("icprobe, probing", told)
    assert took["seconds"] > 0 and took["peak"] > 0 and "torch" in took["versions"]
    direct = METHODS["icprobe, probing"].run(lm, train, queries)
    np.testing.assert_allclose(scores, direct, rtol=1e-5, atol=1e-4)


def test_what_fails_says_why():
    with pytest.raises(RuntimeError, match=r"icprobe, probing failed with 1: (.|\n)*KeyError"):
        comparison.run("icprobe, probing", {})


def test_a_profile_says_where_time_goes(pairs):
    lm, _, train, queries = pairs
    threads = torch.get_num_threads()
    found = profiling.profile(lm, HERE[:1], train, queries).set_index("method").loc[HERE[0]]
    assert found.pop("products over least") > 0
    assert (found >= 0).all() and 0.99 < found.sum() < 1.2  # the profiler's clock is another
    assert found["matrix products"] > 0 and found["attention"] > 0
    assert torch.get_num_threads() == threads


def test_wrong_scores_show():
    exact = {NATS: np.array([[-1.0, -2.0], [-3.0, -4.0]])}
    same = comparison.errors(NATS, exact[NATS], exact)
    assert same == {"error": 0, "rank": pytest.approx(1)}
    wrong = comparison.errors(NATS, -exact[NATS], exact)
    assert wrong == {"error": 2, "rank": pytest.approx(-1)}
    more = np.array([[-1.0, -4.0, 7.0], [-3.0, -2.0, 7.0]])  # the second query's ranks are turned
    assert comparison.errors(NATS, more, exact) == {"error": 0.5, "rank": pytest.approx(0)}


def test_every_peer_has_what_it_needs():
    for name, method in METHODS.items():
        if method.script:
            assert (methods.PEERS / method.script[0]).exists(), name
            needed = methods.PEERS / f"{method.environment}.txt"
            assert needed.exists() or not method.environment, name


@pytest.mark.slow
def test_a_peer_beside_ours(saved, tmp_path, monkeypatch, capsys):
    """Kronfluence needs no environment of its own; others are left out, and named."""
    monkeypatch.setattr(methods, "ENVIRONMENTS", tmp_path)
    names = ["kronfluence, batch 4", "captum, batch 4"]
    table = comparison.compare(saved, "float32", "cpu", "grid", 5, 3, names, repeats=1)
    assert table["method"].tolist() == names[:1]
    assert table["error"].item() < 1e-4 and table["rank"].item() > 0.99
    assert "Left out: captum, batch 4: no environment" in capsys.readouterr().err
    figure = timings.panels(table)
    assert list(figure) == ["gradient products: grid, N = 5, M = 3"]


@pytest.mark.slow
def test_a_peer_that_fails_costs_only_itself(saved, monkeypatch, capsys):
    name, ours = "kronfluence, batch 4", "icprobe, hidden states"
    failing = methods.Method("gradient products", script=("lm_eval_probing.py", "--unknown"))
    monkeypatch.setitem(METHODS, name, failing)
    table = comparison.compare(saved, "float32", "cpu", "grid", 2, 2, [name, ours], repeats=2)
    row = table.set_index("method").loc[ours]
    assert table["method"].tolist() == [ours]
    assert 0 < row["low"] < row["seconds"] < row["high"] and row["repeats"] == 2
    assert row["efficiency"] == row["floor"] / row["seconds"] > 0
    assert f"Left out: {name}: {name} failed with" in capsys.readouterr().err


def test_what_cannot_run_is_left_out(tiny, saved, monkeypatch, tmp_path):
    lm = tiny()
    assert "gradients" in comparison.obstacle(METHODS["autograd, one by one"], lm, held=2**60)
    assert comparison.obstacle(METHODS["icprobe, probing"], lm, held=2**60) == ""
    monkeypatch.setattr(methods, "ENVIRONMENTS", tmp_path)
    with pytest.raises(RuntimeError, match="captum, batch 4"):
        comparison.compare(saved, "float32", "cpu", "grid", 2, 2, ["captum, batch 4"])


def test_long_examples_are_long(tiny, monkeypatch):
    rows = [{**row, "task": f"task {k % 3}"} for k, row in enumerate(ROWS)]
    monkeypatch.setattr(work.data, "load", lambda *_, **__: rows)
    train, queries = work.examples(tiny(), "long", 4, 9)
    assert (len(train), len(queries)) == (4, 9)  # more than there are rows: again from the start
    assert queries[7] == queries[0]
    assert all(len(example.ids) >= work.LONG for example in train)
    assert train[0].id.startswith("0+3+6")  # of its own task
    with pytest.raises(ValueError, match="'short'"):
        work.examples(tiny(), "short", 1, 1)


def test_peers_share_a_loss_that_is_the_completions(pairs, monkeypatch):
    """With the head at the last positions only, too."""
    monkeypatch.syspath_prepend(methods.PEERS)
    import exchange

    lm, _, train, queries = pairs
    told = work.exchange(lm.identity["name"], lm, train, queries)
    batch = exchange.padded([exchange.labelled(row) for row in told["train"]])
    few = exchange.needed(batch["labels"])
    expected = sum(losses.token_losses(lm, example).sum().item() for example in train)
    for kept in (0, few):  # 0: all
        logits = lm.model(batch["input_ids"], logits_to_keep=kept).logits
        assert exchange.loss(logits, batch["labels"]).item() == pytest.approx(expected, rel=1e-5)
    assert few < batch["labels"].shape[1]


def test_sorted_work_comes_back_in_order(monkeypatch):
    monkeypatch.syspath_prepend(methods.PEERS)
    import exchange

    told = {part: [{"ids": [k] * k} for k in sizes] for part, sizes in
            (("train", (3, 1, 2)), ("queries", (5, 4)))}  # fmt: skip
    seen = []

    def products(work):
        sizes = [[len(row["ids"]) for row in work[part]] for part in ("train", "queries")]
        seen.extend(sizes)
        return np.multiply.outer(*map(np.array, sizes))

    found = exchange.by_length(products)(told)
    assert seen == [[1, 2, 3], [4, 5]]
    assert found.tolist() == [[15, 12], [5, 4], [10, 8]]
