"""How long will scoring take, and how much memory? Counted operations, measured rates.

    seconds = operations / (rate of matrix products x efficiency)

Operations are counted from the model's shape and the examples' lengths (`costs`). The rate is that
of the machine, measured on the spot. The efficiency is the share of it that a method reached in the
timings that come with this repository: with other lengths, other numbers of queries and other
models, the least and the greatest of them give a range. Memory is the model, what a method holds
beside it (see `held`), and what those runs have taken beyond these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from icprobe import benchmark, paths
from icprobe.lm import LM, Encoded
from icprobe.methods import costs
from icprobe.methods.costs import Cost, Lengths, Shape
from icprobe.methods.gradient import dot as influence
from icprobe.methods.gradient.methods import GradientProducts

PROBING, PRODUCTS = "probing", "gradient products"
METHODS = (PROBING, PRODUCTS)

CPU_TIMINGS = paths.ROOT / "figures" / "laptop" / "cost.csv"
GPU_TIMINGS = paths.ROOT / "figures" / "gpu" / "gpu.csv"

# the models that were timed (SmolLM2-135M and one of Pythia-1b's shape): weights, numbers that a
# token's gradient factors take
TIMED_WEIGHTS = {"cpu": 134_515_008, "cuda": 1_011_781_632}
TIMED_FACTORS = {"cpu": 253_440, "cuda": 524_288}
TIMED_TOKENS = {"grid": 48, "long": 119}  # of an example, on average

# tokens of training examples whose factors are held together
TOGETHER = {"cpu": influence.TOKENS_TOGETHER, "cuda": influence.TOKENS_ON_GPU}

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Where scoring would run.

    Attributes:
        name: For tables.
        kind: "cpu" or "cuda".
        dtype: The model's.
        rate: Operations a second of matrix products.
        memory: GiB of gradient factors that it holds where nothing else is asked for.
    """

    name: str
    kind: str
    dtype: str
    rate: float
    memory: float = influence.MEMORY

    @classmethod
    def here(cls, lm: LM) -> "Machine":
        """Return this one, which takes a second or two to measure."""
        rate, memory = benchmark.product_rate(lm), influence.usual_memory(lm.device)
        return cls("this machine", lm.device.type, lm.identity["dtype"], rate, memory)


def experience() -> pd.DataFrame:
    """Return what timings tell: a row for each run of ours on a CPU or a GPU.

    Returns:
        Columns method, model, kind, dtype, machine, lengths, n, m, seconds, rate, efficiency, peak
        (GiB), memory (GiB that gradient factors might take), and beyond: GiB that it took beside
        the model and what gradient products hold.
    """
    cpu = pd.read_csv(CPU_TIMINGS)
    cpu = cpu[cpu["method"].str.startswith(benchmark.OURS)]
    cpu = cpu.assign(method=cpu["method"].str.removeprefix(benchmark.OURS), kind=cpu["device"])
    gpu = pd.read_csv(GPU_TIMINGS).assign(kind="cuda", lengths="random", model="Pythia-1b's shape")
    found = pd.concat([cpu, gpu.assign(machine=gpu["device"])], ignore_index=True)
    found = found[found["method"].isin(METHODS)].reset_index(drop=True)
    found["efficiency"] = found["floor"] / found["seconds"]
    size = found["dtype"].map(BYTES) / GIB
    tokens = found["tokens"].fillna(found["lengths"].map(TIMED_TOKENS))
    together = np.minimum(found["n"] * tokens, found["kind"].map(TOGETHER))
    factors = (found["m"] * tokens + together) * found["kind"].map(TIMED_FACTORS) * size
    found["memory"] = found["memory"].fillna(benchmark.MEMORY)
    factors = np.minimum(factors, found["memory"])
    found["beyond"] = found["peak"] - found["kind"].map(TIMED_WEIGHTS) * size
    found["beyond"] -= factors.where(found["method"] == PRODUCTS, 0)
    found["beyond"] = found["beyond"].clip(lower=0)  # what is held may be a batch less than a tile
    columns = ["method", "model", "kind", "dtype", "machine", "lengths", "n", "m", "seconds"]
    return found[[*columns, "rate", "efficiency", "peak", "memory", "beyond"]]


def machines(known: pd.DataFrame) -> list[Machine]:
    """Return the GPUs that were timed, in each dtype."""
    gpus = known[known["kind"] == "cuda"].groupby(["machine", "dtype"], sort=False)
    rows = gpus[["rate", "memory"]].median().itertuples()
    return [Machine(name, "cuda", dtype, *numbers) for (name, dtype), *numbers in rows]


def of_pool(lengths: Lengths, N: int) -> Lengths:
    """Return the lengths of a pool of N like the training examples at hand, repeated or cut."""
    return replace(lengths, train=np.resize(lengths.train, N), learnt=np.resize(lengths.learnt, N))


def cost(method: str, shape: Shape, lengths: Lengths, block: int) -> Cost:
    """Return a method's cost for a pool of any size.

    Args:
        method: One of `METHODS`.
        shape: The model's.
        lengths: Of N training examples and M queries.
        block: Training examples whose gradients are multiplied together.
    """
    if method == PROBING:
        return costs.probing(shape, lengths)
    N = len(lengths.train)
    queries = costs.gradient_products(shape, of_pool(lengths, 0))
    blocks = [
        costs.gradient_products(
            shape,
            replace(
                lengths,
                train=lengths.train[start : start + block],
                learnt=lengths.learnt[start : start + block],
            ),
        )
        for start in range(0, N, block)
    ]
    operations = sum(one.operations - queries.operations for one in blocks)
    return Cost(queries.operations + operations, queries.bytes)


