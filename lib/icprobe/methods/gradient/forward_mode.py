"""Influence on a whole query set without a backward pass on the pool, by forward-mode autograd.

The mean over queries of the gradient dot products is a directional derivative,

    mean_j < grad L(z_i), grad L(q_j) > = d/de L(z_i; w + e v) at e = 0,  v = mean_j grad L(q_j),

so one forward pass with tangents (Jacobian-vector product) gives it for a batch of training
examples, for three times the operations of a plain forward pass and with its memory. (A forward and
a backward pass to the activations takes as many; what is saved is the memory of the backward pass,
and the products with every single query.)
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from icprobe import models
from icprobe.methods.gradient import factors, losses
from icprobe.methods.gradient.layers import LINEAR, linear_layers
from icprobe.models import LM


class MeanGradient:
    """The mean gradient of a query set, ready for any number of training examples.

    Attributes:
        direction: v by layer name, each of its weight's shape.
    """

    def __init__(
        self, lm: LM, queries: Iterable, layers: str = "", max_length: int | None = None
    ) -> None:
        """Compute the mean gradient by backward passes over the queries.

        Args:
            lm: The model.
            queries: M rows with id, prompt, completion (or encoded already).
            layers: See `layers.linear_layers`.
            max_length: Most tokens of one example, see `models.encode`.

        Raises:
            ValueError: If there are no queries, no layer matches, or a query cannot be learnt.
            FloatingPointError: If a gradient is not finite; names the queries.
        """
        self.lm, self.max_length = lm, max_length
        queries = models.encode(lm, queries, max_length)
        chosen = linear_layers(lm, layers)
        exact = torch.promote_types(lm.model.dtype, torch.float32)
        total = {
            name: torch.zeros_like(layer.weight, dtype=exact) for name, layer in chosen.items()
        }
        for batch in losses.batches(lm, queries):
            groups = factors.factors(lm, [queries[j] for j in batch], layers)
            for group in (part.widened() for part in groups):
                for name, g in group.outputs.items():
                    part = g.flatten(0, 1).T @ group.inputs.flatten(0, 1) / len(queries)
                    total[name] += part.T if _is_transposed(chosen[name]) else part
        self.direction = {name: part.to(lm.model.dtype) for name, part in total.items()}

    @torch.no_grad()
    def influence(self, train: Iterable, loss_on: str = "completion") -> np.ndarray:
        """Return the mean influence on the queries: float32 [N], nats per unit of learning rate.

        Positive = helps. Equals the mean over queries of `dot.GradientDot.products`.

        Args:
            train: N rows like the queries; one forward pass with tangents each.
            loss_on: See `dot.GradientDot.products`.

        Raises:
            ValueError: If an example has no completion tokens.
            NotImplementedError: If torch lacks the forward-mode derivative of some operation of the
                model (mixtures of experts, for instance).
            FloatingPointError: If a value is not finite; names the examples.
        """
        lm = self.lm
        train = models.encode(lm, train, self.max_length)
        scores = np.zeros(len(train))
        for batch in losses.batches(lm, train):
            examples = [train[i] for i in batch]
            ids, rows, columns, targets, weights = losses.loss_inputs(lm, examples, loss_on)
            try:
                with forward_ad.dual_level(), models.selective_head(lm), self._tangents():
                    inputs = {"input_ids": ids.to(lm.device)}
                    logits = models.logits_at(lm, rows, columns, **inputs)
                    chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
                    tangent = forward_ad.unpack_dual(chosen).tangent
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{lm.identity['name']} has an operation without forward-mode derivative; "
                    "gradient_dot(...).mean(axis=1) gives the same"
                ) from error
            totals = torch.zeros(len(batch), dtype=torch.float64, device=lm.device)
            totals.index_add_(0, rows.to(lm.device), -tangent.double() * weights)
            scores[batch] = totals.cpu().numpy()
        wrong = [repr(train[i].id) for i in np.flatnonzero(~np.isfinite(scores))]
        if wrong:
            raise FloatingPointError(f"influence is not finite: examples {', '.join(wrong)}")
        return scores.astype(np.float32)

    @contextmanager
    def _tangents(self) -> Iterator[None]:
        """Let the chosen layers' outputs change as if their weights moved along the direction.

        A linear layer with weight w has outputs w x with tangents w x' + v x: three products,
        where torch's own rule takes a fourth, of x and a matrix of zeros.
        """
        given = {}

        def strip(layer, inputs):
            given[layer] = forward_ad.unpack_dual(inputs[0])
            return given[layer].primal

        def move(layer, _, output, direction):
            x, x_tangent = (
                part if part is None else part.flatten(0, -2) for part in given.pop(layer)
            )
            if direction is not None:
                tangent = x @ _across(layer, direction)
                if x_tangent is not None:
                    tangent.addmm_(x_tangent, _across(layer, layer.weight))
            elif x_tangent is not None:
                tangent = x_tangent @ _across(layer, layer.weight)
            else:
                return output
            return forward_ad.make_dual(output, tangent.view_as(output))

        hooks = []
        for name, layer in self.lm.model.named_modules():
            if isinstance(layer, LINEAR):
                moved = functools.partial(move, direction=self.direction.get(name))
                hooks.append(layer.register_forward_pre_hook(strip))
                hooks.append(layer.register_forward_hook(moved))
        try:
            # the fused attention kernels have no forward-mode derivative
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def mean_influence(
    lm: LM,
    train: Iterable,
    queries: Iterable,
    layers: str = "",
    loss_on: str = "completion",
    max_length: int | None = None,
) -> np.ndarray:
    """Return mean_j <grad L(z_i), grad L(q_j)>: float32 [N], positive = helps.

    In nats per unit of learning rate. See `MeanGradient` for arguments and errors, and to go block
    by block.
    """
    return MeanGradient(lm, queries, layers, max_length).influence(train, loss_on)


def _is_transposed(layer: nn.Module) -> bool:
    """Tell a Conv1D, whose weight is [d_in, d_out], from a Linear."""
    return not isinstance(layer, nn.Linear)


def _across(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix like the layer's weight as [d_in, d_out], to be multiplied from the left."""
    return weight if _is_transposed(layer) else weight.T
