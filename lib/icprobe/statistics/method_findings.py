"""Headline numbers of probing and of gradients, with 95 % intervals over examples and queries."""

import numpy as np
import pandas as pd

from icprobe.statistics.results import Pair, findings


def probing(
    gain: np.ndarray,
    neutral: np.ndarray,
    same_task: np.ndarray,
    tokens: np.ndarray,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Return the headline numbers of probing: quantity, unit, estimate, low, high, n.

    `neutral` [N, M] are the gains (nats) of content-free controls, `same_task` [N, M] says whether
    a pair shares its task, `tokens` [N] is the length of each training example.
    """
    helped, length = (gain > 0).astype(float), _along_rows(tokens, gain)
    means = {
        ("pairs with a gain", "share"): (helped, np.ones_like(same_task)),
        **_by_task("gain", "nats", gain, same_task),
        **_by_task("neutral gain", "nats", neutral, same_task),
        **_by_task("gain over neutral", "nats", gain - neutral, same_task),
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
    length = _along_rows(tokens, dot)
    positive = (dot > 0).astype(float), np.ones_like(same_task)
    means = {
        ("pairs with a positive product", "share"): positive,
        **_by_task("product", "nats per learning rate", dot, same_task),
        **_by_task("cosine", "cosine", cosine, same_task),
    }
    agreements = {
        ("mean product against mean cosine", "Spearman"): (dot, cosine),
        ("length against mean product", "Spearman"): (length, dot),
        ("length against mean cosine", "Spearman"): (length, cosine),
    }
    return findings(means, agreements, rng)


def _by_task(
    name: str, unit: str, scores: np.ndarray, same_task: np.ndarray
) -> dict[tuple[str, str], Pair]:
    masks = {"same task": same_task, "other tasks": ~same_task}
    return {(f"mean {name}, {which}", unit): (scores, mask) for which, mask in masks.items()}


def _along_rows(values: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values[:, None], scores.shape).astype(float)
