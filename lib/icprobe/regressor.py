"""A transformer that learns linear regression from its context, trained here from nothing.

A pair is two tokens, (x, 0) and (x, y), so that each label stands beside its covariates and is
predicted where it is still missing (Garg et al. 2022, What can transformers learn in-context?, have
x and y in tokens of their own, which takes ten times as many steps to get going). Blocks are
pre-norm, positions are learnt. Many queries can follow one context: each sees the context and
itself, so the context is read once for all of them.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from icprobe import paths, regression
from icprobe.lm import default_device
from icprobe.regression import LeastSquares, Prior, PriorMean, Problems, Ridge
from icprobe.scores import store

VERSION = 1  # raise it when the same recipe begins to train in another way
TOKENS = 2**13  # queries and context tokens that are read at once: what a cache holds
WIDE = 128  # networks from this width on are trained on all threads of a CPU
KEPT_EVERY = 30.0  # seconds between two states that an interrupted training goes on from
FRESH = 4000  # sequences that a learning curve is measured on
TOGETHER = 128  # gradients at once
DIGITS = 6  # of learning curves, after the point
PARTS = 500  # of a training, each with its mean loss in the record


@dataclass(frozen=True)
class Shape:
    """Of the network.

    Attributes:
        pairs: Most pairs of a sequence, the last of which is the query.
        width: Of the residual stream; the hidden layer of a block has four times as many units.
        layers: Blocks.
        heads: Of attention, in each block.
    """

    pairs: int = 11
    width: int = 48
    layers: int = 4
    heads: int = 4

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number from 1")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of {self.heads} heads")


class Block(nn.Module):
    """Attention and a hidden layer, each added to the residual stream after a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, context: Tensor, asked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return context [R, T, W], and what is asked [R, M, W] if anything, one block further.

        The context sees what comes before; each of those asked sees the context and itself.
        """
        q, k, v = self._heads(context)
        scores = q @ k.mT
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        seen = scores.masked_fill(ahead, -math.inf).softmax(-1) @ v
        context = self._finish(context, seen)
        if asked is None:
            return context, None
        q, own_k, own_v = self._heads(asked)
        own = (q * own_k).sum(-1, keepdim=True)
        weights = torch.cat([q @ k.mT, own], dim=-1).softmax(-1)
        seen = weights[..., :-1] @ v + weights[..., -1:] * own_v
        return context, self._finish(asked, seen)

    def _heads(self, tokens: Tensor) -> list[Tensor]:
        """Return queries (scaled), keys and values [R, heads, T, W / heads]."""
        of_heads = self.qkv(self.attention_norm(tokens)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(-2, -3) for part in of_heads.unbind(-3))
        return [q / math.sqrt(q.shape[-1]), k, v]

    def _finish(self, tokens: Tensor, seen: Tensor) -> Tensor:
        tokens = tokens + self.mix(seen.transpose(-2, -3).flatten(-2))
        return tokens + self.narrow(functional.relu(self.widen(self.hidden_norm(tokens))))


class Regressor(nn.Module):
    """The network; as a learner (`regression.Learner`), it is called with contexts and queries."""

    def __init__(self, dimension: int, shape: Shape):
        super().__init__()
        self.shape = shape
        self.read_in = nn.Linear(dimension + 1, shape.width)
        self.positions = nn.Embedding(2 * shape.pairs, shape.width)
        blocks = (Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.read_out = nn.LayerNorm(shape.width), nn.Linear(shape.width, 1)

    def forward(self, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        """Return predictions [R, M] for queries [R, M, D] after contexts x [R, K, D], y [R, K].

        Raises:
            ValueError: If a context has too many pairs.
        """
        K, most = y.shape[-1], self.shape.pairs - 1
        if most < K:
            raise ValueError(f"a context has {K} pairs, this network reads up to {most}")
        position = self.positions.weight
        asked = self.read_in(functional.pad(queries, (0, 1))) + position[2 * K]
        return self._through(self._tokens(x, y) + position[: 2 * K], asked)

    def along(self, x: Tensor, y: Tensor) -> Tensor:
        """Return predictions [R, K] of each label of a sequence from the pairs before it."""
        tokens = self._tokens(x, y) + self.positions.weight[: 2 * y.shape[-1]]
        return self._through(tokens)[:, ::2]

    def _tokens(self, x: Tensor, y: Tensor) -> Tensor:
        """Return tokens [R, 2 K, W] of pairs: (x, 0) and (x, y) in turn."""
        known = torch.stack([torch.zeros_like(y), y], dim=-1)[..., None]
        twice = x[..., None, :].expand(*x.shape[:-1], 2, -1)
        return self.read_in(torch.cat([twice, known], dim=-1).flatten(-3, -2))

    def _through(self, context: Tensor, asked: Tensor | None = None) -> Tensor:
        """Return what is read out at the queries, or of the context where there are none."""
        for block in self.blocks:
            context, asked = block(context, asked)
        return self.read_out(self.norm(context if asked is None else asked))[..., 0]


def learner(network: Regressor) -> regression.Learner:
    """Return the network as a learner for problems in float64, which are read in its own dtype."""
    weight = network.read_in.weight

    @torch.inference_mode()
    def predict(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        tokens = 2 * y.shape[1] + queries.shape[1]
        parts = (rows.split(max(1, TOKENS // tokens)) for rows in (x, y, queries))
        found = [network(*(t.to(weight) for t in part)) for part in zip(*parts, strict=True)]
        return torch.cat(found).to(x)

    return predict


# -------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    """All that determines a trained network.

    AdamW without weight decay, gradients clipped to norm 1; the rate rises, stays, and falls to
    zero along a cosine. Each step has `batch` new sequences, each of a task of its own.

    Attributes:
        prior: Of tasks and pairs.
        shape: Of the network.
        steps: How many.
        batch: Sequences of a step.
        rate: Learning rate at its highest.
        warmup: Steps in which it rises.
        decay_from: Share of the steps after which it falls.
        seed: Of the network's start and of the data.
    """

    prior: Prior = field(default_factory=Prior)
    shape: Shape = field(default_factory=Shape)
    steps: int = 3300
    batch: int = 64
    rate: float = 2e-3
    warmup: int = 200
    decay_from: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number from 1")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate is {self.rate!r}, expected a positive number")
        if type(self.warmup) is not int or self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup!r}, expected a whole number from 0")
        if not 0 <= self.decay_from < 1:
            raise ValueError(f"decay_from is {self.decay_from!r}, expected 0 to below 1")

    @property
    def name(self) -> str:
        """Of its files: readable, and with a hash of the whole recipe."""
        size = f"d{self.prior.dimension}-w{self.shape.width}-l{self.shape.layers}"
        return store.key(f"{size}-seed{self.seed}", {"version": VERSION, **asdict(self)})

    def rate_at(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        start = self.decay_from * self.steps
        fallen = max(0.0, (step - start) / (self.steps - start))
        return self.rate * rising * (1 + math.cos(math.pi * fallen)) / 2


@dataclass(frozen=True)
class Trained:
    """A trained network and how it came about.

    Attributes:
        network: In evaluation mode, on the device that it was trained on.
        recipe: See `Recipe`.
        losses: Mean squared error of each step's batch, over all places of its sequences (of a
            network from a file, means of up to `PARTS` equal parts of the training).
        curve: See `learning_curve`; None where none was taken.
        seconds: Of training; how long another machine takes is another matter.
        snapshots: The network's weights after a number of steps, by this number.
    """

    network: Regressor
    recipe: Recipe
    losses: np.ndarray
    curve: pd.DataFrame | None
    seconds: float
    snapshots: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    def after(self, step: int) -> Regressor:
        """Return the network as it was after a number of steps that a snapshot was taken of."""
        network = Regressor(self.recipe.prior.dimension, self.recipe.shape)
        network.load_state_dict(self.snapshots[step])
        return network.eval()


def train(
    recipe: Recipe,
    folder: str | Path | None = None,
    snapshots: Sequence[int] = (),
    device: str | None = None,
) -> Trained:
    """Train a network from nothing.

    The same recipe gives the same weights on one machine with as many threads, whether or not it
    was interrupted; elsewhere they differ from the last bits on, more and more.

    Args:
        recipe: See `Recipe`.
        folder: Where the state is kept every `KEPT_EVERY` seconds: the next call with the same
            recipe and snapshots goes on from there.
        snapshots: After how many steps (0 is the start) the weights are kept, see `Trained`.
        device: Such as "cuda"; by default a GPU if there is one.

    Raises:
        ValueError: If a snapshot is to be taken after the end.
        FloatingPointError: If the loss is not finite; names the step.
    """
    if any(not 0 <= step <= recipe.steps for step in snapshots):
        raise ValueError(f"snapshots are {list(snapshots)}, expected 0 to {recipe.steps} steps")
    device = device or default_device()
    with torch.random.fork_rng():  # torch's layers start from the global generator
        torch.manual_seed(recipe.seed)
        network = Regressor(recipe.prior.dimension, recipe.shape).to(device)
    optimizer = _optimizer(network, recipe)
    state = _Progress(None if folder is None else _partial(recipe, folder), snapshots)
    state.restore(network, optimizer)
    bar = tqdm(
        desc="regression", total=recipe.steps, initial=state.step, unit=" steps", leave=False
    )
    with bar, _few_threads(recipe.shape):
        for step in range(state.step, recipe.steps):
            if step in snapshots:
                state.snapshots[step] = _copied(network)
            with state.timed():
                loss = _step(network, optimizer, recipe, step)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{recipe.name}: the loss of step {step + 1} is {loss}: lower the rate "
                    f"({recipe.rate})"
                )
            state.losses.append(loss)
            bar.update()
            state.keep(network, optimizer)
    if recipe.steps in snapshots:
        state.snapshots[recipe.steps] = _copied(network)
    state.forget()
    losses = np.array(state.losses)
    return Trained(network.eval(), recipe, losses, None, state.seconds, dict(state.snapshots))


@contextmanager
def _few_threads(shape: Shape):
    """Work on one thread where products are small: sharing them out costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if shape.width >= WIDE else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _optimizer(network: Regressor, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        network.parameters(), recipe.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )


