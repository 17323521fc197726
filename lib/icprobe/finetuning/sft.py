"""Supervised fine-tuning on selected examples with TRL, on the ids that all methods share.

The loss of a step is the mean negative log-likelihood over the batch's completion tokens, in nats
per token. No packing, truncation, weight decay or telemetry: `_settings` has each setting.
"""

import copy
import gc
import math
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from icprobe import models
from icprobe.finetuning.recipe import Recipe
from icprobe.methods.gradient import losses
from icprobe.models import LM

OPTIMIZER = "adamw_torch_fused"  # on two CPU cores a fifth of the time of the plain one

# tokens of a batch, padding included, whose activations are kept for the backward pass (three
# megabytes each for SmolLM2-135M); those of longer batches are computed again, for a third more
TOKENS_KEPT = 2048


class Trained(NamedTuple):
    """A trained model (adapters merged), its learning curve and, of whole models, its checkpoints.

    The curve has a row for each step: step (from 1), loss (nats per token, of the batch before the
    step), rate. Checkpoints are folders and learning rates: the mean over the steps that led
    there, the start's that of the first step.
    """

    lm: LM
    curve: pd.DataFrame
    checkpoints: list[tuple[str, float]]


def train(
    lm: LM,
    examples: Iterable,
    recipe: Recipe,
    folder: str | Path | None = None,
    loss_on: str = "completion",
) -> Trained:
    """Fine-tune a copy of the model with TRL's SFTTrainer on n examples (encoded or not).

    The same seed gives the same weights on one machine; on another they differ in the last bits.
    Seeds the global random generators, as transformers does. Takes memory for four copies of the
    weights beside the model (with adapters, one), and for activations. Passes are in the model's
    dtype, weights and optimiser in float32. Checkpoints, which adapters have none of, go to the
    folder; the loss is on "completion" or "text", with the prompt.

    Raises:
        ValueError: If there are no examples, an example has no completion tokens, loss_on is
            unknown, or the recipe asks for checkpoints of adapters, of more than there are steps,
            or without a folder.
        FloatingPointError: If the loss is not finite; names the first such step.
    """
    examples = list(examples)
    save_steps = recipe.save_steps(len(examples))
    if recipe.saves and (folder is None or recipe.lora_rank):
        raise ValueError(
            f"saves is {recipe.saves}, expected a folder for checkpoints, and lora_rank 0: "
            "they are of whole models"
        )
    with tempfile.TemporaryDirectory(prefix="icprobe-") as temporary, _quietly():
        folder = Path(folder or temporary)
        names = [str(folder / f"checkpoint-{step}") for step in (0, *save_steps)]
        trainer = _trainer(lm, examples, folder, recipe, loss_on)
        if recipe.saves:
            trainer.save_model(names[0])
        steps = recipe.steps(len(examples))
        with tqdm(desc="fine-tuning", total=steps, unit=" steps", leave=False) as bar:
            trainer.add_callback(_Watching(save_steps, bar))
            trainer.train()
        log = pd.DataFrame(trainer.state.log_history).rename(columns={"learning_rate": "rate"})
        model = trainer.model
        del trainer  # it refers to itself, and holds gradients and the optimizer's state
        gc.collect()
    curve = log[["step", "loss", "rate"]].dropna().reset_index(drop=True)
    if recipe.lora_rank:
        model = model.merge_and_unload()
    # the trainer and accelerate leave their own model with other forward passes
    plain = copy.deepcopy(lm.model).float()
    plain.load_state_dict(model.state_dict())
    identity = {**lm.identity, "name": f"{lm.identity['name']}, fine-tuned", "dtype": "float32"}
    trained = LM(plain.eval().requires_grad_(True), lm.tokenizer, identity)
    if not recipe.saves:
        return Trained(trained, curve, [])
    rates = curve["rate"].to_numpy()
    means = [float(np.mean(part)) for part in np.split(rates, save_steps[:-1])]
    return Trained(trained, curve, list(zip(names, [float(rates[0]), *means], strict=True)))


def batches(
    lm: LM, examples: Iterable, recipe: Recipe, loss_on: str = "completion"
) -> list[dict[str, torch.Tensor]]:
    """Return the batches of the first epoch as the trainer sees them, in their order; see `train`.

    Each has input_ids, attention_mask and labels [n, T]; labels are -100 where there is no loss.
    """
    with tempfile.TemporaryDirectory(prefix="icprobe-") as folder, _quietly():
        trainer = _trainer(lm, list(examples), folder, recipe, loss_on)
        return list(trainer.get_train_dataloader())


