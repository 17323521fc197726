"""Gradient-based influence: what a training step on one example does to the queries' losses.

Everything is [N, M] for N training examples and M queries, positive = the training example helps: a
small step on it lowers the query's loss. With L the negative log-likelihood of a completion in nats
and the gradients by the weights w of the blocks' linear layers,

    gradient_dot_ij = < grad_w L(z_i), grad_w L(q_j) >

is the first-order decrease of L(q_j) per unit of learning rate in one step of gradient descent on
z_i: TracIn at one checkpoint (Pruthi et al. 2020), which Jiao et al. 2025 compare probing with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from icprobe import models
from icprobe.methods import gradient
from icprobe.scores import run
from icprobe.scores.experiment import Experiment
from icprobe.scores.method import Examples, Method, Output, setting

if TYPE_CHECKING:
    import torch

    from icprobe.models import LM, Encoded

PRODUCT = "nats per unit of learning rate; positive = helps"
COSINE = "cosine of the gradients, without unit; positive = helps"

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


@dataclass(frozen=True)
class MeanInfluence(Method):
    """The mean over queries of gradient products, by forward-mode autograd: the same along a row.

    The pool needs no backward pass (see `forward_mode`).
    """

    name = "mean_influence"
    unit = (
        "mean over queries, the same along a row, nats per unit of learning rate; positive = helps"
    )
    notebook = "02"
    block_size: ClassVar = {"cpu": 64, "cuda": 256}

    layers: str = ""
    loss_on: str = "completion"

    def prepare(self, lm: LM, queries: Examples, pool: None) -> tuple:
        """Return the model, the queries' mean gradient by layer, and M."""
        direction = gradient.forward_mode.mean_gradient(lm, queries.tokens, self.layers)
        return lm, direction, len(queries)

    def score(self, prepared: tuple, train: Examples) -> np.ndarray:
        """Return the means [n, M] in nats per unit of learning rate, equal along a row."""
        lm, direction, M = prepared
        along = gradient.forward_mode.influence_along
        return np.repeat(along(lm, train.tokens, direction, self.loss_on)[:, None], M, axis=1)


@dataclass(frozen=True)
class GradientProducts(Method):
    """Gradient dot products and cosines, from one pass, and what parts of the layers contribute.

    Each of `parts`, regular expressions by name that choose some of the `layers` (such as
    `layers.parts`), has an output of its name. For the other fields see `gradient_dot`; the
    memory is that of each worker.
    """

    name = "gradient_dot"
    unit = PRODUCT
    notebook = "02"
    block_size: ClassVar = {"cpu": 64, "cuda": 256}  # on a GPU, enough to fill its passes

    layers: str = ""
    loss_on: str = "completion"
    parts: Mapping[str, str] = setting(())
    memory: float | None = setting()

    @property
    def outputs(self) -> dict[str, Output]:
        """gradient_dot, gradient_cosine, and each part's products by its name."""
        units = {"gradient_dot": PRODUCT, "gradient_cosine": COSINE}
        outputs = {name: Output(name, self.options, unit) for name, unit in units.items()}
        for name, layers in dict(self.parts).items():
            options = {**self.options, "part": {"name": name, "layers": layers}}
            outputs[name] = Output("gradient_dot", options, PRODUCT)
        return outputs

    @property
    def worker_gib(self) -> float:
        """GiB of gradient factors that a worker holds."""
        return MEMORY if self.memory is None else self.memory

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError if no layer matches, or none of a part."""
        chosen = gradient.linear_layers(lm, self.layers)
        for part in dict(self.parts).values():
            if not any(re.search(part, name) for name in chosen):
                raise ValueError(
                    f"no layer among {self.layers or 'all'!r} matches the part {part!r}"
                )

    def prepare(self, lm: LM, queries: Examples, pool: None) -> GradientDot:
        """Return the queries' gradients."""
        return GradientDot(lm, queries.tokens, self.layers, self.memory)

    def score(self, prepared: GradientDot, train: Examples) -> dict[str, np.ndarray]:
        """Return products, cosines and the parts' products, each [n, M]."""
        parts = list(dict(self.parts).values())
        found = prepared.products(train.tokens, self.loss_on, parts)
        return dict(zip(self.outputs, found, strict=True))


