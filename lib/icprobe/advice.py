"""Can the cheap probe be used on one's own data? A rule over a sample, and what would settle it.

The truth is what a real training step on each of n sampled training examples does to each of m
sampled queries. Each query ranks the examples for itself, and a method's agreement is the mean over
queries of its Spearman correlation with the truth. Three differences of agreements, with 95 %
intervals over training examples and queries, decide; d is the margin within which two methods
count as equally good:

- use ICP: gains beat similarity (the interval is above 0), and are not worse than gradients by d
  or more (the interval of gains less gradients is above -d);
- use gradients: they beat similarity, and they beat gains;
- neither beats similarity: neither is better by d or more (both intervals are below d);
- else the sample is too small to tell.

Similarity is the better of words and hidden states. The rule is about ranking single steps; whether
a selection trains better models is for notebook 04.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from icprobe import statistics, tables

ICP, GRADIENTS, SIMILARITY = "ICP", "gradients", "similarity"
MARGIN = 0.1

USE_ICP = "use ICP"
USE_GRADIENTS = "use gradients"
NEITHER = "neither beats similarity"
TOO_SMALL = "sample too small"

# differences that decide
ICP_OVER = "ICP less similarity"
GRADIENTS_OVER = "gradients less similarity"
ICP_AGAINST = "ICP less gradients"

MOST = 100  # times the sample beyond which more data are no answer


def agreements(
    gain: np.ndarray,
    gradient: np.ndarray,
    similarities: Mapping[str, np.ndarray],
    effect: np.ndarray,
    rng: np.random.Generator,
    replicates: int = 1000,
) -> pd.DataFrame:
    """Return how well methods rank what a training step does, and the differences that decide.

    Args:
        gain: [n, m] from probing, nats.
        gradient: [n, m] cosines (or products) of gradients.
        similarities: By name, [n, m]; the better one counts, in every resample.
        effect: [n, m] of the training step, nats.
        rng: For the bootstrap.
        replicates: Number of resamples.

    Returns:
        One row each: quantity (ICP, gradients, each similarity by its name, the better one, and
        three differences), unit, estimate, low, high (see `statistics.crossed_interval`), n and m.
        Not numbers in a sample in which too few queries have a ranking, such as one of fewer than
        four examples.

    Raises:
        ValueError: If the matrices have different shapes, or there is no similarity.
    """
    if not similarities:
        raise ValueError("no similarity is given, at least one is needed")
    matrices = {"gain": gain, "gradient": gradient, **similarities}
    for name, matrix in matrices.items():
        if matrix.shape != effect.shape:
            raise ValueError(
                f"{name} has shape {matrix.shape}, the training effects have {effect.shape}"
            )
    of_query = statistics.agreements([*matrices.values()], [effect], "query")

    def measure(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        icp, gradients, *similar = of_query(rows, columns)[0, :, 0]
        best = np.fmax.reduce(similar)
        rho = icp, gradients, *similar, best
        return np.array([*rho, icp - best, gradients - best, icp - gradients])

    alone = [ICP, GRADIENTS, *similarities, SIMILARITY]
    kinds = np.array(["fisher"] * len(alone) + ["normal"] * 3)
    low, high = statistics.crossed_interval(measure, effect.shape, rng, replicates, kinds)
    n, m = effect.shape
    frame = pd.DataFrame({"quantity": [*alone, ICP_OVER, GRADIENTS_OVER, ICP_AGAINST]})
    return frame.assign(
        unit="Spearman", estimate=measure(np.arange(n), np.arange(m)), low=low, high=high, n=n, m=m
    )


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
        verdict: "use ICP", "use gradients", "neither beats similarity" or "sample too small".
        method: What to score the whole pool with: "ICP", "gradients" or "similarity". Where the
            sample is too small, what its estimates speak for.
        factor: How many times as many training examples and queries would settle it, if the
            estimates hold: 1 where it is settled, not finite where no number would do.
        n: Training examples of a sample so large, or None.
        m: Queries of it, or None.
        differences: The three that decide, as phrases with their intervals.
    """

    verdict: str
    method: str
    factor: float
    n: int | None
    m: int | None
    differences: tuple[str, ...]

    @property
    def settled(self) -> bool:
        """Whether the sample was large enough."""
        return self.verdict != TOO_SMALL


