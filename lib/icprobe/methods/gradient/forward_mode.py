"""Influence on a whole query set without a backward pass on the pool, by forward-mode autograd.

The mean over queries of the gradient dot products is a directional derivative,

    mean_j < grad L(z_i), grad L(q_j) > = d/de L(z_i; w + e v) at e = 0,  v = mean_j grad L(q_j),

so one forward pass with tangents (Jacobian-vector product) gives it for a batch of training
examples, for three times the operations of a plain forward pass and with its memory. (A forward and
a backward pass to the activations takes as many operations, but more memory.)
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from icprobe import models
from icprobe.methods.gradient import factors, losses
from icprobe.methods.gradient.layers import LINEAR, linear_layers
from icprobe.models import LM, Encoded


def mean_influence(
    lm: LM,
    train: Sequence[Encoded],
    queries: Sequence[Encoded],
    layers: str = "",
    loss_on: str = "completion",
) -> np.ndarray:
    """Return mean_j <grad L(z_i), grad L(q_j)>: float32 [N], positive = helps.

    The mean over queries of `dot.gradient_dot`, in nats per unit of learning rate, for encoded
    examples, with the same errors; and NotImplementedError where torch lacks the forward-mode
    derivative of some operation of the model (mixtures of experts, for instance).
    """
    return influence_along(lm, train, mean_gradient(lm, queries, layers), loss_on)


@torch.no_grad()
def influence_along(
    lm: LM, train: Sequence[Encoded], direction: Mapping[str, torch.Tensor], loss_on: str
) -> np.ndarray:
    """Return <grad L(z_i), v>: float32 [N], for a direction v of weights by layer."""
    scores = np.zeros(len(train))
    for batch in losses.batches(lm, train):
        examples = [train[i] for i in batch]
        ids, rows, columns, targets = losses.loss_inputs(lm, examples, loss_on)
        try:
            with forward_ad.dual_level(), models.selective_head(lm), _tangents(lm, direction):
                logits = models.logits_at(lm, rows, columns, input_ids=ids.to(lm.device))
                chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
                tangent = forward_ad.unpack_dual(chosen).tangent
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{lm.identity['name']} has an operation without forward-mode derivative; "
                "gradient_dot(...).mean(axis=1) gives the same"
            ) from error
        totals = torch.zeros(len(batch), dtype=torch.float64, device=lm.device)
        totals.index_add_(0, rows.to(lm.device), -tangent.double())
        scores[batch] = totals.cpu().numpy()
    wrong = [repr(train[i].id) for i in np.flatnonzero(~np.isfinite(scores))]
    if wrong:
        raise FloatingPointError(f"influence is not finite: examples {', '.join(wrong)}")
    return scores.astype(np.float32)


@torch.no_grad()
def mean_gradient(lm: LM, queries: Sequence[Encoded], layers: str) -> dict[str, torch.Tensor]:
    """Return the mean gradient v of the queries by layer, by backward passes over them."""
    chosen = linear_layers(lm, layers)
    exact = torch.promote_types(lm.model.dtype, torch.float32)
    total = {name: torch.zeros_like(layer.weight, dtype=exact) for name, layer in chosen.items()}
    for batch in losses.batches(lm, queries):
        groups = factors.factors(lm, [queries[j] for j in batch], layers)
        for group in (part.widened() for part in groups):
            for name, g in group.outputs.items():
                part = g.flatten(0, 1).T @ group.inputs.flatten(0, 1) / len(queries)
                total[name] += part if isinstance(chosen[name], nn.Linear) else part.T
    return {name: part.to(lm.model.dtype) for name, part in total.items()}


@contextmanager
def _tangents(lm: LM, direction: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let layers' outputs change as if their weights moved along the direction.

    A linear layer with weight w has outputs w x with tangents w x' + v x: three products, where
    torch's own rule takes a fourth, of x and a matrix of zeros.
    """
    given = {}

    def strip(layer, inputs):
        given[layer] = forward_ad.unpack_dual(inputs[0])
        return given[layer].primal

    def move(layer, _, output, v):
        x, x_tangent = (part if part is None else part.flatten(0, -2) for part in given.pop(layer))
        if v is not None:
            tangent = x @ _across(layer, v)
            if x_tangent is not None:
                tangent.addmm_(x_tangent, _across(layer, layer.weight))
        elif x_tangent is not None:
            tangent = x_tangent @ _across(layer, layer.weight)
        else:
            return output
        return forward_ad.make_dual(output, tangent.view_as(output))

    hooks = []
    for name, layer in lm.model.named_modules():
        if isinstance(layer, LINEAR):
            moved = functools.partial(move, v=direction.get(name))
            hooks.append(layer.register_forward_pre_hook(strip))
            hooks.append(layer.register_forward_hook(moved))
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _across(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix like the layer's weight as [d_in, d_out], to be multiplied from the left."""
    return weight.T if isinstance(layer, nn.Linear) else weight
