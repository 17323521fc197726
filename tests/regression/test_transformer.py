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
        return Regressor(3, SHAPE).double().eval()


@pytest.fixture
def problems(rng):
    return draw(PRIOR, rng, 2, 4, 3, K=3, C=2)


# --------------------------------------------------------------------------------- what it sees


def test_queries_are_read_as_the_last_pair_is(network, rng):
    x, y = PRIOR.prompts(rng, 4, 5)
    along = network.along(x, y)
    for k in range(5):
        found = network(x[:, :k], y[:, :k], x[:, k : k + 1])[:, 0]
        np.testing.assert_allclose(found.detach(), along[:, k].detach(), **EXACT)


def test_each_query_sees_the_context_and_itself(network, rng):
    x, y = PRIOR.prompts(rng, 2, 4)
    queries, more = (torch.from_numpy(rng.normal(size=(2, n, 3))) for n in (5, 2))
    found = network(x, y, queries)
    together = network(x, y, torch.cat([more, queries], 1))[:, 2:]
    np.testing.assert_allclose(together.detach(), found.detach(), **EXACT)
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
        np.testing.assert_allclose(after[:, : j + 1].detach(), before[:, : j + 1].detach(), **EXACT)
        assert j == 4 or (after[:, j + 1] != before[:, j + 1]).all()


def test_contexts_longer_than_trained_are_an_error(network, rng):
    x, y = PRIOR.prompts(rng, 2, 5)
    with pytest.raises(ValueError, match="a context has 5 pairs, this network reads up to 4"):
        network(x, y, x)


def test_a_learner_reads_in_parts(network, problems, monkeypatch):
    whole = probing.gain(transformer.learner(network), problems, 2)
    monkeypatch.setattr(transformer, "TOKENS_AT_ONCE", 20)
    np.testing.assert_allclose(
        probing.gain(transformer.learner(network), problems, 2), whole, **EXACT
    )


# -------------------------------------------------------------------------------- its gradients


def losses(network, x, y, asked, labels):
    return (labels - network(x[None], y[None], asked[None])[0]) ** 2 / 2


@pytest.mark.parametrize("k", [0, 2])
def test_own_gradients_are_autograds(network, problems, k):
    found = influence.network_gradients(network, problems, k)
    names = [name for name, _ in network.named_parameters()]
    expected = {form: np.zeros(problems.shape) for form in found}
    contexts = list(problems.base_contexts(k))
    for x, y in contexts:
        for b in range(2):

            def jacobian(asked, x=x[b], y=y[b]):
                out = network(x[None], y[None], asked[None, None])[0, 0]
                parts = torch.autograd.grad(out, list(network.parameters()))
                return dict(zip(names, parts, strict=True)), out.item()

            origin = jacobian(torch.zeros(3).double())[0]
            for i in range(4):
                mine, out = jacobian(problems.x[b, i])
                r = problems.y[b, i].item() - out
                for j in range(3):
                    theirs, out = jacobian(problems.queries[b, j])
                    rr = r * (problems.answers[b, j].item() - out) / len(contexts)
                    forms = {
                        "raw": [(mine[n] * theirs[n]).sum() for n in names],
                        "centred": [
                            ((mine[n] - origin[n]) * (theirs[n] - origin[n])).sum() for n in names
                        ],
                        "embedding": [(mine[n] * theirs[n]).sum() for n in ["read_in.weight"]],
                    }
                    for form, parts in forms.items():
                        expected[form][b, i, j] += rr * sum(parts).item()
    for form, values in expected.items():
        np.testing.assert_allclose(found[form], values, **EXACT)


def test_raw_gradients_are_what_a_small_step_does(network, problems):
    """Finite differences: a step on one example lowers a query's loss by the rate times T."""
    found = influence.network_gradients(network, problems)["raw"]
    nothing = problems.base_x[0, 0, :0], problems.base_y[0, 0, :0]
    asked = problems.queries[0], problems.answers[0]
    for i in range(4):
        slopes = torch.autograd.grad(
            losses(network, *nothing, problems.x[0, i : i + 1], problems.y[0, i : i + 1]).sum(),
            list(network.parameters()),
        )
        sides = []
        for rate in (1e-5, -1e-5):
            with torch.no_grad():
                for weight, slope in zip(network.parameters(), slopes, strict=True):
                    weight -= rate * slope
                sides.append(losses(network, *nothing, *asked))
                for weight, slope in zip(network.parameters(), slopes, strict=True):
                    weight += rate * slope
        lowered = (sides[1] - sides[0]) / 2e-5  # central differences: errors of second order
        np.testing.assert_allclose(found[0, i], lowered, rtol=1e-5, atol=1e-6)


def test_own_gradients_do_not_depend_on_the_batch(network, problems, monkeypatch):
    whole = influence.network_gradients(network, problems, 1)
    monkeypatch.setattr(influence, "GRADIENTS_AT_ONCE", 3)
    for form, values in influence.network_gradients(network, problems, 1).items():
        np.testing.assert_allclose(values, whole[form], **EXACT)


def test_fingerprints_tell_networks_apart(network):
    names = {fingerprint(network)}
    with torch.no_grad():
        network.read_out.bias += 1e-6
    names.add(fingerprint(network))
    other = Regressor(3, Shape(pairs=5, width=8, layers=2, heads=1)).double()
    other.load_state_dict(network.state_dict())  # weights do not tell how many heads there are
    assert len(names | {fingerprint(other)}) == 3


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match=r"(?s)width is 10.*4 heads"):
        Shape(width=10, heads=4)
    with pytest.raises(ValueError, match=r"(?s)pairs.*0"):
        Shape(pairs=0)
