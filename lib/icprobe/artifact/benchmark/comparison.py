"""Methods beside each other: their seconds, their memory, their errors, and where time goes."""

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from scipy.stats import spearmanr
from torch.utils.benchmark import Timer
from tqdm import tqdm

from icprobe.artifact import provenance
from icprobe.artifact.benchmark.methods import METHODS, PLAIN, Method, examples, exchange
from icprobe.data import paths
from icprobe.methods import costs
from icprobe.methods.costs import Lengths, Shape
from icprobe.models import LM, Encoded

PEERS = paths.ROOT / "benchmarks" / "peers"
ENVIRONMENTS = paths.ROOT / "benchmarks" / "environments"
OWN_SCRIPT = "icprobe_methods.py"
CHECKED = 4  # queries whose pairs are compared with float64
FULL = 1 / 3  # share of the memory that M gradients may take: some peers hold them twice, and more
OPERATIONS = "matrix products", "attention", "other operations"


def compare(
    model: str,
    lm: LM,
    lengths: str,
    n: int,
    sizes: Sequence[int],
    names: Sequence[str] = tuple(METHODS),
    repeats: int = 3,
) -> pd.DataFrame:
    """Return timings on the same N training examples and M queries, a row for each M and method.

    The model is given by name and loaded, in the dtype and on the device to compare on. `lengths`
    is "grid" or "long", `sizes` has each M. Methods that cannot run here, and other libraries that
    fail, are left out and named.

    Columns beside what was asked for: seconds, low, high (median, range over repeats), cpu
    (seconds), peak (GiB), rate (operations a second of matrix products), floor (seconds that the
    quantity's operations take at this rate), efficiency (floor over seconds), error and rank (see
    `errors`), and versions.

    Raises:
        RuntimeError: If the process of a method of ours fails, or no method can run.
    """
    train, queries = examples(lm, lengths, n, max(sizes))
    on_gpu, shape, tables, scores = lm.device.type == "cuda", Shape.of(lm), [], {}
    for m in sizes:
        counted = Lengths.of(train, queries[:m])
        held = costs.whole_gradients(shape, counted).bytes
        left_out = {name: why for name in names if (why := obstacle(METHODS[name], lm, held))}
        work = exchange(model, lm, train, queries[:m])
        table, scores[m] = _run_in_turns(names, work, repeats, left_out)
        least = [METHODS[name].min_cost(shape, counted).operations for name in table["method"]]
        rate = product_rate(lm)
        tables.append(table.assign(m=m, rate=rate, floor=np.array(least) / rate))
    table = pd.concat(tables, ignore_index=True)
    table["quantity"] = [METHODS[name].quantity for name in table["method"]]
    table["efficiency"] = table["floor"] / table["seconds"]
    table = table.assign(
        model=lm.identity["name"],
        lengths=lengths,
        dtype=lm.identity["dtype"],
        device=lm.device.type,
        n=n,
        machine=torch.cuda.get_device_name(lm.device) if on_gpu else provenance.processor(),
        threads=torch.get_num_threads(),
        repeats=repeats,
    )
    precise = exchange(model, lm, train, queries[:CHECKED]) | {"dtype": "float64"}
    exact = {one: run(PLAIN[one], precise)[1] for one in set(table["quantity"]) & PLAIN.keys()}
    kept = zip(table["method"], table["m"], table["quantity"], strict=True)
    off = [errors(scores[m][name], exact.get(quantity)) for name, m, quantity in kept]
    return table.join(pd.DataFrame(off))


def obstacle(method: Method, lm: LM, held: float) -> str:
    """Return why a method cannot run here, "" if it can; held: bytes of all queries' gradients."""
    on_gpu = lm.device.type == "cuda"
    if method.script and on_gpu:
        return "other libraries are run on a CPU only"
    if not _python(method).exists():
        return f"no environment, see `benchmarks/peers.sh {method.environment}`"
    memory = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total
    if method.holds_full_gradients and held > FULL * memory:
        return f"the queries' gradients alone take {held / 2**30:.0f} GiB"
    return ""


def _python(method: Method) -> Path:
    if not method.environment:
        return Path(sys.executable)
    return ENVIRONMENTS / method.environment / "bin" / "python"


