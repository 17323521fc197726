"""Ground truth of attribution: train on one example and see what becomes of the queries.

From the model's weights w, one optimiser step is taken on each training example alone, and

    effect_ij = log p(y_j | x_j; w after the step on z_i) - log p(y_j | x_j; w)

in nats, summed over completion tokens: [N, M], positive = training on the example helps. It is what
TracIn (Pruthi et al. 2020) idealises and the gradient dot product is the first order of: for
gradient descent, effect / rate goes to `influence.gradient_dot` of the same loss as the rate goes
to zero. The weights trained are those that gradient products are over, `gradients.linear_layers`,
and the loss is fine-tuning's: the mean over completion tokens.
"""

import functools
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from icprobe import engines, gradients, icp
from icprobe import lm as language_model
from icprobe.experiment import Experiment
from icprobe.lm import LM

METHOD = "training_effect"
UNITS = "nats that the query's completion gains by a training step; positive = helps"

# training examples in one part of a store: little is lost when a run stops
BLOCK_SIZE = 4

# each optimiser with its settings besides the rate; decay would add the same to every effect
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.0, "weight_decay": 0.0}),
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
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
        return f"{OPTIMIZERS[self.optimizer][0].__name__} {rate}{clip}"

    @property
    def options(self) -> dict:
        """Everything that determines the step."""
        return {**vars(self), **OPTIMIZERS[self.optimizer][1]}

    def take(
        self,
        weights: Sequence[nn.Parameter],
        gradient: Sequence[torch.Tensor],
        norm: torch.Tensor,
    ) -> None:
        """Change the weights; the gradient, whose norm is given, is left as it is.

        These optimisers work entry by entry, so one for each weight takes the same step as one for
        all, and its state is a weight's size and not the model's.
        """
        make, settings = OPTIMIZERS[self.optimizer]
        for weight, part in zip(weights, gradient, strict=True):
            weight.grad = part
            if self.clip:
                weight.grad = part.clone()  # clipped in place
                nn.utils.clip_grads_with_norm_([weight], self.clip, norm)
            make([weight], lr=self.rate, **settings).step()


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


class Retraining:
    """The queries before any step, and memory for the trained weights and their gradients.

    The memory, twice the size of these weights, serves all training examples.

    Attributes:
        before: [M] log-likelihoods of the queries, float64.
    """

    def __init__(
        self, lm: LM, queries: Iterable, layers: str = "", max_length: int | None = None
    ) -> None:
        """Score the queries: one forward pass.

        Args:
            lm: The model, in float32 or better: coarser weights would round small steps away.
            queries: M rows with id, prompt, completion (or encoded already).
            layers: See `gradients.linear_layers`.
            max_length: Most tokens of one example, see `lm.encode`.

        Raises:
            ValueError: If there are no queries, no layer matches, or the model's weights are too
                coarse or its attention takes no packed rows.
            FloatingPointError: If a log-likelihood is not finite; names the query.
        """
        if not lm.precise:
            raise ValueError(
                f"{lm.identity['name']} is in {lm.identity['dtype']}, which would round small "
                "steps away: load it with dtype='float32'"
            )
        self.lm, self.max_length = lm, max_length
        self._weights = [module.weight for module in gradients.linear_layers(lm, layers).values()]
        self._queries = language_model.encode(lm, queries, max_length)
        if not self._queries:
            raise ValueError("there are no examples")
        language_model.check_packing(lm)
        self.before = self._log_likelihoods()
        self._start = [weight.detach().clone() for weight in self._weights]
        self._gradient = [torch.zeros_like(weight) for weight in self._start]

    def effects(
        self,
        train: Iterable,
        steps: Sequence[Step],
        loss_on: str = "completion",
    ) -> list[np.ndarray]:
        """Return each step's effects [N, M]: a forward and backward pass and, a step, M queries.

        The model is left as it was, to the bit, even if something fails.

        Args:
            train: N rows like the queries.
            steps: The steps, each taken from the model's own weights.
            loss_on: "completion", or "text" to train on the prompt, too. The training loss is the
                mean over these tokens.

        Returns:
            For each step float32 [N, M], in nats, positive = training on the example helps.

        Raises:
            ValueError: If there are no examples or an example has no completion tokens.
            FloatingPointError: If a gradient or a log-likelihood after a step is not finite; names
                the example.
        """
        train = language_model.encode(self.lm, train, self.max_length)
        if not train:
            raise ValueError("there are no examples")
        effects = [np.zeros((len(train), len(self._queries)), np.float32) for _ in steps]
        with self._trainable():
            for i, example in enumerate(train):
                norm = self._backward(example, loss_on)
                for effect, step in zip(effects, steps, strict=True):
                    try:
                        step.take(self._weights, self._gradient, norm)
                        effect[i] = self._log_likelihoods() - self.before
                    except FloatingPointError as error:
                        raise FloatingPointError(
                            f"{step.name} on {example.id!r} diverged: {error}"
                        ) from None
                    self._restore()
        return effects

    def _log_likelihoods(self) -> np.ndarray:
        """Log-likelihoods of the queries with the weights as they are: float64 [M]."""
        return language_model.log_likelihoods(self.lm, self._queries, dtype=np.float64)[0]

    def _backward(self, example, loss_on: str) -> torch.Tensor:
        """Make an example's gradient, in the memory that there is, and return its norm."""
        for weight, part in zip(self._weights, self._gradient, strict=True):
            weight.grad = part.zero_()
        loss = gradients.loss(self.lm, example, loss_on, "mean")
        torch.autograd.backward(loss, inputs=self._weights)
        norm = nn.utils.get_total_norm(self._gradient)
        if not norm.isfinite():
            raise FloatingPointError(f"gradient is not finite: example {example.id!r}")
        return norm

    @torch.no_grad()
    def _restore(self) -> None:
        for weight, start in zip(self._weights, self._start, strict=True):
            weight.copy_(start)

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """Let gradients flow to the trained weights, and put everything back afterwards."""
        states = [(weight.requires_grad, weight.grad) for weight in self._weights]
        try:
            for weight in self._weights:
                weight.requires_grad_(True)
            yield
        finally:
            self._restore()
            for weight, (requires_grad, gradient) in zip(self._weights, states, strict=True):
                weight.requires_grad_(requires_grad)
                weight.grad = gradient


