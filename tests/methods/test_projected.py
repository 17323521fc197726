"""Projected gradients: unbiased, the closer the larger, the same for pools and queries."""

import numpy as np
import pytest
from helpers import FAMILIES, close, encoded

from icprobe.methods.gradient import gradient_dot, linear_layers, losses, projected_gradients
from icprobe.methods.gradient.projected import width


def products_of(lm, train, queries, size, seed=0):
    one, other = (projected_gradients(lm, rows, [size], seed)[0] for rows in (train, queries))
    return one @ other.T


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_where_nothing_is_projected(tiny, family):
    lm = tiny(family)
    train, queries = encoded(lm, 5, seed=1), encoded(lm, 4, seed=2)
    close(products_of(lm, train, queries, 10_000), gradient_dot(lm, train, queries))


def test_unbiased_and_closer_with_size(tiny):
    lm = tiny()
    train, queries = encoded(lm, 3, seed=1), encoded(lm, 3, seed=2)
    exact = gradient_dot(lm, train, queries)
    spread = {}
    for size in (2, 8):
        draws = np.stack([products_of(lm, train, queries, size, seed) for seed in range(100)])
        spread[size] = draws.std(0)
        off = np.abs(draws.mean(0) - exact) / (spread[size] / np.sqrt(len(draws)))
        assert off.max() < 4.5  # 18 means, in standard errors
    # the variance of a product falls about as 1/size, faster where both sides are small
    assert (spread[8] / spread[2]).mean() < 0.55


def test_sizes_batches_and_layers_do_not_mix(tiny, monkeypatch):
    lm = tiny()
    train = encoded(lm, 6, seed=1, words=20)
    (whole,) = projected_gradients(lm, train, [5])
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 1)
    close(projected_gradients(lm, train, (3, 5))[1], whole)
    assert whole.shape == (6, width(lm, 5))
    by_layer = np.split(whole, len(linear_layers(lm)), axis=1)
    name = "model.layers.1.mlp.up_proj"
    place = list(linear_layers(lm)).index(name)
    close(projected_gradients(lm, train, [5], layers=name)[0], by_layer[place])
    with pytest.raises(ValueError, match="size is 0"):
        projected_gradients(lm, train, [5, 0])
