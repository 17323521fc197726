"""Where blocks of training examples are scored: in this process, or by workers of a Ray cluster.

A method that can be spread gives two functions. `start` is called once in each process, with the
model: it prepares what all blocks share (such as the queries' gradients) and returns the function
that scores. `arguments` says what that function takes for some rows. So a worker is sent the
queries once and training examples a block at a time: it needs the model, and neither the data nor
the folder of scores. Blocks are the same everywhere, and only the driver writes them.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from icprobe import store
from icprobe.experiment import Experiment
from icprobe.lm import LM
from icprobe.store import ScoreStore

LOCAL, RAY = ENGINES = ("local", "ray")

# takes what `arguments` returned for a block of n training examples, returns a matrix [n, M] for
# each store, or None for one where the block is finished
Score = Callable[..., Sequence[np.ndarray | None]]


def fill(
    engine: str,
    experiment: Experiment,
    lm: LM,
    stores: Sequence[ScoreStore],
    start: Callable[[LM], Score],
    arguments: Callable[[range], tuple],
    gib: float = 0,
) -> list[np.ndarray]:
    """Compute the missing blocks of stores that are filled together, and return all scores.

    Args:
        engine: "local" or "ray", see `scores.ray_engine`.
        experiment: What is scored; workers load its model.
        lm: The experiment's model, for this process.
        stores: With the same rows, in blocks of the same size.
        start: See this module; for Ray a function that can be pickled. Not called where nothing
            is missing.
        arguments: The same; called in this process.
        gib: What the method holds in each process, beside the model; for Ray's workers on CPUs.

    Returns:
        float32 [N, M] of each store.

    Raises:
        ValueError: If the engine is unknown.
        store.StoreError: As `store.compute`.
        ImportError: If Ray is not installed.
        scores.ray_engine.ClusterError: If there is no cluster, or workers or blocks failed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, expected {' or '.join(map(repr, ENGINES))}")
    if engine == RAY:
        from icprobe.scores import ray_engine  # Ray is an extra

        score_blocks = functools.partial(
            ray_engine.score_blocks, experiment, lm, start, arguments, gib,
            train_ids=stores[0].train_ids,
        )  # fmt: skip
    else:
        held = functools.cache(lambda: start(lm))
        score_blocks = store.one_by_one(lambda rows: held()(*arguments(rows)))
    store.compute(stores, score_blocks)
    return [kept.matrix() for kept in stores]
