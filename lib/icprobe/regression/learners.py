"""Learners with closed forms: least squares, ridge regression (Bayes), one-step attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from icprobe.regression.problems import Prior, linear

# takes contexts x [R, K, D] and y [R, K] and queries [R, M, D], returns predictions [R, M]
Learner = Callable[[Tensor, Tensor, Tensor], Tensor]


def least_squares(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """Predict by ordinary least squares; of all that fit, by the solution of the smallest norm."""
    return linear(queries, (torch.linalg.pinv(x) @ y[..., None])[..., 0])


@dataclass(frozen=True)
class Ridge:
    """The Bayes learner: the posterior mean of w, which is ridge regression around the prior mean.

    Its gain is exact add-one retraining.
    """

    prior: Prior

    def __call__(self, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        """Return predictions [R, M]."""
        return linear(queries, self.weights(x, y))

    def weights(self, x: Tensor, y: Tensor) -> Tensor:
        """Return w [R, D] after contexts x [R, K, D], y [R, K]."""
        centre = self.prior.centre.to(x)
        right = (y - x @ centre)[..., None]
        return centre + torch.linalg.solve(self.hessian(x), x.mT @ right)[..., 0]

    def hessian(self, x: Tensor) -> Tensor:
        """Return the Hessian [R, D, D] of the objective on covariates [R, K, D]."""
        return x.mT @ x + self.prior.penalty * torch.eye(x.shape[-1]).to(x)


@dataclass(frozen=True)
class LinearAttention:
    """One layer of linear self-attention, its weights set by hand to take one gradient step.

    The step has this rate and starts at w0 [D]. Tokens are (x_j, y_j), the query's is
    (x_q, -w0 . x_q). Keys and queries are the covariates, values (0, w0 . x_j - y_j), the output is
    scaled by the rate (von Oswald et al. 2023, Transformers learn in-context by gradient descent,
    proposition 1). What is left in the query's last slot is -w1 . x_q with
    w1 = w0 + rate * sum_j r_j x_j, one step on sum_j r_j^2 / 2.
    """

    rate: float
    start: Tensor

    def __call__(self, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        """Return predictions [R, M]."""
        D = x.shape[-1]
        start = self.start.to(x)
        key = torch.zeros(D + 1, D + 1).to(x)
        key[:D, :D] = torch.eye(D)
        value = torch.zeros(D + 1, D + 1).to(x)
        value[D, :D], value[D, D] = start, -1
        tokens = torch.cat([x, y[..., None]], dim=-1)
        of_queries = torch.cat([queries, -(queries @ start)[..., None]], dim=-1)
        scores = (of_queries @ key.T) @ (tokens @ key.T).mT
        return -(of_queries + self.rate * scores @ (tokens @ value.T))[..., D]
