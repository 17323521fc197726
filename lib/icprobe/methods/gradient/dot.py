"""Gradient-based influence: what a training step on one example does to the queries' losses.

Everything is [N, M] for N training examples and M queries, positive = the training example helps: a
small step on it lowers the query's loss. With L the negative log-likelihood of a completion in nats
and the gradients by the weights w of the blocks' linear layers,

    gradient_dot_ij = < grad_w L(z_i), grad_w L(q_j) >

is the first-order decrease of L(q_j) per unit of learning rate in one step of gradient descent on
z_i: TracIn at one checkpoint (Pruthi et al. 2020), which Jiao et al. 2025 compare probing with.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from icprobe import models
from icprobe.methods.gradient import factors, losses
from icprobe.methods.gradient.factor_cache import FactorCache
from icprobe.methods.gradient.layers import linear_layers
from icprobe.models import LM, Encoded

# GiB of gradient factors to hold in memory on a CPU; a token's take about a megabyte for
# SmolLM2-135M in float32. Of a GPU's free memory, a share: passes need the rest
MEMORY = 0.75
SHARE_OF_GPU = 0.5

# training examples' tokens whose factors are kept together, see _blocks; on a CPU, more would save
# little, on a GPU there may be as many as memory has room for, up to a limit
TOKENS_TOGETHER = 4096
TOKENS_ON_GPU = 16384

# queries' tokens whose factors, of one group of layers, are read from the file at once
TOKENS_READ = 16384


class GradientDot:
    """The queries' gradients, ready for any number of training examples.

    They are kept as factors (see `factors`): in memory as far as there is room, else in a
    temporary file (see `factor_cache`). No example is passed twice, whatever the memory.
    """

    def __init__(
        self,
        lm: LM,
        queries: Sequence[Encoded],
        layers: str = "",
        memory: float | None = None,
        cosines: bool = True,
    ) -> None:
        """Compute the factors of M queries' gradients: one forward and backward pass each.

        Args:
            lm: The model.
            queries: M encoded examples.
            layers: A regular expression, see `layers.linear_layers`.
            memory: GiB of factors to hold in the device's memory, beside what the passes
                themselves need; the rest goes to a temporary file (in TMPDIR, if set).
            cosines: Whether `products` returns them, too, which takes the norms of all gradients.

        Raises:
            ValueError: If no layer matches, or a query cannot be learnt.
            FloatingPointError: If a gradient is not finite; names the queries.
            OSError: If the factors will not fit on the disk.
        """
        self._lm, self._queries, self._layers = lm, queries, layers
        self._cache = FactorCache((usual_memory(lm.device) if memory is None else memory) * 2**30)
        self._norms = np.full(len(queries), np.nan)
        self._cosines = cosines
        losses.within_memory(lm, self._keep_queries)

    def _keep_queries(self) -> None:
        self._cache.clear()
        self._batches = list(losses.batches(self._lm, self._queries))
        self._tokens = [losses.tokens(self._lm, self._queries, b) for b in self._batches]
        for number, batch in enumerate(self._batches):
            groups = factors.factors(self._lm, [self._queries[j] for j in batch], self._layers)
            if number == 0:
                self._token_bytes = sum(group.nbytes for group in groups) / self._tokens[0]
                self._cache.check_room(sum(self._tokens) * self._token_bytes)
            if self._cosines:
                self._norms[batch] = factors.norms(groups)
            self._cache.put(groups)

    def products(
        self, train: Sequence[Encoded], loss_on: str = "completion", parts: Sequence[str] = ()
    ) -> tuple[np.ndarray, ...]:
        """Return gradient dot products and cosines, from one pass over N training examples.

        Losses are sums over the tokens of the "completion", or of the whole "text" (as published).
        `parts` are regular expressions that each choose some of the layers.

        Returns:
            Products, float32 [N, M], in nats per unit of learning rate, and cosines, float32
            [N, M], without unit, in [-1, 1] up to rounding (0 where a gradient is zero, not
            numbers if they were not asked for); then for each of `parts` what its layers
            contribute to the products, float32 [N, M].

        Raises:
            ValueError: If an example cannot be learnt.
            FloatingPointError: If a gradient is not finite; names the examples.
            OSError: If the factors do not fit on the disk.
        """
        chosen = ("", *parts)
        norms = np.full(len(train), np.nan)

        def dots_of_all() -> np.ndarray:
            dots = np.zeros((len(chosen), len(train), len(self._queries)))
            for rows, columns, by_layer in self._blocks(train, norms, loss_on):
                for dot, layers in zip(dots, chosen, strict=True):
                    parts = [part for name, part in by_layer.items() if re.search(layers, name)]
                    dot[np.ix_(rows, columns)] += sum(parts)
            return dots

        dots = losses.within_memory(self._lm, dots_of_all)
        scale = np.outer(norms, self._norms)
        cosine = np.divide(dots[0], scale, out=0 * scale, where=scale > 0)
        return tuple(scores.astype(np.float32) for scores in (dots[0], cosine, *dots[1:]))

    def _blocks(self, train, norms, loss_on):
        """Yield rows, columns and products by layer, for one group of layers after another.

        Makes each training example's factors and notes its norm. The queries' factors are met once
        for as many training examples as are kept together (a tile), so the cost of meeting them is
        shared: on a CPU at 4096 tokens it is less than that of the products themselves.
        """
        lm = self._lm
        batches = list(losses.batches(lm, train))
        lengths = [losses.tokens(lm, train, batch) for batch in batches]
        cache = FactorCache(self._cache.free)
        together = TOKENS_TOGETHER
        if lm.device.type == "cuda":
            together = max(together, min(TOKENS_ON_GPU, int(cache.free / self._token_bytes)))
        for tile in _runs(lengths, together):
            cache.clear()
            for batch in batches[tile]:
                groups = factors.factors(lm, [train[i] for i in batch], self._layers, loss_on)
                if self._cosines:
                    norms[batch] = factors.norms(groups)
                cache.put(groups)
            rows = np.concatenate(batches[tile])
            for group in range(len(groups)):
                mine = cache.read(group)
                for run in _runs(self._tokens, TOKENS_READ):
                    columns = np.concatenate(self._batches[run])
                    parts = factors.products(mine, self._cache.read(group, run))
                    yield rows, columns, {name: part.cpu().numpy() for name, part in parts.items()}
            del mine, groups


def usual_memory(device: torch.device) -> float:
    """Return how many GiB of gradient factors to hold where nothing else is asked for."""
    if device.type != "cuda":
        return MEMORY
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    return SHARE_OF_GPU * (free + kept_by_torch) / 2**30


def _runs(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Cut a sequence into runs whose sizes add up to at most the limit (or of one element)."""
    start = total = 0
    for end, size in enumerate(sizes):
        if end > start and total + size > limit:
            yield slice(start, end)
            start, total = end, 0
        total += size
    yield slice(start, len(sizes))


