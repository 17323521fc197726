"""Per-example gradients of linear layers, kept as the factors that they are products of.

For one example with T tokens, a linear layer with inputs X [T, d_in] and gradients of the loss by
its outputs G [T, d_out] has the weight gradient W' = G^T X. The inner product of two examples'
gradients needs no W', only the factors (a, b number the tokens of one example and of the other):

    <G1^T X1, G2^T X2> = sum_ab (G1 G2^T)_ab (X1 X2^T)_ab

which costs (d_in + d_out) operations for each pair of tokens, far less than the d_in d_out for each
token that a gradient takes, as long as examples are shorter than a few hundred tokens.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from icprobe import lm as language_model
from icprobe.lm import LM, Encoded

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Factors:
    """Inputs and output gradients of all chosen layers, for the tokens of n examples together.

    Attributes:
        inputs: One [T, d_in] for each group of layers that read the same input.
        outputs: One [T, d_out] for each group: gradients by outputs, side by side.
        example: [T] index of the example that each token belongs to, 0 to n - 1.
        size: n.
    """

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    example: torch.Tensor
    size: int

    @property
    def nbytes(self) -> int:
        """Memory of the factors in bytes."""
        return sum(part.nbytes for part in (*self.inputs, *self.outputs))


def linear_layers(lm: LM, layers: str = "") -> dict[str, nn.Module]:
    """Return the linear layers of the transformer blocks by name: all but the output head.

    Args:
        lm: The model.
        layers: A regular expression that the name must contain, such as "mlp" or "layers.29";
            all by default.

    Raises:
        ValueError: If there is none; lists the module types found.
    """
    head = lm.model.get_output_embeddings()
    modules = dict(lm.model.named_modules())
    found = {
        name: module
        for name, module in modules.items()
        if isinstance(module, LINEAR) and module is not head and re.search(layers, name)
    }
    if not found:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise ValueError(
            f"{lm.identity['name']}: no linear layer matches {layers!r}; module types: "
            f"{', '.join(kinds)}"
        )
    return found


def factors(
    lm: LM,
    examples: Sequence[Encoded],
    layers: str = "",
    loss_on: str = "completion",
    reduction: str = "sum",
) -> Factors:
    """Return the factors of each example's loss gradient, from one forward and backward pass.

    Args:
        lm: The model.
        examples: n encoded examples, padded to the longest of them; padding changes nothing.
        layers: See `linear_layers`.
        loss_on: "completion", or "text" for all tokens but the first.
        reduction: "sum" or "mean" over these tokens, of the negative log-likelihood in nats.

    Raises:
        ValueError: If an option is unknown, or an example has no token to learn from.
        FloatingPointError: If a loss or gradient is not finite; names the examples.
    """
    ids, rows, columns, targets, weights = _batch(lm, examples, loss_on, reduction)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        real[row, : len(lm.bos) + len(example.ids) - 1] = True
    flat = real.flatten().nonzero()[:, 0].to(lm.device)
    captured: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    with _frozen(lm), language_model.selective_head(lm), _capturing(lm, layers, captured):
        logits = language_model.logits_at(lm, rows, columns, input_ids=ids.to(lm.device))
        nats = nn.functional.cross_entropy(logits, targets, reduction="none")
        outputs = [output for _, group in captured for output in group]
        found = iter(torch.autograd.grad((nats * weights).sum(), outputs))

    def tokens(part: torch.Tensor) -> torch.Tensor:
        return part.detach().flatten(0, 1)[flat]

    result = Factors(
        inputs=tuple(tokens(given) for given, _ in captured),
        outputs=tuple(torch.cat([tokens(next(found)) for _ in group], 1) for _, group in captured),
        example=real.nonzero()[:, 0].to(lm.device),
        size=len(examples),
    )
    wrong = {int(rows[k]) for k in (~nats.isfinite()).nonzero()[:, 0].tolist()}
    for part in (*result.inputs, *result.outputs):
        wrong |= set(result.example[~part.isfinite().all(1)].tolist())
    if wrong:
        names = ", ".join(repr(examples[row].id) for row in sorted(wrong))
        raise FloatingPointError(f"loss or gradient is not finite: examples {names}")
    return result


def products(one: Factors, other: Factors) -> torch.Tensor:
    """Return the inner products of all pairs of gradients: float64 [n, m]."""
    total = torch.zeros(
        len(one.example), len(other.example), dtype=one.inputs[0].dtype, device=one.example.device
    )
    for x1, g1, x2, g2 in zip(one.inputs, one.outputs, other.inputs, other.outputs, strict=True):
        total.addcmul_(x1 @ x2.T, g1 @ g2.T)
    return _summed(_summed(total.double(), one).T, other).T


def squared_norms(one: Factors) -> torch.Tensor:
    """Return the squared norm of each example's gradient: float64 [n]."""
    norms = torch.zeros(one.size, dtype=torch.float64, device=one.example.device)
    for row in range(one.size):
        chosen = one.example == row
        for x, g in zip(one.inputs, one.outputs, strict=True):
            x, g = x[chosen], g[chosen]
            norms[row] += ((x @ x.T) * (g @ g.T)).sum(dtype=torch.float64)
    return norms