def measure(
    experiment: Experiment,
    lm: LM,
    steps: Sequence[Step] = STEPS,
    layers: str = "",
    loss_on: str = "completion",
    fresh: bool = False,
    engine: str = engines.LOCAL,
) -> dict[str, np.ndarray]:
    """Measure all pairs of the experiment through its stores: finished blocks are reused.

    Each step has a store of its own, so that a step more costs that step alone.

    Args:
        experiment: What is measured (its pool of N, its M queries) and where the scores lie.
        lm: The experiment's model.
        steps: The steps, see `Step`.
        layers: See `gradients.linear_layers`.
        loss_on: See `Retraining.effects`.
        fresh: Compute everything anew.
        engine: Where, see `engines`.

    Returns:
        Effects float32 [N, M] by the step's name, see `effects`.

    Raises:
        ValueError: If the model is not the experiment's, a step is there twice or none at all, or
            as `Retraining` and its `effects`.
        FloatingPointError: As these.
    """
    pool, queries = experiment.encode(lm)
    gradients.linear_layers(lm, layers)  # an error before any store is made
    by_name = _options(steps, layers, loss_on)
    train_ids, query_ids = ([row.id for row in rows] for rows in (pool, queries))
    settings = {"fresh": fresh, "block_size": BLOCK_SIZE, "description": UNITS}
    stores = [
        experiment.store(METHOD, train_ids, query_ids, options, **settings)
        for options in by_name.values()
    ]

    def arguments(rows: range) -> tuple:
        todo = [None if kept.finished(rows) else s for s, kept in zip(steps, stores, strict=True)]
        return pool[rows.start : rows.stop], todo

    start = functools.partial(_ready, queries, layers, loss_on)
    matrices = engines.fill(engine, experiment, lm, stores, start, arguments)
    return dict(zip(by_name, matrices, strict=True))


def _ready(queries, layers, loss_on, lm: LM) -> engines.Score:
    """Return a function from training examples and steps, None for finished ones, to effects."""
    held = Retraining(lm, queries, layers)

    def score(train: list, steps: list[Step | None]) -> list[np.ndarray | None]:
        found = iter(held.effects(train, [step for step in steps if step], loss_on))
        return [next(found) if step else None for step in steps]

    return score


def find(
    experiment: Experiment,
    made_by: str,
    steps: Sequence[Step] = STEPS,
    layers: str = "",
    loss_on: str = "completion",
) -> dict[str, np.ndarray]:
    """Return finished effects [N, M] by the step's name; needs neither the model nor the data.

    Args:
        experiment: What was measured.
        made_by: What to run if the scores are not there, for the error message.
        steps: See `measure`.
        layers: See `measure`.
        loss_on: See `measure`.

    Raises:
        store.ScoresNotFound: If they are not there.
    """
    return {
        name: experiment.find(METHOD, options, made_by).matrix()
        for name, options in _options(steps, layers, loss_on).items()
    }


def _options(steps: Sequence[Step], layers: str, loss_on: str) -> dict[str, dict]:
    """Return, by each step's name, the options that determine its scores beside the experiment.

    Raises:
        ValueError: If there is no step, or one twice.
    """
    names = [step.name for step in steps]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"steps are {names}, expected at least one, and each once")
    common = {
        "template": icp.TEMPLATE_VERSION,
        "layers": layers,
        "loss_on": loss_on,
        "reduction": "mean",
    }
    return {step.name: {**common, **step.options} for step in steps}
