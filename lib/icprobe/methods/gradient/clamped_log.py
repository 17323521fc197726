"""The influence estimator that the authors' code computes, for comparison with the plain product.

From their gradient_similarity.py as of October 2024: entries of both gradients are clamped to a
magnitude between 1e-4 and 1 (zeros stay), and each weight or bias tensor t of the blocks' linear
layers then adds sign(s) log |s| of its own product s,

    clamped_log_ij = sum_t sign(s_t) log |s_t|
    s_t = < clamp(grad_t L(z_i)), clamp(grad_t L(q_j)) >

It is no derivative of any loss: a product below 1 in magnitude changes its sign under the
logarithm, and a bias counts as much as a matrix. Use `dot.gradient_dot` for attribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from icprobe.methods import gradient
from icprobe.scores.method import Examples, Method

if TYPE_CHECKING:
    from icprobe.models import LM

LOW, HIGH = 1e-4, 1.0

MEMORY = 4.0  # GiB of whole query gradients held at once (0.4 a query for SmolLM2-135M)


@dataclass(frozen=True)
class ClampedLog(Method):
    """The published clamp-and-log estimator: one backward pass a query, and one a training example.

    Slow: N M P operations for P parameters. For `layers` and `loss_on` see `dot.gradient_dot`; the
    published loss of training examples is on the "text".
    """

    name = "clamped_log"
    unit = "no unit; positive = helps"
    notebook = "02"
    block_size = 12
    local_only = True

    layers: str = ""
    loss_on: str = "text"

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the estimates [n, M], without unit."""
        import torch

        lm, queries = prepared
        layers = gradient.linear_layers(lm, self.layers).values()
        tensors = [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]

        def clamped(example, loss_on):
            found = gradient.losses.full_gradient(lm, example, tensors, loss_on)
            return [(g.sign() * g.abs().clamp(LOW, HIGH)).flatten() for g in found]

        size = sum(tensor.nbytes for tensor in tensors)
        together = max(1, int(MEMORY * 2**30 // size))
        scores = np.zeros((len(train), len(queries)))
        for start in range(0, len(queries), together):
            asked = queries.tokens[start : start + together]
            held = [clamped(query, "completion") for query in asked]
            for i, example in enumerate(train.tokens):
                mine = clamped(example, self.loss_on)
                for j, theirs in enumerate(held, start):
                    s = torch.stack([a @ b for a, b in zip(mine, theirs, strict=True)]).double()
                    # a product of exactly zero adds nothing
                    scores[i, j] = float((s.sign() * s.abs().log())[s != 0].sum())
        return scores.astype(np.float32)
