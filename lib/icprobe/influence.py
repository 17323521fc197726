"""Gradient-based influence: what a training step on one example does to the queries' losses.

Everything is [N, M] for N training examples and M queries, positive = the training example helps: a
small step on it lowers the query's loss. With L the negative log-likelihood of a completion in nats
and the gradients by the weights w of the blocks' linear layers,

    gradient_dot_ij = < grad_w L(z_i), grad_w L(q_j) >

is the first-order decrease of L(q_j) per unit of learning rate in one step of gradient descent on
z_i: TracIn at one checkpoint (Pruthi et al. 2020), which Jiao et al. 2025 compare probing with.
"""

import functools
import itertools
import math
import numbers
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from icprobe import engines, gradients, statistics, store
from icprobe import lm as language_model
from icprobe.experiment import Experiment
from icprobe.lm import LM
from icprobe.projected import projected_gradients as projected_gradients
from icprobe.query_set import query_set_influence as query_set_influence
from icprobe.shelf import Shelf

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

# training examples in one part of a store; on a GPU, enough to fill its passes
BLOCK_SIZE = {"cpu": 64, "cuda": 256}

UNITS = {
    "gradient_dot": "nats per unit of learning rate; positive = helps",
    "gradient_cosine": "cosine of the gradients, without unit; positive = helps",
}


class GradientDot:
    """The queries' gradients, ready for any number of training examples.

    They are kept as factors (see `gradients`): in memory as far as there is room, else in a
    temporary file (see `shelf`). No example is passed twice, whatever the memory.

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
            layers: See `gradients.linear_layers`.
            max_length: Most tokens of one example, see `lm.encode`.
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
        queries = language_model.encode(lm, queries, max_length)
        self.size = len(queries)
        self._queries = queries
        self._shelf = Shelf(memory * 2**30)
        self._norms = np.full(self.size, np.nan)
        self._cosines = cosines
        gradients.within_memory(lm, self._keep_queries)

    def _keep_queries(self) -> None:
        """Put the factors of the queries' gradients on the shelf."""
        self._shelf.clear()
        self._batches = list(gradients.batches(self.lm, self._queries))
        self._tokens = [gradients.tokens(self.lm, self._queries, b) for b in self._batches]
        for number, batch in enumerate(self._batches):
            groups = gradients.factors(self.lm, [self._queries[j] for j in batch], self.layers)
            if number == 0:
                self._token_bytes = sum(group.nbytes for group in groups) / self._tokens[0]
                self._check_disk()
            if self._cosines:
                self._norms[batch] = gradients.norms(groups)
            self._shelf.put(groups)

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
        train = language_model.encode(self.lm, train, self.max_length)
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

        dots = gradients.within_memory(self.lm, dots_of_all)
        scale = np.outer(norms, self._norms)
        cosine = np.divide(dots[0], scale, out=0 * scale, where=scale > 0)
        return tuple(scores.astype(np.float32) for scores in (dots[0], cosine, *dots[1:]))

    def _blocks(self, train, norms, *options):
        """Yield rows, columns and products by layer, for one group of layers after another.

        Makes each training example's factors and notes its norm, if `norms` is given. The queries'
        factors are met once for as many training examples as are kept together (a tile), so the
        cost of meeting them is shared: on a CPU at 4096 tokens it is less than that of the products
        themselves.
        """
        batches = list(gradients.batches(self.lm, train))
        lengths = [gradients.tokens(self.lm, train, batch) for batch in batches]
        shelf = Shelf(self._shelf.free)
        together = TOKENS_TOGETHER
        if self.lm.device.type == "cuda":
            together = max(together, min(TOKENS_ON_GPU, int(shelf.free / self._token_bytes)))
        for tile in _runs(lengths, together):
            shelf.clear()
            for batch in batches[tile]:
                groups = gradients.factors(
                    self.lm, [train[i] for i in batch], self.layers, *options
                )
                if norms is not None:
                    norms[batch] = gradients.norms(groups)
                shelf.put(groups)
            rows = list(itertools.chain.from_iterable(batches[tile]))
            for group in range(len(groups)):
                mine = shelf.read(group)
                for run in _runs(self._tokens, TOKENS_READ):
                    columns = list(itertools.chain.from_iterable(self._batches[run]))
                    parts = gradients.products(mine, self._shelf.read(group, run))
                    yield rows, columns, {name: part.cpu().numpy() for name, part in parts.items()}
            del mine, groups

    def _check_disk(self) -> None:
        """Raise OSError if the queries' factors will not fit on the disk, before all are made."""
        size = sum(self._tokens) * self._token_bytes
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if size - self._shelf.free > free:
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