def held(
    method: str, machine: Machine, shape: Shape, lengths: Lengths, memory: float = np.inf
) -> float:
    """Return the GiB that a method holds beside the model, of which some may lie in a file.

    Probing: one context's keys and values. Gradient products: the factors of the gradients of the
    queries, and of as many training examples as are multiplied together.

    Args:
        method: One of `METHODS`.
        machine: Where.
        shape: The model's.
        lengths: Of N training examples and M queries.
        memory: GiB of factors that it may hold in memory: on a GPU, fewer training examples are
            multiplied together if there is no room for more.
    """
    size = BYTES[machine.dtype] / GIB
    if method == PROBING:
        return costs.probing(shape, lengths).bytes / costs.FLOAT * size
    token, queries = shape.factors * size, lengths.queries.sum()
    room = max(influence.TOKENS_TOGETHER, memory / token - queries)
    together = min(lengths.train.sum(), TOGETHER[machine.kind], room)
    return float(queries + together) * token


def predict(
    machine: Machine, shape: Shape, weights: int, lengths: Lengths, known: pd.DataFrame,
    memory: float | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Return what each method would take on a machine.

    Args:
        machine: Where.
        shape: The model's.
        weights: How many it has.
        lengths: Of N training examples and M queries.
        known: See `experience`.
        memory: GiB of gradient factors to hold; the rest goes to a file. By default the machine's.

    Returns:
        One row for each method that was timed on a device of this kind in this dtype: where, dtype,
        method, n, m, minutes, low and high (by the greatest and the least efficiency that was
        reached; not numbers where that was a single one), GiB (on a GPU, of its memory) and file
        (GiB in a temporary file).
    """
    memory = machine.memory if memory is None else memory
    rows = []
    for method in METHODS:
        like = known[
            (known["method"] == method)
            & (known["kind"] == machine.kind)
            & (known["dtype"] == machine.dtype)
        ]
        if like.empty:
            continue
        operations = cost(
            method, shape, lengths, GradientProducts.block_size[machine.kind]
        ).operations
        reached = like["efficiency"].quantile([0.5, 1, 0]).to_numpy()
        minutes = operations / (machine.rate * reached) / 60
        if len(like) == 1:
            minutes[1:] = np.nan
        wanted = held(method, machine, shape, lengths, memory)
        room = min(wanted, memory) if method == PRODUCTS else wanted
        gib = weights * BYTES[machine.dtype] / GIB + room + like["beyond"].median()
        place = machine.name, machine.dtype, method, len(lengths.train), len(lengths.queries)
        rows.append((*place, *minutes, gib, wanted - room))
    columns = ["where", "dtype", "method", "n", "m", "minutes", "low", "high", "GiB", "file"]
    return pd.DataFrame(rows, columns=columns)


def table(
    lm: LM,
    train: Sequence[Encoded],
    queries: Sequence[Encoded],
    sizes: Sequence[int],
    memory: float | None = None,
) -> pd.DataFrame:
    """Return what scoring would take here and on the GPUs that were timed, see `predict`.

    Args:
        lm: The model.
        train: Training examples, whose lengths stand for the pool's.
        queries: M queries.
        sizes: N, sizes of the pool.
        memory: See `predict`.
    """
    known, shape, lengths = experience(), Shape.of(lm), Lengths.of(train, queries)
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    where = [Machine.here(lm), *machines(known)]
    found = [
        predict(machine, shape, weights, of_pool(lengths, N), known, memory)
        for machine in where
        for N in sizes
    ]
    return pd.concat(found, ignore_index=True)


def checked(lm: LM, known: pd.DataFrame) -> pd.DataFrame:
    """Return how well timings on a CPU are foretold by those of other lengths.

    Args:
        lm: The model that was timed.
        known: See `experience`.

    Returns:
        A row for each timing, none if these are of another model: method, dtype, lengths, n, m,
        seconds (measured), predicted, low, high and times (predicted over measured), peak (GiB
        measured) and GiB (predicted).
    """
    shape = Shape.of(lm)
    rows = []
    timed = known[(known["kind"] == "cpu") & (known["model"] == lm.identity["name"])]
    for row in timed.itertuples():
        others = timed[timed["lengths"] != row.lengths]
        work = Lengths.of(*benchmark.examples(lm, row.lengths, row.n, row.m))
        machine = Machine("", "cpu", row.dtype, row.rate)
        weights = TIMED_WEIGHTS["cpu"]
        found = predict(machine, shape, weights, work, others, benchmark.MEMORY)
        found = found[found["method"] == row.method]
        if len(found):
            seconds = 60 * found[["minutes", "low", "high"]].iloc[0]
            times = seconds["minutes"] / row.seconds
            what = row.method, row.dtype, row.lengths, row.n, row.m, row.seconds
            rows.append((*what, *seconds, times, row.peak, found["GiB"].iloc[0]))
    columns = ["method", "dtype", "lengths", "n", "m", "seconds", "predicted", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "times", "peak", "GiB"])
