"""Checkpoints of a fine-tuning run on the experiment's own pool, and TracIn over them.

TracInCP (Pruthi et al. 2020) adds up gradient dot products over the checkpoints w_t of a run:

    tracin_ij = sum_t eta_t < grad L(z_i; w_t), grad L(q_j; w_t) >

where eta_t is the step size used between the checkpoint before and this one. A schedule changes it
in between, so eta_t is the mean over those steps (LESS, Xia et al. 2024, takes it so, too); the
start, which no step has led to, counts with the peak rate, that of the first step away from it. The
sum is in nats: what the queries' losses would fall by, to first order, if from each checkpoint in
turn a step of plain gradient descent of size eta_t were taken on z_i alone. The run itself takes
steps of AdamW on batches' mean losses, so its own falls are other numbers; compare ranks.
"""

import copy
import gc
import math
import numbers
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from icprobe import influence
from icprobe import lm as language_model
from icprobe.experiment import Experiment
from icprobe.lm import LM

METHOD = "tracin"
VERSION = 1  # raise it when the same recipe begins to train in another way
UNIT = "nats; positive = helps"

# transformers' names; without warm-up, down to zero after the last step but for the constant one
SCHEDULES = ("linear", "cosine", "constant")

OPTIMIZER = "adamw_torch"

# tokens of a batch, padding included, whose activations are kept for the backward pass (three
# megabytes each for SmolLM2-135M); those of longer batches are computed again, for a third more
TOKENS_KEPT = 2048


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on the pool: AdamW in float32, no weight decay, warm-up or clipping.

    Attributes:
        epochs: Passes over the pool.
        batch_size: Examples in one step, whose loss is the mean over their tokens.
        rate: Learning rate of the first step, the highest.
        schedule: One of `SCHEDULES`.
        saves: Checkpoints beside the start, evenly spaced; the last one is the end.
        seed: Of the order of the examples, and of dropout.

    Raises:
        ValueError: If a field is out of range; names it.
    """

    epochs: int = 1
    batch_size: int = 8
    rate: float = 1e-4
    schedule: str = "linear"
    saves: int = 2
    seed: int = 0

    def __post_init__(self):
        for name, least in (("epochs", 1), ("batch_size", 1), ("saves", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**32:
                raise ValueError(f"{name} is {value!r}, expected a whole number from {least}")
        if not isinstance(self.rate, numbers.Real) or not 0 < self.rate < math.inf:
            raise ValueError(f"rate is {self.rate!r}, expected a positive number")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {SCHEDULES}")
        object.__setattr__(self, "rate", float(self.rate))  # 1 and 1.0 are one recipe

    def save_steps(self, n: int) -> list[int]:
        """Return after which steps (counted from 1) on n examples a checkpoint is saved.

        Raises:
            ValueError: If there are fewer steps than checkpoints.
        """
        steps = self.epochs * math.ceil(n / self.batch_size)
        if self.saves > steps:
            raise ValueError(
                f"saves is {self.saves} checkpoints, but {n} examples make {steps} steps with "
                f"epochs={self.epochs} and batch_size={self.batch_size}"
            )
        return [math.ceil(steps * k / self.saves) for k in range(1, self.saves + 1)]


def train(
    lm: LM,
    examples: Iterable,
    folder: str | Path,
    recipe: Recipe,
    loss_on: str = "completion",
) -> list[tuple[str, float]]:
    """Fine-tune a copy of the model with TRL's SFTTrainer, as `influence.tracin` takes it.

    Nothing is packed or cut, all weights are trained, and the loss is that of the gradient code, on
    the same ids. The same seed gives the same weights on one machine; on another they differ in the
    last bits. Seeds the global random generators, as transformers does.

    Args:
        lm: The model; it is left as it was. Training takes memory for four copies of its
            weights beside it, and for activations.
        examples: N rows with id, prompt, completion (or encoded already).
        folder: Where the checkpoints go, each with weights (float32, safetensors) and tokenizer.
        recipe: See `Recipe`.
        loss_on: "completion", or "text" to train on the prompt, too.

    Returns:
        Folder and learning rate of each checkpoint, the start (the model as it is) first. The rates
        are the trainer's own, see the module for what they are means of.

    Raises:
        ValueError: If loss_on is unknown, there are fewer steps than checkpoints, or an example has
            no completion tokens.
        FloatingPointError: If the loss is not finite at some step; names the first.
    """
    if loss_on not in ("completion", "text"):
        raise ValueError(f"loss_on is {loss_on!r}, expected 'completion' or 'text'")
    rows = language_model.training_rows(lm, examples)
    steps = recipe.save_steps(len(rows))
    with _quietly(), tqdm(desc="fine-tuning", total=steps[-1], unit=" steps") as bar:
        trainer = _trainer(lm, rows, folder, recipe, loss_on, _Saving(steps, bar))
        names = [str(Path(folder) / f"checkpoint-{step}") for step in (0, *steps)]
        trainer.save_model(names[0])
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    for entry in logs:
        if not math.isfinite(entry["loss"]):
            raise FloatingPointError(f"loss at step {entry['step']} is {entry['loss']}: lower rate")
    rates = [entry["learning_rate"] for entry in logs]
    means = [float(np.mean(part)) for part in np.split(rates, steps[:-1])]
    del trainer
    gc.collect()  # it refers to itself, and holds gradients and the optimizer's state
    return list(zip(names, [rates[0], *means], strict=True))


def tracin(
    experiment: Experiment,
    lm: LM,
    recipe: Recipe,
    dot: np.ndarray | None = None,
    layers: str = "",
    loss_on: str = "completion",
    reduction: str = "sum",
    memory: float = influence.MEMORY,
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
        recipe: How it is trained.
        dot: [N, M] products at the start if they are there, `influence.attribute` of the same
            layers, loss_on and reduction; saves their share of the time.
        layers: See `gradients.linear_layers`; of the scores only, all weights are trained.
        loss_on: See `influence.GradientDot.products`; what is trained on, too.
        reduction: See `influence.GradientDot.products`; of the scores only.
        memory: See `influence.GradientDot`.
        fresh: Compute everything anew.

    Raises:
        ValueError: If the model is not the experiment's, `dot` has another shape, or as `train`.
        FloatingPointError: If a loss or a gradient is not finite.
    """
    pool, queries = experiment.encode(lm)
    shape = len(pool), len(queries)
    if dot is not None and np.shape(dot) != shape:
        raise ValueError(f"dot has shape {np.shape(dot)}, expected {shape}")
    recipe.save_steps(len(pool))
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
            (_, rate), *later = train(lm, pool, folder, recipe, loss_on)
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


