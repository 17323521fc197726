"""Influence: TracIn, influence functions, retraining and one step in closed form; own gradients.

Everything returned is [B, N, M], positive = the example helps the query. After k pairs means the
mean over all base contexts of k pairs.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from icprobe.regression.learners import LinearAttention, Ridge
from icprobe.regression.problems import Prior, Problems, linear
from icprobe.regression.transformer import Regressor


def tracin(problems: Problems, w: Tensor, inverse: Tensor | None = None) -> np.ndarray:
    """Return gradient inner products at weights w [B, D]: T_iq = r_i r_q x_i . x_q.

    With the inverse [B, D, D] of a Hessian, influence functions: r_i r_q x_i . H^-1 x_q.
    """
    r = problems.y - linear(problems.x, w)
    r_q = problems.answers - linear(problems.queries, w)
    x = problems.x if inverse is None else problems.x @ inverse
    return (r[:, :, None] * r_q[:, None] * (x @ problems.queries.mT)).numpy()


def tracin_at_base(
    prior: Prior, problems: Problems, k: int = 0, preconditioned: bool = False
) -> np.ndarray:
    """Return TracIn at ridge regression's fit to k pairs; to none, that is the prior mean.

    Preconditioned with the inverse of the fit's Hessian, it is an influence function.
    """
    ridge, found = Ridge(prior), []
    for x, y in problems.base_contexts(k):
        inverse = torch.linalg.inv(ridge.hessian(x)) if preconditioned else None
        found.append(tracin(problems, ridge.weights(x, y), inverse))
    return np.mean(found, axis=0)


def tracin_at_pool(prior: Prior, problems: Problems, preconditioned: bool = False) -> np.ndarray:
    """Return TracIn at ridge regression's fit to all N training examples."""
    pool = replace(problems, base_x=problems.x[:, None], base_y=problems.y[:, None])
    return tracin_at_base(prior, pool, problems.shape[1], preconditioned)


def add_one(prior: Prior, problems: Problems, k: int = 0) -> np.ndarray:
    """Return by how much adding an example to k pairs of ridge regression lowers queries' losses.

    By Sherman and Morrison, w changes by H^-1 x_i r_i / (1 + x_i . H^-1 x_i).
    """
    contexts = problems.base_contexts(k)
    return np.mean([-_retrained(prior, problems, x, y, 1) for x, y in contexts], axis=0)


def leave_one_out(prior: Prior, problems: Problems) -> np.ndarray:
    """Return by how much ridge regression without an example of all N raises queries' losses.

    Then w changes by -H^-1 x_i r_i / (1 - x_i . H^-1 x_i).
    """
    return _retrained(prior, problems, problems.x, problems.y, -1)


def _retrained(prior: Prior, problems: Problems, x: Tensor, y: Tensor, sign: int) -> np.ndarray:
    ridge = Ridge(prior)
    w = ridge.weights(x, y)
    solved = torch.linalg.solve(ridge.hessian(x), problems.x.mT).mT
    leverage = (problems.x * solved).sum(-1)
    r = problems.y - linear(problems.x, w)
    r_q = (problems.answers - linear(problems.queries, w))[:, None]
    moved = (solved @ problems.queries.mT) * (sign * r / (1 + sign * leverage))[..., None]
    return (((r_q - moved) ** 2 - r_q**2) / 2).numpy()


def step_gain(problems: Problems, w: Tensor, rate: float) -> np.ndarray:
    """Return by how much a gradient step on an example, from w [B, D], lowers queries' losses.

    rate * T_iq - rate^2 / 2 * r_i^2 (x_i . x_q)^2: of second order, and exact.
    """
    r = (problems.y - linear(problems.x, w)).numpy()
    second = (r[..., None] * (problems.x @ problems.queries.mT).numpy()) ** 2
    return rate * tracin(problems, w) - rate**2 / 2 * second


def after_attention_step(problems: Problems, k: int, attention: LinearAttention) -> Problems:
    """Return problems of which `step_gain` is the gain of attention after k pairs of one context.

    It takes all its steps from one start, so an example's residual stays that at the start, and the
    query's is that after the step on the base pairs.
    """
    ((x, y),) = problems.base_contexts(k)
    before = attention(x, y, problems.queries)
    at_start = problems.queries @ attention.start.to(x)
    return replace(problems, answers=problems.answers - before + at_start)


def network_gradients(network: Regressor, problems: Problems, k: int = 0) -> dict[str, np.ndarray]:
    """Return inner products of the network's own gradients, r_i r_q J_i . J_q, by form.

    Residuals r, after k pairs of one base context, are the network's, J [P] is the derivative of a
    prediction by all weights. "raw" is J as it is: every prediction has a large part in common
    (such as that by the output bias), which says nothing of x. "centred" is J(x) - J(0), what
    depends on the covariates; "embedding" has the weights that read tokens in.
    """
    B, N, _ = problems.shape
    weight = network.read_in.weight
    parameters = {name: tensor.detach() for name, tensor in network.named_parameters()}

    def predict(parameters, x, y, query):
        inputs = x[None], y[None], query[None, None]
        return torch.func.functional_call(network, parameters, inputs)[0, 0]

    both = torch.func.grad_and_value(predict)
    of_many = torch.func.vmap(both, in_dims=(None, None, None, 0))
    ((x, y),) = problems.base_contexts(k)
    found = []
    for b in range(B):
        origin = torch.zeros_like(problems.x[b, :1])
        points = torch.cat([problems.x[b], problems.queries[b], origin]).to(weight)
        labels = torch.cat([problems.y[b], problems.answers[b]])
        jacobian, predictions = of_many(parameters, x[b].to(weight), y[b].to(weight), points)
        r = labels - predictions[:-1].to(labels)
        residuals = r[:N, None] * r[None, N:]
        found.append({f: residuals * kernel.cpu() for f, kernel in _kernels(jacobian, N).items()})
    return {form: torch.stack([each[form] for each in found]).numpy() for form in found[0]}


def _kernels(jacobian: Mapping[str, Tensor], N: int) -> dict[str, Tensor]:
    """Return J_i . J_q [N, M] by form, from J [N + M + 1, ...] by parameter, the last one J(0)."""
    raw, centred = 0.0, 0.0
    for name, part in jacobian.items():
        part = part.flatten(1)
        products = (part[:N] @ part[N:].T).double()  # with queries and with the origin
        of_origin = (part[-1] @ part[N:].T).double()
        raw = raw + products[:, :-1]
        centred = centred + products[:, :-1] - products[:, -1:] - of_origin[:-1] + of_origin[-1]
        if name == "read_in.weight":
            embedding = products[:, :-1]
    return {"raw": raw, "centred": centred, "embedding": embedding}
