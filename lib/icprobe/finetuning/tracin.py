"""TracIn over the checkpoints of a fine-tuning run on the experiment's own pool.

TracInCP (Pruthi et al. 2020) adds gradient products up over the checkpoints w_t of a run:

    tracin_ij = sum_t eta_t < grad L(z_i; w_t), grad L(q_j; w_t) >

in nats: what the queries' losses would fall by, to first order, if from each checkpoint in turn a
step of plain gradient descent of size eta_t were taken on z_i alone. eta_t is the mean rate of the
steps that led to w_t (as LESS takes it, Xia et al. 2024), at the start that of the first step. The
run itself takes steps of AdamW on batches' mean losses, so its own falls are other numbers than the
sum; compare ranks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from icprobe import models
from icprobe.finetuning.recipe import Recipe
from icprobe.methods import gradient
from icprobe.scores.method import Examples, Method, setting

if TYPE_CHECKING:
    from icprobe.models import LM, Encoded


@dataclass(frozen=True)
class TracIn(Method):
    """Gradient products over a run's checkpoints: float32 [N, M], in nats, positive = helps.

    A copy of the model is trained, all its weights whatever the `layers`; its checkpoints are
    scored and deleted (they lie in TMPDIR, one size of the model each), and the matrix is stored in
    one part, so that it is of one run. It is stored under the recipe, not under the checkpoints'
    hashes: training differs in the last bits between machines, and the scores with it.

    `start` are the products [N, M] at the start, of the same layers and loss_on, if they are there;
    that saves their part of the time. For layers, loss_on and memory see `gradient.gradient_dot`.
    """

    name = "tracin"
    unit = "nats; positive = helps"
    version = 2
    notebook = "02"
    block_size = None  # one part
    local_only = True

    recipe: Recipe
    layers: str = ""
    loss_on: str = "completion"
    start: np.ndarray | None = setting()
    memory: float | None = setting()

    @property
    def options(self) -> dict:
        """The version, layers, loss_on and the recipe's fields."""
        return {**super().options, "recipe": asdict(self.recipe)}

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError for a `start` of another shape, or a recipe without checkpoints."""
        shape = len(pool), len(queries)
        if self.start is not None and np.shape(self.start) != shape:
            raise ValueError(f"start has shape {np.shape(self.start)}, expected {shape}")
        if not self.recipe.save_steps(len(pool)):
            raise ValueError("saves is 0, expected at least one checkpoint beside the start")

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Train on the whole pool, and return the sum over checkpoints [N, M] in nats."""
        from icprobe.finetuning import sft

        lm, queries = prepared
        pairs = train.tokens, queries.tokens
        how = {"layers": self.layers, "loss_on": self.loss_on, "memory": self.memory}
        start = self.start
        if start is None:  # before the training, so that wrong options show at once
            start = gradient.gradient_dot(lm, *pairs, **how)
        with tempfile.TemporaryDirectory(prefix="icprobe-") as folder:
            run = sft.train(lm, train.tokens, self.recipe, folder, self.loss_on)
            (_, rate), *later = run.checkpoints
            return rate * start + over_checkpoints(lm, later, *pairs, **how)


def over_checkpoints(
    lm: LM,
    checkpoints: Sequence[tuple[str, float]],
    train: Sequence[Encoded],
    queries: Sequence[Encoded],
    **how: str | float | None,
) -> np.ndarray:
    """Return the sum over checkpoints (folder, learning rate) of a run: float32 [N, M], in nats.

    They are read in the dtype and on the device of `lm`; for the rest see `gradient.gradient_dot`.
    """
    total = np.zeros((len(train), len(queries)))
    for folder, rate in tqdm(checkpoints, desc="checkpoints"):
        if rate:  # at the end of many schedules it is zero
            reached = models.load(folder, lm.identity["dtype"], str(lm.device))
            total += rate * gradient.gradient_dot(reached, train, queries, **how)
            del reached  # or two models would be held
    return total.astype(np.float32)