class _Saving(TrainerCallback):
    """Save after given steps: a trainer's own interval does not space them evenly to the end.

    Attributes:
        steps: Counted from 1.
        bar: Progress, in steps.
    """

    def __init__(self, steps: list[int], bar: tqdm) -> None:
        self.steps, self.bar = steps, bar

    def on_step_end(self, args, state, control, **_) -> None:
        """Ask for a checkpoint where one is due."""
        control.should_save = state.global_step in self.steps
        self.bar.update()


def _trainer(lm, rows, folder, recipe, loss_on, callback):
    """Return the trainer of a copy of the model, everything that matters said here."""
    from trl import SFTConfig, SFTTrainer  # slow to import

    class Trainer(SFTTrainer):
        def _send_telemetry(self) -> None:
            """Tell nobody about it."""

    settings = SFTConfig(
        output_dir=str(folder),
        # what is learnt
        completion_only_loss=loss_on == "completion",
        packing=False,
        max_length=None,
        # how
        optim=OPTIMIZER,
        learning_rate=recipe.rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,  # no clipping
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        seed=recipe.seed,
        bf16=False,
        activation_checkpointing=recipe.batch_size * max(map(len, rows["input_ids"])) > TOKENS_KEPT,
        use_cpu=lm.device.type == "cpu",
        dataloader_pin_memory=lm.device.type != "cpu",
        # what is kept and said: `callback` asks for the checkpoints
        save_strategy="no",
        save_only_model=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        copy.deepcopy(lm.model).float(),
        settings,
        train_dataset=rows,
        processing_class=copy.deepcopy(lm.tokenizer),  # it is given a padding token
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _quietly():
    """Hide the progress bars of datasets and transformers, and what the latter warns of.

    The trainer fits the copied model's special tokens to its tokenizer's and says so; they only
    matter to text generation.
    """
    shown = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        for were_shown, enable in zip(
            shown, (datasets.enable_progress_bars, logging.enable_progress_bar), strict=True
        ):
            if were_shown:
                enable()
