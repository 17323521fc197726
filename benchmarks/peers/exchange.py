"""What the peers' scripts share: ids from a file, the time of the work, scores to a file.

Runs in environments that have the peer, torch and numpy, and not this package.
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import numpy as np
import torch


def arguments():
    """Return options: the work to do, the file for the scores, batch size and projection."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("scores")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--method", help="of those of a script that has several")
    parser.add_argument("--projection", type=int, default=0, help="rows a side; 0: none")
    options = parser.parse_args()
    options.work = json.loads(Path(options.work).read_text(encoding="utf-8"))
    torch.set_num_threads(options.work["threads"])
    return options


def model(work):
    """Return the model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    found.config.use_cache = False
    return found.eval()


def linear_layers(module):
    """Return the names of the blocks' linear layers."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    ]


def labelled(row):
    """Return ids and labels, -100 where nothing is learnt."""
    ids, start = row["ids"], row["start"]
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def padded(rows):
    """Return a batch of rows that are labelled, padded at the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values, rest):
        return values + [rest] * (longest - len(values))

    return {
        "input_ids": torch.tensor([filled(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([filled(row["labels"], -100) for row in rows]),
    }


def needed(labels):
    """Return at how many of the last positions the head must work: from before the first label."""
    return labels.shape[1] - int((labels != -100).any(0).nonzero()[0]) + 1


def loss(logits, labels):
    """Return the negative log-likelihood of the labels in nats, summed over the batch.

    Logits may be those of the last positions only, see `needed`.
    """
    labels = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="sum"
    )


def by_length(products):
    """Return the same function of the work, given examples by length, so that little is padded."""

    def sorted_products(work):
        parts = ("train", "queries")
        orders = [sorted(range(len(work[p])), key=lambda k: len(work[p][k]["ids"])) for p in parts]
        given = {p: [work[p][k] for k in order] for p, order in zip(parts, orders, strict=True)}
        found = products({**work, **given})
        scores = np.empty_like(found)
        scores[np.ix_(*orders)] = found
        return scores

    return sorted_products


def peak_memory():
    """Return the most memory that this process has held, in GiB; NaN where none says.

    On a GPU, the GPU's.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")  # getrusage would count the parent's, too
    lines = status.read_text().splitlines() if status.exists() else []
    peak = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return peak[0] / 2**20 if peak else float("nan")


def timed(name, function, options):
    """Run on two examples by two queries, then on all; write scores, say what it took."""
    work = options.work
    few = {**work, **{part: work[part][:2] for part in ("train", "contexts", "queries")}}
    function(few)
    start, cpu = time.perf_counter(), time.process_time()
    scores = function(work)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    np.save(options.scores, np.asarray(scores))
    packages = filter(None, (name, "torch", "transformers"))
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    report = {"seconds": seconds, "cpu": cpu, "peak": peak_memory()}
    report["versions"] = ", ".join(versions)
    print()
    print(json.dumps(report))
