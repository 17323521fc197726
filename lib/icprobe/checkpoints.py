"""TracIn over the checkpoints of a fine-tuning run on the experiment's own pool.

TracInCP (Pruthi et al. 2020) adds up gradient dot products over the checkpoints w_t of a run:

    tracin_ij = sum_t eta_t < grad L(z_i; w_t), grad L(q_j; w_t) >

where eta_t is the step size used between the checkpoint before and this one. A schedule changes it
in between, so eta_t is the mean over those steps (LESS, Xia et al. 2024, takes it so, too); the
start, which no step has led to, counts with the rate of the first step away from it. The sum is in
nats: what the queries' losses would fall by, to first order, if from each checkpoint in turn a step
of plain gradient descent of size eta_t were taken on z_i alone. The run itself takes steps of AdamW
on batches' mean losses, so its own falls are other numbers; compare ranks.
"""

import tempfile
from dataclasses import asdict

import numpy as np

from icprobe import influence
from icprobe.experiment import Experiment
from icprobe.finetuning import sft
from icprobe.finetuning.recipe import Recipe
from icprobe.lm import LM

METHOD = "tracin"
VERSION = 2  # raise it when the same recipe begins to train in another way
UNIT = "nats; positive = helps"


def tracin(
    experiment: Experiment,
    lm: LM,
    recipe: Recipe,
    dot: np.ndarray | None = None,
    layers: str = "",
    loss_on: str = "completion",
    reduction: str = "sum",
    memory: float | None = None,
    fresh: bool = False,
) -> np.ndarray:
    """Return TracIn over a fine-tuning run on the experiment's pool: float32 [N, M], in nats.

    Positive = helps; see the module for the formula. Finished scores are returned at once. Else a
    copy of the model is trained, its checkpoints are scored and deleted (they lie in TMPDIR, one
    size of the model each), and the whole matrix is stored in one part, so that it is always of one
    run. It is stored under the recipe, not under the checkpoints' hashes: training differs in the
    last bits between machines, and the scores with it.

    Args:
        experiment: What is scored (its pool of N, its M queries) and where the scores lie.
        lm: The experiment's model; it is left as it was.
        recipe: How it is trained, with at least one checkpoint.
        dot: [N, M] products at the start if they are there, `influence.attribute` of the same
            layers, loss_on and reduction; saves their share of the time.
        layers: See `gradients.linear_layers`; of the scores only, all weights are trained.
        loss_on: See `influence.GradientDot.products`; what is trained on, too.
        reduction: See `influence.GradientDot.products`; of the scores only.
        memory: See `influence.GradientDot`.
        fresh: Compute everything anew.

    Raises:
        ValueError: If the model is not the experiment's, `dot` has another shape, the recipe saves
            no checkpoint, or as `sft.train`.
        FloatingPointError: If a loss or a gradient is not finite.
    """
    pool, queries = experiment.encode(lm)
    shape = len(pool), len(queries)
    if dot is not None and np.shape(dot) != shape:
        raise ValueError(f"dot has shape {np.shape(dot)}, expected {shape}")
    if not recipe.save_steps(len(pool)):
        raise ValueError("saves is 0, expected at least one checkpoint beside the start")
    kept = experiment.store(
        METHOD,
        *([row.id for row in rows] for rows in (pool, queries)),
        _options(recipe, layers, loss_on, reduction),
        fresh=fresh,
        description=UNIT,
        block_size=len(pool),
    )

    def scores(_) -> np.ndarray:
        loss = {"loss_on": loss_on, "reduction": reduction}
        scoring = {"layers": layers, **loss, "memory": memory}
        start = dot
        if start is None:  # before the training, so that wrong options show at once
            start = influence.gradient_dot(lm, pool, queries, **scoring)
        with tempfile.TemporaryDirectory(prefix="icprobe-") as folder:
            (_, rate), *later = sft.train(lm, pool, recipe, folder, loss_on).checkpoints
            return rate * start + influence.tracin(
                later, pool, queries, lm.identity["dtype"], str(lm.device), **scoring
            )

    return kept.fill(scores, progress=False)


def find(
    experiment: Experiment,
    recipe: Recipe,
    made_by: str,
    layers: str = "",
    loss_on: str = "completion",
    reduction: str = "sum",
) -> np.ndarray:
    """Return finished scores, float32 [N, M] in nats; needs neither the model nor the data.

    Args:
        experiment: What was scored.
        recipe: See `tracin`.
        made_by: What to run if the scores are not there, for the error message.
        layers: See `tracin`.
        loss_on: See `tracin`.
        reduction: See `tracin`.

    Raises:
        store.ScoresNotFound: If they are not there.
    """
    options = _options(recipe, layers, loss_on, reduction)
    return experiment.find(METHOD, options, made_by).matrix()


def _options(recipe: Recipe, layers: str, loss_on: str, reduction: str) -> dict:
    """Return what determines the scores, beside the experiment."""
    return {
        "version": VERSION,
        "recipe": asdict(recipe),
        "layers": layers,
        "loss_on": loss_on,
        "reduction": reduction,
    }
