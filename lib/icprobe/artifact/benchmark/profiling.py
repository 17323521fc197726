"""Where the seconds of this library's methods go."""

import time
from collections.abc import Sequence

import pandas as pd
import torch
from tqdm import tqdm

from icprobe.artifact.benchmark.methods import METHODS
from icprobe.methods.costs import Lengths, Shape
from icprobe.models import LM, Encoded

KINDS = PRODUCTS, ATTENTION, OTHER = "matrix products", "attention", "other operations"


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
            events = [
                (_kind(e.key), e.self_cpu_time_total / 1e6, e.flops) for e in seen.key_averages()
            ]
            taken = pd.DataFrame(events, columns=["kind", "seconds", "flops"]).groupby("kind").sum()
            parts = (taken["seconds"] / seconds).reindex(KINDS, fill_value=0)
            parts["between operations"] = max(0.0, 1 - parts.sum())
            least = method.min_cost(shape, lengths).operations
            products = taken["flops"].get(PRODUCTS, 0)
            rows.append({"method": name, **parts, "products over least": products / least})
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(rows)


def _kind(operation: str) -> str:
    """Return what kind of operation one of torch's is."""
    if operation in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_"):
        return PRODUCTS
    return ATTENTION if "scaled_dot_product" in operation else OTHER
