"""Time every method on the same pairs, each run in a process of its own, methods taking turns.

    ./run_all.sh python -m icprobe.benchmark [--methods NAME ...] [--lengths grid long]
        [--train 32] [--queries 1 12 48] [--repeats 3] [--dtype float32 ...]
        [--output figures/mine]

Same token ids, model, dtype and threads for all. A run loads the model, works on a small part
once, and then is timed: wall and CPU seconds, the process's peak memory, and in the same process
the rate of matrix products, by which operations are turned into the seconds that they take at
least. No speed without its error: all pairs of some queries are compared with plain loops in
float64.

Peers run in environments of their own (`benchmarks/peers.sh` makes them). Those that are not there
or fail are left out, and so is a method whose gradients would not fit into the machine's memory;
all are named. A row of the table replaces the one of the same method, model, lengths, sizes, dtype
and device.
"""

import argparse
import functools
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
import transformers
from scipy.stats import spearmanr
from tqdm import tqdm

from icprobe import (
    assets,
    data,
    figures,
    machine,
    paths,
)
from icprobe import lm as language_model
from icprobe.lm import LM, Encoded
from icprobe.methods import baselines, costs, gradient, icp
from icprobe.methods.costs import Cost, Lengths, Shape
from icprobe.scores import compute

TABLE = "cost"
PEERS = paths.ROOT / "benchmarks" / "peers"
ENVIRONMENTS = paths.ROOT / "benchmarks" / "environments"

NATS, PRODUCTS, SET = "log-likelihoods", "gradient products", "mean gradient product"
SIMILARITY = "similarity"
PROJECTION = 16  # rows of each random matrix, see `projected`
MEMORY = 6  # GiB of gradient factors; methods that hold whole gradients take more
LONG = 90  # tokens that a long example has at least
CHECKED = 4  # queries whose pairs are compared with float64
FULL = 1 / 3  # share of the memory that M gradients may take: some peers hold them twice, and more
PLAIN_BATCH = 8

OURS = "icprobe, "  # how the names of our own methods begin
CLAIMED = (1, 12, 48)  # numbers of queries that claim C5 looks at
LENGTHS = ("grid", "long")  # of examples: as they are in this suite, or made of several

KEY = ["method", "model", "lengths", "dtype", "device", "n", "m"]


@dataclass(frozen=True)
class Method:
    """One way to a matrix of scores.

    Attributes:
        gives: What it computes, for N examples and M queries: log-likelihoods of queries after each
            example, products of their gradients, or the mean of the latter over queries.
        needs: The operations that this quantity takes at least.
        run: Takes model, training examples and queries; None for a peer.
        peer: Environment, script and its arguments.
        whole: Whether it holds gradients of the model's size for all queries at once.
    """

    gives: str
    needs: Callable[[Shape, Lengths], Cost]
    run: Callable[[LM, list[Encoded], list[Encoded]], np.ndarray] | None = None
    peer: tuple[str, ...] = ()
    whole: bool = False

    @property
    def exact(self) -> bool:
        """Whether it computes what it gives, rather than an estimate."""
        return self.needs is not _projection

    @property
    def python(self) -> Path | None:
        """The Python that runs it, None if its environment is not there."""
        if not self.peer or self.peer[0] == "kronfluence":  # which this package needs anyway
            return Path(sys.executable)
        python = ENVIRONMENTS / self.peer[0] / "bin" / "python"
        return python if python.exists() else None


def _probing(lm, train, queries):
    return icp.log_likelihoods(lm, queries, train)


def _gradient_products(lm, train, queries):
    return gradient.gradient_dot(lm, train, queries, memory=MEMORY)


