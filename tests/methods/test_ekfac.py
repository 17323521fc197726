"""EK-FAC: gradient dot products where the curvature is the identity, else its closed form."""

import numpy as np
import pytest
import torch
from helpers import FAMILIES, close, examples

from icprobe import models
from icprobe.methods.gradient import EKFACInfluence, ekfac, gradient_dot, losses
from icprobe.scores import Examples, compute


def scores(lm, train, queries, blocks=3, **options):
    return compute(EKFACInfluence(blocks, **options), lm, train, queries)["ekfac"]


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_gives_gradient_dot(tiny, family, monkeypatch):
    monkeypatch.setattr(ekfac, "CURVATURE", "identity")
    lm = tiny(family, bos=family == "gpt2")
    train, queries = examples(5, seed=1, words=20), examples(3, seed=2, words=20)
    close(scores(lm, train, queries), gradient_dot(lm, train, queries))
    options = {"layers": "mlp|dense|c_fc", "loss_on": "text"}
    monkeypatch.setattr(ekfac, "MEMORY", 1e-9)
    close(scores(lm, train, queries, **options), gradient_dot(lm, train, queries, **options))


LAYER = "layers.1"  # kronfluence takes its time for each layer


def test_blocks_of_examples_share_one_fit(tiny):
    lm, method = tiny(), EKFACInfluence(1, LAYER)
    pool, queries = (Examples.of(lm, examples(n, seed=n)) for n in (6, 4))
    prepared = method.prepare(lm, queries, pool)
    blocks = [method.score(prepared, part) for part in (pool[:2], pool[2:])]
    close(np.concatenate(blocks), method.score(prepared, pool))


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
    monkeypatch.setattr(ekfac, "DAMPING", damping)
    lm, seed, name = tiny(dtype="float64"), 3, "model.layers.1.mlp.up_proj"
    rows, asked = examples(6, seed=1), examples(3, seed=2)
    train, queries = models.encode(lm, rows), models.encode(lm, asked)

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
    actual = scores(lm, rows, asked, blocks=1, layers=name, seed=seed)
    assert abs(actual - expected).max() < 2e-3 * abs(expected).max()


def test_seeded_and_batches_do_not_matter(tiny, monkeypatch):
    lm = tiny()
    train, queries = examples(5, seed=1, words=20), examples(2, seed=2, words=20)

    def drawn(seed):
        return scores(lm, train, queries, blocks=1, layers=LAYER, seed=seed)

    first = drawn(1)
    torch.rand(3)
    np.testing.assert_array_equal(drawn(1), first)
    assert abs(drawn(2) - first).max() > 1e-3 * abs(first).max()
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 1)
    assert abs(drawn(1) - first).max() < 2e-3 * abs(first).max()


def test_the_model_is_left_as_it_was(tiny):
    lm = tiny("gpt2")
    pool = Examples.of(lm, examples(3, seed=1))
    before = models.token_log_likelihoods(lm, pool.tokens[0])
    kinds = [type(module) for module in lm.model.modules()]
    method = EKFACInfluence(3, "c_fc")
    prepared = method.prepare(lm, pool, pool)
    method.score(prepared, pool)
    cut = Examples([{"id": "cut"}], [models.Encoded("cut", (1, 2), ())])
    with pytest.raises(ValueError, match="'cut': no completion token"):
        method.score(prepared, cut)
    assert [type(module) for module in lm.model.modules()] == kinds
    assert all(p.requires_grad for p in lm.model.parameters())
    np.testing.assert_array_equal(models.token_log_likelihoods(lm, pool.tokens[0]), before)
