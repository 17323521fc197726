"""Influence functions with EK-FAC curvature, through the library kronfluence.

    ekfac_ij = < grad L(z_i), (H + damping)^-1 grad L(q_j) >

where H is the eigenvalue-corrected Kronecker-factored approximation (George et al. 2018) of the
Fisher information of each linear layer's weight, as Grosse et al. 2023 use it for language models.
In nats: nats per unit of learning rate, over the curvature's nats per squared weight.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from icprobe.methods import gradient
from icprobe.scores.method import Examples, Method

if TYPE_CHECKING:
    from icprobe.models import LM, Encoded

    Fitted = tuple[LM, list[Encoded], tempfile.TemporaryDirectory]

FITTED = 1024  # examples that are enough for the curvature
CURVATURE = "ekfac"  # of those that kronfluence knows
# added to every eigenvalue of H; None is a tenth of each layer's mean, as Grosse et al. take it
DAMPING = None

# GiB of whole query gradients held at once (4 bytes for each weight of the chosen layers); the
# training examples are read again for each
MEMORY = 4.0


@dataclass(frozen=True)
class EKFACInfluence(Method):
    """Influence functions with EK-FAC curvature over so many of the last transformer blocks.

    The curvature is fitted once for all training examples: to the pool, or to one to two thousand
    of it. The seed is that of the labels that H is computed with: drawn from the model's own
    predictions at the tokens of the loss, for each example the same whatever it is batched with.
    For `layers` and `loss_on` see `dot.gradient_dot`.
    """

    name = "ekfac"
    unit = "nats; positive = helps"
    notebook = "02"
    needs_pool = True
    local_only = True

    blocks: int
    layers: str = ""
    loss_on: str = "completion"
    seed: int = 0

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError for more blocks than there are, or if no layer matches."""
        gradient.last_blocks(lm, self.blocks, self.layers)
        if importlib.util.find_spec("kronfluence") is None:
            raise ImportError(
                "EK-FAC needs kronfluence: pip install --no-deps -r requirements-no-deps.txt"
            )

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> Fitted:
        """Fit the curvature on the pool, or on one to two thousand of it."""
        from kronfluence.arguments import FactorArguments

        fit_on = pool.tokens[:: max(1, len(pool) // FITTED)]
        folder = tempfile.TemporaryDirectory(prefix="icprobe-")  # removed with what is returned
        with self._analyzer(lm, [(z, self.loss_on) for z in fit_on], folder) as analyzer:
            analyzer.fit_all_factors(
                "factors",
                dataset=gradient.losses.by_length(fit_on),
                per_device_batch_size=_per_pass(lm, fit_on),
                factor_args=FactorArguments(strategy=CURVATURE),
            )
        return lm, queries.tokens, folder

    def score(self, prepared: Fitted, train: Examples) -> np.ndarray:
        """Return the influence functions [n, M] in nats."""
        from kronfluence.arguments import ScoreArguments

        lm, queries, folder = prepared
        everything = [(z, self.loss_on) for z in train.tokens]
        everything += [(q, "completion") for q in queries]
        rows, columns = map(gradient.losses.by_length, (train.tokens, queries))
        weights = sum(layer.weight.nbytes for layer in self._layers(lm).values())
        per_pass = _per_pass(lm, queries)
        held = max(1, int(MEMORY * 2**30 / weights) // per_pass)
        with self._analyzer(lm, everything, folder) as analyzer:
            analyzer.compute_pairwise_scores(
                "scores",
                factors_name="factors",
                query_dataset=[len(train) + j for j in columns],
                train_dataset=rows,
                per_device_query_batch_size=per_pass,
                per_device_train_batch_size=_per_pass(lm, train.tokens),
                score_args=ScoreArguments(
                    damping_factor=DAMPING, query_gradient_accumulation_steps=held
                ),
                overwrite_output_dir=True,
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"].T
        scores = np.empty((len(train), len(queries)), np.float32)
        scores[np.ix_(rows, columns)] = found.float().numpy()
        return scores

    def _layers(self, lm: LM) -> dict:
        return gradient.linear_layers(lm, gradient.last_blocks(lm, self.blocks, self.layers))

    def _analyzer(self, lm, everything, folder):
        from icprobe.methods.gradient import kronfluence_task

        layers = self._layers(lm)
        return kronfluence_task.analyzer(lm, layers, everything, self.seed, folder.name)


def _per_pass(lm: LM, examples: Sequence[Encoded]) -> int:
    """Return how many examples of any length fit in one forward and backward pass."""
    longest = max(len(lm.bos) + len(example.ids) for example in examples)
    return max(1, gradient.losses.tokens_per_pass(lm) // longest)