def tracin(
    checkpoints: Sequence[tuple[str, float]],
    train: Iterable,
    queries: Iterable,
    dtype: str = "float32",
    device: str | None = None,
    layers: str = "",
    loss_on: str = "completion",
    max_length: int | None = None,
    memory: float | None = None,
) -> np.ndarray:
    """Return sum_t eta_t <grad L(z_i; w_t), grad L(q_j; w_t)>: float32 [N, M], in nats.

    TracInCP of Pruthi et al. 2020: the decrease of the queries' losses that training on an example
    brought, to first order, added up over the checkpoints w_t that were reached with learning rate
    eta_t. Positive = helps.

    Args:
        checkpoints: Model and learning rate of each checkpoint. A model is a local folder (of a
            whole model or a LoRA adapter), a hub name or `name@revision`, see `lm.load`.
        train: N rows with id, prompt, completion.
        queries: M rows like them.
        dtype: See `lm.load`.
        device: See `lm.load`.
        layers: See `gradients.linear_layers`.
        loss_on: See `GradientDot.products`.
        max_length: See `lm.encode`.
        memory: See `GradientDot`.

    Raises:
        ValueError: If there is no checkpoint, or one has no learning rate (zero is one).
    """
    if not checkpoints:
        raise ValueError("tracin needs at least one checkpoint")
    for checkpoint in checkpoints:
        if isinstance(checkpoint, str) or len(checkpoint) != 2:
            raise ValueError(f"checkpoint {checkpoint!r}: expected (model, learning rate)")
        model, rate = checkpoint
        if not isinstance(rate, numbers.Real) or not 0 <= rate < math.inf:
            raise ValueError(
                f"checkpoint {model!r}: learning rate is {rate!r}, expected a number from 0"
            )
    train, queries = list(train), list(queries)
    total = np.zeros((len(train), len(queries)))
    for model, rate in tqdm(checkpoints, desc="checkpoints"):
        if rate:  # at the end of many schedules it is zero
            influence = GradientDot(
                language_model.load(model, dtype, device),
                queries, layers, max_length, memory, cosines=False,
            )  # fmt: skip
            total += rate * influence.products(train, loss_on)[0]
            del influence  # or two models would be held
    return total.astype(np.float32)


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
        layers: See `gradients.linear_layers`.
        loss_on: See `GradientDot.products`.
        max_length: See `lm.encode`.
    """
    train, queries = (language_model.encode(lm, rows, max_length) for rows in (train, queries))
    weights = [module.weight for module in gradients.linear_layers(lm, layers).values()]
    before = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def move(rate: float, gradient: list[torch.Tensor]) -> None:
        for weight, start, part in zip(weights, before, gradient, strict=True):
            weight.copy_(start - rate * part)

    def after_step(rate: float, gradient: list[torch.Tensor]) -> np.ndarray:
        move(rate, gradient)
        return np.array([language_model.token_log_likelihoods(lm, q).sum() for q in queries])

    measured = []
    for example in train:
        gradient = gradients.whole(lm, example, weights, loss_on)
        rate = step / math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
        try:
            downhill, uphill = after_step(rate, gradient), after_step(-rate, gradient)
        finally:
            move(0, gradient)
        measured.append((downhill - uphill) / (2 * rate))
    return np.array(measured, dtype=np.float32)


@dataclass(frozen=True)
class Influence:
    """Finished scores of an experiment.

    Attributes:
        dot: [N, M] gradient dot products, nats per unit of learning rate.
        cosine: [N, M] the same over both gradients' norms.
        parts: [N, M] contributions to `dot` of some of the layers, by name.
    """

    dot: np.ndarray
    cosine: np.ndarray
    parts: dict[str, np.ndarray]


def attribute(
    experiment: Experiment,
    lm: LM,
    layers: str = "",
    loss_on: str = "completion",
    parts: Mapping[str, str] | None = None,
    memory: float | None = None,
    fresh: bool = False,
    engine: str = engines.LOCAL,
) -> Influence:
    """Score all pairs of the experiment through its stores: finished blocks are reused.

    Args:
        experiment: What is scored (its pool of N, its M queries) and where the scores lie.
        lm: The experiment's model.
        layers: See `gradients.linear_layers`.
        loss_on: See `GradientDot.products`.
        parts: By name, a regular expression that chooses some of the layers (such as
            `gradients.parts`): what they contribute has a store of its own.
        memory: See `GradientDot`; with Ray, of each worker.
        fresh: Compute everything anew.
        engine: Where, see `engines`.

    Raises:
        ValueError: If the model is not the experiment's, no layer matches, or an example has no
            completion tokens.
        FloatingPointError: If a gradient is not finite; names the examples.
    """
    parts = parts or {}
    for part in parts.values():
        if not any(re.search(part, name) for name in gradients.linear_layers(lm, layers)):
            raise ValueError(f"no layer among {layers or 'all'!r} matches the part {part!r}")
    pool, queries = experiment.encode(lm)
    train_ids, query_ids = ([row.id for row in rows] for rows in (pool, queries))
    block_size = language_model.by_device(BLOCK_SIZE, lm.device)
    stores = []
    for method, options in _stores(layers, loss_on, parts):
        settings = {"fresh": fresh, "block_size": block_size, "description": UNITS[method]}
        stores.append(experiment.store(method, train_ids, query_ids, options, **settings))
        block_size = stores[0].block_size  # one that was there keeps its own
    start = functools.partial(_ready, queries, layers, memory, (loss_on, list(parts.values())))
    matrices = engines.fill(
        engine, experiment, lm, stores, start, lambda rows: (pool[rows.start : rows.stop],),
        gib=MEMORY if memory is None else memory,
    )  # fmt: skip
    return Influence(*matrices[:2], dict(zip(parts, matrices[2:], strict=True)))


def _ready(queries, layers, memory, options, lm: LM) -> engines.Score:
    """Return a function from training examples to their products; see `GradientDot`."""
    held = GradientDot(lm, queries, layers, memory=memory)
    return lambda train: held.products(train, *options)


def find(
    experiment: Experiment,
    made_by: str,
    layers: str = "",
    loss_on: str = "completion",
) -> Influence:
    """Return finished scores, with all parts that there are; needs neither the model nor the data.

    Args:
        experiment: What was scored.
        made_by: What to run if the scores are not there, for the error message.
        layers: See `attribute`.
        loss_on: See `attribute`.

    Raises:
        store.ScoresNotFound: If they are not there.
        store.StoreError: If two different parts have the same name.
    """
    wanted = _stores(layers, loss_on)
    dot, cosine = (experiment.find(*which, made_by).matrix() for which in wanted)
    identity = experiment.identity_of(*wanted[0])
    parts = {}
    for kept in store.find_all(experiment.scores_dir, wanted[0][0]):
        options = dict(kept.identity["options"])
        part = options.pop("part", None)
        if part and {**kept.identity, "options": options} == identity:
            if part["name"] in parts:
                raise store.StoreError(f"two parts {part['name']!r} in {experiment.scores_dir}")
            parts[part["name"]] = kept.matrix()
    return Influence(dot, cosine, dict(sorted(parts.items())))


def findings(
    scores: Influence, same_task: np.ndarray, tokens: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """Return the headline numbers with 95 % intervals over training examples and queries.

    Args:
        scores: The scores.
        same_task: [N, M] bool, whether the pair shares its task.
        tokens: [N] length of each training example.
        rng: For the bootstrap.

    Returns:
        One row per quantity: quantity, unit, estimate, low, high, n.
    """
    dot, cosine = scores.dot, scores.cosine
    shape, every_pair = dot.shape, np.ones_like(same_task)
    length = np.broadcast_to(tokens[:, None], shape).astype(float)
    means = {
        ("pairs with a positive product", "share"): ((dot > 0).astype(float), every_pair),
        ("mean product, same task", "nats per learning rate"): (dot, same_task),
        ("mean product, other tasks", "nats per learning rate"): (dot, ~same_task),
        ("mean cosine, same task", "cosine"): (cosine, same_task),
        ("mean cosine, other tasks", "cosine"): (cosine, ~same_task),
    }
    agreements = {
        ("mean product against mean cosine", "Spearman"): (dot, cosine),
        ("length against mean product", "Spearman"): (length, dot),
        ("length against mean cosine", "Spearman"): (length, cosine),
    }
    return statistics.findings(means, agreements, rng)


def _stores(
    layers: str, loss_on: str, parts: Mapping[str, str] | None = None
) -> list[tuple[str, dict]]:
    """Return each store's method and the options that determine it, beside the experiment."""
    options = {"layers": layers, "loss_on": loss_on, "reduction": "sum"}
    return [
        *((method, options) for method in UNITS),
        *(
            ("gradient_dot", {**options, "part": {"name": name, "layers": part}})
            for name, part in (parts or {}).items()
        ),
    ]
