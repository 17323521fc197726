"""Time probing and gradient products on a GPU, for a model and queries of the paper's size.

    ./run_all.sh python benchmarks/gpu.py [--output figures/mine] [--dtype bfloat16] [--probed 256]
        [--passed 1024] [--repeats 3]

The model has Pythia-1b's shape and random weights: speed does not ask what they say, though errors
do. Examples are random tokens, 120 on average, the queries 100 as in the paper. Probing is timed
with --probed training examples, gradient products with --passed, in the blocks and passes in which
notebooks 01 and 02 score them; a run with few of them tells the seconds that do not grow with their
number, and both those of the paper's 52,002. Beside them, in the same run, the card's limits: the
rate of matrix products, and of copying. Errors are those of a few of the timed pairs, relative to
the largest value of plain loops in float64 on a CPU.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tqdm import tqdm

from icprobe import figures, models
from icprobe.artifact.benchmark.comparison import errors, product_rate
from icprobe.artifact.benchmark.methods import METHODS, NATS, PLAIN, PRODUCTS
from icprobe.data import paths
from icprobe.methods import costs, icp
from icprobe.methods.costs import Lengths, Shape
from icprobe.methods.gradient import GradientProducts, dot
from icprobe.models import LM, Encoded

POOL, QUERIES = 52_002, 100  # the paper's
PROMPT, COMPLETION = (20, 80), (20, 120)  # tokens at least and at most
CHECKED = 4, 2  # training examples and queries whose pairs are compared with float64
FEW = 8  # training examples in the run that tells the seconds which do not grow

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
    with torch.device("cuda"):  # where a billion numbers are drawn in no time
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(tokenizer_models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def random_examples(rng: np.random.Generator, count: int) -> list[Encoded]:
    """Return examples of random tokens."""

    def tokens(low: int, high: int) -> tuple[int, ...]:
        drawn = rng.integers(PYTHIA_1B["vocab_size"], size=rng.integers(low, high + 1))
        return tuple(drawn.tolist())

    return [Encoded(str(k), tokens(*PROMPT), tokens(*COMPLETION)) for k in range(count)]


def copied_per_second() -> float:
    """Return how many bytes the card copies in a second, read and written; median of five."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    rates = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        rates.append(2 * source.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def probing(lm: LM, train: list[Encoded], queries: list[Encoded]) -> np.ndarray:
    """Return log-likelihoods [N, M], as `icp.ICP` makes them."""
    size = icp.ICP.block_size["cuda"]
    blocks = [train[start : start + size] for start in range(0, len(train), size)]
    return np.concatenate([icp.log_likelihoods(lm, queries, block) for block in blocks])


def products(lm: LM, train: list[Encoded], queries: list[Encoded]) -> np.ndarray:
    """Return gradient dot products [N, M], as `GradientProducts` makes them."""
    size = GradientProducts.block_size["cuda"]
    blocks = [train[start : start + size] for start in range(0, len(train), size)]
    held = dot.GradientDot(lm, queries)
    return np.concatenate([held.products(block)[0] for block in blocks])


def time_one(name: str, method, lm: LM, train: list[Encoded], queries: list[Encoded], options):
    """Return the scores [N, M], and the seconds and memory of a method as columns of a row."""
    method(lm, train, queries)  # the first run is slower
    torch.cuda.reset_peak_memory_stats()
    seconds = {}
    for part in (train[:FEW], train):
        seconds[len(part)] = []
        for _ in tqdm(range(options.repeats), desc=f"{name}, N = {len(part)}"):
            start = time.perf_counter()
            scores = method(lm, part, queries)
            seconds[len(part)].append(time.perf_counter() - start)
    few, many = (statistics.median(found) for found in seconds.values())
    slope = (many - few) / (len(train) - FEW)
    return scores, {
        "n": len(train),
        "m": len(queries),
        "tokens": np.mean([len(example.ids) for example in (*train, *queries)]),
        "seconds": many,
        "low": min(seconds[len(train)]),
        "high": max(seconds[len(train)]),
        "repeats": options.repeats,
        "seconds of few": few,
        "minutes": (few + slope * (POOL - FEW)) / 60,
        "peak": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Run everything, and write gpu.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="figures/mine", help="a folder (figures/mine)")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], help="of the model (bfloat16)")
    parser.add_argument("--probed", type=int, default=256, help="examples to probe with (256)")
    parser.add_argument("--passed", type=int, default=1024, help="examples for products (1024)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here.")
    if min(options.probed, options.passed) <= FEW:
        parser.error(f"--probed and --passed must be above {FEW}")

    methods = {
        "probing": (NATS, costs.probing, probing, options.probed),
        "gradient products": (PRODUCTS, costs.gradient_products, products, options.passed),
    }
    rng = np.random.default_rng(0)
    train = random_examples(rng, max(options.probed, options.passed))
    queries, rows = random_examples(rng, QUERIES), []
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    copied = copied_per_second()
    with tempfile.TemporaryDirectory(prefix="icprobe-") as folder:
        path = str(random_model(Path(folder)))
        some = train[: CHECKED[0]], queries[: CHECKED[1]]
        plain = models.load(path, "float64", "cpu")
        exact = {quantity: METHODS[name].run(plain, *some) for quantity, name in PLAIN.items()}
        del plain
        for dtype, name in itertools.product(options.dtype, methods):
            quantity, min_cost, method, count = methods[name]
            lm = models.load(path, dtype, "cuda")
            memory = dot.usual_memory(lm.device)
            mine = train[:count]
            scores, took = time_one(f"{name}, {dtype}", method, lm, mine, queries, options)
            rate = product_rate(lm)
            floor = min_cost(Shape.of(lm), Lengths.of(mine, queries)).operations / rate
            rows.append(
                {
                    "method": name,
                    "device": torch.cuda.get_device_name(),
                    "dtype": dtype,
                    **took,
                    "rate": rate,
                    "copied": copied,
                    "memory": memory,  # GiB that gradient factors may take
                    "floor": floor,  # all at the rate of the model's dtype
                    **errors(scores[: CHECKED[0]], exact[quantity]),
                    "versions": versions,
                }
            )
            print(rows[-1], flush=True)
            del lm
    figures.save_table(pd.DataFrame(rows), "gpu", paths.resolve(options.output))


if __name__ == "__main__":
    main()
