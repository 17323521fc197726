"""Losses whose gradients are taken: of batches of examples, padded, within the device's memory."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from icprobe import models
from icprobe.methods.gradient.layers import linear_layers
from icprobe.models import LM, Encoded, Result

# what the loss of a training example is taken over
LOSSES = ("completion", "text")

# tokens in one forward and backward pass, padding included; more would only cost memory
TOKENS_PER_PASS = {"cpu": 384, "cuda": 4096}

PASSES = "gradients"  # what passes are for, see `models.within_memory`

# examples are padded to a multiple of so many tokens: a GPU multiplies matrices of other sizes at a
# fraction of its rate
MULTIPLE = {"cpu": 1, "cuda": 8}


def loss_inputs(lm: LM, examples: Sequence[Encoded], loss_on: str) -> tuple[torch.Tensor, ...]:
    """Return ids [n, T], and row, column and target id [S] of each token of the loss.

    Raises ValueError for an example that cannot be learnt: without prompt or completion, or too
    long; for an unknown `loss_on`; and in training mode (dropout makes random numbers) or inference
    mode.
    """
    if loss_on not in LOSSES:
        raise ValueError(f"loss_on is {loss_on!r}, expected 'completion' or 'text'")
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients cannot be taken inside torch.inference_mode()")
    if lm.model.training:
        raise ValueError(f"{lm.identity['name']} is in training mode: call lm.model.eval() first")
    sequences = [models.sequence(lm, example) for example in examples]
    longest = max(len(ids) for ids, _ in sequences) - 1
    ids = torch.zeros(len(examples), _padded(lm, longest), dtype=torch.long)
    entries = []
    for row, (tokens, mask) in enumerate(sequences):
        name = f"example {examples[row].id!r}"
        if lm.max_positions and len(tokens) > lm.max_positions:
            raise ValueError(
                f"{name} has {len(tokens)} tokens, the model reads {lm.max_positions}: "
                "lower max_length"
            )
        if mask[0]:
            raise ValueError(f"{name}: the prompt has no tokens")
        if not any(mask):
            raise ValueError(f"{name}: no completion token is left to learn")
        ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        learnt = [k for k in range(1, len(tokens)) if mask[k] or loss_on == "text"]
        entries += [(row, k - 1, tokens[k]) for k in learnt]
    rows, columns, targets = torch.tensor(entries).T
    return ids, rows, columns, targets.to(lm.device)


def logits_of(lm: LM, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the logits [S, V] at the positions that `loss_inputs` chose."""
    with models.selective_head(lm):
        return models.logits_at(lm, rows, columns, input_ids=ids.to(lm.device))


def token_losses(lm: LM, example: Encoded, loss_on: str = "completion") -> torch.Tensor:
    """Return one example's negative log-likelihoods by token, in nats: float64 [S], with graph."""
    *places, targets = loss_inputs(lm, [example], loss_on)
    with torch.enable_grad():
        logits = logits_of(lm, *places)
        return nn.functional.cross_entropy(logits, targets, reduction="none").double()


def full_gradient(
    lm: LM,
    example: Encoded,
    parameters: Sequence[nn.Parameter],
    loss_on: str = "completion",
) -> list[torch.Tensor]:
    """Return the gradient of one example's loss by each of the parameters, as large as they are."""
    loss = token_losses(lm, example, loss_on).sum()
    return list(torch.autograd.grad(loss, list(parameters)))


def finite_difference(
    lm: LM,
    train: Sequence[Encoded],
    queries: Sequence[Encoded],
    layers: str = "",
    loss_on: str = "completion",
    step: float = 0.003,
) -> np.ndarray:
    """Return `dot.gradient_dot` measured by actual steps: float32 [N, M], for checks.

    For each training example, the weights go a distance `step` (in their own unit) downhill and
    uphill along its gradient, and back; half the difference of the queries' log-likelihoods over
    the learning rate is the product, but for terms of third order and rounding.
    """
    weights = [module.weight for module in linear_layers(lm, layers).values()]
    before = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def move(rate: float, gradient: list[torch.Tensor]) -> None:
        for weight, start, part in zip(weights, before, gradient, strict=True):
            weight.copy_(start - rate * part)

    def after_step(rate: float, gradient: list[torch.Tensor]) -> np.ndarray:
        move(rate, gradient)
        return np.array([models.token_log_likelihoods(lm, q).sum() for q in queries])

    measured = []
    for example in train:
        gradient = full_gradient(lm, example, weights, loss_on)
        rate = step / math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
        try:
            downhill, uphill = after_step(rate, gradient), after_step(-rate, gradient)
        finally:
            move(0, gradient)
        measured.append((downhill - uphill) / (2 * rate))
    return np.array(measured, dtype=np.float32)


def by_length(examples: Sequence[Encoded]) -> list[int]:
    """Return the examples' numbers, the shortest first, so that little is padded."""
    return sorted(range(len(examples)), key=lambda i: len(examples[i].ids))


def batches(lm: LM, examples: Sequence[Encoded]) -> Iterator[list[int]]:
    """Cut examples into batches of like length, for one pass each: lists of indices.

    Raises ValueError if there are none.
    """
    if not examples:
        raise ValueError("there are no examples")
    budget = tokens_per_pass(lm)
    batch: list[int] = []
    for i in by_length(examples):
        if batch and tokens(lm, examples, [*batch, i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def tokens_per_pass(lm: LM) -> int:
    """Return the most tokens of one forward and backward pass on the model's device."""
    usual = models.by_device(TOKENS_PER_PASS, lm.device)
    return models.fitting(lm, PASSES, usual)


def within_memory(lm: LM, work: Callable[[], Result]) -> Result:
    """Return `work()`; where a GPU's memory is too small, called again with smaller `batches`."""
    return models.within_memory(lm, PASSES, tokens_per_pass(lm), lambda _: work())


def tokens(lm: LM, examples: Sequence[Encoded], batch: list[int]) -> int:
    """Return the tokens of a batch, padding included."""
    return len(batch) * _padded(lm, max(len(lm.bos) + len(examples[i].ids) - 1 for i in batch))


def _padded(lm: LM, length: int) -> int:
    """Return the length to which a batch is padded whose longest example has `length` tokens."""
    multiple = models.by_device(MULTIPLE, lm.device)
    padded = -(-length // multiple) * multiple
    return max(length, min(padded, lm.max_positions or padded))
