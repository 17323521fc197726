"""The in-context transformer: what it sees, and its gradients."""

import numpy as np
import pytest
import torch

from icprobe.regression import influence, probing, transformer
from icprobe.regression.problems import Prior, draw
from icprobe.regression.transformer import Regressor, Shape, fingerprint

EXACT = {"rtol": 0, "atol": 1e-10}  # networks in float64
PRIOR = Prior(dimension=3)
SHAPE = Shape(pairs=5, width=8, layers=2, heads=2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Regressor(3, SHAPE).double().eval().requires_grad_(False)


@pytest.fixture
def problems(rng):
    return draw(PRIOR, rng, 2, 4, 3, K=3)


# --------------------------------------------------------------------------------- what it sees


def test_queries_are_read_as_the_last_pair_is(network, rng):
    x, y = PRIOR.prompts(rng, 4, 5)
    along = network.along(x, y)
    for k in range(5):
        found = network(x[:, :k], y[:, :k], x[:, k : k + 1])[:, 0]
        np.testing.assert_allclose(found, along[:, k], **EXACT)


def test_each_query_sees_the_context_and_itself(network, rng):
    x, y = PRIOR.prompts(rng, 2, 4)
    queries, more = (torch.from_numpy(rng.normal(size=(2, n, 3))) for n in (5, 2))
    found = network(x, y, queries)
    together = network(x, y, torch.cat([more, queries], 1))[:, 2:]
    np.testing.assert_allclose(together, found, **EXACT)
    changed = y.clone()
    changed[:, -1] += 1
    assert (network(x, changed, queries) - found).abs().min() > 1e-6


def test_a_prediction_does_not_see_its_label_or_later_pairs(network, rng):
    x, y = PRIOR.prompts(rng, 2, 5)
    before = network.along(x, y)
    for j in range(5):
        other_x, other_y = x.clone(), y.clone()
        other_y[:, j] += 1
        other_x[:, j + 1 :] += 1
        after = network.along(other_x, other_y)
        np.testing.assert_allclose(after[:, : j + 1], before[:, : j + 1], **EXACT)
        assert j == 4 or (after[:, j + 1] != before[:, j + 1]).all()


def test_contexts_longer_than_trained_are_an_error(network, rng):
    x, y = PRIOR.prompts(rng, 2, 5)
    with pytest.raises(ValueError, match="a context has 5 pairs, this network reads up to 4"):
        network(x, y, x)


def test_a_learner_reads_in_parts(network, problems, monkeypatch):
    whole = probing.gain(transformer.learner(network), problems, 2)
    monkeypatch.setattr(transformer, "TOKENS_AT_ONCE", 20)
    again = probing.gain(transformer.learner(network), problems, 2)
    np.testing.assert_allclose(again, whole, **EXACT)


# -------------------------------------------------------------------------------- its gradients


@pytest.mark.parametrize("k", [0, 2])
def test_own_gradients_are_autograds(network, problems, k):
    found = influence.network_gradients(network, problems, k)
    ((x, y),) = problems.base_contexts(k)
    weights = dict(network.requires_grad_().named_parameters())
    for b in range(2):
        points = torch.cat([problems.x[b], problems.queries[b], torch.zeros(1, 3)])
        out = network(x[[b]], y[[b]], points[None])[0]
        rows = [torch.autograd.grad(one, weights.values(), retain_graph=True) for one in out]
        whole = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        read_in = list(weights).index("read_in.weight")
        embedding = torch.stack([row[read_in].flatten() for row in rows])
        r = torch.cat([problems.y[b], problems.answers[b]]) - out[:-1].detach()
        forms = {"raw": whole, "centred": whole - whole[-1], "embedding": embedding}
        for form, J in forms.items():
            expected = r[:4, None] * r[4:] * (J[:4] @ J[4:-1].T)
            np.testing.assert_allclose(found[form][b], expected, **EXACT)


def test_fingerprints_tell_networks_apart(network):
    names = {fingerprint(network)}
    network.read_out.bias += 1e-6
    names.add(fingerprint(network))
    other = Regressor(3, Shape(pairs=5, width=8, layers=2, heads=1)).double()
    other.load_state_dict(network.state_dict())  # weights do not tell how many heads there are
    assert len(names | {fingerprint(other)}) == 3


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match=r"(?s)width is 10.*4 heads"):
        Shape(width=10, heads=4)