class _Watching(TrainerCallback):
    """Show progress, save after given steps, and stop where the loss is not finite.

    A trainer's own interval does not space checkpoints evenly to the end.
    """

    def __init__(self, save_steps: list[int], bar: tqdm) -> None:
        self.save_steps, self.bar = save_steps, bar

    def on_step_end(self, args, state, control, **_) -> None:
        """Ask for a checkpoint where one is due."""
        control.should_save = state.global_step in self.save_steps
        self.bar.update()

    def on_log(self, args, state, control, logs, **_) -> None:
        """Raise FloatingPointError for a loss that is not finite."""
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"loss at step {state.global_step} is {logs['loss']}: lower the learning rate"
            )


def _trainer(lm: LM, examples: Sequence, folder: str | Path, recipe: Recipe, loss_on: str):
    """Return the trainer of a copy of the model."""
    if not examples:
        raise ValueError("there are no examples to train on")
    if loss_on not in losses.LOSSES:
        raise ValueError(f"loss_on is {loss_on!r}, expected 'completion' or 'text'")
    # slow to import
    from peft import LoraConfig, get_peft_model
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Return TRL's loss; on a CPU, from the positions that it counts."""
            # TRL's fused output head is a kernel for GPUs. Its stand-in works through the
            # vocabulary at every position, prompts included, for metrics that nobody reads: two
            # fifths of a step on the built-in model.
            if return_outputs or not self.args.use_cpu:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return _mean_loss(LM(model, lm.tokenizer, lm.identity), inputs, num_items_in_batch)

        def _send_telemetry(self) -> None:
            pass

    rows = models.training_rows(lm, examples)
    settings = _settings(lm, rows, folder, recipe, loss_on)
    tokenizer = copy.deepcopy(lm.tokenizer)  # it is given a padding token
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # it is masked: any will do
    transformers.set_seed(recipe.seed)  # the adapters' start is random
    model = copy.deepcopy(lm.model).float()
    if recipe.lora_rank:
        rank, layers = recipe.lora_rank, "all-linear"
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    trainer = Trainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _settings(lm: LM, rows: datasets.Dataset, folder: str | Path, recipe: Recipe, loss_on: str):
    """Return the trainer's settings, with everything in them that matters."""
    from trl import SFTConfig  # slow to import

    tokens = recipe.batch_size * max(map(len, rows["input_ids"]))
    warmup = int(recipe.warmup * recipe.steps(len(rows)))  # a single step has none
    schedule = recipe.schedule
    if schedule == "constant" and warmup:  # which would leave it out
        schedule = "constant_with_warmup"
    settings = SFTConfig(
        output_dir=str(folder),
        # what is trained on
        completion_only_loss=loss_on == "completion",
        packing=False,
        max_length=None,
        router_aux_loss_coef=0.0,  # no loss of its own for mixtures of experts
        # how
        optim=OPTIMIZER,
        learning_rate=recipe.rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        weight_decay=0.0,
        max_grad_norm=0.0,  # no clipping
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        seed=recipe.seed,
        bf16=lm.model.dtype == torch.bfloat16,
        fp16=lm.model.dtype == torch.float16,
        activation_checkpointing=tokens > TOKENS_KEPT,
        use_cpu=lm.device.type == "cpu",
        dataloader_pin_memory=lm.device.type != "cpu",
        # what is kept and said: `_Watching` asks for the checkpoints
        save_strategy="no",
        save_only_model=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    if settings.n_gpu > 1:  # else each of them would take a batch, and a step be another one
        settings._n_gpu = 1
    return settings


def _mean_loss(lm: LM, inputs: dict, count: torch.Tensor | int | None) -> torch.Tensor:
    """Return the mean negative log-likelihood, in nats, of the labels that are not -100."""
    labels = inputs["labels"][:, 1:]  # each is predicted at the position before
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    passed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with models.selective_head(lm):
        logits = models.logits_at(lm, rows, columns, **passed, use_cache=False)
    nats = nn.functional.cross_entropy(logits, labels[rows, columns], reduction="sum")
    return nats / (len(rows) if count is None else count)


@contextmanager
def _quietly():
    """Hide the progress bars of datasets and transformers, and what the latter warns of."""
    shown = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # how peft asks the model, nothing that anybody could change here
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            logging.enable_progress_bar()
