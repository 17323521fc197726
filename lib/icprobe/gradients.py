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
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from icprobe import lm as language_model
from icprobe.lm import LM, Encoded, Result

LINEAR = (nn.Linear, Conv1D)

# what the loss of a training example is taken over
LOSSES = ("completion", "text")

# a block's number in the name of a layer, such as model.layers.3.mlp.up_proj
BLOCK = re.compile(r"\.(\d+)\.")

# tokens in one forward and backward pass, padding included; more would only cost memory
TOKENS_PER_PASS = {"cpu": 384, "cuda": 4096}

PASSES = "gradients"  # what passes are for, see `lm.within_memory`

# examples are padded to a multiple of so many tokens: a GPU multiplies matrices of other sizes at a
# fraction of its rate
MULTIPLE = {"cpu": 1, "cuda": 8}

# entries of weight gradients that are made at once: on a CPU, what its cache holds
WEIGHT_ENTRIES = {"cpu": 2**23, "cuda": 2**28}

# share of the blocks' weights in no linear layer above which there is a warning
LEFT_OUT = 0.01

# time of an operation over weights, in that of one over tokens (measured on a CPU; on an H200, 2)
OVER_WEIGHTS = 1.5
OVER_WEIGHTS_SHORT = 9  # the same of short floats on a GPU (measured on an H200 in bfloat16)


@dataclass(frozen=True)
class Factors:
    """Inputs and output gradients of layers that read one input, for n examples padded to T tokens.

    In the model's dtype: wider ones would hold nothing more. Output gradients of padding are zero,
    so it adds nothing to any product.

    Attributes:
        inputs: [n, T, d_in].
        outputs: Gradients of the loss by the layers' outputs, [n, T, d_out] by layer name.
    """

    inputs: torch.Tensor
    outputs: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.inputs.shape[:2].numel()

    @property
    def nbytes(self) -> int:
        """Memory of the factors in bytes."""
        return sum(part.nbytes for part in (self.inputs, *self.outputs.values()))

    def widened(self) -> "Factors":
        """Return them in float32 or better, in which sums are to be taken."""
        dtype = torch.promote_types(self.inputs.dtype, torch.float32)
        outputs = {name: part.to(dtype) for name, part in self.outputs.items()}
        return Factors(self.inputs.to(dtype), outputs)

    def multipliable(self) -> "Factors":
        """Return them as `_matmul` takes them: short floats only where a GPU multiplies those."""
        return self if self.inputs.is_cuda else self.widened()


def linear_layers(lm: LM, layers: str = "") -> dict[str, nn.Module]:
    """Return the linear layers of the transformer blocks by name: all but the output head.

    Args:
        lm: The model.
        layers: A regular expression that the name must contain, such as "mlp" or "layers.29";
            all by default.

    Raises:
        ValueError: If there is none (lists the module types found), or two share their weight.

    Warns:
        UserWarning: If by default much of the blocks' weights is in no linear layer, as in mixtures
            of experts.
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
    owners: dict[nn.Parameter, str] = {}
    for name, module in found.items():
        if module.weight in owners:
            raise ValueError(f"layers {owners[module.weight]} and {name} share their weight")
        owners[module.weight] = name
    if not layers:
        in_blocks = [p for name, p in lm.model.named_parameters() if BLOCK.search(name)]
        matrices = [p for p in in_blocks if p.ndim > 1]
        out = sum(p.numel() for p in matrices if p not in owners)
        if out > LEFT_OUT * sum(p.numel() for p in matrices):
            warnings.warn(
                f"{lm.identity['name']}: {out / sum(p.numel() for p in matrices):.0%} of the "
                "blocks' weights are in no linear layer; gradients leave them out",
                stacklevel=2,
            )
    return found


def last_blocks(lm: LM, count: int, layers: str = "") -> str:
    """Return the regular expression that chooses the last transformer blocks among `layers`.

    Raises:
        ValueError: If there are not so many blocks.
    """
    chosen = linear_layers(lm, layers)
    numbers = {int(number) for name in chosen for number in BLOCK.findall(name)}
    if not 1 <= count <= len(numbers):
        raise ValueError(f"last {count} blocks: the model has {len(numbers)}")
    last = rf"\.({'|'.join(map(str, sorted(numbers)[-count:]))})\."
    return f"^(?=.*(?:{layers})).*{last}" if layers else last


def parts(lm: LM, layers: str = "", bands: int = 6) -> dict[str, str]:
    """Return the kinds of layers and bands of blocks: by name, the regular expression for each.

    Both cut the layers into parts whose dot products add up to the whole.

    Args:
        lm: The model.
        layers: See `linear_layers`.
        bands: Into how many runs of neighbouring blocks to cut them.
    """
    names = list(linear_layers(lm, layers))
    kinds = sorted({BLOCK.split(name)[-1] for name in names})
    numbers = sorted({int(number) for name in names for number in BLOCK.findall(name)})
    by_name = {kind: rf"\.\d+\.{re.escape(kind)}$" for kind in kinds}
    for band in np.array_split(numbers, min(bands, len(numbers))):
        by_name[f"blocks {band[0]:02}-{band[-1]:02}"] = rf"\.({'|'.join(map(str, band))})\."
    return by_name


def batches(lm: LM, examples: Sequence[Encoded]) -> Iterator[list[int]]:
    """Cut examples into batches of like length, so that little is padded: lists of indices.

    Raises:
        ValueError: If there are no examples.
    """
    if not examples:
        raise ValueError("there are no examples")
    budget = tokens_per_pass(lm)
    batch: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i].ids)):
        if batch and tokens(lm, examples, [*batch, i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def tokens_per_pass(lm: LM) -> int:
    """Return the most tokens of one forward and backward pass on the model's device."""
    usual = language_model.by_device(TOKENS_PER_PASS, lm.device)
    return language_model.fitting(lm, PASSES, usual)


