"""Training the in-context transformer from scratch, its learning curve, and its files."""

import copy
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
from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from icprobe.data import paths
from icprobe.regression.learners import LeastSquares, PriorMean, Ridge
from icprobe.regression.problems import Positive, Prior
from icprobe.regression.transformer import TOKENS_AT_ONCE, Regressor, Shape
from icprobe.scores import store

VERSION = 1  # raise it when the same recipe begins to train in another way
WIDE = 128  # networks from this width on are trained on all threads of a CPU
CURVE_SEQUENCES = 4000
CURVE_DIGITS = 6  # after the point


@validated(frozen=True, kw_only=True)
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
        decay_from: Fraction of the steps after which it falls.
        seed: Of the network's start and of the data.

    Raises:
        ValueError: If a field is out of range; names it.
    """

    prior: Prior = field(default_factory=Prior)
    shape: Shape = field(default_factory=Shape)
    steps: int = Field(3300, ge=1, strict=True)
    batch: int = Field(64, ge=1, strict=True)
    rate: Positive = 2e-3
    warmup: int = Field(200, ge=0, strict=True)
    decay_from: float = Field(0.2, ge=0, lt=1)
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of its files: readable, and with a hash of the whole recipe."""
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
        seconds: Of training, on the machine where it was trained.
        curve: See `learning_curve`; None where none was taken.
        snapshots: The network as it was after a number of steps, by this number.
    """

    network: Regressor
    recipe: Recipe
    seconds: float
    curve: pd.DataFrame | None = None
    snapshots: Mapping[int, Regressor] = field(default_factory=dict, repr=False)


def train(recipe: Recipe, snapshots: Sequence[int] = ()) -> Trained:
    """Train a network from scratch, on a GPU if there is one.

    The same recipe gives the same weights on one machine with as many threads; elsewhere they
    differ from the last bits on, more and more.

    Args:
        recipe: See `Recipe`.
        snapshots: After how many steps (0 is the start) the network is kept, see `Trained`.

    Raises:
        ValueError: If a snapshot is to be taken after the end.
        FloatingPointError: If the loss is not finite; names the step.
    """
    if any(not 0 <= step <= recipe.steps for step in snapshots):
        raise ValueError(f"snapshots are {list(snapshots)}, expected 0 to {recipe.steps} steps")
    with torch.random.fork_rng():  # torch's layers start from the global generator
        torch.manual_seed(recipe.seed)
        network = Regressor(recipe.prior.dimension, recipe.shape).to(_device())
    optimizer = torch.optim.AdamW(
        network.parameters(), recipe.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    kept, start = {}, time.perf_counter()
    bar = tqdm(desc=f"training {recipe.name}", total=recipe.steps, unit=" steps", leave=False)
    with bar, _few_threads(recipe.shape):
        for step in range(recipe.steps):
            if step in snapshots:
                kept[step] = copy.deepcopy(network).eval()
            loss = _step(network, optimizer, recipe, step)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{recipe.name}: the loss of step {step + 1} is {loss}: lower the rate "
                    f"({recipe.rate})"
                )
            bar.update()
    seconds = time.perf_counter() - start
    network.eval()
    if recipe.steps in snapshots:
        kept[recipe.steps] = network
    return Trained(network, recipe, seconds, snapshots=kept)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _few_threads(shape: Shape):
    """Work on one thread where products are small: sharing them out costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if shape.width >= WIDE else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def learning_curve(
    network: Regressor, prior: Prior, n: int = CURVE_SEQUENCES, seed: int = 0
) -> pd.DataFrame:
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
        parts = (t.to(weight).split(max(1, TOKENS_AT_ONCE // (2 * K))) for t in (x, y))
        ours = torch.cat([network.along(*part) for part in zip(*parts, strict=True)]).to(y)
    known = {
        "prior mean": PriorMean(prior), "least squares": LeastSquares(), "ridge": Ridge(prior),
    }  # fmt: skip
    rows = []
    for k in range(K):
        context = x[:, :k], y[:, :k], x[:, k : k + 1]
        found = {name: learner(*context)[:, 0] for name, learner in known.items()}
        for name, predicted in {"transformer": ours[:, k], **found}.items():
            errors = (y[:, k] - predicted) ** 2
            mean, half = errors.mean().item(), 1.96 * errors.std().item() / math.sqrt(n)
            rows.append((k, name, mean, mean - half, mean + half))
    return pd.DataFrame(rows, columns=["pairs", "learner", "error", "low", "high"])


def load_or_train(recipe: Recipe, folder: str | Path, fresh: bool = False) -> Trained:
    """Return a trained network: a finished one of the folder or the reference, else a new one.

    Args:
        recipe: See `Recipe`; file names have its hash.
        folder: Of <name>.safetensors and <name>.json (recipe, learning curve, seconds, versions),
            where a new one is kept; reference networks are only read.
        fresh: Train it anew in any case.

    Raises:
        store.StoreError: If the files are damaged, or a new one would be the reference's.
        FloatingPointError: As `train`.
    """
    for kept in (paths.resolve(folder), paths.REFERENCE_NETWORKS):
        weights = kept / f"{recipe.name}.safetensors"
        if not fresh and weights.exists() and weights.with_suffix(".json").exists():
            print(f"networks: reused {paths.shown(weights)}")
            return _load(recipe, weights)
    weights = paths.resolve(folder) / f"{recipe.name}.safetensors"
    if paths.is_reference(weights):
        raise store.StoreError(f"{paths.shown(weights)}: reference networks are only read")
    trained = train(recipe)
    curve = learning_curve(trained.network, recipe.prior).round(CURVE_DIGITS)
    trained = replace(trained, curve=curve)
    _save(trained, weights)
    return trained


def _save(trained: Trained, weights: Path) -> None:
    """Write a network's files, each by way of a temporary name."""
    record = {
        "recipe": asdict(trained.recipe),
        "curve": trained.curve.to_dict("list"),
        "seconds": round(trained.seconds, 1),
        "made_with": store.made_with(),
    }
    described = weights.with_suffix(".json")
    with paths.replacing(weights) as temporary:
        temporary.write_bytes(save(copy.deepcopy(trained.network).cpu().state_dict()))
        described.unlink(missing_ok=True)  # it is of other weights, until it is written
    with paths.replacing(described) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")


def _load(recipe: Recipe, weights: Path) -> Trained:
    """Read a network's files.

    Raises:
        store.StoreError: If they are damaged.
    """
    network = Regressor(recipe.prior.dimension, recipe.shape)
    try:
        network.load_state_dict(load_file(weights))
        record = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        if Recipe(**record["recipe"]) != recipe:
            raise ValueError("it is of another recipe")
        curve, seconds = pd.DataFrame(record["curve"]), record["seconds"]
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise store.StoreError(
            f"{paths.shown(weights)} or the .json beside it is damaged: {error}. Delete both and "
            "run again; the network will be trained anew."
        ) from error
    return Trained(network.to(_device()).eval(), recipe, seconds, curve)
