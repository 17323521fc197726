"""Methods beside each other: their seconds, their memory, and their errors."""

import functools
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from scipy.stats import spearmanr
from torch.utils.benchmark import Timer
from tqdm import tqdm

from icprobe import lm as language_model
from icprobe.artifact import provenance
from icprobe.artifact.benchmark.methods import METHODS, PEERS, PLAIN
from icprobe.artifact.benchmark.work import examples, exchange
from icprobe.lm import LM
from icprobe.methods import costs
from icprobe.methods.costs import Lengths, Shape

OWN_SCRIPT = "icprobe_methods.py"
CHECKED = 4  # queries whose pairs are compared with float64
FULL = 1 / 3  # share of the memory that M gradients may take: some peers hold them twice, and more


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
        names: Of `METHODS`; those that cannot run here are left out and named.
        repeats: Runs of each, in turn; each turn begins with another.

    Returns:
        Columns method, model, lengths, dtype, device, n, m, machine, threads, quantity, seconds,
        low, high (of seconds), cpu (seconds), peak (GiB), rate (operations a second of matrix
        products), floor (seconds that the quantity's operations take at this rate), efficiency
        (floor over seconds), error and rank (see `errors`), repeats and versions.

    Raises:
        ValueError: If a method or the lengths are unknown.
        RuntimeError: If the process of a method of ours fails, or no method can run.
    """
    lm = language_model.load(model, dtype, device)
    train, queries = examples(lm, lengths, n, m)
    shape, sizes = Shape.of(lm), Lengths.of(train, queries)
    left_out = impossible(names, lm, costs.whole_gradients(shape, sizes).bytes)
    names = [name for name in names if name not in left_out]
    exact = {
        quantity: reference(quantity, model, device, lengths, n)
        for quantity in {METHODS[name].quantity for name in names} & PLAIN.keys()
    }
    told = exchange(model, lm, train, queries)
    runs, scores = run_in_turns(names, told, repeats, left_out, f"{lengths}, N = {n}, M = {m}")
    for name, why in left_out.items():
        print(f"Left out: {name}: {why}", file=sys.stderr)
    if not runs:
        raise RuntimeError(f"no method could run to its end: {left_out}")
    on_gpu = lm.device.type == "cuda"
    key = {
        "model": lm.identity["name"], "lengths": lengths, "dtype": lm.identity["dtype"],
        "device": lm.device.type, "n": n, "m": m,
        "machine": torch.cuda.get_device_name(lm.device) if on_gpu else provenance.processor(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    rate = product_rate(lm)
    rows = []
    for name, mine in runs.items():
        floor = METHODS[name].min_cost(shape, sizes).operations / rate
        off = errors(METHODS[name].quantity, scores[name], exact)
        rows.append({"method": name, **key, **_summary(name, mine, rate, floor), **off})
    versions = [mine[0]["versions"] for mine in runs.values()]
    return pd.DataFrame(rows).assign(repeats=repeats, versions=versions)


def _summary(name: str, runs: list[dict], rate: float, floor: float) -> dict:
    """Return the columns of a row of `compare` that tell what one method's runs took."""
    took = pd.DataFrame(runs)
    middle = took[["seconds", "cpu", "peak"]].median()
    return {
        "quantity": METHODS[name].quantity,
        "seconds": middle["seconds"],
        "low": took["seconds"].min(),
        "high": took["seconds"].max(),
        "cpu": middle["cpu"],
        "peak": middle["peak"],
        "rate": rate,
        "floor": floor,
        "efficiency": floor / middle["seconds"],
    }


def impossible(names: Sequence[str], lm: LM, held: int) -> dict[str, str]:
    """Return why methods cannot run here, by the names of those that cannot.

    Args:
        names: Of `METHODS`.
        lm: The model.
        held: Bytes of all queries' gradients.

    Raises:
        ValueError: If a method is unknown.
    """
    unknown = sorted(set(names) - METHODS.keys())
    if unknown:
        raise ValueError(f"unknown methods {unknown}, there are {list(METHODS)}")
    on_gpu = lm.device.type == "cuda"
    memory = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total
    left_out = {}
    for name in names:
        method = METHODS[name]
        if method.script and lm.device.type != "cpu":
            left_out[name] = "other libraries are run on a CPU only"
        elif not method.python:
            left_out[name] = f"no environment, see `benchmarks/peers.sh {method.environment}`"
        elif method.holds_full_gradients and held > FULL * memory:
            left_out[name] = f"the queries' gradients alone take {held / 2**30:.0f} GiB"
    return left_out


@functools.lru_cache(maxsize=4)
def reference(quantity: str, model: str, device: str | None, lengths: str, n: int) -> np.ndarray:
    """Return log-likelihoods or gradient products [N, CHECKED] by plain loops in float64.

    In a process of its own, since whole gradients leave it large. Arguments are those of `compare`;
    the same array serves all dtypes and numbers of queries.
    """
    lm = language_model.load(model, device=device)
    work = exchange(model, lm, *examples(lm, lengths, n, CHECKED)) | {"dtype": "float64"}
    return run(PLAIN[quantity], work)[1]


def errors(quantity: str, scores: np.ndarray, exact: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest error relative to the largest value, and the mean of Spearman per query.

    NaN where the reference has none: of similarities, and of means over all queries.

    Args:
        quantity: See `Method`.
        scores: [N, M].
        exact: By quantity, see `reference`; compared are the queries that both have.
    """
    if quantity not in exact:
        return {"error": np.nan, "rank": np.nan}
    m = min(scores.shape[1], exact[quantity].shape[1])
    found, true = scores[:, :m], exact[quantity][:, :m]
    ranks = [spearmanr(*pair).statistic for pair in zip(found.T, true.T, strict=True)]
    return {"error": float(abs(found - true).max() / abs(true).max()), "rank": np.mean(ranks)}


def run_in_turns(
    names: list[str], work: dict, repeats: int, left_out: dict[str, str], what: str
) -> tuple[dict[str, list[dict]], dict[str, np.ndarray]]:
    """Return what each method's runs took, and its scores [N, M]; each turn begins with another.

    Args:
        names: Of `METHODS`.
        work: See `exchange`.
        repeats: Runs of each.
        left_out: Why methods are left out; other libraries that fail are added.
        what: Stands beside the progress bar.

    Raises:
        RuntimeError: If a method of this library fails.
    """
    runs, scores = {name: [] for name in names}, {}
    turns = [names[(k + turn) % len(names)] for turn in range(repeats) for k in range(len(names))]
    for name in tqdm(turns, desc=what, unit=" runs"):
        if name in left_out:
            continue
        try:
            took, scores[name] = run(name, work)
            runs[name].append(took)
        except RuntimeError as error:
            if METHODS[name].run:
                raise
            left_out[name] = str(error)
            del runs[name]
    return runs, scores


def run(name: str, work: dict) -> tuple[dict, np.ndarray]:
    """Run a method in a process of its own.

    Returns:
        seconds, cpu (seconds), peak (GiB) and versions; the scores [N, M].

    Raises:
        RuntimeError: If the process fails; says how it ended, and has the end of what it wrote.
    """
    method = METHODS[name]
    script, *options = method.script or (OWN_SCRIPT, "--method", name)
    with tempfile.TemporaryDirectory(prefix="icprobe-") as folder:
        told, scores = Path(folder) / "work.json", Path(folder) / "scores.npy"
        told.write_text(json.dumps(work))
        command = [method.python, PEERS / script, told, scores, *options]
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
