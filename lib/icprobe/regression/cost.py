"""What training and scoring cost on synthetic regression, by dimension."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from tqdm import tqdm

from icprobe.regression import influence, probing
from icprobe.regression.problems import draw
from icprobe.regression.training import Recipe, train
from icprobe.regression.transformer import learner


def by_dimension(
    dimensions: Sequence[int], recipe: Recipe, steps: int, B: int, N: int, M: int
) -> pd.DataFrame:
    """Return what training and scoring cost at each dimension, contexts being 2 D + 1 pairs long.

    Args:
        dimensions: D.
        recipe: Whose architecture and batch are kept.
        steps: Of training, whose mean time is taken.
        B: Problems that are scored.
        N: Examples of each.
        M: Queries of each.

    Returns:
        One row each, times in milliseconds: dimension, pairs, weights, training step; and for each
        problem, one-shot: gain, own gradients, TracIn, add-one (the last two in closed form).
    """
    rows = []
    for D in tqdm(dimensions, desc="cost", unit=" dimensions"):
        prior = replace(recipe.prior, dimension=D, variances=())
        shape = replace(recipe.shape, pairs=2 * D + 1)
        trained = train(replace(recipe, prior=prior, shape=shape, steps=steps))
        network = trained.network
        problems = draw(prior, np.random.default_rng(0), B, N, M)
        rows.append(
            {
                "dimension": D,
                "pairs": 2 * D + 1,
                "weights": sum(weight.numel() for weight in network.parameters()),
                "training step": 1000 * trained.seconds / steps,
                "gain": _milliseconds(probing.gain, learner(network), problems) / B,
                "own gradients": _milliseconds(influence.network_gradients, network, problems) / B,
                "TracIn": _milliseconds(influence.tracin_at_base, prior, problems) / B,
                "add-one": _milliseconds(influence.add_one, prior, problems) / B,
            }
        )
    return pd.DataFrame(rows)


def _milliseconds(work: Callable, *arguments) -> float:
    """Return how long a call takes the second time."""
    work(*arguments)
    start = time.perf_counter()
    work(*arguments)
    return 1000 * (time.perf_counter() - start)
