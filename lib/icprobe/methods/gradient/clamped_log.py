"""The influence estimator that the authors' code computes, for comparison with the plain product.

From their gradient_similarity.py as of October 2024: entries of both gradients are clamped to a
magnitude between 1e-4 and 1 (zeros stay), and each weight or bias tensor t of the blocks' linear
layers then adds sign(s) log |s| of its own product s,

    clamped_log_ij = sum_t sign(s_t) log |s_t|
    s_t = < clamp(grad_t L(z_i)), clamp(grad_t L(q_j)) >
"""

from collections.abc import Iterable

import numpy as np
import torch

from icprobe import models
from icprobe.methods.gradient import losses
from icprobe.methods.gradient.layers import linear_layers
from icprobe.models import LM

LOW, HIGH = 1e-4, 1.0

# GiB of whole query gradients held at once (0.4 a query for SmolLM2-135M)
MEMORY = 4.0


def clamped_log(
    lm: LM,
    train: Iterable,
    queries: Iterable,
    layers: str = "",
    loss_on: str = "text",
    max_length: int | None = None,
    memory: float = MEMORY,
) -> np.ndarray:
    """Return the published clamp-and-log estimate for all pairs: float32 [N, M], no unit.

    It is not an inner product and no derivative of any loss: it is not linear in the examples, a
    product below 1 in magnitude changes its sign under the logarithm, entries below 1e-4 are
    raised, and a bias counts as much as a matrix. Use `dot.gradient_dot` for attribution.

    It needs every entry of every gradient: one backward pass a query, and one a training example
    for each `memory` of queries; N M P operations for P parameters.

    Args:
        lm: The model.
        train: N rows with id, prompt, completion (or encoded already).
        queries: M rows like them; their loss is on the completion.
        layers: See `layers.linear_layers`.
        loss_on: Of the training examples, "text" (as published) or "completion"; losses are summed
            over tokens.
        max_length: See `models.encode`.
        memory: GiB of query gradients held at once.

    Raises:
        ValueError: If no layer matches, or an example has no completion tokens.
        FloatingPointError: If a product is not finite; names the pair.
    """
    train, queries = (models.encode(lm, rows, max_length) for rows in (train, queries))
    tensors = [
        tensor
        for layer in linear_layers(lm, layers).values()
        for tensor in (layer.weight, layer.bias if hasattr(layer, "bias") else None)
        if tensor is not None
    ]

    def clamped(example, loss_on):
        found = losses.full_gradient(lm, example, tensors, loss_on)
        return [(g.sign() * g.abs().clamp(LOW, HIGH)).flatten() for g in found]

    size = sum(tensor.nbytes for tensor in tensors)
    chunk_size = max(1, int(memory * 2**30 // size))
    scores = np.zeros((len(train), len(queries)))
    for start in range(0, len(queries), chunk_size):
        held = [clamped(query, "completion") for query in queries[start : start + chunk_size]]
        for i, example in enumerate(train):
            mine = clamped(example, loss_on)
            for j, theirs in enumerate(held, start):
                s = torch.stack([a @ b for a, b in zip(mine, theirs, strict=True)]).double()
                # a product of exactly zero adds nothing
                scores[i, j] = float((s.sign() * s.abs().log())[s != 0].sum())
    if not np.isfinite(scores).all():
        i, j = np.argwhere(~np.isfinite(scores))[0]
        raise FloatingPointError(f"not finite: {train[i].id!r} on {queries[j].id!r}")
    return scores.astype(np.float32)
