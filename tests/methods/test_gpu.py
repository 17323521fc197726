"""On a GPU (`./run_all.sh test --gpu`): the same scores as in float64 on a CPU, close enough."""

import warnings

import numpy as np
import pytest
import torch
from helpers import close, experiment_on, texts

from icprobe import models
from icprobe.methods import icp
from icprobe.methods.gradient import GradientProducts, factors, gradient_dot
from icprobe.methods.training_effect import Step, TrainingEffect
from icprobe.models import likelihoods
from icprobe.scores import compute, score

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return an experiment, and a function that loads its model in a dtype on a device."""
    train, queries = (texts(n, kind).to_dict("records") for n, kind in ((20, "t"), (6, "q")))
    experiment = experiment_on(tmp_path_factory.mktemp("gpu"), train, queries)

    def load(dtype="float32", device="cuda"):
        return models.load(experiment.model, dtype, device)

    return experiment, load


def pool(experiment):
    return experiment.load_data()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("tokens", [100, 100_000])
def test_log_likelihoods(made, monkeypatch, dtype, tolerance, tokens):
    experiment, load = made
    train, queries = pool(experiment)
    exact = load("float64", "cpu")
    encoded = [models.encode(exact, rows) for rows in (train, queries)]
    contexts = [(), *(one.ids for one in encoded[0])]
    expected = [
        [models.token_log_likelihoods(exact, q, context).sum() for q in encoded[1]]
        for context in contexts
    ]
    monkeypatch.setitem(likelihoods.TOKENS_PER_FORWARD, "cuda", tokens)
    found = models.log_likelihoods(load(dtype), encoded[1], contexts)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.2)])
@pytest.mark.parametrize("memory", [None, 1e-4, 0])
def test_gradient_products(made, dtype, tolerance, memory):
    """In its memory, and with some or all factors in a file."""
    experiment, load = made
    train, queries = pool(experiment)
    expected = gradient_dot(load("float64", "cpu"), train, queries)
    found = gradient_dot(load(dtype), train, queries, memory=memory)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_of_factors_are_those_of_widened_ones(dtype):
    random = torch.Generator().manual_seed(0)

    def batch(n: int, tokens: int) -> tuple[factors.Factors, factors.Factors]:
        x, *g = (torch.randn(n, tokens, d, generator=random) for d in (24, 16, 40))
        exact = factors.Factors(x, {f"layer {k}": part for k, part in enumerate(g)})
        held = exact.map(lambda part: part.to(getattr(torch, dtype)))
        return held.map(torch.Tensor.cuda), held.map(torch.Tensor.double)

    (one, exact_one), (other, exact_other) = ([*zip(*sizes, strict=True)] for sizes in (
        [batch(3, 16), batch(2, 8)], [batch(4, 24)],
    ))  # fmt: skip
    expected = factors.products(exact_one, exact_other)
    for way in (factors.products, factors._over_tokens, factors._over_weights):
        for name, part in way(one, other).items():
            close(part.cpu(), expected[name])
    norms = factors.squared_norms(exact_one[:1])
    for name, part in factors.squared_norms(one[:1]).items():
        close(part.cpu(), norms[name])


def test_effects_of_training_steps(made):
    experiment, load = made
    train, queries = (rows.select(range(4)) for rows in pool(experiment))
    method = TrainingEffect([Step("sgd", 1e-3), Step("adamw", 1e-5)])
    exact, found = (
        compute(method, lm, train, queries).values() for lm in (load("float64", "cpu"), load())
    )
    for mine, theirs in zip(found, exact, strict=True):
        assert np.abs(mine - theirs).max() <= 0.02 * np.abs(theirs).max() + 1e-4


def test_what_does_not_fit_is_done_in_smaller_passes(made):
    """The card lets this process have a little only: the passes get smaller, scores stay."""
    experiment, load = made
    lm = load()
    queries = models.encode(lm, pool(experiment)[1])
    contexts = [tuple(range(3 + k, 203 + k)) for k in range(50)] * 40
    expected = models.log_likelihoods(lm, queries, contexts, 1000)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.warns(UserWarning, match="log-likelihoods: too little memory, now"):
            found = models.log_likelihoods(lm, queries, contexts, 2**24)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_what_the_notebooks_call(made, tmp_path):
    """Blocks of a GPU's size, written to stores."""
    experiment, load = made
    lm = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = score(experiment, [*icp.probing(neutral=True), GradientProducts()], lm)
    assert {scores.shape for name, scores in found.items() if name != "zero_shot"} == {(20, 6)}