def gradient_dot(
    lm: LM,
    train: Iterable,
    queries: Iterable,
    layers: str = "",
    loss_on: str = "completion",
    cosine: bool = False,
    max_length: int | None = None,
    memory: float | None = None,
) -> np.ndarray:
    """Return <grad L(z_i), grad L(q_j)> for all pairs: float32 [N, M], positive = helps.

    Exact, in nats per unit of learning rate; with `cosine` divided by both gradients' norms and
    without unit. `train` and `queries` are rows with id, prompt, completion, of at most
    `max_length` tokens (see `models.encode`), or encoded already. For the other arguments and
    errors, and to score block by block, see `GradientDot`.
    """
    train, queries = (models.encode(lm, rows, max_length) for rows in (train, queries))
    held = GradientDot(lm, queries, layers, memory, cosines=cosine)
    products, cosines = held.products(train, loss_on)
    return cosines if cosine else products


def finite_difference(
    lm: LM,
    train: Sequence[Encoded],
    queries: Sequence[Encoded],
    layers: str = "",
    loss_on: str = "completion",
    step: float = 0.003,
) -> np.ndarray:
    """Return `gradient_dot` measured by actual steps: float32 [N, M], for checks.

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
        gradient = losses.full_gradient(lm, example, weights, loss_on)
        rate = step / math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
        try:
            downhill, uphill = after_step(rate, gradient), after_step(-rate, gradient)
        finally:
            move(0, gradient)
        measured.append((downhill - uphill) / (2 * rate))
    return np.array(measured, dtype=np.float32)
