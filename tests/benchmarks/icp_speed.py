"""In-context probing against a plain transformers loop: same ids, same threads, one run.

    ./run_all.sh python tests/benchmarks/icp_speed.py [--demonstrations 2] [--bfloat16]

The loop scores each pair separately, in batches of 8 in the order given, right-padded, with the
logits of all positions, as one would write it down. Methods take turns; medians and ranges of the
repeats are shown, beside the rate of matrix products measured in between.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from scipy.stats import spearmanr

from icprobe import assets, data, icp
from icprobe import lm as language_model

BATCH = 8


def plain_loop(lm, queries, contexts):
    """Log-likelihoods [N, M], every pair on its own, in batches of 8."""
    pairs = [
        language_model.sequence(lm, query, context) for context in contexts for query in queries
    ]
    nats = []
    with torch.inference_mode():
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            shape = (len(batch), max(len(ids) for ids, _ in batch))
            ids, real, scored = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
            for row, (tokens, mask) in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                real[row, : len(tokens)] = 1
                scored[row, : len(tokens)] = torch.tensor(mask)
            logits = lm.model(ids, attention_mask=real).logits[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            nats += (chosen * scored[:, 1:]).sum(1).tolist()
    return np.array(nats).reshape(len(contexts), len(queries))


def useful_operations(lm, queries, contexts):
    """Floating-point operations that no exact method can do without: every distinct token once."""
    config = lm.model.config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head = lm.model.get_output_embeddings().weight.numel()
    inner = sum(p.numel() for p in lm.model.parameters()) - head
    inputs = [query.ids[:-1] for query in queries]
    prefixes = {sequence[: k + 1] for sequence in inputs for k in range(len(sequence))}
    scored = sum(len(query.completion) for query in queries)
    total = 0
    for context in contexts:
        length, tokens = len(context), len(prefixes)
        keys = (
            sum(len(prefix) for prefix in prefixes) + tokens * length + length * (length + 1) // 2
        )
        total += 2 * inner * (tokens + length) + 4 * hidden * layers * keys + 2 * head * scored
    return total


def product_rate():
    """Floating-point operations a second of a float32 matrix product."""
    a, b = torch.randn(1024, 1536), torch.randn(1536, 1536)
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    return 20 * 2 * 1024 * 1536 * 1536 / (time.perf_counter() - start)


def doubled(rows, tasks=12):
    """Rows of twice the length: each joined with the next one of its task."""
    pairs = [(row, rows[(i + tasks) % len(rows)]) for i, row in enumerate(rows)]
    return [
        {
            **a,
            "prompt": a["prompt"] + "\n" + b["prompt"],
            "completion": a["completion"] + b["completion"],
        }
        for a, b in pairs
    ]


def measure(lm, demonstrations, queries, repeats, methods):
    """Time the methods in turn; return seconds {method: [..]} and scores {method: [N, M]}."""
    contexts = [icp.context(lm, demonstration) for demonstration in demonstrations]
    seconds, scores, rates = {name: [] for name in methods}, {}, []
    for method in methods.values():
        method(lm, queries[:BATCH], contexts[:1])
    for _ in range(repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            scores[name] = method(lm, queries, contexts)
            seconds[name].append(time.perf_counter() - start)
            rates.append(product_rate())
    return seconds, scores, rates, useful_operations(lm, queries, contexts)


def report(title, lm, demonstrations, queries, repeats):
    """Print one comparison."""
    methods = {"plain loop": plain_loop, "icprobe": language_model.log_likelihoods}
    seconds, scores, rates, operations = measure(lm, demonstrations, queries, repeats, methods)
    lengths = [np.mean([len(e.ids) for e in group]) for group in (demonstrations, queries)]
    n_pairs = len(demonstrations) * len(queries)
    print(f"\n{title}: {n_pairs} pairs, {lengths[0]:.0f} + {lengths[1]:.0f} tokens on average")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"  {name:11} {n_pairs / middle:7.2f} pairs/s   {middle:.2f} s "
            f"({min(values):.2f} to {max(values):.2f})"
        )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    rate = statistics.median(rates)
    used = operations / statistics.median(seconds["icprobe"])
    error = np.abs(scores["plain loop"] - scores["icprobe"]).max()
    print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(
        f"  useful operations {used / 1e9:.0f} GFLOP/s, matrix products {rate / 1e9:.0f} GFLOP/s "
        f"({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}): {used / rate:.0%}"
    )
    print(f"  largest difference {error:.1e} nats; {operations / n_pairs / 1e9:.2f} GFLOP a pair")


def main():
    """Run the comparisons asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demonstrations", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="also compare with bfloat16")
    parser.add_argument("--memory-of", choices=["plain_loop", "icprobe"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    pool = data.load("grid", "train", 12 * max(1, options.demonstrations))
    pool = list(pool)[:: max(1, len(pool) // options.demonstrations)][: options.demonstrations]
    questions = list(data.load("grid", "query", 48))
    lm = language_model.load(assets.DEFAULT_MODEL, device="cpu")

    def encoded(rows):
        return language_model.encode(lm, rows)

    if options.memory_of:
        method = plain_loop if options.memory_of == "plain_loop" else language_model.log_likelihoods
        method(lm, encoded(questions), [icp.context(lm, d) for d in encoded(pool[:1])])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  {options.memory_of}: peak memory {peak:.2f} GiB")
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    report("lengths of grid", lm, encoded(pool), encoded(questions), options.repeats)
    longer = encoded(doubled(pool, 1)), encoded(doubled(questions))
    report("twice those lengths", lm, *longer, options.repeats)
    print("\npeak memory of a process that scores one demonstration by 48 queries:")
    for name in ("plain_loop", "icprobe"):
        subprocess.run([sys.executable, __file__, "--memory-of", name], check=True)
    if options.bfloat16:
        compare_bfloat16(lm, encoded(data.load("grid", "train", 12)), encoded(questions[:24]))


def compare_bfloat16(lm, demonstrations, queries):
    """Print time and rank agreement of bfloat16 with float32 on the same pairs."""
    half = language_model.load(assets.DEFAULT_MODEL, "bfloat16", device="cpu")
    seconds, scores = {}, {}
    for model in (lm, half):
        icp.log_likelihoods(model, queries[:2], demonstrations[:1])
        start = time.perf_counter()
        scores[model.identity["dtype"]] = icp.log_likelihoods(model, queries, demonstrations)
        seconds[model.identity["dtype"]] = time.perf_counter() - start
    rho = [spearmanr(a, b).statistic for a, b in zip(*(s.T for s in scores.values()), strict=True)]
    print(f"\nbfloat16: {seconds['float32'] / seconds['bfloat16']:.2f} times the speed of float32")
    print(
        f"  per-query Spearman over {len(demonstrations)} demonstrations: mean {np.mean(rho):.3f}"
    )


if __name__ == "__main__":
    main()
