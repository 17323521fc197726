"""The published clamp-and-log estimator against a plain loop over parameters."""

import math

import numpy as np
import pytest
import torch
from helpers import FAMILIES, close, examples

from icprobe import models
from icprobe.methods.gradient import ClampedLog, clamped_log, linear_layers
from icprobe.scores import compute


def gradient_by_name(lm, row, loss_on):
    ids, mask = models.sequence(lm, *models.encode(lm, [row]))
    lm.model.zero_grad()
    logits = lm.model(torch.tensor([ids])).logits[0, :-1]
    learnt = torch.tensor([bool(m) or loss_on == "text" for m in mask[1:]])
    targets = torch.tensor(ids[1:])[learnt]
    torch.nn.functional.cross_entropy(logits[learnt], targets, reduction="sum").backward()
    chosen = tuple(f"{name}." for name in linear_layers(lm))
    parameters = lm.model.named_parameters()
    return {name: p.grad.double().numpy() for name, p in parameters if name.startswith(chosen)}


def slow(lm, train, queries, loss_on):
    def clamp(value):
        return math.copysign(min(max(abs(value), 1e-4), 1.0), value) if value else 0.0

    scores = np.zeros((len(train), len(queries)))
    for i, z in enumerate(train):
        one = gradient_by_name(lm, z, loss_on)
        for j, q in enumerate(queries):
            other = gradient_by_name(lm, q, "completion")
            for name in one:
                pairs = zip(one[name].ravel(), other[name].ravel(), strict=True)
                s = sum(clamp(a) * clamp(b) for a, b in pairs)
                scores[i, j] += math.copysign(1, s) * math.log(abs(s)) if s else 0.0
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_plain_loop(tiny, family, monkeypatch):
    lm = tiny(family, dtype="float64")
    train, queries = examples(2, seed=1), examples(2, seed=2)
    actual = compute(ClampedLog(), lm, train, queries)["clamped_log"]
    close(actual, slow(lm, train, queries, "text"), "float64")
    monkeypatch.setattr(clamped_log, "MEMORY", 0)
    one_at_a_time = compute(ClampedLog(), lm, train, queries)["clamped_log"]
    np.testing.assert_array_equal(one_at_a_time, actual)