def joined(parts: Sequence[Factors]) -> Factors:
    """Return the factors of several batches of examples as those of one, in order."""
    starts = [sum(part.size for part in parts[:k]) for k in range(len(parts))]
    return Factors(
        inputs=tuple(torch.cat(same) for same in zip(*(p.inputs for p in parts), strict=True)),
        outputs=tuple(torch.cat(same) for same in zip(*(p.outputs for p in parts), strict=True)),
        example=torch.cat([p.example + s for p, s in zip(parts, starts, strict=True)]),
        size=sum(part.size for part in parts),
    )


def _summed(values: torch.Tensor, of: Factors) -> torch.Tensor:
    """Sum rows [T, ...] that belong to the same example: [n, ...]."""
    result = torch.zeros(of.size, *values.shape[1:], dtype=values.dtype, device=values.device)
    return result.index_add_(0, of.example, values)


def _batch(lm, examples, loss_on, reduction):
    """Return inputs [n, T], and row, column, target and weight of each token of the loss."""
    if loss_on not in ("completion", "text"):
        raise ValueError(f"loss_on is {loss_on!r}, expected 'completion' or 'text'")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}, expected 'sum' or 'mean'")
    sequences = [language_model.sequence(lm, example) for example in examples]
    ids = torch.zeros(len(examples), max(len(ids) for ids, _ in sequences) - 1, dtype=torch.long)
    entries = []
    for row, (tokens, mask) in enumerate(sequences):
        ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        learnt = [k for k in range(1, len(tokens)) if mask[k] or loss_on == "text"]
        if not learnt or not any(mask):
            raise ValueError(f"example {examples[row].id!r}: no completion token is left to learn")
        weight = 1.0 if reduction == "sum" else 1 / len(learnt)
        entries += [(row, k - 1, tokens[k], weight) for k in learnt]
    rows, columns, targets, weights = zip(*entries, strict=True)
    targets, weights = (
        torch.tensor(targets, device=lm.device),
        torch.tensor(weights, device=lm.device, dtype=torch.float64),
    )
    return ids, torch.tensor(rows), torch.tensor(columns), targets, weights


@contextmanager
def _frozen(lm) -> Iterator[None]:
    """Let gradients flow to activations only: no weight gradient is computed or kept."""
    parameters = [p for p in lm.model.parameters() if p.requires_grad]

    def start(_, __, output):
        return output.requires_grad_()

    hook = lm.model.get_input_embeddings().register_forward_hook(start)
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _capturing(lm, layers, captured) -> Iterator[None]:
    """Append (input, [outputs]) of the chosen layers; layers that read one input share an entry."""

    def keep(_, inputs, output):
        if captured and captured[-1][0] is inputs[0]:
            captured[-1][1].append(output)
        else:
            captured.append((inputs[0], [output]))

    hooks = [m.register_forward_hook(keep) for m in linear_layers(lm, layers).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
