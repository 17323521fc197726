"""In-context probing of a learner: by how much an example in its context lowers a query's loss."""

import numpy as np
import torch

from icprobe.regression.learners import Learner
from icprobe.regression.problems import Problems


def gain(learner: Learner, problems: Problems, k: int = 0) -> np.ndarray:
    """Return by how much each example, after k pairs, lowers queries' losses: [B, N, M]."""
    return gain_and_score(learner, problems, k)[0]


def gain_and_score(
    learner: Learner, problems: Problems, k: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return means over base contexts of gains, and of whether they are positive: [B, N, M] each.

    The mean over queries of the latter is the published ICP score.
    """
    B, N, M = problems.shape
    queries, answers = problems.queries, problems.answers
    task = torch.arange(B).repeat_interleave(N)  # of each context
    found = []
    for base_x, base_y in problems.base_contexts(k):
        before = (answers - learner(base_x, base_y, queries)) ** 2 / 2
        x = torch.cat([base_x[task], problems.x.flatten(0, 1)[:, None]], dim=1)
        y = torch.cat([base_y[task], problems.y.reshape(-1, 1)], dim=1)
        after = (answers[task] - learner(x, y, queries[task])) ** 2 / 2
        found.append(before[:, None] - after.reshape(B, N, M))
    gains = torch.stack(found)
    return gains.mean(0).numpy(), (gains > 0).double().mean(0).numpy()
