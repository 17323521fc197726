"""The benchmark on a tiny model: methods agree with float64, and what fails is left out."""

import numpy as np
import pytest
import torch
from helpers import save_tiny

from icprobe import models
from icprobe.artifact.benchmark import comparison, methods, timings
from icprobe.artifact.benchmark.methods import EXACT, METHODS, PRODUCTS, Method
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
def compared(pairs, tmp_path, monkeypatch):
    """Return `compare` of five training examples and three queries with a tiny model."""
    lm = pairs[0]
    encoded = models.encode(lm, ROWS)
    monkeypatch.setattr(comparison, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(comparison, "examples", lambda *_: (encoded[:5], encoded[:3]))
    model = str(save_tiny(tmp_path / "model", "llama", bos=True))
    return lambda *names: comparison.compare(model, lm, "grid", 5, [3], names, repeats=2)


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
    said = comparison.errors(found, exact[METHODS[name].quantity])
    assert said["error"] < 1e-4 and said["rank"] > 0.99


@pytest.mark.slow
def test_methods_beside_each_other(compared, monkeypatch, capsys):
    """Kronfluence needs no environment of its own; what cannot run is left out, and named."""
    names = ["icprobe, probing", "kronfluence, batch 4"]
    failing = Method(*EXACT, script=("lm_eval_probing.py", "--unknown"))
    monkeypatch.setitem(METHODS, "kronfluence, batch 16", failing)
    table = compared(*names, "kronfluence, batch 16", "captum, batch 4").set_index("method")
    assert table.index.tolist() == names
    assert (table["error"] < 1e-4).all() and (table["rank"] > 0.99).all()
    assert (table["low"] < table["seconds"]).all() and (table["seconds"] < table["high"]).all()
    assert (table["low"] > 0).all() and (table["peak"] > 0).all()
    assert table["efficiency"].equals(table["floor"] / table["seconds"])
    said = capsys.readouterr().err
    assert "Left out: captum, batch 4: no environment" in said
    assert "Left out: kronfluence, batch 16: kronfluence, batch 16 failed with" in said
    wanted = [f"{what}: grid, N = 5, M = 3" for what in ("gradient products", "log-likelihoods")]
    assert list(timings.panels(table.reset_index())) == wanted


def test_what_cannot_run(compared, pairs):
    with pytest.raises(RuntimeError, match=r"icprobe, probing failed with 1: (.|\n)*KeyError"):
        comparison.run("icprobe, probing", {})
    with pytest.raises(RuntimeError, match="captum, batch 4"):
        compared("captum, batch 4")
    lm = pairs[0]
    assert "gradients" in comparison.obstacle(METHODS["autograd, one by one"], lm, held=2**60)
    assert comparison.obstacle(METHODS["icprobe, probing"], lm, held=2**60) == ""


def test_a_profile_says_where_time_goes(pairs):
    lm, _, train, queries = pairs
    threads = torch.get_num_threads()
    found = comparison.profile(lm, HERE[:1], train, queries).set_index("method").loc[HERE[0]]
    assert found.pop("products over least") > 0
    assert (found >= 0).all() and 0.99 < found.sum() < 1.2  # the profiler's clock is another
    assert found["matrix products"] > 0 and found["attention"] > 0
    assert torch.get_num_threads() == threads


def test_wrong_scores_show():
    exact = np.array([[-1.0, -2.0], [-3.0, -4.0]])
    assert comparison.errors(exact, exact) == {"error": 0, "rank": pytest.approx(1)}
    assert comparison.errors(-exact, exact) == {"error": 2, "rank": pytest.approx(-1)}
    more = np.array([[-1.0, -4.0, 7.0], [-3.0, -2.0, 7.0]])  # the second query's ranks are turned
    assert comparison.errors(more, exact) == {"error": 0.5, "rank": pytest.approx(0)}


def test_every_peer_has_what_it_needs():
    for name, method in METHODS.items():
        if method.script:
            assert (comparison.PEERS / method.script[0]).exists(), name
            needed = comparison.PEERS / f"{method.environment}.txt"
            assert needed.exists() or not method.environment, name


def test_long_examples_are_long(tiny, monkeypatch):
    rows = [{**row, "task": f"task {k % 3}"} for k, row in enumerate(ROWS)]
    monkeypatch.setattr(methods.data, "load", lambda *_, **__: rows)
    train, queries = methods.examples(tiny(), "long", 4, 9)
    assert (len(train), len(queries)) == (4, 9)  # more than there are rows: again from the start
    assert queries[7] == queries[0]
    assert all(len(example.ids) >= methods.LONG for example in train)
    assert train[0].id.startswith("0+3+6")  # of its own task


def test_peers_share_a_loss_that_is_the_completions(pairs, monkeypatch):
    """With the head at the last positions only, too."""
    monkeypatch.syspath_prepend(comparison.PEERS)
    import exchange

    lm, _, train, queries = pairs
    told = methods.exchange(lm.identity["name"], lm, train, queries)
    batch = exchange.padded([exchange.labelled(row) for row in told["train"]])
    few = exchange.needed(batch["labels"])
    expected = sum(losses.token_losses(lm, example).sum().item() for example in train)
    for kept in (0, few):  # 0: all
        logits = lm.model(batch["input_ids"], logits_to_keep=kept).logits
        assert exchange.loss(logits, batch["labels"]).item() == pytest.approx(expected, rel=1e-5)
    assert few < batch["labels"].shape[1]


def test_sorted_work_comes_back_in_order(monkeypatch):
    monkeypatch.syspath_prepend(comparison.PEERS)
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
