"""Projected gradients: unbiased, the closer the larger, the same for pools and queries."""

import numpy as np
import pytest
from conftest import FAMILIES
from test_influence import close, encoded
from test_influence import experiment as experiment

from icprobe import gradients, influence, projected


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_where_nothing_is_projected(tiny, family):
    lm = tiny(family)
    train, queries = encoded(lm, 5, seed=1), encoded(lm, 4, seed=2)
    one, other = (projected.projected_gradients(lm, rows, 10_000) for rows in (train, queries))
    close(one @ other.T, influence.gradient_dot(lm, train, queries))


def test_unbiased_and_closer_with_size(tiny):
    lm = tiny()
    train, queries = encoded(lm, 3, seed=1), encoded(lm, 3, seed=2)
    exact = influence.gradient_dot(lm, train, queries)
    spread = {}
    for size in (2, 8):
        draws = np.stack(
            [projected.products_by_size(lm, train, queries, [size], seed)[0] for seed in range(100)]
        )
        spread[size] = draws.std(0)
        off = np.abs(draws.mean(0) - exact) / (spread[size] / np.sqrt(len(draws)))
        assert off.max() < 4.5  # 18 means, in standard errors
    # the variance of a product falls about as 1/size, faster where both sides are small
    assert (spread[8] / spread[2]).mean() < 0.55


def test_sizes_batches_and_layers_do_not_mix(tiny, monkeypatch):
    lm = tiny()
    train, queries = encoded(lm, 6, seed=1, words=20), encoded(lm, 4, seed=2)
    together = projected.products_by_size(lm, train, queries, (3, 5))
    whole = projected.projected_gradients(lm, train, 5)
    close(together[1], whole @ projected.projected_gradients(lm, queries, 5).T)
    monkeypatch.setitem(gradients.TOKENS_PER_PASS, "cpu", 1)
    close(projected.projected_gradients(lm, train, 5), whole)
    widths = [25] * len(gradients.linear_layers(lm))
    by_layer = np.split(whole, np.cumsum(widths)[:-1], axis=1)
    name = "model.layers.1.mlp.up_proj"
    place = list(gradients.linear_layers(lm)).index(name)
    close(projected.projected_gradients(lm, train, 5, layers=name), by_layer[place])
    with pytest.raises(ValueError, match="size is 0"):
        projected.projected_gradients(lm, train, 0)


def test_a_stored_pool_serves_any_queries(experiment, monkeypatch):
    lm = experiment.load_model()
    pool, queries = experiment.load_data()
    factors, seen = gradients.factors, []

    def counted(lm, examples, *rest):
        seen.extend(example.id for example in examples)
        return factors(lm, examples, *rest)

    kept = projected.store_pool(experiment, lm, size=4)
    whole = projected.projected_gradients(lm, pool, 4)
    close(kept.matrix(), whole)
    monkeypatch.setattr(gradients, "factors", counted)
    actual = projected.scores(projected.store_pool(experiment, lm, size=4), lm, queries)
    assert sorted(seen) == sorted(row["id"] for row in queries)
    close(actual, whole @ projected.projected_gradients(lm, queries, 4).T)
    assert projected.store_pool(experiment, lm, size=3).folder != kept.folder
