"""Closed forms against retraining and autograd, learners, the exact anchor, probing."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icprobe.regression import influence, probing
from icprobe.regression.learners import LinearAttention, Ridge, least_squares
from icprobe.regression.problems import Prior, draw

EXACT = {"rtol": 0, "atol": 1e-10}  # all is in float64
B, N, M, K, C = 3, 7, 5, 4, 2


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def prior():
    return Prior(dimension=4, noise=0.3, mean=0.7, spread=0.9)


@pytest.fixture
def problems(prior, rng):
    return draw(prior, rng, B, N, M, K=K, C=C)


def fitted(prior, x, y):
    """Weights of least squares on the pairs, and on made-up ones that stand for the prior."""
    root = np.sqrt(prior.penalty)
    rows = np.vstack([x, root * np.eye(prior.dimension)])
    labels = np.concatenate([y, np.full(prior.dimension, root * prior.mean)])
    return np.linalg.lstsq(rows, labels, rcond=None)[0]


def loss(w, x, y):
    return (y - x @ w) ** 2 / 2


def retrained(prior, problems, x, y, change):
    """Falls [B, N, M] of queries' losses by refitting pairs from scratch, changed one by one."""
    found = np.zeros(problems.shape)
    for b in range(B):
        pairs = x[b].numpy(), y[b].numpy()
        asked = problems.queries[b].numpy(), problems.answers[b].numpy()
        for i in range(N):
            changed = fitted(prior, *change(b, i, *pairs))
            found[b, i] = loss(fitted(prior, *pairs), *asked) - loss(changed, *asked)
    return found


# ------------------------------------------------------------------- closed forms and retraining


@pytest.mark.parametrize("k", [0, 1, K])
def test_add_one_is_retraining_and_the_bayes_learners_gain(prior, problems, k):
    def with_example(b, i, x, y):
        return np.vstack([x, problems.x[b, i].numpy()]), np.append(y, problems.y[b, i].numpy())

    contexts = problems.base_contexts(k)
    expected = np.mean([retrained(prior, problems, *c, with_example) for c in contexts], axis=0)
    np.testing.assert_allclose(influence.add_one(prior, problems, k), expected, **EXACT)
    np.testing.assert_allclose(probing.gain(Ridge(prior), problems, k), expected, **EXACT)


def test_leave_one_out_is_retraining_without_the_example(prior, problems):
    def without_example(b, i, x, y):
        return np.delete(x, i, 0), np.delete(y, i)

    expected = -retrained(prior, problems, problems.x, problems.y, without_example)
    np.testing.assert_allclose(influence.leave_one_out(prior, problems), expected, **EXACT)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("where", ["start", "base", "pool"])
def test_tracin_is_autograds(prior, problems, where, preconditioned):
    if where == "pool":
        found = influence.tracin_at_pool(prior, problems, preconditioned)
        contexts = [(problems.x, problems.y)]
    else:
        k = K if where == "base" else 0
        found = influence.tracin_at_base(prior, problems, k, preconditioned)
        contexts = list(problems.base_contexts(k))

    def losses(w, x, y):
        return (y - x @ w) ** 2 / 2

    expected = np.zeros(problems.shape)
    for x, y in contexts:
        for b in range(B):
            w = torch.tensor(fitted(prior, x[b].numpy(), y[b].numpy()))

            def objective(w, x=x[b], y=y[b]):
                return losses(w, x, y).sum() + prior.penalty * ((w - prior.centre) ** 2).sum() / 2

            gradients = torch.autograd.functional.jacobian
            mine = gradients(partial(losses, x=problems.x[b], y=problems.y[b]), w)
            theirs = gradients(partial(losses, x=problems.queries[b], y=problems.answers[b]), w)
            curvature = torch.autograd.functional.hessian(objective, w)
            inverse = torch.linalg.inv(curvature) if preconditioned else torch.eye(4).double()
            expected[b] += (mine @ inverse @ theirs.T).numpy() / len(contexts)
    np.testing.assert_allclose(found, expected, **EXACT)


def test_a_step_gains_what_the_step_gains(prior, problems):
    w = torch.from_numpy(np.random.default_rng(1).normal(size=(B, 4)))
    found = influence.step_gain(problems, w, 0.2)
    for b in range(B):
        for i in range(N):
            x, y = problems.x[b, i], problems.y[b, i]
            moved = w[b] + 0.2 * (y - x @ w[b]) * x
            asked = problems.queries[b], problems.answers[b]
            gain = loss(w[b], *asked) - loss(moved, *asked)
            np.testing.assert_allclose(found[b, i], gain, **EXACT)
    first = influence.step_gain(problems, w, 1e-8) / 1e-8
    np.testing.assert_allclose(first, influence.tracin(problems, w), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------- learners


@pytest.mark.parametrize("k", [0, 2, 9])
def test_least_squares_is_numpys(rng, k):
    prior = Prior(dimension=4)
    x, y = prior.prompts(rng, 3, k)
    queries = torch.eye(4).double().expand(3, -1, -1)  # whose predictions are the weights
    for b, w in enumerate(least_squares(x, y, queries)):
        expected = np.linalg.lstsq(x[b].numpy(), y[b].numpy(), rcond=None)[0] if k else np.zeros(4)
        np.testing.assert_allclose(w, expected, **EXACT)


# ------------------------------------------------------------------------------ the exact anchor


@settings(max_examples=40, deadline=None)
@given(
    D=st.integers(1, 12),
    k=st.integers(0, 5),
    rate=st.floats(1e-3, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_gain_of_one_step_attention_is_the_formula(D, k, rate, seed):
    rng = np.random.default_rng(seed)
    problems = draw(Prior(dimension=D), rng, 2, 6, 5, K=k)
    start = torch.from_numpy(rng.normal(size=D))
    attention = LinearAttention(rate, start)
    gain = probing.gain(attention, problems, k)
    moved = influence.after_attention_step(problems, k, attention)
    w = start.expand(2, -1)
    formula = influence.step_gain(moved, w, rate)
    scale = max(1.0, np.abs(formula).max())
    np.testing.assert_allclose(gain / scale, formula / scale, **EXACT)
    if k == 0:  # the queries' residuals are those at the start
        np.testing.assert_allclose(moved.answers, problems.answers, **EXACT)


def test_attention_takes_the_step(rng):
    x, y = Prior(dimension=3).prompts(rng, 2, 5)
    start = torch.tensor([1.0, -2.0, 0.5]).double()
    queries = torch.from_numpy(rng.normal(size=(2, 4, 3)))
    w = start.clone().requires_grad_()
    for b in range(2):
        (slope,) = torch.autograd.grad(((y[b] - x[b] @ w) ** 2).sum() / 2, w)
        expected = queries[b] @ (start - 0.1 * slope)
        found = LinearAttention(0.1, start)(x, y, queries)[b]
        np.testing.assert_allclose(found, expected, **EXACT)


# ----------------------------------------------------------------------- probing


def test_the_published_score_counts_context_by_context(prior, problems):
    gains, shares = probing.gain_and_score(Ridge(prior), problems, 2)
    alone = []
    for c in range(C):
        bases = {"base_x": problems.base_x[:, c : c + 1], "base_y": problems.base_y[:, c : c + 1]}
        alone.append(probing.gain(Ridge(prior), replace(problems, **bases), 2))
    np.testing.assert_allclose(gains, np.mean(alone, axis=0), **EXACT)
    np.testing.assert_array_equal(shares, np.mean([gain > 0 for gain in alone], axis=0))
    assert set(np.unique(shares)) == {0, 0.5, 1}
