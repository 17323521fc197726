"""Scores with labels, in memory and at once: `icprobe.probe` and `icprobe.attribute`.

For pools that take minutes. What takes hours goes through `scores.score`, which keeps finished
blocks and can be interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from icprobe.methods import gradient, icp
from icprobe.scores import compute

if TYPE_CHECKING:
    from icprobe.models import LM

REQUIRED = ("id", "prompt", "completion")


def probe(
    lm: LM,
    pool: Sequence[dict],
    queries: Sequence[dict],
    preamble: str = "",
    max_length: int | None = None,
) -> pd.DataFrame:
    """Return the gain of each query from each training example as a demonstration.

    Args:
        lm: The model.
        pool: N training examples: rows with id, prompt, completion.
        queries: M queries like them.
        preamble: Text before the demonstration; the paper's is `methods.icp.PUBLISHED_PREAMBLE`.
        max_length: Most tokens of one example, see `models.encode`.

    Returns:
        [N, M] in nats, rows and columns named by id; positive = the training example helps.

    Raises:
        ValueError: If there are no rows, ids repeat, a row lacks a field or is too long.
    """
    ids = _ids(pool, "training examples"), _ids(queries, "queries")
    scores: dict[str, np.ndarray] = {}
    for method in icp.probing(preamble):
        scores |= compute(method, lm, pool, queries, max_length)
    return pd.DataFrame(icp.gains(scores)[0], *ids)


def attribute(
    lm: LM,
    pool: Sequence[dict],
    queries: Sequence[dict],
    loss_on: str = "completion",
    max_length: int | None = None,
) -> pd.DataFrame:
    """Return the gradient dot product of each training example with each query, as `probe` does.

    To first order, what a step of gradient descent on the example (on its "completion", or on the
    whole "text") does to the query's log-likelihood, in nats per unit of learning rate, over the
    linear layers of the blocks. FloatingPointError names an example whose gradient is not finite.
    """
    ids = _ids(pool, "training examples"), _ids(queries, "queries")
    method = gradient.GradientProducts(loss_on=loss_on)
    return pd.DataFrame(compute(method, lm, pool, queries, max_length)["gradient_dot"], *ids)


def _ids(rows: Sequence[dict], kind: str) -> list[str]:
    if not len(rows):
        raise ValueError(f"there are no {kind}")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not {*REQUIRED} <= {*row}:
            raise ValueError(
                f"row {i} of the {kind} is {row!r:.80}, expected one with {', '.join(REQUIRED)}"
            )
    ids = [row["id"] for row in rows]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"the id {repeated[0]!r} is there more than once")
    return ids