def _plain_loop(lm, train, queries):
    """Return the same as one would write it down: pair by pair, in padded batches."""
    contexts = [icp.context(lm, example) for example in train]
    pairs = [language_model.sequence(lm, query, shown) for shown in contexts for query in queries]
    nats = []
    with torch.inference_mode():
        for start in range(0, len(pairs), PLAIN_BATCH):
            batch = pairs[start : start + PLAIN_BATCH]
            shape = (len(batch), max(len(ids) for ids, _ in batch))
            ids, real, scored = torch.zeros((3, *shape), dtype=torch.long)
            for row, (tokens, mask) in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                real[row, : len(tokens)] = 1
                scored[row, : len(tokens)] = torch.tensor(mask)
            ids, real, scored = (part.to(lm.device) for part in (ids, real, scored))
            logits = lm.model(ids, attention_mask=real).logits[:, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            nats += (chosen * scored[:, 1:]).sum(1).tolist()
    return np.array(nats).reshape(len(train), len(queries))


def _naive(lm, train, queries):
    """Return gradient products as one would write them down: autograd, one example at a time."""
    weights = [layer.weight for layer in gradient.linear_layers(lm).values()]
    theirs = [
        torch.empty(len(queries), weight.numel(), dtype=weight.dtype, device=lm.device)
        for weight in weights
    ]
    for j, query in enumerate(queries):
        for rows, part in zip(
            theirs, gradient.losses.full_gradient(lm, query, weights), strict=True
        ):
            rows[j] = part.flatten()
    scores = torch.zeros(len(train), len(queries), dtype=torch.float64)
    for i, example in enumerate(train):
        for rows, part in zip(
            theirs, gradient.losses.full_gradient(lm, example, weights), strict=True
        ):
            scores[i] += (rows @ part.flatten()).double().cpu()
    return scores.numpy()


def _projected(lm, train, queries):
    return gradient.projected_gradients(lm, train, PROJECTION) @ (
        gradient.projected_gradients(lm, queries, PROJECTION).T
    )


def _hidden_states(lm, train, queries):
    return compute(baselines.Embedding(), lm, train, queries)["embedding"]


def _query_set(lm, train, queries):
    return gradient.mean_influence(lm, train, queries)[:, None]


def _peer(gives, needs, environment, script, batch, projection=0, whole=False):
    """Return a peer's method."""
    options = ("--batch", str(batch), "--projection", str(projection))
    return Method(gives, needs, peer=(environment, script, *options), whole=whole)


def _projection(shape, lengths):
    return costs.projected(shape, lengths, PROJECTION)


_products, _shrunk = (PRODUCTS, costs.gradient_products), (PRODUCTS, _projection)

METHODS = {
    "icprobe, probing": Method(NATS, costs.probing, _probing),
    "transformers, plain loop": Method(NATS, costs.probing, _plain_loop),
    **{
        f"lm-eval, batch {batch}": _peer(
            NATS, costs.probing, "lm-eval", "lm_eval_probing.py", batch
        )
        for batch in (1, 8, 32)
    },
    "icprobe, gradient products": Method(*_products, _gradient_products),
    "autograd, one by one": Method(*_products, _naive, whole=True),
    **{
        f"kronfluence, batch {batch}": _peer(
            *_products, "kronfluence", "kronfluence_identity.py", batch
        )
        for batch in (4, 16)
    },
    **{
        f"{library}, batch {batch}": _peer(*_products, library, script, batch, whole=True)
        for library, script in (
            ("bergson", "bergson_products.py"),
            ("captum", "captum_tracin.py"),
        )
        for batch in (1, 4)
    },
    "icprobe, projected": Method(*_shrunk, _projected),
    **{
        f"{library}, projected, batch {batch}": _peer(*_shrunk, library, script, batch, PROJECTION)
        for library, script in (("bergson", "bergson_products.py"), ("dattri", "dattri_logra.py"))
        for batch in (4, 16)
    },
    "icprobe, query set": Method(SET, costs.query_set, _query_set),
    "icprobe, hidden states": Method(SIMILARITY, costs.reading, _hidden_states),
}


# what everything is compared with, in float64
PLAIN = {NATS: "transformers, plain loop", PRODUCTS: "autograd, one by one"}


def examples(lm: LM, lengths: str, n: int, m: int) -> tuple[list[Encoded], list[Encoded]]:
    """Return training examples and queries of grid, or long ones that are joined from its rows.

    A split that is too small is gone through again.

    Raises:
        ValueError: If lengths are neither "grid" nor "long".
    """
    if lengths not in LENGTHS:
        raise ValueError(f"lengths is {lengths!r}, expected 'grid' or 'long'")
    found = []
    for split, size in (("train", n), ("query", m)):
        rows = _rows(split)
        rows = _joined(lm, rows, size) if lengths == "long" else rows[:size]
        encoded = language_model.encode(lm, rows)
        found.append(list(itertools.islice(itertools.cycle(encoded), size)))
    return found[0], found[1]


@functools.cache
def _rows(split: str) -> list[dict]:
    """Return all rows of a split of grid."""
    return list(data.load("grid", split, seed=0))


def _joined(lm: LM, rows: list[dict], size: int) -> list[dict]:
    """Return the first rows, each with as many of the next ones of its task as make it long."""
    tokens = [len(encoded.ids) for encoded in language_model.encode(lm, rows)]
    step = len({row["task"] for row in rows})  # every so many rows, a task comes again
    joined = []
    for start in range(min(size, len(rows))):
        part, total = [], 0
        for k in itertools.count(start, step):
            part.append(rows[k % len(rows)])
            total += tokens[k % len(rows)]
            if total >= LONG:
                break
        joined.append(
            {
                "id": "+".join(row["id"] for row in part),
                "prompt": "\n".join(row["prompt"] for row in part),
                "completion": "".join(row["completion"] for row in part),
            }
        )
    return joined


def exchange(model: str, lm: LM, train: Sequence[Encoded], queries: Sequence[Encoded]) -> dict:
    """Return what a method needs to know, in a form for any environment's Python.

    The model is named as for `lm.load`, and passed on as a folder or hub name. Ids include the
    beginning-of-sequence token, if the model has one; `start` is the position of the first
    completion token.
    """
    return {
        "model": assets.model_path(model),
        "dtype": lm.identity["dtype"],
        "device": lm.device.type,
        "threads": torch.get_num_threads(),
        "begin": len(lm.bos),
        "contexts": [[*lm.bos, *icp.context(lm, example)] for example in train],
        **{
            name: [
                {
                    "ids": [*lm.bos, *row.ids],
                    "start": len(lm.bos) + len(row.prompt),
                }
                for row in rows
            ]
            for name, rows in (("train", train), ("queries", queries))
        },
    }


def peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has held, in GiB; not a number where none says.

    On a GPU, the GPU's.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return machine.peak_memory()


def _memory(device: torch.device) -> int:
    """Return the bytes that a device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def product_rate(lm: LM) -> float:
    """Return the operations a second of matrix products on a model's device, in its dtype.

    Median of five, of the faster way to use a CPU's threads: all in one product, or a product each.
    """
    # large enough for a GPU's rate, or small enough for a CPU's cache
    sizes = (8192, 8192, 8192) if lm.device.type == "cuda" else (1024, 1536, 1536)
    a = torch.randn(sizes[:2]).to(lm.device, lm.model.dtype)
    b = torch.randn(sizes[1:]).to(lm.device, lm.model.dtype)
    together = torch.get_num_threads() if lm.device.type == "cpu" else 1

    def multiply(count: int) -> None:
        for _ in range(count):
            a @ b

    def apart(count: int) -> None:
        language_model.side_by_side(multiply, [count // together] * together, lm.device)

    rates = {multiply: [], apart: []}
    for _, way in itertools.product(range(5), rates):
        _finish(lm.device)
        start = time.perf_counter()
        way(2 * together)
        _finish(lm.device)
        operations = 2 * together * 2 * math.prod(sizes)
        rates[way].append(operations / (time.perf_counter() - start))
    return max(statistics.median(found) for found in rates.values())


def _finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, work: dict, file: Path) -> dict:
    """Run one of our own methods here, write its scores, and return what it took."""
    torch.set_num_threads(work["threads"])
    lm = language_model.load(work["model"], work["dtype"], work["device"])
    train, queries = (
        [
            Encoded(str(k), tuple(row["ids"][work["begin"] : row["start"]]),
                    tuple(row["ids"][row["start"] :]))
            for k, row in enumerate(work[part])
        ]
        for part in ("train", "queries")
    )  # fmt: skip
    method = METHODS[name].run
    method(lm, train[:2], queries[:2])
    rate = product_rate(lm)
    start, cpu = time.perf_counter(), time.process_time()
    scores = method(lm, train, queries)  # in the CPU's memory, so a GPU has finished
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    np.save(file, scores)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak": peak_memory(lm.device),
        "rate": rate,
        "versions": versions(),
    }


def versions() -> str:
    """Return those of what computes here."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def run(name: str, work: Path, scores: Path) -> dict:
    """Run a method in a process of its own; see `measure`.

    Raises:
        RuntimeError: If the process fails; says how it ended, and has the end of what it wrote.
    """
    method = METHODS[name]
    if method.peer:
        script, *arguments = method.peer[1:]
        command = [str(method.python), str(PEERS / script), str(work), str(scores), *arguments]
    else:
        command = [sys.executable, "-m", "icprobe.benchmark", "--measure", name, str(work)]
        command.append(str(scores))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        killed = done.returncode == -signal.SIGKILL
        how = "was killed (out of memory?)" if killed else f"failed with {done.returncode}"
        raise RuntimeError(f"{name} {how}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.lru_cache(maxsize=4)
def reference(gives: str, model: str, device: str | None, lengths: str, n: int) -> np.ndarray:
    """Return log-likelihoods or gradient products [N, CHECKED] by plain loops in float64.

    In a process of its own, since whole gradients leave it large. Arguments are those of `compare`;
    the same array serves all dtypes and numbers of queries.
    """
    lm = language_model.load(model, device=device)
    work = {**exchange(model, lm, *examples(lm, lengths, n, CHECKED)), "dtype": "float64"}
    with tempfile.TemporaryDirectory(prefix="icprobe-") as folder:
        file, scores = Path(folder) / "work.json", Path(folder) / "scores.npy"
        file.write_text(json.dumps(work))
        run(PLAIN[gives], file, scores)
        return np.load(scores)


def errors(gives: str, scores: np.ndarray, exact: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest error relative to the largest value, and the mean of Spearman per query.

    Not a number where the reference has none: of similarities, and of means over all queries.

    Args:
        gives: See `Method`.
        scores: [N, M].
        exact: By what it gives, see `reference`; compared are the queries that both have.
    """
    if gives not in exact:
        return {"error": np.nan, "rank": np.nan}
    m = min(scores.shape[1], exact[gives].shape[1])
    found, true = scores[:, :m], exact[gives][:, :m]
    ranks = [spearmanr(*pair).statistic for pair in zip(found.T, true.T, strict=True)]
    return {"error": float(abs(found - true).max() / abs(true).max()), "rank": np.mean(ranks)}


def compare(
    model: str,
    dtype: str,
    device: str | None,
    lengths: str,
    n: int,
    m: int,
    names: Sequence[str] = tuple(METHODS),
    repeats: int = 3,
) -> pd.DataFrame:
    """Return one row a method: medians over repeats, ranges, efficiency and errors.

    Args:
        model: See `lm.load`.
        dtype: To compare in.
        device: The same; peers run on a CPU only.
        lengths: "grid" or "long".
        n: N, training examples.
        m: M, queries.
        names: Of `METHODS`; what cannot run here is left out, see the module.
        repeats: Runs of each, in turn; each turn begins with another.

    Returns:
        Columns `KEY`, machine, threads, gives, seconds, low, high (of seconds), cpu (seconds), peak
        (GiB), rate (operations a second of matrix products), floor (seconds that the quantity's
        operations take at this rate), efficiency (floor over seconds), error and rank (see
        `errors`), repeats and versions.

    Raises:
        ValueError: If a method or the lengths are unknown, or there is none that can run.
        RuntimeError: If the process of a method of ours fails, or those of all others.
    """
    unknown = sorted(set(names) - METHODS.keys())
    if unknown:
        raise ValueError(f"unknown methods {unknown}, there are {list(METHODS)}")
    lm = language_model.load(model, dtype, device)
    train, queries = examples(lm, lengths, n, m)
    shape, sizes = Shape.of(lm), Lengths.of(train, queries)
    names, left_out = _possible(names, lm, costs.whole_gradients(shape, sizes).bytes)
    exact = {
        gives: reference(gives, model, device, lengths, n)
        for gives in {METHODS[name].gives for name in names} & PLAIN.keys()
    }
    runs: dict[str, list[dict]] = {name: [] for name in names}
    found = {}
    with tempfile.TemporaryDirectory(prefix="icprobe-") as folder:
        work, file = Path(folder) / "work.json", Path(folder) / "scores.npy"
        work.write_text(json.dumps(exchange(model, lm, train, queries)))
        turns = [names[k % len(names) :] + names[: k % len(names)] for k in range(repeats)]
        what = f"{lengths}, N = {n}, M = {m}"
        for name in tqdm(list(itertools.chain(*turns)), desc=what, unit=" runs"):
            if name in left_out:
                continue
            try:
                runs[name].append(run(name, work, file))
                found[name] = np.load(file)
            except RuntimeError as error:
                if METHODS[name].run:
                    raise
                left_out[name] = str(error)
                del runs[name]
    for name, why in left_out.items():
        print(f"Left out: {name}: {why}", file=sys.stderr)
    if not runs:
        raise RuntimeError(f"no method ran to its end: {left_out}")
    rates = [entry["rate"] for mine in runs.values() for entry in mine if "rate" in entry]
    rate = statistics.median(rates or [product_rate(lm)])  # other libraries' scripts tell none
    on_gpu = lm.device.type == "cuda"
    processor = torch.cuda.get_device_name(lm.device) if on_gpu else machine.processor()
    rows = []
    for name, mine in runs.items():
        method = METHODS[name]
        seconds = [entry["seconds"] for entry in mine]
        floor = method.needs(shape, sizes).operations / rate
        middle = statistics.median(seconds)
        rows.append(
            {
                "method": name,
                "model": lm.identity["name"],
                "lengths": lengths,
                "dtype": lm.identity["dtype"],
                "device": lm.device.type,
                "n": n,
                "m": m,
                "machine": processor,
                "threads": torch.get_num_threads(),
                "gives": method.gives,
                "seconds": middle,
                "low": min(seconds),
                "high": max(seconds),
                "cpu": statistics.median(entry["cpu"] for entry in mine),
                "peak": statistics.median(entry["peak"] for entry in mine),
                "rate": rate,
                "floor": floor,
                "efficiency": floor / middle,
                **errors(method.gives, found[name], exact),
                "repeats": repeats,
                "versions": mine[0]["versions"],
            }
        )
    return pd.DataFrame(rows)


def _possible(names: Sequence[str], lm: LM, held: int) -> tuple[list[str], dict[str, str]]:
    """Return the methods that can run here, and why each other one cannot.

    Args:
        names: Of `METHODS`.
        lm: The model.
        held: Bytes of all queries' gradients.

    Raises:
        ValueError: If none can.
    """
    left_out = {}
    for name in names:
        method = METHODS[name]
        if method.peer and lm.device.type != "cpu":
            left_out[name] = "other libraries are run on a CPU only"
        elif not method.python:
            left_out[name] = f"no environment, see `benchmarks/peers.sh {method.peer[0]}`"
        elif method.whole and held > FULL * _memory(lm.device):
            left_out[name] = f"the queries' gradients alone take {held / 2**30:.0f} GiB"
    names = [name for name in names if name not in left_out]
    if not names:
        raise ValueError(f"no method can run here: {left_out}")
    return names, left_out


def profile(
    lm: LM, names: Sequence[str], train: list[Encoded], queries: list[Encoded]
) -> pd.DataFrame:
    """Return where the time of our own methods goes, on one thread: shares of all seconds.

    Args:
        lm: The model.
        names: Of `METHODS`.
        train: N training examples.
        queries: M queries.

    Returns:
        A row a method; columns "matrix products", "attention" (fused; where it is not, its products
        are with the others), "other operations" and "between operations" (Python, and calling
        them); and "products over least", the operations of matrix products over the least that
        the method's quantity takes.
    """
    threads, rows = torch.get_num_threads(), {}
    shape, lengths = Shape.of(lm), Lengths.of(train, queries)
    torch.set_num_threads(1)  # what other threads do, the profiler does not see
    try:
        for name in tqdm(names, desc="profiles", unit=" methods"):
            method = METHODS[name]
            method.run(lm, train[:2], queries[:2])
            start = time.perf_counter()
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, with_flops=True) as seen:
                method.run(lm, train, queries)
                seconds = time.perf_counter() - start
            parts = dict.fromkeys(("matrix products", "attention", "other operations"), 0.0)
            operations = 0
            for event in seen.key_averages():
                kind = _kind(event.key)
                parts[kind] += event.self_cpu_time_total / 1e6 / seconds
                operations += event.flops if kind == "matrix products" else 0
            parts["between operations"] = max(0.0, 1 - sum(parts.values()))
            least = method.needs(shape, lengths).operations
            rows[name] = {**parts, "products over least": operations / least}
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").reset_index()


def _kind(operation: str) -> str:
    """Return what kind of operation one of torch's is."""
    if operation in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_"):
        return "matrix products"
    return "attention" if "scaled_dot_product" in operation else "other operations"


def merged(before: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return a table in which new rows replace those of the same key."""
    both = pd.concat([before, rows], ignore_index=True)
    return both.drop_duplicates(KEY, keep="last").sort_values(KEY[1:]).reset_index(drop=True)


def main() -> None:
    """Run the comparisons asked for, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = "; ".join(METHODS)
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--methods", **several, choices=METHODS, default=list(METHODS),
        help=f"in quotes, by default all: {known}",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", **several, choices=LENGTHS, default=LENGTHS,
        help="lengths of examples: those of the suite grid, or long ones made of these (both)",
    )  # fmt: skip
    parser.add_argument("--train", type=int, default=32, metavar="N", help="examples (32)")
    parser.add_argument(
        "--queries", type=int, nargs="+", default=CLAIMED, metavar="M",
        help=f"numbers of queries ({', '.join(map(str, CLAIMED))})",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    parser.add_argument(
        "--dtype", **several, choices=language_model.DTYPES, default=["float32"],
        help="of the model (float32)",
    )  # fmt: skip
    parser.add_argument(
        "--model", default=assets.DEFAULT_MODEL, help="a folder or a hub name (the built-in one)"
    )
    parser.add_argument("--output", default="figures/mine", help="a folder (figures/mine)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, work, file = options.measure
        print(json.dumps(measure(name, json.loads(Path(work).read_text()), Path(file))))
        return
    table = paths.resolve(options.output) / f"{TABLE}.csv"
    for lengths, dtype, m in itertools.product(options.lengths, options.dtype, options.queries):
        what = options.model, dtype, "cpu", lengths, options.train, m
        rows = compare(*what, options.methods, options.repeats)
        before = pd.read_csv(table) if table.exists() else pd.DataFrame()
        figures.save_table(merged(before, rows), TABLE, options.output)
        print(rows.drop(columns="versions").to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
