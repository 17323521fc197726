"""Training the in-context transformer from scratch, its learning curve, and its files."""

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from tqdm import trange

from icprobe.data import paths
from icprobe.regression.learners import Ridge, least_squares
from icprobe.regression.problems import Positive, Prior
from icprobe.regression.transformer import TOKENS_AT_ONCE, Regressor, Shape
from icprobe.scores import store

VERSION = 1  # raise it when the same recipe begins to train in another way
# from this width on, all threads train: sharing smaller products out costs more than it saves
WIDE = 128
CURVE_SEQUENCES = 4000
CURVE_DIGITS = 6  # after the point
# what reading damaged files raises
DAMAGE = FileNotFoundError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError


@validated(frozen=True, kw_only=True)
class Recipe:
    """All that determines a trained network.

    AdamW without weight decay, gradients clipped to norm 1; the rate rises, stays, and falls to
    zero along a cosine. Each step has `batch` new sequences, each of a task of its own.
    """

    prior: Prior = field(default_factory=Prior)
    shape: Shape = field(default_factory=Shape)
    steps: int = Field(3300, ge=1, strict=True)
    batch: int = Field(64, ge=1, strict=True)
    rate: Positive = 2e-3  # at its highest
    warmup: int = Field(200, ge=0, strict=True)  # steps in which the rate rises
    decay_from: float = Field(0.2, ge=0, lt=1)  # fraction of the steps after which it falls
    seed: int = 0  # of the network's start and of the data

    @property
    def name(self) -> str:
        """Of the files of a network: readable, and with a hash of the whole recipe."""
        size = f"d{self.prior.dimension}-w{self.shape.width}-l{self.shape.layers}"
        return store.key(f"{size}-seed{self.seed}", {"version": VERSION, **asdict(self)})

    def rate_at(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        start = self.decay_from * self.steps
        fallen = max(0.0, (step - start) / (self.steps - start))
        return self.rate * rising * (1 + math.cos(math.pi * fallen)) / 2


@dataclass(frozen=True)
class Trained:
    """A trained network, in evaluation mode, and how it came about."""

    network: Regressor
    seconds: float  # of training, on the machine where it was trained
    curve: pd.DataFrame | None = None  # see `learning_curve`
    snapshots: Mapping[int, Regressor] | None = None  # the network after a number of steps


def train(recipe: Recipe, snapshots: Sequence[int] = ()) -> Trained:
    """Train a network from scratch, on a GPU if there is one, and keep it after `snapshots` steps.

    The same recipe gives the same weights on one machine with as many threads; elsewhere they
    differ from the last bits on, more and more. FloatingPointError names the step at which the loss
    was not finite.
    """
    with torch.random.fork_rng():  # torch's layers start from the global generator
        torch.manual_seed(recipe.seed)
        network = Regressor(recipe.prior.dimension, recipe.shape).to(_device())
    optimizer = torch.optim.AdamW(
        network.parameters(), recipe.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    kept, start, threads = {}, time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(threads if recipe.shape.width >= WIDE else 1)
    try:
        for step in trange(recipe.steps, desc=f"training {recipe.name}", leave=False):
            if step in snapshots:
                kept[step] = copy.deepcopy(network).eval()
            loss = _step(network, optimizer, recipe, step)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{recipe.name}: the loss of step {step + 1} is {loss}: lower the rate "
                    f"({recipe.rate})"
                )
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    kept[recipe.steps] = network.eval()
    return Trained(network, seconds, snapshots=kept)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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


def learning_curve(network: Regressor, prior: Prior, n: int = CURVE_SEQUENCES) -> pd.DataFrame:
    """Return how well labels of n new sequences are predicted from the pairs before them.

    One row each: pairs, learner, error (mean squared), low, high (95 %, normal). Least squares has
    no finite expectation where there are about as many pairs as dimensions.
    """
    K, weight, ridge = network.shape.pairs, network.read_in.weight, Ridge(prior)
    x, y = prior.prompts(np.random.default_rng([0, 2**31]), n, K)
    with torch.inference_mode():
        parts = (t.to(weight).split(max(1, TOKENS_AT_ONCE // (2 * K))) for t in (x, y))
        ours = torch.cat([network.along(*part) for part in zip(*parts, strict=True)]).to(y)
    rows = []
    for k in range(K):
        context, query = (x[:, :k], y[:, :k]), x[:, k : k + 1]
        found = {
            "transformer": ours[:, k : k + 1],
            "prior mean": ridge(x[:, :0], y[:, :0], query),
            "least squares": least_squares(*context, query),
            "ridge": ridge(*context, query),
        }
        for name, predicted in found.items():
            errors = (y[:, k] - predicted[:, 0]) ** 2
            mean, half = errors.mean().item(), 1.96 * errors.std().item() / math.sqrt(n)
            rows.append((k, name, mean, mean - half, mean + half))
    return pd.DataFrame(rows, columns=["pairs", "learner", "error", "low", "high"])


def load_or_train(recipe: Recipe, folder: str | Path, fresh: bool = False) -> Trained:
    """Return a trained network of the folder or the reference, else (or if fresh) a new one.

    A network has <name>.safetensors and <name>.json (recipe, learning curve, seconds, versions),
    written last; a new one is kept in the folder. StoreError names files that are damaged, or that
    would be the reference's.
    """
    own, reference = (
        paths.resolve(kept) / f"{recipe.name}.json" for kept in (folder, paths.REFERENCE_NETWORKS)
    )
    for record in () if fresh else (own, reference):
        if record.exists():
            print(f"networks: reused {paths.shown(record.with_suffix('.safetensors'))}")
            return _load(recipe, record)
    if paths.is_reference(own):
        raise store.StoreError(f"{paths.shown(own)}: reference networks are only read")
    trained = train(recipe)
    curve = learning_curve(trained.network, recipe.prior).round(CURVE_DIGITS)
    own.unlink(missing_ok=True)  # of other weights, until it is written
    with paths.replacing(own.with_suffix(".safetensors")) as temporary:
        save_file(trained.network.state_dict(), temporary)
    record = {"recipe": asdict(recipe), "curve": curve.to_dict("list")}
    record |= {"seconds": round(trained.seconds, 1), "made_with": store.made_with()}
    with paths.replacing(own) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return Trained(trained.network, trained.seconds, curve)


def _load(recipe: Recipe, file: Path) -> Trained:
    network = Regressor(recipe.prior.dimension, recipe.shape)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        network.load_state_dict(load_file(file.with_suffix(".safetensors")))
        if Recipe(**record["recipe"]) != recipe:
            raise ValueError("it is of another recipe")
        curve, seconds = pd.DataFrame(record["curve"]), record["seconds"]
    except DAMAGE as error:
        raise store.StoreError(
            f"{paths.shown(file)} or the .safetensors beside it is damaged: {error}. Delete both "
            "and run again; the network will be trained anew."
        ) from error
    return Trained(network.to(_device()).eval(), seconds, curve)
