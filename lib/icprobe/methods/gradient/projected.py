"""Gradients projected to a few numbers a layer, to be kept for a pool and met by any query.

A layer's weight gradient W' = G^T X [d_out, d_in] is shrunk from both sides by random matrices to
P W' Q^T, with P [k, d_out] and Q [k, d_in] of independent entries +-1/sqrt(k), so that inner
products keep their expectation: E < P A Q^T, P B Q^T > = < A, B >. From the factors this costs
k (d_in + d_out) operations a token (LoGra, Choe et al. 2024, with random instead of principal
directions). Signs have less variance than normal entries; a side of at most k entries stays whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from icprobe.methods import gradient
from icprobe.methods.gradient.dot import PRODUCT
from icprobe.scores.method import Examples, Method, Output, setting

if TYPE_CHECKING:
    import torch

    from icprobe.methods.gradient.factors import Factors
    from icprobe.models import LM, Encoded

    Prepared = tuple[LM, list[np.ndarray]]


@dataclass(frozen=True)
class ProjectedProducts(Method):
    """Unbiased estimates of products, from gradients projected to several sizes k.

    Each has an output "projected <k>". The seed is that of the random matrices.
    """

    name = "projected"
    unit = PRODUCT
    notebook = "02"
    block_size = 8

    sizes: Sequence[int] = setting((16,))
    layers: str = ""
    loss_on: str = "completion"
    seed: int = 0

    @property
    def outputs(self) -> dict[str, Output]:
        """An output for each size."""
        options = {size: {**self.options, "size": size} for size in self.sizes}
        return {f"{self.name} {k}": Output(self.name, options[k], self.unit) for k in self.sizes}

    def prepare(self, lm: LM, queries: Examples, pool: None) -> Prepared:
        """Return the model, and the queries' projected gradients by size."""
        return lm, projected_gradients(lm, queries.tokens, self.sizes, self.seed, self.layers)

    def score(self, prepared: Prepared, train: Examples) -> dict[str, np.ndarray]:
        """Return the products [n, M] of each size, in nats per unit of learning rate."""
        lm, queries = prepared
        how = self.sizes, self.seed, self.layers, self.loss_on
        found = zip(projected_gradients(lm, train.tokens, *how), queries, strict=True)
        return {name: a @ b.T for name, (a, b) in zip(self.outputs, found, strict=True)}


def projected_gradients(
    lm: LM,
    examples: Sequence[Encoded],
    sizes: Sequence[int],
    seed: int = 0,
    layers: str = "",
    loss_on: str = "completion",
) -> list[np.ndarray]:
    """Return the examples' projected gradients for each size k: float32 [N, `width`] each.

    Inner products of the rows of two such matrices (of one size and seed) are unbiased estimates of
    `dot.gradient_dot`, in nats per unit of learning rate; examples are encoded. All
    sizes are made in one pass.
    """
    if min(sizes) < 1:
        raise ValueError(f"size is {min(sizes)}, expected a positive number")
    result = [np.zeros((len(examples), width(lm, size, layers)), np.float32) for size in sizes]
    for batch in gradient.losses.batches(lm, examples):
        groups = gradient.factors.factors(lm, [examples[i] for i in batch], layers, loss_on)
        for rows, size in zip(result, sizes, strict=True):
            rows[batch] = _project(groups, size, seed).cpu().numpy()
    return result


def width(lm: LM, size: int, layers: str = "") -> int:
    """Return how many numbers are kept for one example: about size^2 a layer."""
    shapes = [layer.weight.shape for layer in gradient.linear_layers(lm, layers).values()]
    return sum(min(size, rows) * min(size, columns) for rows, columns in shapes)


def _project(groups: Sequence[Factors], size: int, seed: int) -> torch.Tensor:
    """Project the gradients of n examples: float32 [n, width]."""
    import torch

    blocks = []
    for group in (part.widened() for part in groups):
        x = group.inputs
        for name, g in group.outputs.items():
            p = _signs(f"{seed} out {name}", size, g.shape[-1]).to(g)
            q = _signs(f"{seed} in {name}", size, x.shape[-1]).to(x)
            blocks.append(((g @ p.T).mT @ (x @ q.T)).flatten(1))
    return torch.cat(blocks, 1).float()


def _signs(key: str, size: int, entries: int) -> torch.Tensor:
    """Return a random matrix [size, entries] of +-1/sqrt(size), or the identity if that is smaller.

    Drawn on the CPU, so that it is the same whatever the device and the choice of layers.
    """
    import torch

    if entries <= size:
        return torch.eye(entries)
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    signs = torch.randint(0, 2, (size, entries), generator=generator) * 2.0 - 1
    return signs / size**0.5
