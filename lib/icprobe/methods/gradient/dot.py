"""Gradient-based influence: what a training step on one example does to the queries' losses.

Everything is [N, M] for N training examples and M queries, positive = the training example helps: a
small step on it lowers the query's loss. With L the negative log-likelihood of a completion in nats
and the gradients by the weights w of the blocks' linear layers,

    gradient_dot_ij = < grad_w L(z_i), grad_w L(q_j) >

is the first-order decrease of L(q_j) per unit of learning rate in one step of gradient descent on
z_i: TracIn at one checkpoint (Pruthi et al. 2020), which Jiao et al. 2025 compare probing with.
"""

import itertools
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from icprobe import models
from icprobe.methods.gradient import factors, losses
from icprobe.methods.gradient.factor_cache import FactorCache
from icprobe.methods.gradient.layers import linear_layers
from icprobe.models import LM

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

    Attributes:
        size: M.
    """

    def __init__(
        self,
        lm: LM,
        queries: Iterable,
        layers: str = "",
        max_length: int | None = None,
        memory: float | None = None,
        cosines: bool = True,
    ) -> None:
        """Compute the factors of the queries' gradients: one forward and backward pass each.

        Args:
            lm: The model.
            queries: M rows with id, prompt, completion (or encoded already).
            layers: See `layers.linear_layers`.
            max_length: Most tokens of one example, see `models.encode`.
            memory: GiB of factors to hold in the device's memory, beside what the passes
                themselves need; the rest goes to a temporary file (in TMPDIR, if set). By default
                `usual_memory`.
            cosines: Whether `products` returns them, too, which takes the norms of all gradients.

        Raises:
            ValueError: If no layer matches, a query cannot be learnt, or memory is negative.
            FloatingPointError: If a gradient is not finite; names the queries.
            OSError: If the factors will not fit on the disk.
        """
        if memory is None:
            memory = usual_memory(lm.device)
        if not memory >= 0:
            raise ValueError(f"memory is {memory}, expected GiB from 0")
        self.lm, self.layers, self.max_length = lm, layers, max_length
        queries = models.encode(lm, queries, max_length)
        self.size = len(queries)
        self._queries = queries
        self._cache = FactorCache(memory * 2**30)
        self._norms = np.full(self.size, np.nan)
        self._cosines = cosines
        losses.within_memory(lm, self._keep_queries)

    def _keep_queries(self) -> None:
        """Put the factors of the queries' gradients on the cache."""
        self._cache.clear()
        self._batches = list(losses.batches(self.lm, self._queries))
        self._tokens = [losses.tokens(self.lm, self._queries, b) for b in self._batches]
        for number, batch in enumerate(self._batches):
            groups = factors.factors(self.lm, [self._queries[j] for j in batch], self.layers)
            if number == 0:
                self._token_bytes = sum(group.nbytes for group in groups) / self._tokens[0]
                self._check_disk()
            if self._cosines:
                self._norms[batch] = factors.norms(groups)
            self._cache.put(groups)

    def products(
        self,
        train: Iterable,
        loss_on: str = "completion",
        parts: Sequence[str] = (),
    ) -> tuple[np.ndarray, ...]:
        """Return gradient dot products and cosines, from one pass over the training examples.

        Args:
            train: N rows like the queries; one forward and one backward pass each, whatever M is.
            loss_on: "completion", or "text" to train on the prompt, too (as published). Losses are
                sums over these tokens.
            parts: Regular expressions that each choose some of the layers.

        Returns:
            Products, float32 [N, M], in nats per unit of learning rate, and cosines, float32
            [N, M], without unit, in [-1, 1] up to rounding (0 where a gradient is zero, not
            numbers if they were not asked for); then for each of `parts` what its layers
            contribute to the products, float32 [N, M].

        Raises:
            ValueError: If an example has no completion tokens.
            FloatingPointError: If a gradient is not finite; names the examples.
            OSError: If the factors do not fit on the disk.
        """
        train = models.encode(self.lm, train, self.max_length)
        chosen = ("", *parts)
        norms = np.full(len(train), np.nan)
        kept = norms if self._cosines else None

        def dots_of_all() -> np.ndarray:
            dots = np.zeros((len(chosen), len(train), self.size))
            for rows, columns, by_layer in self._blocks(train, kept, loss_on):
                for dot, layers in zip(dots, chosen, strict=True):
                    parts = [part for name, part in by_layer.items() if re.search(layers, name)]
                    dot[np.ix_(rows, columns)] += sum(parts)
            return dots

        dots = losses.within_memory(self.lm, dots_of_all)
        scale = np.outer(norms, self._norms)
        cosine = np.divide(dots[0], scale, out=0 * scale, where=scale > 0)
        return tuple(scores.astype(np.float32) for scores in (dots[0], cosine, *dots[1:]))

    def _blocks(self, train, norms, loss_on):
        """Yield rows, columns and products by layer, for one group of layers after another.

        Makes each training example's factors and notes its norm, if `norms` is given. The queries'
        factors are met once for as many training examples as are kept together (a tile), so the
        cost of meeting them is shared: on a CPU at 4096 tokens it is less than that of the products
        themselves.
        """
        batches = list(losses.batches(self.lm, train))
        lengths = [losses.tokens(self.lm, train, batch) for batch in batches]
        cache = FactorCache(self._cache.free)
        together = TOKENS_TOGETHER
        if self.lm.device.type == "cuda":
            together = max(together, min(TOKENS_ON_GPU, int(cache.free / self._token_bytes)))
        for tile in _runs(lengths, together):
            cache.clear()
            for batch in batches[tile]:
                groups = factors.factors(self.lm, [train[i] for i in batch], self.layers, loss_on)
                if norms is not None:
                    norms[batch] = factors.norms(groups)
                cache.put(groups)
            rows = list(itertools.chain.from_iterable(batches[tile]))
            for group in range(len(groups)):
                mine = cache.read(group)
                for run in _runs(self._tokens, TOKENS_READ):
                    columns = list(itertools.chain.from_iterable(self._batches[run]))
                    parts = factors.products(mine, self._cache.read(group, run))
                    yield rows, columns, {name: part.cpu().numpy() for name, part in parts.items()}
            del mine, groups

    def _check_disk(self) -> None:
        """Raise OSError if the queries' factors will not fit on the disk, before all are made."""
        size = sum(self._tokens) * self._token_bytes
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if size - self._cache.free > free:
            raise OSError(
                f"the queries' gradients take {size / 2**30:.1f} GiB, {tempfile.gettempdir()} has "
                f"{free / 2**30:.1f} free: set TMPDIR to a larger disk, or raise memory"
            )


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
    if sizes:
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
    without unit. See `GradientDot` for the arguments and errors, and to score block by block.
    """
    influence = GradientDot(lm, queries, layers, max_length, memory, cosine)
    dot, cosines = influence.products(train, loss_on)
    return cosines if cosine else dot


def finite_difference(
    lm: LM,
    train: Iterable,
    queries: Iterable,
    step: float = 0.003,
    layers: str = "",
    loss_on: str = "completion",
    max_length: int | None = None,
) -> np.ndarray:
    """Return `gradient_dot` measured by actual steps: float32 [N, M], for checks.

    For each training example, the weights go a distance `step` (in their own unit) downhill and
    uphill along its gradient; half the difference of the queries' log-likelihoods over the learning
    rate is the product, but for terms of third order and rounding.

    Args:
        lm: The model; its weights are restored.
        train: N rows with id, prompt, completion (or encoded already); M + 1 passes each.
        queries: M rows like them.
        step: Length of the step in weight space.
        layers: See `layers.linear_layers`.
        loss_on: See `GradientDot.products`.
        max_length: See `models.encode`.
    """
    train, queries = (models.encode(lm, rows, max_length) for rows in (train, queries))
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