def load_parts(experiment: Experiment, method: GradientProducts) -> dict[str, np.ndarray]:
    """Return the finished products of all parts of layers, by name: float32 [N, M] each.

    Raises ValueError if two different parts have the same name.
    """
    found = {}
    for options, scores in run.variants(experiment, method.outputs["gradient_dot"]):
        part = options.pop("part", None)
        if part and options == method.options:
            if part["name"] in found:
                raise ValueError(f"two parts {part['name']!r} in {experiment.scores_dir}")
            found[part["name"]] = scores
    return dict(sorted(found.items()))


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
        """Make the factors of M queries; without `cosines`, no norm of a gradient is computed.

        For the other arguments and the errors see `gradient_dot`.
        """
        self._lm, self._queries, self._layers = lm, queries, layers
        self._memory = 2**30 * (usual_memory(lm.device) if memory is None else memory)
        self._norms = np.full(len(queries), np.nan)
        self._cosines = cosines
        gradient.losses.within_memory(lm, self._keep_queries)

    def _keep_queries(self) -> None:
        self._cache = gradient.factor_cache.FactorCache(self._memory)
        self._batches = list(gradient.losses.batches(self._lm, self._queries))
        self._tokens = [gradient.losses.tokens(self._lm, self._queries, b) for b in self._batches]
        for batch in self._batches:
            groups = self._keep(self._cache, self._queries, batch, self._norms)
            if batch is self._batches[0]:
                self._token_bytes = sum(group.nbytes for group in groups) / self._tokens[0]
                self._cache.check_room(sum(self._tokens[1:]) * self._token_bytes)

    def _keep(self, cache, examples, batch, norms, loss_on="completion"):
        """Make the factors of a batch, put them on a cache, note the norms; return the factors."""
        chosen = [examples[i] for i in batch]
        groups = gradient.factors.factors(self._lm, chosen, self._layers, loss_on)
        if self._cosines:
            norms[batch] = gradient.factors.norms(groups)
        cache.put(groups)
        return groups

    def products(
        self, train: Sequence[Encoded], loss_on: str = "completion", parts: Sequence[str] = ()
    ) -> tuple[np.ndarray, ...]:
        """Return matrices float32 [N, M] from one pass over N training examples.

        The gradient dot products; the cosines (in [-1, 1] up to rounding, 0 where a gradient is
        zero, not numbers if they were not asked for); and for each of `parts`, a regular expression
        that chooses some of the layers, what these contribute to the products.
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

        dots = gradient.losses.within_memory(self._lm, dots_of_all)
        scale = np.outer(norms, self._norms)
        cosine = np.divide(dots[0], scale, out=0 * scale, where=scale > 0)
        return tuple(scores.astype(np.float32) for scores in (dots[0], cosine, *dots[1:]))

    def _blocks(self, train, norms, loss_on):
        """Yield rows, columns and products by layer, for one group of layers after another.

        Notes the training examples' norms. The queries' factors are read once for as many training
        examples as are kept together (a tile): on a CPU at 4096 tokens that costs less than the
        products themselves.
        """
        lm = self._lm
        batches = list(gradient.losses.batches(lm, train))
        lengths = [gradient.losses.tokens(lm, train, batch) for batch in batches]
        free, together = self._cache.free, TOKENS_TOGETHER
        if lm.device.type == "cuda":
            together = max(together, min(TOKENS_ON_GPU, int(free / self._token_bytes)))
        for tile in _runs(lengths, together):
            cache = gradient.factor_cache.FactorCache(free)
            for batch in batches[tile]:
                groups = self._keep(cache, train, batch, norms, loss_on)
            rows = np.concatenate(batches[tile])
            for group in range(len(groups)):
                mine = cache.read(group)
                for part in _runs(self._tokens, TOKENS_READ):
                    columns = np.concatenate(self._batches[part])
                    parts = gradient.factors.products(mine, self._cache.read(group, part))
                    yield rows, columns, {name: part.cpu().numpy() for name, part in parts.items()}
            del mine, groups  # before the next tile's are made


def usual_memory(device: torch.device) -> float:
    """Return how many GiB of gradient factors to hold where nothing else is asked for."""
    import torch

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
    without unit. To score block by block, see `GradientDot`.

    Args:
        lm: The model.
        train: N rows with id, prompt, completion (or encoded already).
        queries: M rows like them; their loss is on the completion.
        layers: A regular expression, see `layers.linear_layers`.
        loss_on: Training losses are sums over the tokens of the "completion", or of the "text" (the
            prompt too, as published).
        cosine: Whether to return cosines.
        max_length: Most tokens of one example, see `models.encode`.
        memory: GiB of factors to hold in the device's memory, beside what the passes themselves
            need; the rest goes to a temporary file (in TMPDIR, if set).

    Raises:
        ValueError: If no layer matches, or an example cannot be learnt.
        FloatingPointError: If a gradient is not finite; names the examples.
        OSError: If the factors do not fit on the disk.
    """
    train, queries = (models.encode(lm, rows, max_length) for rows in (train, queries))
    held = GradientDot(lm, queries, layers, memory, cosines=cosine)
    products, cosines = held.products(train, loss_on)
    return cosines if cosine else products