def _partial(recipe: Recipe, folder: str | Path) -> Path:
    return paths.resolve(folder) / f"{recipe.name}.partial"


def step_seconds(recipe: Recipe, steps: int) -> float:
    """Return the median time of a step of training, the first of which does not count."""
    device = default_device()
    network = Regressor(recipe.prior.dimension, recipe.shape).to(device)
    optimizer, seconds = _optimizer(network, recipe), []
    with _few_threads(recipe.shape):
        for step in range(steps + 1):
            start = time.perf_counter()
            _step(network, optimizer, recipe, step)
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _step(network: Regressor, optimizer, recipe: Recipe, step: int) -> float:
    """Take a step on new data, which depend on seed and step alone; return the loss before it."""
    rng = np.random.default_rng([recipe.seed, step])
    weight = network.read_in.weight
    x, y = (t.to(weight) for t in recipe.prior.prompts(rng, recipe.batch, recipe.shape.pairs))
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate_at(step)
    loss = functional.mse_loss(network.along(x, y), y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _copied(network: Regressor) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


class _Progress:
    """What an interrupted training goes on from, kept in a file if there is one."""

    def __init__(self, file: Path | None, asked: Sequence[int]):
        self.file, self.asked = file, list(asked)
        self.losses: list[float] = []
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.seconds = 0.0
        self._kept = time.monotonic()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)

    @contextmanager
    def timed(self):
        """Add the time that passes to the seconds."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def restore(self, network: Regressor, optimizer) -> None:
        """Take over what was kept, if anything, with the same snapshots in view."""
        if self.file is None or not self.file.exists():
            return
        kept = torch.load(self.file, map_location=network.read_in.weight.device, weights_only=True)
        if kept["asked"] != self.asked:
            return
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        self.losses, self.snapshots = kept["losses"], kept["snapshots"]
        self.seconds = kept["seconds"]

    def keep(self, network: Regressor, optimizer) -> None:
        """Write everything, by way of a temporary name, if it is time to."""
        if self.file is None or time.monotonic() - self._kept < KEPT_EVERY:
            return
        parts = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        mine = {name: getattr(self, name) for name in ("asked", "losses", "snapshots", "seconds")}
        with paths.replacing(self.file) as temporary:
            torch.save(parts | mine, temporary)
        self._kept = time.monotonic()

    def forget(self) -> None:
        """Remove the file."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def learning_curve(network: Regressor, prior: Prior, n: int = FRESH, seed: int = 0) -> pd.DataFrame:
    """Return how well labels are predicted from the pairs before them, beside other learners.

    Args:
        network: See `Regressor`.
        prior: Of the sequences.
        n: How many, drawn anew.
        seed: Of these sequences.

    Returns:
        One row for each number of pairs and learner: pairs, learner, error (mean squared), low,
        high (95 %, normal). Least squares has no finite expectation where there are about as many
        pairs as dimensions.
    """
    K = network.shape.pairs
    x, y = prior.prompts(np.random.default_rng([seed, 2**31]), n, K)
    weight = network.read_in.weight
    with torch.inference_mode():
        parts = (t.to(weight).split(max(1, TOKENS // (2 * K))) for t in (x, y))
        ours = torch.cat([network.along(*part) for part in zip(*parts, strict=True)]).to(y)
    known = {
        "prior mean": PriorMean(prior), "least squares": LeastSquares(), "ridge": Ridge(prior),
    }  # fmt: skip
    rows = []
    for k in range(K):
        seen = x[:, :k], y[:, :k], x[:, k : k + 1]
        found = {name: rival(*seen)[:, 0] for name, rival in known.items()}
        for name, predicted in {"transformer": ours[:, k], **found}.items():
            errors = (y[:, k] - predicted) ** 2
            mean, half = errors.mean().item(), 1.96 * errors.std().item() / math.sqrt(n)
            rows.append((k, name, mean, mean - half, mean + half))
    return pd.DataFrame(rows, columns=["pairs", "learner", "error", "low", "high"])


# ------------------------------------------------------------------------------- kept in files


def obtain(
    recipe: Recipe, folder: str | Path, fresh: bool = False, device: str | None = None
) -> Trained:
    """Return a trained network: the one in the folder if it is there, else a new one, kept there.

    Args:
        recipe: See `Recipe`; file names have its hash.
        folder: Of <name>.safetensors and <name>.json (recipe, learning curve, losses, versions).
        fresh: Train it anew in any case.
        device: See `train`.

    Raises:
        store.StoreError: If the files are damaged.
        FloatingPointError: As `train`.
    """
    weights = paths.resolve(folder) / f"{recipe.name}.safetensors"
    known = weights.exists() and weights.with_suffix(".json").exists()
    if known and not fresh:
        print(f"networks: reused {paths.shown(weights)}")
        return _load(recipe, weights, device)
    if fresh:
        _partial(recipe, folder).unlink(missing_ok=True)
    trained = train(recipe, folder, device=device)
    curve = learning_curve(trained.network, recipe.prior).round(DIGITS)
    trained = replace(trained, curve=curve)
    if known:
        before = _load(recipe, weights, "cpu").curve["error"]
        apart = (trained.curve["error"] / before - 1).abs().max()
        print(f"networks: trained {recipe.name} anew; its learning curve is within {apart:.1%}")
    _save(trained, weights)
    return trained


def _save(trained: Trained, weights: Path) -> None:
    """Write a network's files, each by way of a temporary name."""
    parts = np.array_split(trained.losses, min(PARTS, len(trained.losses)))
    record = {
        "recipe": asdict(trained.recipe),
        "curve": trained.curve.to_dict("list"),
        "losses": [round(float(part.mean()), 5) for part in parts],
        "seconds": round(trained.seconds, 1),
        "made_with": store.made_with(),
    }
    with paths.replacing(weights) as temporary:
        temporary.write_bytes(save(_copied(trained.network)))
        # of other weights, until it is written
        weights.with_suffix(".json").unlink(missing_ok=True)
    store.publish(weights.with_suffix(".json"), (json.dumps(record) + "\n").encode())


def _load(recipe: Recipe, weights: Path, device: str | None) -> Trained:
    """Read a network's files.

    Raises:
        store.StoreError: If they are damaged.
    """
    network = Regressor(recipe.prior.dimension, recipe.shape)
    try:
        network.load_state_dict(load_file(weights))
        record = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        if record["recipe"] != json.loads(json.dumps(asdict(recipe))):
            raise ValueError("it is of another recipe")
        curve, losses = pd.DataFrame(record["curve"]), np.array(record["losses"])
        trained = Trained(network.eval(), recipe, losses, curve, record["seconds"])
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise store.StoreError(
            f"{paths.shown(weights)} or the .json beside it is damaged: {error}. Delete both and "
            "run again; the network will be trained anew."
        ) from error
    network.to(device or default_device())
    return trained


# ------------------------------------------------------------------------ the network's gradients


def own_gradients(network: Regressor, problems: Problems, k: int = 0) -> dict[str, np.ndarray]:
    """Return inner products of the network's own gradients, r_i r_q J_i . J_q, by form.

    Losses are half the squared errors of predictions after a base context of k pairs (none at all
    for k = 0), residuals r are the network's, J [P] is the derivative of a prediction by all
    weights. The mean over base contexts.

    - "raw": as it is. Every prediction has a large part of J in common (such as that by the output
      bias), which says nothing of x.
    - "centred": J(x) - J(0), what depends on the covariates.
    - "embedding": J by the weights that read tokens in.

    Args:
        network: See `Regressor`.
        problems: B problems.
        k: Pairs of each base context.

    Returns:
        By form, [B, N, M]; positive = helps.
    """
    B, N, M = problems.shape
    weight = network.read_in.weight
    parameters = {name: tensor.detach() for name, tensor in network.named_parameters()}

    def predicted(parameters, x, y, asked):
        inputs = x[None], y[None], asked[None, None]
        return torch.func.functional_call(network, parameters, inputs)[0, 0]

    both = torch.func.grad_and_value(predicted)
    of_many = torch.func.vmap(both, in_dims=(None, None, None, 0), chunk_size=TOGETHER)
    bases = list(problems.bases(k))
    found = {form: np.zeros((B, N, M)) for form in ("raw", "centred", "embedding")}
    for b in range(B):
        origin = torch.zeros_like(problems.x[b, :1])
        asked = torch.cat([problems.x[b], problems.queries[b], origin]).to(weight)
        labels = torch.cat([problems.y[b], problems.answers[b]])
        for x, y in bases:
            jacobian, predictions = of_many(parameters, x[b].to(weight), y[b].to(weight), asked)
            r = labels - predictions[:-1].to(labels)
            residuals = (r[:N, None] * r[None, N:]).numpy()
            for form, kernel in _kernels(jacobian, N).items():
                found[form][b] += residuals * kernel.cpu().numpy() / len(bases)
    return found


def _kernels(jacobian: Mapping[str, Tensor], N: int) -> dict[str, Tensor]:
    """Return J_i . J_q [N, M] by form, from J [N + M + 1, ...] by parameter, the last one J(0)."""
    raw, centred = 0.0, 0.0
    for name, part in jacobian.items():
        part = part.flatten(1)
        products = (part[:N] @ part[N:].T).double()  # with queries and with the origin
        of_origin = (part[-1] @ part[N:].T).double()
        raw = raw + products[:, :-1]
        centred = centred + products[:, :-1] - products[:, -1:] - of_origin[:-1] + of_origin[-1]
        if name == "read_in.weight":
            embedding = products[:, :-1]
    return {"raw": raw, "centred": centred, "embedding": embedding}
