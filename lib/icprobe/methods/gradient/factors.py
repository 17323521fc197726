"""Per-example gradients of linear layers, kept as the factors that they are products of.

For one example with T tokens, a linear layer with inputs X [T, d_in] and gradients of the loss by
its outputs G [T, d_out] has the weight gradient W' = G^T X. The inner product of two examples'
gradients can be taken over the weights or, without ever making W', over pairs of tokens (a of the
one example, b of the other):

    <G1^T X1, G2^T X2> = sum_ab (G1 G2^T)_ab (X1 X2^T)_ab

The first costs d_in d_out operations a pair of examples, beside d_in d_out a token to make the W';
the second d_in + d_out a pair of tokens. Short examples take the second, long ones the first.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from icprobe import models
from icprobe.methods.gradient.layers import linear_layers
from icprobe.methods.gradient.losses import batches, logits_of, loss_inputs
from icprobe.models import LM, Encoded

# entries of weight gradients made at once: on a CPU, what its cache holds
WEIGHT_ENTRIES = {"cpu": 2**23, "cuda": 2**28}

# cost of an operation over weights relative to one over tokens (measured on a CPU; on an H200, 2)
OVER_WEIGHTS = 1.5
OVER_WEIGHTS_SHORT = 9  # the same of short floats on a GPU (measured on an H200 in bfloat16)


@dataclass(frozen=True)
class Factors:
    """Inputs and output gradients of layers that read one input, for n examples padded to T tokens.

    In the model's dtype: wider ones would hold nothing more. Output gradients of padding are zero,
    so it adds nothing to any product.
    """

    inputs: torch.Tensor  # [n, T, d_in]
    outputs: dict[str, torch.Tensor]  # gradients by the outputs, [n, T, d_out] by layer name

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """The tokens, padding included."""
        return self.inputs.shape[:2].numel()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Inputs and output gradients in one list."""
        return [self.inputs, *self.outputs.values()]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(part.nbytes for part in self.tensors)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Factors":
        """Return the factors with each tensor changed."""
        inputs = change(self.inputs)
        return Factors(inputs, {name: change(part) for name, part in self.outputs.items()})

    def widened(self) -> "Factors":
        """Return them in float32 or better, in which sums are to be taken."""
        dtype = torch.promote_types(self.inputs.dtype, torch.float32)
        return self.map(lambda part: part.to(dtype))

    def multipliable(self) -> "Factors":
        """Return them as `_matmul` takes them: short floats only where a GPU multiplies those."""
        return self if self.inputs.is_cuda else self.widened()


def factors(
    lm: LM, examples: Sequence[Encoded], layers: str = "", loss_on: str = "completion"
) -> list[Factors]:
    """Return the factors of each example's loss gradient, from one forward and backward pass.

    One entry for each group of layers that read the same input, such as queries, keys and values.
    Examples are padded to the longest; that changes nothing. Arguments and errors are those of
    `dot.gradient_dot`; and ValueError if the model does not run each chosen layer once.
    """
    ids, rows, columns, targets = loss_inputs(lm, examples, loss_on)
    chosen = linear_layers(lm, layers)
    with _frozen(lm), _capturing(chosen) as captured:
        logits = logits_of(lm, ids, rows, columns)
        nats = nn.functional.cross_entropy(logits, targets, reduction="none")
        _check_calls(captured, chosen)
        edges = [edge for call in captured for edge in call.outputs.values()]
        found = iter(torch.autograd.grad(nats.double().sum(), edges))

    def by_token(part: torch.Tensor) -> torch.Tensor:
        # some layers (OPT's) see the tokens of all examples in one row
        return part.detach().reshape(*ids.shape, part.shape[-1])

    result = [
        Factors(by_token(call.inputs), {name: by_token(next(found)) for name in call.outputs})
        for call in captured
    ]
    finite = torch.ones(len(examples), dtype=torch.bool)
    finite[rows[~nats.isfinite().cpu()]] = False
    for part in (part for group in result for part in group.tensors):
        finite &= part.abs().amax((1, 2)).isfinite().cpu()  # the largest is only if all are
    if not finite.all():
        wrong = [repr(one.id) for one, good in zip(examples, finite, strict=True) if not good]
        raise FloatingPointError(f"loss or gradient is not finite: examples {', '.join(wrong)}")
    return result


def products(one: Sequence[Factors], other: Sequence[Factors]) -> dict[str, torch.Tensor]:
    """Return the inner products of all pairs of gradients, by layer: float64 [n, m] each.

    Each side has its examples' factors for one group of layers, in any number of batches.
    """
    one, other = ([part.multipliable() for part in side] for side in (one, other))
    n, m = (sum(len(part) for part in side) for side in (one, other))
    tokens, other_tokens = (sum(part.tokens for part in side) for side in (one, other))
    d_in, d_out = one[0].inputs.shape[-1], sum(g.shape[-1] for g in one[0].outputs.values())
    over_tokens = tokens * other_tokens * (d_in + d_out)
    over_weights = (tokens + other_tokens + n * m) * d_in * d_out
    over_weights *= OVER_WEIGHTS_SHORT if _short(one[0].inputs) else OVER_WEIGHTS
    return (_over_tokens if over_tokens < over_weights else _over_weights)(one, other)


