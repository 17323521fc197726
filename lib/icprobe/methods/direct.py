"""Scores with labels, in memory and at once: `icprobe.probe` and `icprobe.attribute`.

For pools that take minutes. What takes hours goes through `scores.score`, which keeps finished
blocks and can be interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm import tqdm

from icprobe import models
from icprobe.methods import gradient, icp

if TYPE_CHECKING:
    from icprobe.models import LM

BLOCK_SIZE = 16  # training examples between two looks at the progress bar


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
        preamble: Text before the demonstration; the paper's is `icp.PUBLISHED_PREAMBLE`.
        max_length: Most tokens of one example, see `models.encode`.

    Returns:
        [N, M] in nats, rows and columns named by id; positive = the training example helps.

    Raises:
        ValueError: If ids repeat, a completion would lose tokens, or a sequence is too long for
            the model.
    """
    ids = _ids(pool), _ids(queries)
    shown, asked = (models.encode(lm, rows, max_length) for rows in (pool, queries))
    zero_shot = icp.log_likelihoods(lm, asked)

    def gains(part: list) -> np.ndarray:
        return icp.gain(icp.log_likelihoods(lm, asked, part, preamble), zero_shot)

    return pd.DataFrame(_by_block(gains, shown, "probe"), *ids)


def attribute(
    lm: LM,
    pool: Sequence[dict],
    queries: Sequence[dict],
    loss_on: str = "completion",
    max_length: int | None = None,
) -> pd.DataFrame:
    """Return the gradient dot product of each training example with each query.

    To first order, what a step of gradient descent on the example does to the query's
    log-likelihood, over the linear layers of the transformer blocks.

    Args:
        lm: The model.
        pool: N training examples: rows with id, prompt, completion.
        queries: M queries like them.
        loss_on: Training loss on the "completion", or on the "text".
        max_length: Most tokens of one example, see `models.encode`.

    Returns:
        [N, M] in nats per unit of learning rate, rows and columns named by id; positive = the
        training example helps.

    Raises:
        ValueError: If ids repeat, or an example has no completion tokens or is too long for the
            model.
        FloatingPointError: If a gradient is not finite; names the example.
    """
    ids = _ids(pool), _ids(queries)
    train, asked = (models.encode(lm, rows, max_length) for rows in (pool, queries))
    held = gradient.GradientDot(lm, asked)
    products = _by_block(lambda part: held.products(part, loss_on)[0], train, "attribute")
    return pd.DataFrame(products, *ids)


def _ids(rows: Sequence[dict]) -> list[str]:
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        repeated = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"the id {repeated!r} is there more than once")
    return ids


def _by_block(score: Callable[[list], np.ndarray], examples: list, label: str) -> np.ndarray:
    """Return the scores of all examples, made block by block with a progress bar."""
    blocks = []
    with tqdm(desc=label, total=len(examples), unit=" examples", leave=False) as bar:
        for start in range(0, len(examples), BLOCK_SIZE):
            blocks.append(score(examples[start : start + BLOCK_SIZE]))
            bar.update(len(blocks[-1]))
    return np.concatenate(blocks)
