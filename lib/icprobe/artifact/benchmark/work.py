"""What is timed: training examples and queries, and how a process of any environment is told."""

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
    """Return N training examples and M queries of grid, or long ones joined from its rows.

    A split that is too small is gone through again.
    """
    found = []
    for split, size in (("train", n), ("query", m)):
        rows = list(data.load("grid", split, seed=0))
        rows = _joined(lm, rows, size) if lengths == "long" else rows[:size]
        found.append(list(itertools.islice(itertools.cycle(models.encode(lm, rows)), size)))
    return found[0], found[1]


def _joined(lm: LM, rows: list[dict], size: int) -> list[dict]:
    """Return the first rows, each with as many of the next ones of its task as make it long."""
    tokens = [len(encoded.ids) for encoded in models.encode(lm, rows)]
    step = len({row["task"] for row in rows})  # every so many rows, a task comes again
    joined = []
    for start in range(min(size, len(rows))):
        part, length = [], 0
        while length < LONG:
            k = (start + len(part) * step) % len(rows)
            part.append(rows[k])
            length += tokens[k]
        joined.append({
            "id": "+".join(row["id"] for row in part),
            "prompt": "\n".join(row["prompt"] for row in part),
            "completion": "".join(row["completion"] for row in part),
        })  # fmt: skip
    return joined


def exchange(model: str, lm: LM, train: Sequence[Encoded], queries: Sequence[Encoded]) -> dict:
    """Return what a method needs to know as JSON: a folder or hub name, settings and token ids.

    Ids include the beginning-of-sequence token, if the model has one (`begin` says how many);
    `start` is the position of the first completion token.
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
