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

import math
import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

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


@dataclass(frozen=True)
class Step:
    """One step of an optimiser that has seen nothing before.

    Attributes:
        optimizer: "sgd" or "adamw", with the settings in `OPTIMIZERS`.
        rate: Learning rate.
        clip: Norm that a larger gradient is scaled down to (`torch.nn.utils.clip_grad_norm_`), or
            None for no limit.

    Raises:
        ValueError: If the optimiser is unknown, or rate or clip is not a positive number.
    """

    optimizer: str
    rate: float
    clip: float | None = None

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            known = " or ".join(map(repr, OPTIMIZERS))
            raise ValueError(f"optimizer is {self.optimizer!r}, expected {known}")
        for field in ("rate", "clip"):
            value = getattr(self, field)
            if field == "clip" and value is None:
                continue
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"{field} is {value!r}, expected a positive number")
            object.__setattr__(self, field, float(value))

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


# the linear regime, a step that leaves it, and one as in fine-tuning
STEPS = (Step("sgd", 1e-4), Step("sgd", 3e-3), Step("adamw", 1e-5))


def planned(steps: Sequence[Sequence]) -> list[Step]:
    """Return the steps that the notebooks' parameter `steps` asks for.

    Args:
        steps: Optimiser, rate and, if it clips, the norm of each step. The first two are of SGD
            without clipping, the smaller rate first: the linear regime, and the step that scores
            are held against.

    Raises:
        ValueError: If they are anything else; names the step.
    """
    if not isinstance(steps, Sequence):
        raise ValueError(f"steps is {steps!r}, expected a list of [optimizer, rate]")
    found = []
    for k, step in enumerate(steps):
        try:
            found.append(Step(*step))
        except (TypeError, ValueError) as error:
            raise ValueError(f"steps[{k}] is {step!r}: {error}") from None
    small_and_large = [(step.optimizer, step.clip) for step in found[:2]]
    if small_and_large != 2 * [("sgd", None)] or found[0].rate >= found[1].rate:
        raise ValueError(
            f"steps is {steps!r}, expected two of sgd first, without clipping, the smaller rate "
            "first"
        )
    return found


def part(experiment: Experiment, n_train: int | None, n_query: int | None) -> Experiment:
    """Return the part of an experiment's pairs that is really trained on, in float32 or better.

    Args:
        experiment: All pairs.
        n_train: Most training examples, None for all.
        n_query: Most queries, None for all.
    """
    dtype = experiment.dtype if experiment.dtype in ("float32", "float64") else "float32"
    return replace(experiment.part(n_train, n_query), dtype=dtype)


@dataclass(frozen=True)
class TrainingEffect(Method):
    """What one training step on each example alone does to each query, for several steps.

    Each step has a store of its own, so that one more costs that step alone.

    Attributes:
        steps: The steps; an output for each, by its name.
        layers: See `gradient.layers.linear_layers`.
        loss_on: See `training_steps.TrainingSteps.effects`.

    Raises:
        ValueError: If there is no step, or one twice.
    """

    name = "training_effect"
    unit = "nats that the query's completion gains by a training step; positive = helps"
    notebook = "02"
    block_size = 4  # little is lost when a run stops

    steps: Sequence[Step] = setting(STEPS)
    layers: str = ""
    loss_on: str = "completion"

    def __post_init__(self):
        names = [step.name for step in self.steps]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"steps are {names}, expected at least one, and each once")

    @property
    def outputs(self) -> dict[str, Output]:
        """An output for each step."""
        return {
            step.name: Output(self.name, {**self.options, **step.options}, self.unit)
            for step in self.steps
        }

    def only(self, names: Sequence[str]) -> TrainingEffect:
        """Return it with fewer steps."""
        return replace(self, steps=[step for step in self.steps if step.name in names])

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError if no layer matches."""
        from icprobe.methods.gradient.layers import linear_layers

        linear_layers(lm, self.layers)

    def prepare(self, lm: LM, queries: Examples, pool: None) -> TrainingSteps:
        """Score the queries before any step."""
        from icprobe.methods.training_steps import TrainingSteps

        return TrainingSteps(lm, queries.tokens, self.layers)

    def score(self, prepared: TrainingSteps, train: Examples) -> dict[str, np.ndarray]:
        """Return the effects [n, M] of each step."""
        found = prepared.effects(train.tokens, self.steps, self.loss_on)
        return dict(zip(self.outputs, found, strict=True))
