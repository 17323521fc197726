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

from icprobe import gradients
from icprobe import lm as language_model
from icprobe.experiment import Experiment
from icprobe.lm import LM

METHOD = "clamped_log"
UNITS = "no unit; positive = helps"

# training examples in one part of a store
BLOCK_SIZE = 12

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
    raised, and a bias counts as much as a matrix. Use `influence.gradient_dot` for attribution.

    It needs every entry of every gradient: one backward pass a query, and one a training example
    for each `memory` of queries; N M P operations for P parameters.

    Args:
        lm: The model.
        train: N rows with id, prompt, completion (or encoded already).
        queries: M rows like them; their loss is on the completion.
        layers: See `gradients.linear_layers`.
        loss_on: Of the training examples, "text" (as published) or "completion"; losses are summed
            over tokens.
        max_length: See `lm.encode`.
        memory: GiB of query gradients held at once.

    Raises:
        ValueError: If no layer matches, or an example has no completion tokens.
        FloatingPointError: If a product is not finite; names the pair.
    """
    train, queries = (language_model.encode(lm, rows, max_length) for rows in (train, queries))
    tensors = [
        tensor
        for layer in gradients.linear_layers(lm, layers).values()
        for tensor in (layer.weight, layer.bias if hasattr(layer, "bias") else None)
        if tensor is not None
    ]

    def clamped(example, loss_on):
        found = gradients.whole(lm, example, tensors, loss_on)
        return [(g.sign() * g.abs().clamp(LOW, HIGH)).flatten() for g in found]

    size = sum(tensor.nbytes for tensor in tensors)
    at_once = max(1, int(memory * 2**30 // size))
    scores = np.zeros((len(train), len(queries)))
    for start in range(0, len(queries), at_once):
        held = [clamped(query, "completion") for query in queries[start : start + at_once]]
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


def measure(
    experiment: Experiment, lm: LM, layers: str = "", loss_on: str = "text", fresh: bool = False
) -> np.ndarray:
    """Estimate all pairs of the experiment through its store: float32 [N, M].

    Args:
        experiment: What is scored (`Experiment.part`, this is slow) and where the scores lie.
        lm: The experiment's model.
        layers: And errors: see `clamped_log`.
        loss_on: See `clamped_log`.
        fresh: Compute everything anew.
    """
    pool, queries = experiment.encode(lm)
    ids = ([row.id for row in rows] for rows in (pool, queries))
    settings = {"fresh": fresh, "block_size": BLOCK_SIZE, "description": UNITS}
    kept = experiment.store(METHOD, *ids, _options(layers, loss_on), **settings)
    return kept.fill(
        lambda rows: clamped_log(lm, pool[rows.start : rows.stop], queries, layers, loss_on)
    )


def find(
    experiment: Experiment, made_by: str, layers: str = "", loss_on: str = "text"
) -> np.ndarray:
    """Return finished scores [N, M]; needs neither the model nor the data.

    Raises:
        store.ScoresNotFound: If they are not there; says to run `made_by`.
    """
    return experiment.find(METHOD, _options(layers, loss_on), made_by).matrix()


def _options(layers: str, loss_on: str) -> dict:
    """Return what determines the scores beside the experiment."""
    return {"layers": layers, "loss_on": loss_on}