def advise(agreed: pd.DataFrame, margin: float = MARGIN) -> Advice:
    """Return the verdict by the rule of this module.

    Intervals shrink with the root of the sample (both sides grow alike; what a single pair has of
    its own shrinks faster, so this is rather too many), so with estimates e at a distance |e - t|
    from a threshold and half-lengths h, (h / |e - t|)^2 times the sample is needed.

    Args:
        agreed: See `agreements`.
        margin: d, above 0: differences that do not matter.

    Raises:
        ValueError: If the margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin!r}, expected a number above 0")
    rows = agreed.set_index("quantity")
    estimate, low, high = (rows[column] for column in ("estimate", "low", "high"))
    n, m = int(rows["n"].iloc[0]), int(rows["m"].iloc[0])
    said = tables.in_words(agreed)
    differences = tuple(f"{name} {said[name]}" for name in (ICP_OVER, GRADIENTS_OVER, ICP_AGAINST))

    settled = _verdict(low, high, margin)
    if settled:
        return Advice(settled, METHODS[settled], 1.0, n, m, differences)
    if not np.isfinite(low).all():
        return Advice(TOO_SMALL, SIMILARITY, math.inf, None, None, differences)
    likely = _verdict(estimate, estimate, margin)
    factor = 1.0
    for quantity, threshold, above in _NEEDED[likely]:
        limit = threshold * margin
        half = estimate[quantity] - low[quantity] if above else high[quantity] - estimate[quantity]
        distance = abs(estimate[quantity] - limit)
        factor = max(factor, (half / distance) ** 2 if distance else math.inf)
    sizes = (None, None) if factor > MOST else (math.ceil(factor * n), math.ceil(factor * m))
    return Advice(TOO_SMALL, METHODS[likely], factor, *sizes, differences)


METHODS = {USE_ICP: ICP, USE_GRADIENTS: GRADIENTS, NEITHER: SIMILARITY}

# by verdict: a difference, a threshold in margins, and whether the interval must be above it
_NEEDED = {
    USE_ICP: [(ICP_OVER, 0, True), (ICP_AGAINST, -1, True)],
    USE_GRADIENTS: [(GRADIENTS_OVER, 0, True), (ICP_AGAINST, 0, False)],
    NEITHER: [(ICP_OVER, 1, False), (GRADIENTS_OVER, 1, False)],
}


def _verdict(low: pd.Series, high: pd.Series, margin: float) -> str | None:
    """Return the first verdict all of whose intervals are where they must be, or None."""
    for verdict, needed in _NEEDED.items():
        if all(
            low[quantity] > threshold * margin if above else high[quantity] < threshold * margin
            for quantity, threshold, above in needed
        ):
            return verdict
    return None


def in_words(advice: Advice, margin: float, available: tuple[int, int]) -> str:
    """Return the verdict in plain words (Markdown).

    Args:
        advice: The verdict.
        margin: As for `advise`.
        available: N and M: the whole pool, and all queries.
    """
    said = {
        USE_ICP: "**Use ICP:** the probe ranks training examples better than similarity does, and "
        f"no more than {margin:g} worse than gradients. The cheap probe will do.",
        USE_GRADIENTS: "**Use gradients:** they rank training examples better than similarity "
        "does, and better than the probe.",
        NEITHER: "**Neither beats similarity:** the probe and gradients are both less than "
        f"{margin:g} better than it. Similarity, which needs neither, will do.",
    }
    numbers = f" ({'; '.join(advice.differences)}.)"
    if advice.settled:
        return said[advice.verdict] + numbers
    head = "**Sample too small:** its intervals allow more than one of the three answers. "
    likely = f"Its estimates speak for {advice.method}, which is used for now. "
    if not math.isfinite(advice.factor):
        return head + likely + "There are too few rankings for an interval." + numbers
    if advice.n is None:
        return (
            head + likely + f"The methods are so close to the rule's bounds that {MOST} times as "
            f"many examples would not tell them apart: take the easiest to run.{numbers}"
        )
    N, M = available
    more = (
        f"About {advice.n} training examples by {advice.m} queries would settle it, if the "
        f"estimates hold ({advice.factor:.1f} times both)"
    )
    lacks = [
        f"{have} {name}"
        for need, have, name in ((advice.n, N, "training examples"), (advice.m, M, "queries"))
        if need > have
    ]
    more += f"; there are only {' and '.join(lacks)}, so more are needed." if lacks else "."
    return head + likely + more + numbers
