"""EK-FAC: gradient dot products where the curvature is the identity, else its closed form."""

import numpy as np
import pytest
import torch
from helpers import FAMILIES, close, encoded

from icprobe import models
from icprobe.methods.gradient import EKFAC, gradient_dot, losses
from icprobe.methods.gradient import ekfac as module


def scores(lm, train, queries, **options):
    return EKFAC(lm, queries, train, **options).scores(train)


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_gives_gradient_dot(tiny, family, monkeypatch):
    monkeypatch.setattr(module, "CURVATURE", "identity")
    lm = tiny(family, bos=family == "gpt2")
    train, queries = encoded(lm, 5, seed=1, words=20), encoded(lm, 3, seed=2, words=20)
    actual = scores(lm, train, queries)
    assert actual.dtype == np.float32 and actual.shape == (5, 3)
    close(actual, gradient_dot(lm, train, queries))
    options = {"layers": "mlp|dense|c_fc", "loss_on": "text"}
    actual = scores(lm, train, queries, memory=1e-9, **options)
    close(actual, gradient_dot(lm, train, queries, **options))


def test_blocks_of_examples_share_one_fit(tiny):
    lm = tiny()
    train, queries = encoded(lm, 6, seed=1), encoded(lm, 4, seed=2)
    layers = "layers.1"  # kronfluence takes its time for each layer
    whole = scores(lm, train, queries, layers=layers)
    fitted = EKFAC(lm, queries, train, layers)
    close(np.concatenate([fitted.scores(train[:2]), fitted.scores(train[2:])]), whole)


def test_large_damping_gives_gradient_dot(tiny, monkeypatch):
    monkeypatch.setattr(module, "DAMPING", 1e9)
    lm = tiny()
    train, queries = encoded(lm, 5, seed=1), encoded(lm, 4, seed=2)
    damped = scores(lm, train, queries) * 1e9
    close(damped, gradient_dot(lm, train, queries))


def with_labels(lm, example, index, seed):
    """Draw the labels of an example from the model, by the inverse of the distribution."""
    ids, mask = models.sequence(lm, example)
    with torch.no_grad():
        levels = lm.model(torch.tensor([ids])).logits[0, :-1].double().softmax(-1).cumsum(-1)
    draws = np.random.default_rng((seed, index)).random(sum(mask))
    places = [k - 1 for k, m in enumerate(mask) if m]
    return [int((levels[k] < u).sum()) for k, u in zip(places, draws, strict=True)]


@pytest.mark.parametrize("damping", [0.5, None])
def test_equals_the_closed_form(tiny, damping, monkeypatch):
    """Covariances, their eigenvectors, second moments along them, division; one layer, by numpy."""
    monkeypatch.setattr(module, "DAMPING", damping)
    lm, seed, name = tiny(dtype="float64"), 3, "model.layers.1.mlp.up_proj"
    train, queries = encoded(lm, 6, seed=1), encoded(lm, 3, seed=2)

    def factors(example, labels=None):
        ids, mask = models.sequence(lm, example)
        layer, kept = lm.model.get_submodule(name), {}
        hook = layer.register_forward_hook(lambda _, x, y: kept.update(x=x[0], y=y))
        logits = lm.model(torch.tensor([ids[:-1]])).logits[0]
        hook.remove()
        learnt = torch.tensor(mask[1:], dtype=torch.bool)
        targets = torch.tensor(example.completion if labels is None else labels)
        loss = torch.nn.functional.cross_entropy(logits[learnt], targets, reduction="sum")
        (g,) = torch.autograd.grad(loss, kept["y"])
        return g[0].numpy(), kept["x"][0].detach().numpy()

    drawn = [factors(z, with_labels(lm, z, i, seed)) for i, z in enumerate(train)]
    tokens = sum(len(g) for g, _ in drawn)
    outputs = np.linalg.eigh(sum(g.T @ g for g, _ in drawn) / tokens)[1]
    inputs = np.linalg.eigh(sum(x.T @ x for _, x in drawn) / tokens)[1]

    def rotated(pair):
        g, x = pair
        return outputs.T @ (g.T @ x) @ inputs

    eigenvalues = np.mean([rotated(pair) ** 2 for pair in drawn], axis=0)
    eigenvalues += 0.1 * eigenvalues.mean() if damping is None else damping
    one, other = ([rotated(factors(e)) for e in side] for side in (train, queries))
    expected = np.array([[(a * b / eigenvalues).sum() for b in other] for a in one])
    actual = scores(lm, train, queries, layers=name, seed=seed)
    assert abs(actual - expected).max() < 2e-3 * abs(expected).max()


def test_seeded_and_batches_do_not_matter(tiny, monkeypatch):
    lm = tiny()
    train, queries = encoded(lm, 5, seed=1, words=20), encoded(lm, 2, seed=2, words=20)
    state = torch.get_rng_state()
    first = scores(lm, train, queries, layers="layers.1", seed=1)
    torch.rand(3)
    again = scores(lm, train, queries, layers="layers.1", seed=1)
    np.testing.assert_array_equal(again, first)
    torch.set_rng_state(state)
    other = scores(lm, train, queries, layers="layers.1", seed=2)
    assert abs(other - first).max() > 1e-3 * abs(first).max()
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 1)
    alone = scores(lm, train, queries, layers="layers.1", seed=1)
    assert abs(alone - first).max() < 2e-3 * abs(first).max()


def test_the_model_is_left_as_it_was(tiny):
    lm = tiny("gpt2")
    example = encoded(lm, 1, seed=3)[0]
    before = models.token_log_likelihoods(lm, example)
    kinds = [type(module) for module in lm.model.modules()]
    train = encoded(lm, 3, seed=1)
    scores(lm, train, train, layers="c_fc")
    with pytest.raises(ValueError, match="'cut': no completion token"):
        scores(lm, [models.Encoded("cut", train[0].prompt, ())], train)
    assert [type(module) for module in lm.model.modules()] == kinds
    assert all(p.requires_grad for p in lm.model.parameters())
    np.testing.assert_array_equal(models.token_log_likelihoods(lm, example), before)
