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

from icprobe import models
from icprobe.artifact import provenance
from icprobe.artifact.benchmark.methods import METHODS, PEERS, PLAIN, Method
from icprobe.artifact.benchmark.work import examples, exchange
from icprobe.methods import costs
from icprobe.methods.costs import Lengths, Shape
from icprobe.models import LM

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
        model: A folder or a hub name.
        dtype: To compare in.
        device: To compare on, None for the usual one; peers run on a CPU only.
        lengths: "grid" or "long".
        n: N, training examples.
        m: M, queries.
        names: Of `METHODS`; those that cannot run here are left out and named.
        repeats: Runs of each.

    Returns:
        Columns method, model, lengths, dtype, device, n, m, machine, threads, quantity, seconds,
        low, high (of seconds), cpu (seconds), peak (GiB), rate (operations a second of matrix
        products), floor (seconds that the quantity's operations take at this rate), efficiency
        (floor over seconds), error and rank (see `errors`), repeats and versions.

    Raises:
        ValueError: If the lengths are unknown.
        RuntimeError: If the process of a method of ours fails, or no method can run.
    """
    lm = models.load(model, dtype, device)
    pairs = examples(lm, lengths, n, m)
    shape, sizes = Shape.of(lm), Lengths.of(*pairs)
    held = costs.whole_gradients(shape, sizes).bytes
    left_out = {name: why for name in names if (why := obstacle(METHODS[name], lm, held))}
    known = {METHODS[name].quantity for name in {*names} - left_out.keys()} & PLAIN.keys()
    exact = {quantity: reference(quantity, model, device, lengths, n) for quantity in known}
    work = exchange(model, lm, *pairs)
    table, scores = _run_in_turns(names, work, repeats, left_out)
    on_gpu, rate = lm.device.type == "cuda", product_rate(lm)
    methods = [METHODS[name] for name in table["method"]]
    table = table.assign(
        model=lm.identity["name"],
        lengths=lengths,
        dtype=lm.identity["dtype"],
        device=lm.device.type,
        n=n,
        m=m,
        machine=torch.cuda.get_device_name(lm.device) if on_gpu else provenance.processor(),
        threads=work["threads"],
        quantity=[method.quantity for method in methods],
        rate=rate,
        floor=[method.min_cost(shape, sizes).operations / rate for method in methods],
        repeats=repeats,
    )
    table["efficiency"] = table["floor"] / table["seconds"]
    off = [errors(METHODS[name].quantity, scores[name], exact) for name in table["method"]]
    return table.join(pd.DataFrame(off))


def obstacle(method: Method, lm: LM, held: float) -> str:
    """Return why a method cannot run here, "" if it can; held: bytes of all queries' gradients."""
    if method.script and lm.device.type != "cpu":
        return "other libraries are run on a CPU only"
    if not method.python:
        return f"no environment, see `benchmarks/peers.sh {method.environment}`"
    on_gpu = lm.device.type == "cuda"
    memory = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total
    if method.holds_full_gradients and held > FULL * memory:
        return f"the queries' gradients alone take {held / 2**30:.0f} GiB"
    return ""


@functools.lru_cache(maxsize=4)
def reference(quantity: str, model: str, device: str | None, lengths: str, n: int) -> np.ndarray:
    """Return log-likelihoods or gradient products [N, CHECKED] by plain loops in float64.

    In a process of its own, since whole gradients leave it large. Arguments are those of `compare`;
    the same array serves all dtypes and numbers of queries.
    """
    lm = models.load(model, device=device)
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


def _run_in_turns(
    names: list[str], work: dict, repeats: int, left_out: dict[str, str]
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Return medians and ranges over repeats, and scores [N, M] by method.

    Each turn begins with another method. Those left out (name: why) are named, and with them other
    libraries that fail.

    Raises:
        RuntimeError: If a method of ours fails, or none runs to its end.
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
    runs = pd.DataFrame(runs, columns=["method", "seconds", "cpu", "peak", "versions"])
    runs = runs[~runs["method"].isin(left_out)]
    for name, why in left_out.items():
        print(f"Left out: {name}: {why}", file=sys.stderr)
    if runs.empty:
        raise RuntimeError(f"no method could run to its end: {left_out}")
    summary = runs.groupby("method", sort=False).agg(
        seconds=("seconds", "median"),
        low=("seconds", "min"),
        high=("seconds", "max"),
        cpu=("cpu", "median"),
        peak=("peak", "median"),
        versions=("versions", "first"),
    )
    return summary.reset_index(), scores


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