def within_memory(lm: LM, work: Callable[[], Result]) -> Result:
    """Return `work()`; where a GPU's memory is too small, called again with smaller `batches`."""
    return language_model.within_memory(lm, PASSES, tokens_per_pass(lm), lambda _: work())


def tokens(lm: LM, examples: Sequence[Encoded], batch: list[int]) -> int:
    """Return the tokens of a batch, padding included."""
    return len(batch) * _padded(lm, max(len(lm.bos) + len(examples[i].ids) - 1 for i in batch))


def _padded(lm: LM, length: int) -> int:
    """Return the length to which a batch is padded whose longest example has `length` tokens."""
    multiple = language_model.by_device(MULTIPLE, lm.device)
    padded = -(-length // multiple) * multiple
    return max(length, min(padded, lm.max_positions or padded))


def factors(
    lm: LM,
    examples: Sequence[Encoded],
    layers: str = "",
    loss_on: str = "completion",
) -> list[Factors]:
    """Return the factors of each example's loss gradient, from one forward and backward pass.

    One entry for each group of layers that read the same input, such as queries, keys and values.

    Args:
        lm: The model.
        examples: n encoded examples, padded to the longest of them; padding changes nothing.
        layers: See `linear_layers`.
        loss_on: Tokens whose negative log-likelihoods in nats are added up: "completion", or
            "text" for all but the first.

    Raises:
        ValueError: If an option is unknown, an example has no token to learn from or is too long,
            or the model does not run each chosen layer once.
        FloatingPointError: If a loss or gradient is not finite; names the examples.
    """
    ids, rows, columns, targets, weights = loss_inputs(lm, examples, loss_on)
    captured: list[_Call] = []
    with _frozen(lm), language_model.selective_head(lm), _capturing(lm, layers, captured):
        logits = language_model.logits_at(lm, rows, columns, input_ids=ids.to(lm.device))
        nats = nn.functional.cross_entropy(logits, targets, reduction="none")
        _check_calls(captured, linear_layers(lm, layers))
        edges = [edge for call in captured for edge in call.outputs.values()]
        found = iter(torch.autograd.grad((nats * weights).sum(), edges))

    def by_token(part: torch.Tensor) -> torch.Tensor:
        # some layers (OPT's) see the tokens of all examples in one row
        return part.detach().reshape(*ids.shape, part.shape[-1])

    result = [
        Factors(by_token(call.inputs), {name: by_token(next(found)) for name in call.outputs})
        for call in captured
    ]
    wrong = {int(rows[k]) for k in (~nats.isfinite()).nonzero()[:, 0].tolist()}
    for group in result:
        for part in (group.inputs, *group.outputs.values()):
            finite = part.abs().amax((1, 2)).isfinite()  # the largest is only if all are
            wrong |= set((~finite).nonzero()[:, 0].tolist())
    if wrong:
        names = ", ".join(repr(examples[row].id) for row in sorted(wrong))
        raise FloatingPointError(f"loss or gradient is not finite: examples {names}")
    return result


def loss(
    lm: LM, example: Encoded, loss_on: str = "completion", reduction: str = "sum"
) -> torch.Tensor:
    """Return one example's loss in nats, a scalar with its graph: a "sum" or "mean" over tokens."""
    ids, rows, columns, targets, weights = loss_inputs(lm, [example], loss_on, reduction)
    with torch.enable_grad(), language_model.selective_head(lm):
        logits = language_model.logits_at(lm, rows, columns, input_ids=ids.to(lm.device))
        nats = nn.functional.cross_entropy(logits, targets, reduction="none")
        return (nats * weights).sum()


def whole(
    lm: LM,
    example: Encoded,
    parameters: Sequence[nn.Parameter],
    loss_on: str = "completion",
) -> list[torch.Tensor]:
    """Return the gradient of one example's loss by each of the parameters, as autograd does.

    As large as the parameters themselves: for checks and for estimators that need every entry.
    """
    return list(torch.autograd.grad(loss(lm, example, loss_on), list(parameters)))


def products(one: Sequence[Factors], other: Sequence[Factors]) -> dict[str, torch.Tensor]:
    """Return the inner products of all pairs of gradients, by layer: float64 [n, m] each.

    Args:
        one: Factors of n examples for one group of layers, in any number of batches.
        other: Factors of m examples for the same layers.
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
    """Return a @ b in float32 or better, of matrices or batches of them.

    The product of two short floats is a float32 without rounding, and their sums are in float32;
    PyTorch has that on GPUs only.
    """
    if not _short(a):
        return torch.matmul(a, b, out=out)
    multiply = torch.bmm if a.ndim == 3 else torch.mm
    return multiply(a, b, out_dtype=torch.float32, **({} if out is None else {"out": out}))


def _over_tokens(one, other) -> dict[str, torch.Tensor]:
    """Products [n, m] over pairs of tokens."""
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
    """Products [n, m] over weight gradients, which are made some output rows at a time."""
    both = [*one, *other]
    sizes = [len(part) for part in both]
    n, d_in = sum(len(part) for part in one), one[0].inputs.shape[-1]
    device = one[0].inputs.device
    dtype = torch.promote_types(one[0].inputs.dtype, torch.float32)
    entries = language_model.by_device(WEIGHT_ENTRIES, device)
    at_once = max(1, entries // (sum(sizes) * d_in))
    pieces = [
        (name, slice(start, min(start + at_once, output.shape[-1])))
        for name, output in one[0].outputs.items()
        for start in range(0, output.shape[-1], at_once)
    ]
    workers = torch.get_num_threads()
    found = {}

    def work(mine: list[int]) -> None:
        # memory that is used again and again stays in the processor's cache
        memory = torch.empty(sum(sizes) * at_once * d_in, dtype=dtype, device=device)
        for k in mine:
            name, rows = pieces[k]
            shape = sum(sizes), rows.stop - rows.start, d_in
            weights = memory[: math.prod(shape)].view(shape)
            for part, into in zip(both, weights.split(sizes), strict=True):
                _matmul(part.outputs[name][..., rows].mT, part.inputs, out=into)
            weights = weights.flatten(1)
            found[k] = (weights[:n] @ weights[n:].T).double()

    shares = [list(range(len(pieces)))[w::workers] for w in range(workers)]
    language_model.side_by_side(work, [s for s in shares if s], device)
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


def loss_inputs(
    lm: LM, examples: Sequence[Encoded], loss_on: str, reduction: str = "sum"
) -> tuple[torch.Tensor, ...]:
    """Return ids [n, T], and row, column, target id and weight [S] of each token of the loss.

    Raises:
        ValueError: If an option is unknown, the model is in training mode (dropout would make the
            numbers random) or inference mode is on, or an example has no prompt or completion or is
            too long for the model.
    """
    if loss_on not in LOSSES:
        raise ValueError(f"loss_on is {loss_on!r}, expected 'completion' or 'text'")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}, expected 'sum' or 'mean'")
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients cannot be taken inside torch.inference_mode()")
    if lm.model.training:
        raise ValueError(f"{lm.identity['name']} is in training mode: call lm.model.eval() first")
    sequences = [language_model.sequence(lm, example) for example in examples]
    longest = max(len(ids) for ids, _ in sequences) - 1
    ids = torch.zeros(len(examples), _padded(lm, longest), dtype=torch.long)
    entries = []
    for row, (tokens, mask) in enumerate(sequences):
        if lm.max_positions and len(tokens) > lm.max_positions:
            raise ValueError(
                f"example {examples[row].id!r} has {len(tokens)} tokens, the model reads "
                f"{lm.max_positions}: lower max_length"
            )
        if mask[0]:
            raise ValueError(f"example {examples[row].id!r}: the prompt has no tokens")
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


@dataclass
class _Call:
    """Layers that were given the same tensor: that tensor, and their outputs' place in the graph.

    An output may be changed in place afterwards, so not the tensor is kept but the edge behind it.
    """

    inputs: torch.Tensor
    version: int
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
def _capturing(lm, layers, calls) -> Iterator[None]:
    """Append a call for each layer; layers that read one tensor one after another share theirs."""

    def keep(name, inputs, output):
        x = inputs[0]
        if not calls or calls[-1].inputs is not x or name in calls[-1].outputs:
            calls.append(_Call(x, x._version, {}))
        calls[-1].outputs[name] = torch.autograd.graph.get_gradient_edge(output)

    hooks = [
        module.register_forward_hook(lambda _, *rest, name=name: keep(name, *rest))
        for name, module in linear_layers(lm, layers).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
