"""Influence on a query set by forward-mode autograd against the mean of the pairs."""

import numpy as np
import pytest
import torch
from helpers import FAMILIES, PRECISION, close, encoded, examples

from icprobe import models
from icprobe.methods.gradient import (
    MeanInfluence,
    forward_mode,
    gradient_dot,
    losses,
    mean_influence,
)
from icprobe.scores import compute


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        *((family, dtype, {}) for family in FAMILIES for dtype in PRECISION),
        ("opt", "float32", {}),
        ("olmo", "float32", {}),
        ("llama", "float32", {"loss_on": "text"}),
        ("llama", "float32", {"layers": r"layers\.1\.mlp", "loss_on": "text"}),
    ],
)
def test_equals_the_mean_over_queries(tiny, monkeypatch, family, dtype, options):
    lm = tiny(family, bos=family == "gpt2", dtype=dtype)
    train, queries = encoded(lm, 6, seed=1, words=20), encoded(lm, 5, seed=2)
    expected = gradient_dot(lm, train, queries, **options).mean(axis=1)
    for budget in (1, 384):
        monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", budget)
        actual = mean_influence(lm, train, queries, **options)
        assert actual.dtype == np.float32 and actual.shape == (6,)
        close(actual, expected, dtype)


def test_the_method_has_the_mean_in_each_column(tiny):
    lm = tiny()
    train, queries = examples(5, seed=1), examples(3, seed=2)
    found = compute(MeanInfluence(loss_on="text"), lm, train, queries)["mean_influence"]
    expected = gradient_dot(lm, train, queries, loss_on="text").mean(axis=1, keepdims=True)
    assert found.shape == (5, 3)
    close(found, np.broadcast_to(expected, (5, 3)))


def test_the_pool_needs_no_backward_pass(tiny, monkeypatch):
    lm = tiny()
    train = encoded(lm, 3, seed=1)
    direction = forward_mode.mean_gradient(lm, train, "")
    monkeypatch.setattr(forward_mode, "mean_gradient", lambda *_: direction)

    def refused(*_, **__):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refused)
    monkeypatch.setattr(torch.Tensor, "backward", refused)
    graphs = []
    inner = models.logits_at

    def watched(*args, **inputs):
        logits = inner(*args, **inputs)
        graphs.append(logits.grad_fn)
        return logits

    monkeypatch.setattr(models, "logits_at", watched)
    mean_influence(lm, train, train)
    assert graphs and not any(graphs)
    assert not any(module._forward_hooks for module in lm.model.modules())
