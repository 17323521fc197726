"""In-context probing of a learner: by how much an example in its context lowers a query's loss."""

import numpy as np
import torch
from torch import Tensor

from icprobe.regression.learners import Learner
from icprobe.regression.problems import Problems

NUMBERS_AT_ONCE = 2**22  # contexts by queries by dimensions, held in memory


def losses(learner: Learner, x: Tensor, y: Tensor, queries: Tensor, answers: Tensor) -> Tensor:
    """Return the losses [R, M] of queries [R, M, D] after contexts x [R, K, D], y [R, K]."""
    return (answers - learner(x, y, queries)) ** 2 / 2


def gain(learner: Learner, problems: Problems, k: int = 0) -> np.ndarray:
    """Return how much each example lowers each query's loss when it joins a context of k pairs.

    The example stands last. With several base contexts, the mean over them; see `gain_and_score`.

    Returns:
        [B, N, M], positive = helps.
    """
    return gain_and_score(learner, problems, k)[0]


def gain_and_score(
    learner: Learner, problems: Problems, k: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return means over base contexts of gains, and of whether they are positive.

    The mean over queries of the latter is the published ICP score.

    Args:
        learner: See `Learner`.
        problems: B problems.
        k: Pairs of each base context.

    Returns:
        [B, N, M] each, positive = helps.
    """
    B, N, M = problems.shape
    D = problems.x.shape[-1]
    queries, answers = problems.queries, problems.answers
    task = torch.arange(B).repeat_interleave(N)  # of each context
    found = []
    for base_x, base_y in problems.base_contexts(k):
        before = losses(learner, base_x, base_y, queries, answers)
        x = torch.cat([base_x[:, None].expand(-1, N, -1, -1), problems.x[:, :, None]], dim=2)
        y = torch.cat([base_y[:, None].expand(-1, N, -1), problems.y[:, :, None]], dim=2)
        x, y = x.reshape(B * N, k + 1, D), y.reshape(B * N, k + 1)
        parts = torch.arange(B * N).split(max(1, NUMBERS_AT_ONCE // (M * D)))
        after = [losses(learner, x[p], y[p], queries[task[p]], answers[task[p]]) for p in parts]
        found.append(before[:, None] - torch.cat(after).reshape(B, N, M))
    gains = torch.stack(found)
    return gains.mean(0).numpy(), (gains > 0).double().mean(0).numpy()
