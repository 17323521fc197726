"""Exact gradient dot products against kronfluence with the identity for its curvature.

    ./run_all.sh python tests/benchmarks/influence_speed.py [--train 64] [--queries 48]
        [--repeats 3] [--memory 0.75] [--peer-memory 20] [--peer-batch 16]
        [--methods icprobe kronfluence]

Same ids, loss, layers, dtype and threads. Each method runs in a process of its own (for its peak
memory), methods take turns, medians and ranges are shown. The floor is the time that the operations
of an exact method take at the rate of matrix products measured in the same process: a forward and a
backward pass over all tokens, each weight gradient made once from its factors, and one product a
pair. `--methods icprobe` alone shows how time and memory grow with --train and --queries.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from icp_speed import product_rate

from icprobe import data, ekfac, gradients, influence
from icprobe import lm as language_model

METHODS = ("icprobe", "kronfluence")


def examples(lm, split, size):
    """Return so many examples of grid; a split that is too small is gone through again."""
    rows = language_model.encode(lm, data.load("grid", split, seed=0))
    return list(itertools.islice(itertools.cycle(rows), size))


def measure(method, n_train, n_query, memory, peer_batch):
    """Return seconds, their parts, peak memory and the scores of one run."""
    lm = language_model.load("smollm2-135m-instruct", device="cpu")
    train, queries = (
        examples(lm, split, n) for split, n in (("train", n_train), ("query", n_query))
    )
    influence.gradient_dot(lm, train[:1], train[:1])  # weights are read from disk at first use
    rate = statistics.median(product_rate() for _ in range(5))
    passes = [0.0]
    inner = gradients.factors

    def timed(*arguments):
        start = time.perf_counter()
        result = inner(*arguments)
        passes[0] += time.perf_counter() - start
        return result

    gradients.factors = timed
    start = time.perf_counter()
    if method == "icprobe":
        scores = influence.gradient_dot(lm, train, queries, memory=memory)
    else:
        ekfac._per_pass = lambda *_: peer_batch
        scores = influence.ekfac(lm, train, queries, curvature="identity", memory=memory)
    seconds = time.perf_counter() - start
    weights = sum(layer.weight.numel() for layer in gradients.linear_layers(lm).values())
    pairs = len(train) * len(queries)
    head = lm.model.get_output_embeddings().weight.numel()
    tokens = sum(len(e.ids) - 1 for e in (*train, *queries))
    learnt = sum(len(e.completion) for e in (*train, *queries))
    return {
        "seconds": seconds,
        "passes": passes[0],
        "floor of passes": 4 * (weights * tokens + head * learnt) / rate,
        "floor of products": 2 * weights * (tokens + pairs) / rate,
        "rate": rate / 1e9,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "scores": scores.tolist(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=influence.MEMORY)
    parser.add_argument("--peer-memory", type=float, default=20.0)
    parser.add_argument("--peer-batch", type=int, default=16)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    memory = {"icprobe": options.memory, "kronfluence": options.peer_memory}
    if options.measure:
        size = options.train, options.queries
        setting = memory[options.measure], options.peer_batch
        print(json.dumps(measure(options.measure, *size, *setting)))
        return
    results = {method: [] for method in options.methods}
    for _ in range(options.repeats):
        for method, found in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", method]
            output = subprocess.check_output(command, text=True)
            found.append(json.loads(output.splitlines()[-1]))
    print(f"N = {options.train}, M = {options.queries}, {torch.get_num_threads()} threads")
    for method, found in results.items():
        print(f"{method}: {spread(found, 'seconds')} s, peak {spread(found, 'peak', 2)} GiB")
    if "icprobe" in results:
        for name in ("passes", "floor of passes", "floor of products"):
            print(f"    {name}: {spread(results['icprobe'], name)} s")
        print(f"    rate of matrix products: {spread(results['icprobe'], 'rate', 0)} billion/s")
    if len(results) > 1:
        runs = zip(results["icprobe"], results["kronfluence"], strict=True)
        ratios = [{"ratio": theirs["seconds"] / ours["seconds"]} for ours, theirs in runs]
        print(f"ratio of seconds: {spread(ratios, 'ratio', 2)}")
        one, other = (np.array(results[method][0]["scores"]) for method in METHODS)
        error = abs(one - other).max() / abs(one).max()
        print(f"largest difference, relative to the largest: {error:.1e}")


def spread(runs, name, digits=1):
    """Return median and range of one measured quantity."""
    values = [run[name] for run in runs]
    middle, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