def errors(scores: np.ndarray, exact: np.ndarray | None) -> dict[str, float]:
    """Return the largest error relative to the largest value, and the mean of Spearman per query.

    Of scores [N, M] against exact ones [N, m], over the queries that both have; NaN without any.
    """
    if exact is None:
        return {"error": np.nan, "rank": np.nan}
    m = min(scores.shape[1], exact.shape[1])
    found, true = scores[:, :m], exact[:, :m]
    ranks = [spearmanr(*pair).statistic for pair in zip(found.T, true.T, strict=True)]
    return {"error": float(abs(found - true).max() / abs(true).max()), "rank": np.mean(ranks)}


def _run_in_turns(
    names: Sequence[str], work: dict, repeats: int, left_out: dict[str, str]
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Return medians and ranges over repeats, and scores [N, M] by method.

    Each turn begins with another method; those left out (name: why) are named, and peers that fail.
    """
    runs, scores = [], {}
    turns = [name for turn in range(repeats) for name in np.roll(names, -turn).tolist()]
    for name in tqdm(turns, unit=" runs"):
        if name in left_out:
            continue
        try:
            took, scores[name] = run(name, work)
            runs.append({"method": name, **took})
        except RuntimeError as error:
            if METHODS[name].run:
                raise
            left_out[name] = str(error)
    for name, why in left_out.items():
        print(f"Left out: {name}: {why}", file=sys.stderr)
    runs = [row for row in runs if row["method"] not in left_out]
    if not runs:
        raise RuntimeError(f"no method could run to its end: {left_out}")
    summary = pd.DataFrame(runs).groupby("method", sort=False).agg(
        seconds=("seconds", "median"),
        low=("seconds", "min"),
        high=("seconds", "max"),
        cpu=("cpu", "median"),
        peak=("peak", "median"),
        versions=("versions", "first"),
    )  # fmt: skip
    return summary.reset_index(), scores


def run(name: str, work: dict) -> tuple[dict, np.ndarray]:
    """Run a method in a process of its own; return what it took, and the scores [N, M].

    Raises:
        RuntimeError: If the process fails; says how it ended, and has the end of what it wrote.
    """
    method = METHODS[name]
    script, *options = method.script or (OWN_SCRIPT, "--method", name)
    with tempfile.TemporaryDirectory(prefix="icprobe-") as folder:
        told, scores = Path(folder) / "work.json", Path(folder) / "scores.npy"
        told.write_text(json.dumps(work))
        command = [_python(method), PEERS / script, told, scores, *options]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            killed = done.returncode == -signal.SIGKILL
            how = "was killed (out of memory?)" if killed else f"failed with {done.returncode}"
            raise RuntimeError(f"{name} {how}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1]), np.load(scores)


def product_rate(lm: LM) -> float:
    """Return the operations a second of large matrix products, on a model's device in its dtype."""
    # large enough for a GPU's rate, or small enough for a CPU's cache
    sizes = (8192, 8192, 8192) if lm.device.type == "cuda" else (1024, 1536, 1536)
    a, b = (torch.randn(part).to(lm.device, lm.model.dtype) for part in (sizes[:2], sizes[1:]))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * math.prod(sizes) / timer.blocked_autorange(min_run_time=0.5).median


def profile(
    lm: LM, names: Sequence[str], train: list[Encoded], queries: list[Encoded]
) -> pd.DataFrame:
    """Return where the seconds of our own methods go, on one thread, as shares; a row a method.

    Attention counts by itself where it is fused; between operations is Python, and calling them.
    "products over least" are the operations of matrix products over the quantity's least.
    """
    threads, rows = torch.get_num_threads(), []
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
            events = {kind: [] for kind in OPERATIONS}
            for event in seen.key_averages():
                events[_operation(event.key)].append(event)
            parts = {
                kind: sum(event.self_cpu_time_total for event in some) / 1e6 / seconds
                for kind, some in events.items()
            }
            parts["between operations"] = max(0.0, 1 - sum(parts.values()))
            products = sum(event.flops for event in events[OPERATIONS[0]])
            least = method.min_cost(shape, lengths).operations
            rows.append({"method": name, **parts, "products over least": products / least})
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(rows)


def _operation(name: str) -> str:
    if name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_"):
        return OPERATIONS[0]
    return OPERATIONS[1 if "scaled_dot_product" in name else 2]
