"""Exact gradient dot products against kronfluence with the identity for its curvature.

    ./run_all.sh python tests/benchmarks/influence_speed.py [--train 64] [--queries 48]
        [--repeats 3] [--memory 2.4] [--peer-memory 16]

Same ids, loss, layers, dtype and threads. Each method runs in a process of its own (for its peak
memory), methods take turns, medians and ranges are shown, beside the rate of matrix products
measured in the same process: the floor is the time that a forward and backward pass over all
tokens takes at that rate, below which no exact method can come.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from icp_speed import product_rate

from icprobe import data, gradients, influence
from icprobe import lm as language_model

METHODS = ("icprobe", "kronfluence")


def measure(method, n_train, n_query, memory):
    """Return seconds, their parts, peak memory and the scores of one run."""
    lm = language_model.load("smollm2-135m-instruct", device="cpu")
    train, queries = (
        language_model.encode(lm, data.load("grid", split, n, seed=0))
        for split, n in (("train", n_train), ("query", n_query))
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
        scores = influence.ekfac(lm, train, queries, curvature="identity", memory=memory)
    seconds = time.perf_counter() - start
    weights = sum(layer.weight.numel() for layer in gradients.linear_layers(lm).values())
    head = lm.model.get_output_embeddings().weight.numel()
    tokens = sum(len(e.ids) - 1 for e in (*train, *queries))
    learnt = sum(len(e.completion) for e in (*train, *queries))
    return {
        "seconds": seconds,
        "passes": passes[0],
        "floor": 4 * (weights * tokens + head * learnt) / rate,
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
    parser.add_argument("--peer-memory", type=float, default=16.0)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    memory = {"icprobe": options.memory, "kronfluence": options.peer_memory}
    if options.method:
        size = options.train, options.queries
        print(json.dumps(measure(options.method, *size, memory[options.method])))
        return
    results = {method: [] for method in METHODS}
    for _ in range(options.repeats):
        for method, found in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
            output = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
            found.append(json.loads(output.splitlines()[-1]))
    print(f"N = {options.train}, M = {options.queries}, {torch.get_num_threads()} threads")
    for method, found in results.items():
        seconds = [run["seconds"] for run in found]
        print(
            f"{method:12} {statistics.median(seconds):6.1f} s ({min(seconds):.1f} to "
            f"{max(seconds):.1f}), peak {max(run['peak'] for run in found):.2f} GiB"
        )
    ours = [run["seconds"] for run in results["icprobe"]]
    ratios = [b["seconds"] / a for a, b in zip(ours, results["kronfluence"], strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for name in ("passes", "floor", "rate"):
        values = [run[name] for run in results["icprobe"]]
        print(f"icprobe {name}: {statistics.median(values):.1f}")
    one, other = (np.array(results[method][0]["scores"]) for method in METHODS)
    error = abs(one - other).max() / abs(one).max()
    print(f"largest difference, relative to the largest: {error:.1e}")


if __name__ == "__main__":
    main()
