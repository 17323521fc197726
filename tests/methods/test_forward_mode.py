"""Influence on a query set by forward-mode autograd against the mean of the pairs."""

import numpy as np
import pytest
import torch
from helpers import FAMILIES, PRECISION, close, encoded

from icprobe import models
from icprobe.methods.gradient import (
    MeanGradient,
    gradient_dot,
    linear_layers,
    losses,
    mean_influence,
)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_mean_over_queries(tiny, family, dtype):
    lm = tiny(family, bos=family == "gpt2", dtype=dtype)
    train, queries = encoded(lm, 6, seed=1), encoded(lm, 5, seed=2)
    actual = mean_influence(lm, train, queries)
    assert actual.dtype == np.float32 and actual.shape == (6,)
    close(actual, gradient_dot(lm, train, queries).mean(axis=1), dtype)


@pytest.mark.parametrize(
    "options",
    [{"loss_on": "text"}, {"layers": r"layers\.1\.mlp", "loss_on": "text"}],
)
def test_options(tiny, options, monkeypatch):
    lm = tiny()
    train, queries = encoded(lm, 6, seed=1, words=20), encoded(lm, 5, seed=2)
    expected = gradient_dot(lm, train, queries, **options).mean(axis=1)
    close(mean_influence(lm, train, queries, **options), expected)
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 1)
    close(mean_influence(lm, train, queries, **options), expected)


def test_the_pool_needs_no_backward_pass(tiny, monkeypatch):
    lm = tiny()
    train = encoded(lm, 3, seed=1)
    held = MeanGradient(lm, encoded(lm, 2, seed=2))

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
    held.influence(train)
    assert graphs and not any(graphs)
    assert not any(m._forward_hooks for m in linear_layers(lm).values())


def test_bad_input_is_named(tiny, tmp_path):
    from helpers import save_tiny

    lm = models.load(str(save_tiny(tmp_path, "llama")), device="cpu")
    train = encoded(lm, 3, seed=1)
    held = MeanGradient(lm, train)
    with pytest.raises(ValueError, match="'cut': no completion token is left"):
        held.influence([models.Encoded("cut", train[0].prompt, ())])
    bad = models.Encoded("bad", (*train[0].prompt, 200), train[0].completion)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[200] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite: examples 'bad'$"):
        held.influence([*train, bad])
