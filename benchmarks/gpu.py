"""Time probing and gradient products on a GPU at the paper's scale, and how exact they are there.

    python benchmarks/gpu.py [--output figures/gpu] [--dtype bfloat16 float32] [--probed 256]
        [--passed 1024] [--repeats 3]

The model has Pythia-1b's shape and random weights: speed does not ask what they say. Examples are
random tokens of Alpaca-like lengths. Both methods meet the paper's 100 queries; their seconds grow
with the number of training examples alone, from which those of all 52,002 follow. Beside them, in
the same run, the card's limits: the rate of matrix products in each precision, and of copying.
Errors are those of a few pairs, relative to the largest value of plain loops in float64 on a CPU.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, models
from tqdm import tqdm

from icprobe import benchmark, costs, figures, icp, influence, lm
from icprobe.benchmark import PLAIN, Lengths, Shape

POOL, QUERIES = 52_002, 100  # the paper's
PROMPT, COMPLETION = (20, 80), (20, 120)  # tokens at least and at most: 120 on average
CHECKED = 4, 2  # training examples and queries whose pairs are compared with float64
MEMORY = 40  # GiB of gradient factors
TOKENS = 65536  # in one forward pass of probing
SLOWER = 16  # times fewer training examples in float32

PYTHIA_1B = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}


def random_model(folder: Path) -> Path:
    """Save a model of Pythia-1b's shape with random weights, and a tokenizer of two words."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**PYTHIA_1B)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def random_examples(rng: np.random.Generator, count: int) -> list[lm.Encoded]:
    """Return examples of random tokens."""

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(PYTHIA_1B["vocab_size"], size=rng.integers(low, high + 1)))

    return [
        lm.Encoded(str(k), *(tuple(map(int, tokens(*part))) for part in (PROMPT, COMPLETION)))
        for k in range(count)
    ]


def copy_rate() -> float:
    """Return the bytes a second that the card reads and writes when it copies; median of five."""
    source = torch.randn(2**30, device="cuda")
    target, rates = torch.empty_like(source), []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        rates.append(2 * source.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def products(model, train, queries):
    return influence.gradient_dot(model, train, queries, memory=MEMORY)


def probing(model, train, queries):
    return lm.log_likelihoods(model, queries, [icp.context(model, z) for z in train], TOKENS)


METHODS = {
    "probing": (benchmark.NATS, costs.probing, probing),
    "gradient products": (benchmark.PRODUCTS, costs.gradient_products, products),
}


def main() -> None:
    """Run everything, and write gpu.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="figures/gpu")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--probed", type=int, default=256, help="training examples")
    parser.add_argument("--passed", type=int, default=1024, help="the same, of gradient products")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    counts = {"probing": options.probed, "gradient products": options.passed}
    rng = np.random.default_rng(0)
    train, queries = (random_examples(rng, n) for n in (max(counts.values()), QUERIES))
    some, asked = train[: CHECKED[0]], queries[: CHECKED[1]]
    copied, rows = copy_rate(), []
    with tempfile.TemporaryDirectory(prefix="icprobe-") as folder:
        path = str(random_model(Path(folder)))
        plain = lm.load(path, "float64", "cpu")
        exact = {
            gives: benchmark.METHODS[name].run(plain, some, asked) for gives, name in PLAIN.items()
        }
        del plain
        for dtype, (name, (gives, needs, method)) in itertools.product(
            options.dtype, METHODS.items()
        ):
            model = lm.load(path, dtype, "cuda")
            rate = benchmark.product_rate(model)
            mine = train[: counts[name] // (SLOWER if dtype == "float32" else 1)]
            found = benchmark.errors(gives, method(model, some, asked), exact)
            method(model, mine[:64], queries)  # a warm-up
            torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in tqdm(range(options.repeats), desc=f"{name}, {dtype}"):
                start = time.perf_counter()
                method(model, mine, queries)
                seconds.append(time.perf_counter() - start)
            middle = statistics.median(seconds)
            floor = needs(Shape.of(model), Lengths.of(mine, queries)).operations / rate
            rows.append(
                {
                    "method": name,
                    "device": torch.cuda.get_device_name(),
                    "dtype": dtype,
                    "n": len(mine),
                    "m": QUERIES,
                    "seconds": middle,
                    "low": min(seconds),
                    "high": max(seconds),
                    "pairs per second": len(mine) * QUERIES / middle,
                    "minutes of the paper's": POOL / len(mine) * middle / 60,
                    "peak": torch.cuda.max_memory_allocated() / 2**30,
                    "rate": rate,
                    "copied": copied,
                    "floor": floor,
                    "efficiency": floor / middle,
                    **found,
                    "repeats": options.repeats,
                    "versions": benchmark.versions(),
                }
            )
            print(rows[-1], flush=True)
            del model
            figures.save_table(pd.DataFrame(rows), "gpu", options.output)


if __name__ == "__main__":
    main()