def _short(part: torch.Tensor) -> bool:
    return part.dtype.itemsize == 2


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a @ b in float32 or better, of matrices or batches of them; of short floats on GPUs.

    The product of two short floats is a float32 without rounding, and their sums are in float32.
    """
    if not _short(a):
        return torch.matmul(a, b, out=out)
    multiply = torch.bmm if a.ndim == 3 else torch.mm
    return multiply(a, b, out_dtype=torch.float32, **({} if out is None else {"out": out}))


def _over_tokens(one, other) -> dict[str, torch.Tensor]:
    rows: dict[str, list] = {name: [] for name in one[0].outputs}
    for a in one:
        columns: dict[str, list] = {name: [] for name in rows}
        for b in other:
            x = _matmul(a.inputs.flatten(0, 1), b.inputs.flatten(0, 1).T)
            for name, part in columns.items():
                g = _matmul(a.outputs[name].flatten(0, 1), b.outputs[name].flatten(0, 1).T)
                pairs = g.mul_(x).view(len(a), -1, len(b), x.shape[1] // len(b))
                if pairs.is_cuda:  # to sum in float64, it would first copy them all to that
                    pairs = pairs.sum(1, keepdim=True)
                part.append(pairs.sum((1, 3), dtype=torch.float64))
        for name, part in columns.items():
            rows[name].append(torch.cat(part, 1))
    return {name: torch.cat(part) for name, part in rows.items()}


def _over_weights(one, other) -> dict[str, torch.Tensor]:
    """Make the weight gradients some output rows at a time."""
    both = [*one, *other]
    sizes = [len(part) for part in both]
    n, d_in = sum(len(part) for part in one), one[0].inputs.shape[-1]
    device = one[0].inputs.device
    dtype = torch.promote_types(one[0].inputs.dtype, torch.float32)
    entries = models.by_device(WEIGHT_ENTRIES, device)
    rows_at_once = max(1, entries // (sum(sizes) * d_in))
    pieces = [
        (name, slice(start, min(start + rows_at_once, output.shape[-1])))
        for name, output in one[0].outputs.items()
        for start in range(0, output.shape[-1], rows_at_once)
    ]
    workers = torch.get_num_threads()
    found = {}

    def work(mine: list[int]) -> None:
        # memory that is used again and again stays in the processor's cache
        memory = torch.empty(sum(sizes) * rows_at_once * d_in, dtype=dtype, device=device)
        for k in mine:
            name, rows = pieces[k]
            shape = sum(sizes), rows.stop - rows.start, d_in
            weights = memory[: math.prod(shape)].view(shape)
            for part, into in zip(both, weights.split(sizes), strict=True):
                _matmul(part.outputs[name][..., rows].mT, part.inputs, out=into)
            weights = weights.flatten(1)
            found[k] = (weights[:n] @ weights[n:].T).double()

    shares = [list(range(len(pieces)))[w::workers] for w in range(workers)]
    models.side_by_side(work, [s for s in shares if s], device)
    result = {}
    for k, (name, _) in enumerate(pieces):
        result[name] = result[name] + found[k] if name in result else found[k]
    return result


def squared_norms(groups: Sequence[Factors]) -> dict[str, torch.Tensor]:
    """Return the squared norm of each example's gradient, by layer: float64 [n] each."""
    squares = {}
    for group in (part.multipliable() for part in groups):
        x = _matmul(group.inputs, group.inputs.mT)
        for name, g in group.outputs.items():
            squares[name] = _matmul(g, g.mT).mul_(x).sum((1, 2), dtype=torch.float64)
    return squares


def norms(groups: Sequence[Factors]) -> np.ndarray:
    """Return the norm of each example's gradient over all layers: float64 [n]."""
    return sum(squared_norms(groups).values()).sqrt().cpu().numpy()


def norm_shares(
    lm: LM, examples: Sequence[Encoded], layers: str = "", loss_on: str = "completion"
) -> dict[str, float]:
    """Return each layer's share of the squared norm of a gradient, averaged over examples."""
    shares: dict[str, float] = dict.fromkeys(linear_layers(lm, layers), 0.0)
    for batch in batches(lm, examples):
        squares = squared_norms(factors(lm, [examples[i] for i in batch], layers, loss_on))
        whole = sum(squares.values())
        for name, part in squares.items():
            shares[name] += float((part / whole).sum()) / len(examples)
    return shares


@dataclass
class _Call:
    """Layers that were given the same tensor, and its version then."""

    inputs: torch.Tensor
    version: int
    # by layer; not the tensors, which may be changed in place afterwards
    outputs: dict[str, torch.autograd.graph.GradientEdge]


def _check_calls(calls: Sequence[_Call], layers: Iterable[str]) -> None:
    """Raise ValueError unless each layer ran once and its inputs are still what it was given."""
    counts = Counter(name for call in calls for name in call.outputs)
    for name in layers:
        if counts[name] != 1:
            raise ValueError(
                f"layer {name} ran {counts[name]} times in a forward pass, its gradient is known "
                "for one: leave it out with `layers`"
            )
    for call in calls:
        if call.inputs._version != call.version:
            raise ValueError(f"the inputs of layers {list(call.outputs)} were changed in place")


@contextmanager
def _frozen(lm: LM) -> Iterator[None]:
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
def _capturing(layers: dict[str, nn.Module]) -> Iterator[list[_Call]]:
    """Yield a list that gets a call for each layer, one for all that read a tensor in a row."""
    calls = []

    def keep(name, inputs, output):
        x = inputs[0]
        if not calls or calls[-1].inputs is not x or name in calls[-1].outputs:
            calls.append(_Call(x, x._version, {}))
        calls[-1].outputs[name] = torch.autograd.graph.get_gradient_edge(output)

    hooks = [
        module.register_forward_hook(lambda _, *rest, name=name: keep(name, *rest))
        for name, module in layers.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
