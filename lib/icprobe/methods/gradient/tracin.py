"""TracIn over checkpoints: gradient dot products added up along a training run.

TracInCP (Pruthi et al. 2020) adds them up over the checkpoints w_t of a run:

    tracin_ij = sum_t eta_t < grad L(z_i; w_t), grad L(q_j; w_t) >

in nats: what the queries' losses would fall by, to first order, if from each checkpoint in turn a
step of plain gradient descent of size eta_t were taken on z_i alone.
"""

import math
import numbers
from collections.abc import Iterable, Sequence

import numpy as np
from tqdm import tqdm

from icprobe import models
from icprobe.methods.gradient.dot import GradientDot


def tracin(
    checkpoints: Sequence[tuple[str, float]],
    train: Iterable,
    queries: Iterable,
    dtype: str = "float32",
    device: str | None = None,
    layers: str = "",
    loss_on: str = "completion",
    max_length: int | None = None,
    memory: float | None = None,
) -> np.ndarray:
    """Return sum_t eta_t <grad L(z_i; w_t), grad L(q_j; w_t)>: float32 [N, M], in nats.

    TracInCP of Pruthi et al. 2020: the decrease of the queries' losses that training on an example
    brought, to first order, added up over the checkpoints w_t that were reached with learning rate
    eta_t. Positive = helps.

    Args:
        checkpoints: Model and learning rate of each checkpoint. A model is a local folder (of a
            whole model or a LoRA adapter), a hub name or `name@revision`, see `models.load`.
        train: N rows with id, prompt, completion.
        queries: M rows like them.
        dtype: See `models.load`.
        device: See `models.load`.
        layers: See `layers.linear_layers`.
        loss_on: See `dot.GradientDot.products`.
        max_length: See `models.encode`.
        memory: See `dot.GradientDot`.

    Raises:
        ValueError: If there is no checkpoint, or one has no learning rate (zero is one).
    """
    if not checkpoints:
        raise ValueError("tracin needs at least one checkpoint")
    for checkpoint in checkpoints:
        if isinstance(checkpoint, str) or len(checkpoint) != 2:
            raise ValueError(f"checkpoint {checkpoint!r}: expected (model, learning rate)")
        model, rate = checkpoint
        if not isinstance(rate, numbers.Real) or not 0 <= rate < math.inf:
            raise ValueError(
                f"checkpoint {model!r}: learning rate is {rate!r}, expected a number from 0"
            )
    train, queries = list(train), list(queries)
    total = np.zeros((len(train), len(queries)))
    for model, rate in tqdm(checkpoints, desc="checkpoints"):
        if rate:  # at the end of many schedules it is zero
            influence = GradientDot(
                models.load(model, dtype, device),
                queries, layers, max_length, memory, cosines=False,
            )  # fmt: skip
            total += rate * influence.products(train, loss_on)[0]
            del influence  # or two models would be held
    return total.astype(np.float32)
