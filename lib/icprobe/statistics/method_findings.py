"""Headline numbers of probing and of gradients, with 95 % intervals over examples and queries."""

import numpy as np
import pandas as pd

from icprobe.statistics.results import findings


def probing(
    gain: np.ndarray,
    neutral: np.ndarray,
    same_task: np.ndarray,
    tokens: np.ndarray,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the headline numbers of probing, one row per quantity.

    Args:
        gain: [N, M] nats.
        neutral: [N, M] gains of neutral demonstrations, nats.
        same_task: [N, M] bool, whether the pair shares its task.
        tokens: [N] length of each training example.
        rng: For the bootstrap.

    Returns:
        Columns quantity, unit, estimate, low, high, n.
    """
    helped, every_pair = (gain > 0).astype(float), np.ones_like(same_task)
    length = _along_rows(tokens, gain)
    means = {
        ("pairs with a gain", "share"): (helped, every_pair),
        ("mean gain, same task", "nats"): (gain, same_task),
        ("mean gain, other tasks", "nats"): (gain, ~same_task),
        ("mean neutral gain, same task", "nats"): (neutral, same_task),
        ("mean neutral gain, other tasks", "nats"): (neutral, ~same_task),
        ("mean gain over neutral, same task", "nats"): (gain - neutral, same_task),
        ("mean gain over neutral, other tasks", "nats"): (gain - neutral, ~same_task),
    }
    agreements = {
        ("ICP score against mean gain", "Spearman"): (helped, gain),
        ("length against ICP score", "Spearman"): (length, helped),
        ("length against mean gain", "Spearman"): (length, gain),
    }
    return findings(means, agreements, rng)


def gradients(
    dot: np.ndarray,
    cosine: np.ndarray,
    same_task: np.ndarray,
    tokens: np.ndarray,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the headline numbers of gradient products [N, M] and cosines [N, M]; see `probing`."""
    every_pair, length = np.ones_like(same_task), _along_rows(tokens, dot)
    means = {
        ("pairs with a positive product", "share"): ((dot > 0).astype(float), every_pair),
        ("mean product, same task", "nats per learning rate"): (dot, same_task),
        ("mean product, other tasks", "nats per learning rate"): (dot, ~same_task),
        ("mean cosine, same task", "cosine"): (cosine, same_task),
        ("mean cosine, other tasks", "cosine"): (cosine, ~same_task),
    }
    agreements = {
        ("mean product against mean cosine", "Spearman"): (dot, cosine),
        ("length against mean product", "Spearman"): (length, dot),
        ("length against mean cosine", "Spearman"): (length, cosine),
    }
    return findings(means, agreements, rng)


def _along_rows(values: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values[:, None], scores.shape).astype(float)
