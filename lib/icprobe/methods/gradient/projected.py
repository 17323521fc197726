"""Gradients projected to a few numbers a layer, to be kept for a pool and met by any query.

A layer's weight gradient W' = G^T X [d_out, d_in] is shrunk from both sides by random matrices to
P W' Q^T, with P [k, d_out] and Q [k, d_in] of independent entries +-1/sqrt(k), so that inner
products keep their expectation: E < P A Q^T, P B Q^T > = < A, B >. From the factors this costs
k (d_in + d_out) operations a token (LoGra, Choe et al. 2024, with random instead of principal
directions). Signs have less variance than normal entries; a side of at most k entries stays whole.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from icprobe import models
from icprobe.methods.gradient import factors, losses
from icprobe.methods.gradient.factors import Factors
from icprobe.methods.gradient.layers import linear_layers
from icprobe.models import LM, Encoded


def projected_gradients(
    lm: LM,
    examples: Iterable,
    size: int,
    seed: int = 0,
    layers: str = "",
    loss_on: str = "completion",
    max_length: int | None = None,
) -> np.ndarray:
    """Return each example's projected gradient: float32 [N, K], K about size^2 a layer.

    Inner products of the rows of two such matrices (of one size and seed) are unbiased estimates of
    `dot.gradient_dot`, in nats per unit of learning rate.

    Args:
        lm: The model.
        examples: N rows with id, prompt, completion (or encoded already).
        size: k, rows of each random matrix.
        seed: Of the random matrices; each depends on its layer's name, too.
        layers: See `layers.linear_layers`.
        loss_on: See `dot.GradientDot.products`.
        max_length: See `models.encode`.

    Raises:
        ValueError: If size is not positive, no layer matches, or a completion has no tokens.
        FloatingPointError: If a gradient is not finite; names the examples.
    """
    examples = models.encode(lm, examples, max_length)
    return of_sizes(lm, examples, [size], seed, layers, loss_on)[0]


def of_sizes(
    lm: LM,
    examples: Sequence[Encoded],
    sizes: Sequence[int],
    seed: int,
    layers: str = "",
    loss_on: str = "completion",
) -> list[np.ndarray]:
    """Return projected gradients [N, K] of several sizes, from one pass over the examples.

    Arguments and errors are those of `projected_gradients`.
    """
    if min(sizes) < 1:
        raise ValueError(f"size is {min(sizes)}, expected a positive number")
    result: list = [None] * len(sizes)
    for batch in losses.batches(lm, examples):
        groups = factors.factors(lm, [examples[i] for i in batch], layers, loss_on)
        for k, size in enumerate(sizes):
            block = _project(groups, size, seed).cpu().numpy()
            if result[k] is None:
                result[k] = np.zeros((len(examples), block.shape[1]), np.float32)
            result[k][batch] = block
    return result


def width(lm: LM, size: int, layers: str = "") -> int:
    """Return K, the numbers that are kept for one example."""
    shapes = [layer.weight.shape for layer in linear_layers(lm, layers).values()]
    return sum(min(size, rows) * min(size, columns) for rows, columns in shapes)


def _project(groups: Sequence[Factors], size: int, seed: int) -> torch.Tensor:
    """Project the gradients of n examples: float32 [n, K]."""
    blocks = []
    for group in (part.widened() for part in groups):
        x = group.inputs
        for name, g in group.outputs.items():
            p, q = (
                _signs(side, name, seed, size, part.shape[-1]).to(part)
                for side, part in (("out", g), ("in", x))
            )
            blocks.append(((g @ p.T).mT @ (x @ q.T)).flatten(1))
    return torch.cat(blocks, 1).float()


def _signs(side: str, name: str, seed: int, size: int, entries: int) -> torch.Tensor:
    """Return a random matrix [size, entries] of +-1/sqrt(size), or the identity if that is smaller.

    Drawn on the CPU, so that it is the same whatever the device and the choice of layers.
    """
    if entries <= size:
        return torch.eye(entries)
    digest = hashlib.sha256(f"{seed} {side} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    signs = torch.randint(0, 2, (size, entries), generator=generator) * 2.0 - 1
    return signs / size**0.5
