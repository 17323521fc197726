"""Ground truth of attribution: train on one example and see what becomes of the queries.

From the model's weights w, one optimiser step is taken on each training example alone, and

    effect_ij = log p(y_j | x_j; w after the step on z_i) - log p(y_j | x_j; w)

in nats, summed over completion tokens: [N, M], positive = training on the example helps. It is what
TracIn (Pruthi et al. 2020) idealises and the gradient dot product is the first order of: for
gradient descent, effect / rate goes to `gradient.gradient_dot` of the same loss as the rate goes
to zero. The weights trained are those that gradient products are over, `gradient.linear_layers`,
and the loss is fine-tuning's: the mean over completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pydantic

from icprobe.scores.experiment import Experiment
from icprobe.scores.method import Examples, Method, Output, setting

if TYPE_CHECKING:
    from icprobe.methods.training_steps import TrainingSteps
    from icprobe.models import LM

# each optimiser's class in torch, and its settings besides the rate; decay would add the same to
# every effect
OPTIMIZERS = {
    "sgd": ("SGD", {"momentum": 0.0, "weight_decay": 0.0}),
    "adamw": ("AdamW", {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
}

Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(strict=True))
class Step:
    """One step of an optimiser that has seen nothing before, with its settings in `OPTIMIZERS`."""

    optimizer: Literal["sgd", "adamw"]
    rate: Positive  # the learning rate
    clip: Positive | None = None  # norm that a larger gradient is scaled down to

    @property
    def name(self) -> str:
        """Such as "SGD 1e-4", or "AdamW 1e-5, clip 1"; different steps have different names."""
        rate = np.format_float_scientific(self.rate, trim="-", exp_digits=1)
        clip = f", clip {np.format_float_positional(self.clip, trim='-')}" if self.clip else ""
        return f"{OPTIMIZERS[self.optimizer][0]} {rate}{clip}"

    @property
    def options(self) -> dict:
        """Everything that determines the step."""
        return {**asdict(self), **OPTIMIZERS[self.optimizer][1]}


def read_step(values: Sequence) -> Step:
    """Return the step that a parameter [optimizer, rate] or [optimizer, rate, clip] asks for.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        return Step(*values)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"{values!r} is no [optimizer, rate]: {reason}") from None


def planned(steps: Sequence[Sequence]) -> list[Step]:
    """Return the steps of the parameter `steps`, see `read_step`.

    The first two are of SGD without clipping, the smaller rate first: the linear regime, and the
    step that scores are held against.

    Raises:
        ValueError: If they are anything else, or one is there twice.
    """
    found = [read_step(values) for values in steps]
    if len(set(found)) < len(found):
        raise ValueError(f"steps is {steps!r}, expected each once")
    small_and_large = [(step.optimizer, step.clip) for step in found[:2]]
    if small_and_large != 2 * [("sgd", None)] or found[0].rate >= found[1].rate:
        raise ValueError(
            f"steps is {steps!r}, expected two of sgd first, without clipping, the smaller rate "
            "first"
        )
    return found


def part(experiment: Experiment, n_train: int | None, n_query: int | None) -> Experiment:
    """Return the part of an experiment that is trained on, None for all; in float32 or better."""
    dtype = experiment.dtype if experiment.dtype in ("float32", "float64") else "float32"
    return replace(experiment.part(n_train, n_query), dtype=dtype)


@dataclass(frozen=True)
class TrainingEffect(Method):
    """What one training step on each example alone does to each query: an output for each step.

    Each step has a store of its own, so that one more costs that step alone. The loss is the mean
    over the tokens of the "completion", or of the "text".
    """

    name = "training_effect"
    unit = "nats that the query's completion gains by a training step; positive = helps"
    notebook = "02"
    block_size = 4  # little is lost when a run stops

    steps: Sequence[Step] = setting(())
    layers: str = ""
    loss_on: str = "completion"

    def __post_init__(self):
        if not self.steps:
            raise ValueError("steps is empty, expected at least one")

    @property
    def outputs(self) -> dict[str, Output]:
        """An output for each step, by its name."""
        return {
            step.name: Output(self.name, {**self.options, **step.options}, self.unit)
            for step in self.steps
        }

    def only(self, names: Sequence[str]) -> TrainingEffect:
        """Return it with the named steps."""
        return replace(self, steps=[step for step in self.steps if step.name in names])

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError if no layer matches, or the model is too coarse or takes no packs."""
        from icprobe import models
        from icprobe.methods.gradient.layers import linear_layers

        linear_layers(lm, self.layers)
        models.check_packing(lm)
        if not lm.precise:
            raise ValueError(
                f"{lm.identity['name']} is in {lm.identity['dtype']}, which would round small "
                "steps away: load it with dtype='float32'"
            )

    def prepare(self, lm: LM, queries: Examples, pool: None) -> TrainingSteps:
        """Score the queries before any step."""
        from icprobe.methods.training_steps import TrainingSteps

        return TrainingSteps(lm, queries.tokens, self.layers)

    def score(self, prepared: TrainingSteps, train: Examples) -> dict[str, np.ndarray]:
        """Return the effects [n, M] of each step, in nats."""
        found = prepared.effects(train.tokens, self.steps, self.loss_on)
        return dict(zip(self.outputs, found, strict=True))
