"""The five-line use: labelled matrices that equal the reference, and a selection for TRL."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers import ATOL, RTOL, save_tiny

import icprobe
from icprobe import models
from icprobe.methods import gradient, icp


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    save_tiny(folder / "model", "llama", bos=True)
    for name, count in (("pool", 18), ("queries", 3)):
        rows = [{"prompt": f"{name} {i}?", "completion": f" yes {i * i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lm = icprobe.load_model(str(folder / "model"), device="cpu")
    return lm, *(icprobe.load_data(folder / f"{name}.jsonl") for name in ("pool", "queries"))


def test_probe_gives_labelled_gains_by_which_the_best_are_selected(made):
    lm, pool, queries = made
    gains = icprobe.probe(lm, pool, queries, preamble="Help:")
    assert list(gains.index) == pool["id"] and list(gains.columns) == queries["id"]
    shown, asked = (models.encode(lm, rows) for rows in (pool, queries))
    for i, j in ((0, 0), (17, 2)):
        context = icp.context(lm, shown[i], "Help:")
        after = models.token_log_likelihoods(lm, asked[j], context).sum()
        alone = models.token_log_likelihoods(lm, asked[j]).sum()
        assert gains.iloc[i, j] == pytest.approx(after - alone, rel=RTOL, abs=ATOL)

    chosen = icprobe.select(pool, gains, n=4)
    order = np.argsort(-gains.mean(axis=1).to_numpy(), kind="stable")[:4]
    assert chosen["id"] == [pool["id"][i] for i in order]
    np.testing.assert_allclose(chosen["score"], gains.mean(axis=1).iloc[order], rtol=RTOL)


def test_attribute_gives_labelled_products(made):
    lm, pool, queries = made
    products = icprobe.attribute(lm, pool, queries, loss_on="text")
    assert list(products.index) == pool["id"] and list(products.columns) == queries["id"]
    expected = gradient.gradient_dot(lm, pool, queries, loss_on="text")
    np.testing.assert_allclose(products, expected, rtol=RTOL, atol=RTOL * abs(expected).max())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pool": []}, "no training examples"),
        ({"queries": []}, "no queries"),
        ({"pool": [{"id": "a", "prompt": "b"}]}, "row 0 of the training examples .* completion"),
        ({"queries": pd.DataFrame({"id": ["a"]})}, "row 0 of the queries is 'id'"),
    ],
)
@pytest.mark.parametrize("score", [icprobe.probe, icprobe.attribute])
def test_rows_that_are_none_or_not_whole_are_named(made, score, changed, said):
    lm, pool, queries = made
    with pytest.raises(ValueError, match=said):
        score(lm, **{"pool": pool, "queries": queries} | changed)


def test_wrong_names_are_refused(made):
    lm, pool, queries = made
    with pytest.raises(ValueError, match="pool-00001"):
        icprobe.probe(lm, [pool[0], pool[0]], queries)
    with pytest.raises(AttributeError, match="nonsense"):
        icprobe.nonsense  # noqa: B018
