"""Statistics of score matrices [N, M]: estimates with intervals."""

from collections.abc import Callable

import numpy as np


def crossed_interval(
    measure: Callable[[np.ndarray, np.ndarray], float],
    shape: tuple[int, int],
    rng: np.random.Generator,
    replicates: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return a percentile interval from resampling training examples and queries together.

    Both are samples, and a pair's score depends on both: resampling pairs would give intervals
    that are far too short.

    Args:
        measure: Takes row numbers [N] and column numbers [M], returns the statistic of that sample
            (not a number where it is undefined there; such replicates are left out).
        shape: (N, M).
        rng: The source of randomness.
        replicates: Number of resamples.
        level: Coverage.
    """
    N, M = shape
    values = [measure(rng.integers(N, size=N), rng.integers(M, size=M)) for _ in range(replicates)]
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)
