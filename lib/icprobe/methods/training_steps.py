"""Training steps on one example each, and what becomes of the queries; see `training_effect`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from icprobe import models
from icprobe.methods.gradient import losses
from icprobe.methods.gradient.layers import linear_layers
from icprobe.methods.training_effect import OPTIMIZERS, Step
from icprobe.models import LM, Encoded

Gradient = tuple[torch.Tensor, ...]


class TrainingSteps:
    """The queries before any step, and a copy of the weights that are trained."""

    def __init__(self, lm: LM, queries: Sequence[Encoded], layers: str = "") -> None:
        self._lm, self._queries = lm, queries
        self._weights = [module.weight for module in linear_layers(lm, layers).values()]
        self._before = self._log_likelihoods()
        self._start = [weight.detach().clone() for weight in self._weights]

    def effects(
        self, train: Sequence[Encoded], steps: Sequence[Step], loss_on: str = "completion"
    ) -> list[np.ndarray]:
        """Return the effects of each step, float32 [N, M]; positive = training on it helps.

        Each step is taken from the model's own weights. The model is left as it was, to the bit,
        even if something fails. FloatingPointError names an example whose gradient, or a
        log-likelihood after whose step, is not finite.
        """
        effects = [np.zeros((len(train), len(self._queries)), np.float32) for _ in steps]
        with self._trainable():
            for i, example in enumerate(train):
                gradient, norm = self._gradient(example, loss_on)
                for effect, step in zip(effects, steps, strict=True):
                    try:
                        self._take(step, gradient, norm)
                        effect[i] = self._log_likelihoods() - self._before
                    except FloatingPointError as error:
                        raise FloatingPointError(
                            f"{step.name} on {example.id!r} diverged: {error}"
                        ) from None
                    self._restore()
        return effects

    def _log_likelihoods(self) -> np.ndarray:
        """Log-likelihoods of the queries with the weights as they are: float64 [M]."""
        return models.log_likelihoods(self._lm, self._queries, dtype=np.float64)[0]

    def _gradient(self, example: Encoded, loss_on: str) -> tuple[Gradient, torch.Tensor]:
        """Return an example's gradient, by weight, and its norm."""
        loss = losses.token_losses(self._lm, example, loss_on).mean()
        gradient = torch.autograd.grad(loss, self._weights, materialize_grads=True)
        norm = nn.utils.get_total_norm(gradient)
        if not norm.isfinite():
            raise FloatingPointError(f"gradient is not finite: example {example.id!r}")
        return gradient, norm

    def _take(self, step: Step, gradient: Gradient, norm: torch.Tensor) -> None:
        """Change the weights; the gradient is left as it is.

        These optimisers work entry by entry, so one for each weight takes the same step as one for
        all, and its state is a weight's size and not the model's.
        """
        name, settings = OPTIMIZERS[step.optimizer]
        for weight, part in zip(self._weights, gradient, strict=True):
            weight.grad = part
            if step.clip:
                weight.grad = part.clone()  # clipped in place
                nn.utils.clip_grads_with_norm_([weight], step.clip, norm)
            getattr(torch.optim, name)([weight], lr=step.rate, **settings).step()

    @torch.no_grad()
    def _restore(self) -> None:
        for weight, start in zip(self._weights, self._start, strict=True):
            weight.copy_(start)

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """Let gradients flow to the trained weights, and put everything back afterwards."""
        states = [(weight.requires_grad, weight.grad) for weight in self._weights]
        try:
            for weight in self._weights:
                weight.requires_grad_(True)
            yield
        finally:
            self._restore()
            for weight, (requires_grad, gradient) in zip(self._weights, states, strict=True):
                weight.requires_grad_(requires_grad)
                weight.grad = gradient
