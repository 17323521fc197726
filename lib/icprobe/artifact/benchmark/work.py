"""What is timed: training examples and queries, and the file that tells a process of them."""

import itertools
from collections.abc import Sequence

import torch

from icprobe import data, models
from icprobe.data import assets
from icprobe.methods import icp
from icprobe.models import LM, Encoded

LENGTHS = ("grid", "long")  # of examples: as they are in this suite, or made of several
LONG = 90  # tokens that a long example has at least


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
        rows = list(data.load("grid", split, seed=0))
        rows = _joined(lm, rows, size) if lengths == "long" else rows[:size]
        encoded = models.encode(lm, rows)
        found.append(list(itertools.islice(itertools.cycle(encoded), size)))
    return found[0], found[1]


def _joined(lm: LM, rows: list[dict], size: int) -> list[dict]:
    """Return the first rows, each with as many of the next ones of its task as make it long."""
    tokens = [len(encoded.ids) for encoded in models.encode(lm, rows)]
    step = len({row["task"] for row in rows})  # every so many rows, a task comes again
    joined = []
    for start in range(min(size, len(rows))):
        chosen = []
        while sum(tokens[k] for k in chosen) < LONG:
            chosen.append((start + len(chosen) * step) % len(rows))
        part = [rows[k] for k in chosen]
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

    The model is named as for `models.load`, and passed on as a folder or hub name. Ids include the
    beginning-of-sequence token, if the model has one; `start` is the position of the first
    completion token.
    """
    begin = len(lm.bos)

    def told(rows: Sequence[Encoded]) -> list[dict]:
        return [{"ids": [*lm.bos, *row.ids], "start": begin + len(row.prompt)} for row in rows]

    return {
        "model": assets.model_path(model),
        "dtype": lm.identity["dtype"],
        "device": lm.device.type,
        "threads": torch.get_num_threads(),
        "begin": begin,
        "contexts": [[*lm.bos, *icp.context(lm, example)] for example in train],
        "train": told(train),
        "queries": told(queries),
    }
