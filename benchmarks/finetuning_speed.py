"""Seconds of a training step with TRL as used here, against TRL as it comes and a plain loop.

    ./run_all.sh python benchmarks/finetuning_speed.py [--examples 32] [--batch 4] [--rank 0]
        [--repeats 3] [--methods icprobe trl plain]

Same model, batches, order, optimiser and threads: `icprobe.finetuning.sft.train`; the same trainer
with TRL's own loss; and a loop of a dozen lines over the very same batches, with the model's own
loss over all positions. Each runs in a process of its own (for its peak memory), they take turns,
and medians and ranges over runs are shown. The first step, which touches memory for the first time,
is left out of the seconds a step and is in the total. With them the largest difference of the final
query log-likelihoods from the plain loop's: no speed without the error.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from transformers import TrainerCallback, get_linear_schedule_with_warmup
from trl import SFTTrainer

from icprobe import models
from icprobe.artifact import provenance
from icprobe.artifact.benchmark.methods import examples
from icprobe.finetuning import sft
from icprobe.finetuning.recipe import Recipe

METHODS = ("icprobe", "trl", "plain")
RATE, ADAPTERS_RATE = 1e-4, 2e-3


class Clock(TrainerCallback):
    """Notes the seconds of each step."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *_, **__):
        """Start."""
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        """Stop."""
        self.steps.append(time.perf_counter() - self.start)


def plain(model, batches, recipe):
    """Train by the book; return the seconds of each step."""
    trained = [weight for weight in model.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(batches))
    clock = Clock()
    for batch in batches:
        clock.on_step_begin()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.on_step_end()
    return clock.steps


def measure(method, n, batch, rank):
    """Return seconds a step and in all, peak memory and what the queries have afterwards."""
    lm = models.load("smollm2-135m-instruct", device="cpu")
    rows, queries = examples(lm, "grid", n, 24)
    recipe = Recipe(batch_size=batch, lora_rank=rank, rate=ADAPTERS_RATE if rank else RATE)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft._trainer(lm, rows, folder, recipe, "completion")
        start = time.perf_counter()
        if method == "plain":
            steps = plain(trainer.model, list(trainer.get_train_dataloader()), recipe)
        else:
            clock = Clock()
            trainer.add_callback(clock)
            if method == "trl":
                type(trainer).compute_loss = SFTTrainer.compute_loss
            trainer.train()
            steps = clock.steps
        seconds = time.perf_counter() - start
    peak = provenance.peak_memory()
    model = trainer.model.merge_and_unload() if rank else trainer.model
    trained = models.LM(model.eval(), lm.tokenizer, lm.identity)
    nats = models.log_likelihoods(trained, queries)[0]
    step = float(np.mean(steps[1:]))
    return {"step": step, "seconds": seconds, "peak": peak, "nats": nats.tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        size = options.examples, options.batch, options.rank
        print(json.dumps(measure(options.measure, *size)))
        return
    results = {method: [] for method in options.methods}
    for _ in range(options.repeats):
        for method, found in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", method]
            output = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
            found.append(json.loads(output.splitlines()[-1]))
    trained = f"adapters of rank {options.rank}" if options.rank else "all weights"
    sizes = f"{options.examples} examples, batches of {options.batch}"
    print(f"{trained}, {sizes}, {torch.get_num_threads()} threads")
    for method, found in results.items():
        error = ""
        if "plain" in results:
            one, other = (np.array(runs[0]["nats"]) for runs in (found, results["plain"]))
            error = f", largest difference from plain {abs(one - other).max():.1e} nats"
        step = f"{spread(found, 'step', 2)} s a step, {spread(found, 'seconds')} s in all"
        print(f"{method}: {step}, peak {spread(found, 'peak', 2)} GiB{error}")


def spread(runs, name, digits=1):
    """Return median and range of one measured quantity."""
    values = [run[name] for run in runs]
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
