"""Can probing be used on one's own data? A rule over a sample, and what would settle it.

The truth is what a real training step on each of n sampled training examples does to each of m
sampled queries. Each query ranks the examples for itself, and a method's agreement is the mean over
queries of its Spearman correlation with the truth. Differences of agreements, with 95 % intervals
over training examples and queries, decide; similarities are those of words and of hidden states,
and d is the tolerance within which two methods count as equally good. The first that holds:

- use ICP: gains beat each similarity (the intervals are above 0), and are not worse than gradients
  by d or more (the interval of gains minus gradients is above -d);
- use gradients: they beat each similarity, and they beat gains;
- neither beats similarity: there is one that neither beats by d or more (both intervals below d);
- else, and with fewer than `MIN_QUERIES` queries in any case, the sample is too small to tell.

The rule is about ranking single steps; whether a selection trains better models is for notebook 04.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm

from icprobe.statistics.bootstrap import bootstrap_ci
from icprobe.statistics.measures import by_set
from icprobe.statistics.results import as_text as findings_as_text

ICP, GRADIENTS, SIMILARITY = "ICP", "gradients", "similarity"
TOLERANCE = 0.1

USE_ICP = "use ICP"
USE_GRADIENTS = "use gradients"
NEITHER = "neither beats similarity"
TOO_SMALL = "sample too small"
METHODS = {USE_ICP: ICP, USE_GRADIENTS: GRADIENTS, NEITHER: SIMILARITY}

ICP_AGAINST = "ICP minus gradients"

MIN_QUERIES = 6  # queries: with fewer, intervals over them are too short, and verdicts often wrong
CHANCE = 0.8  # that a sample of the size asked for settles it
MOST = 100  # times the sample beyond which more data are no answer


def agreements(
    gain: np.ndarray,
    gradient: np.ndarray,
    similarities: Mapping[str, np.ndarray],
    effect: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Return how well methods rank what a training step does, and the differences that decide.

    A method that scores all examples alike for a query ranks none of them: its correlation counts
    as 0 there, so that all methods are averaged over the same queries.

    Args:
        gain: [n, m] from probing, nats.
        gradient: [n, m] cosines (or products) of gradients.
        similarities: By name, [n, m].
        effect: [n, m] of the training step, nats.
        rng: For the bootstrap.
        resamples: How many.

    Returns:
        One row each: quantity (ICP, gradients, each similarity, ICP and gradients minus each
        similarity, ICP minus gradients), unit, estimate, low, high (see
        `bootstrap_ci`), n and m. Not numbers where no query has a ranking, as in a
        sample of fewer than four examples.

    Raises:
        ValueError: If the matrices have different shapes or a score is not finite, or there is no
            similarity.
    """
    if not similarities:
        raise ValueError("no similarity is given, at least one is needed")
    matrices = {"gain": gain, "gradient": gradient, **similarities}
    for name, matrix in matrices.items():
        if matrix.shape != effect.shape:
            raise ValueError(
                f"{name} has shape {matrix.shape}, the training effects have {effect.shape}"
            )
    for name, matrix in {**matrices, "training effects": effect}.items():
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name} has scores that are not finite")
    names = [ICP, GRADIENTS, *similarities]
    pairs = [(one, name) for name in similarities for one in (ICP, GRADIENTS)] + [(ICP, GRADIENTS)]
    of_queries = by_set([*matrices.values()], [effect], "query", None, (), None)

    def measure(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        rho, weights = of_queries(rows, columns)
        rho = rho[0, :, :, 0]  # [queries, methods]
        ranked = np.isfinite(rho).any(axis=1)  # not where the step did the same to all
        rho = np.where(np.isnan(rho[ranked]), 0.0, rho[ranked])  # scores were all alike
        mean = np.average(rho, 0, weights[ranked]) if len(rho) else np.full(len(names), np.nan)
        found = dict(zip(names, mean, strict=True))
        return np.array([*mean, *(found[one] - found[other] for one, other in pairs)])

    kinds = np.array(["fisher"] * len(names) + ["normal"] * len(pairs))
    found = bootstrap_ci(measure, effect.shape, rng, resamples, kinds)
    frame = pd.DataFrame({"quantity": [*names, *(f"{one} minus {other}" for one, other in pairs)]})
    numbers = dict(zip(("estimate", "low", "high", "n", "m"), (*found, *effect.shape), strict=True))
    return frame.assign(unit="Spearman", **numbers)


@dataclass(frozen=True)
class Recommendation:
    """What to do, and why.

    Attributes:
        verdict: "use ICP", "use gradients", "neither beats similarity" or "sample too small".
        method: What to score the whole pool with: "ICP", "gradients" or "similarity". Where the
            sample is too small, what its estimates speak for (similarity if there are none).
        factor: How many times as many training examples and queries would settle it with a chance
            of `CHANCE`, if the estimates hold: 1 where it is settled, infinite where there are no
            estimates, or no number would do.
        n: Training examples of a sample so large, or None.
        m: Queries of it, or None.
        differences: Those that decide, as phrases with their intervals.
        known: Whether there were enough rankings for intervals.
    """

    verdict: str
    method: str
    factor: float
    n: int | None
    m: int | None
    differences: tuple[str, ...]
    known: bool = True

    @property
    def settled(self) -> bool:
        """Whether the sample was large enough."""
        return self.verdict != TOO_SMALL


class Condition(NamedTuple):
    """A difference whose interval must be above a bound, or below it."""

    difference: str
    bound: float
    above: bool


def recommend(agreed: pd.DataFrame, tolerance: float = TOLERANCE) -> Recommendation:
    """Return the verdict by the rule of this module.

    Intervals shrink with the root of the sample (both sides grow alike; what a single pair has of
    its own shrinks faster, so this is rather too many). With estimates e at a distance |e - t| from
    a bound t, and half-lengths h, a sample (h / |e - t|)^2 times as large has an even chance that
    its interval keeps to the bound; for a chance of 80 % it takes about twice that.

    Args:
        agreed: See `agreements`.
        tolerance: d, above 0: differences that do not matter.

    Raises:
        ValueError: If the tolerance is not above 0.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance!r}, expected a number above 0")
    rows = agreed.set_index("quantity")
    deciding = rows[rows.index.str.contains(" minus ")]
    estimate, low, high = (deciding[column] for column in ("estimate", "low", "high"))
    n, m = int(rows["n"].iloc[0]), int(rows["m"].iloc[0])
    said = findings_as_text(deciding.reset_index())
    differences = tuple(f"{name} {said[name]}" for name in deciding.index)
    others = [q.removeprefix("ICP minus ") for q in deciding.index if q.startswith("ICP ")]
    needed = _needed([name for name in others if name != GRADIENTS], tolerance)

    known = bool(np.isfinite(low).all())
    settled = _first(needed, low, high) if known and m >= MIN_QUERIES else None
    if settled:
        return Recommendation(settled, METHODS[settled], 1.0, n, m, differences)
    likely = _first(needed, estimate, estimate)
    if not known or not likely:
        method = METHODS.get(likely, SIMILARITY)
        return Recommendation(TOO_SMALL, method, math.inf, None, None, differences, known)
    factor = min(
        max(_times(estimate[q], low[q], high[q], bound, above) for q, bound, above in conditions)
        for conditions in needed[likely]
    )
    sizes = (None, None)
    if factor <= MOST:
        sizes = math.ceil(factor * n), max(MIN_QUERIES, math.ceil(factor * m))
    return Recommendation(TOO_SMALL, METHODS[likely], factor, *sizes, differences)


def _needed(similar: Sequence[str], tolerance: float) -> dict[str, list[list[Condition]]]:
    """Return what each verdict needs: all conditions of one of several lists."""

    def beats_all(name: str) -> list[Condition]:
        return [Condition(f"{name} minus {s}", 0, above=True) for s in similar]

    return {
        USE_ICP: [[*beats_all(ICP), Condition(ICP_AGAINST, -tolerance, above=True)]],
        USE_GRADIENTS: [[*beats_all(GRADIENTS), Condition(ICP_AGAINST, 0, above=False)]],
        NEITHER: [
            [Condition(f"{name} minus {s}", tolerance, above=False) for name in (ICP, GRADIENTS)]
            for s in similar
        ],
    }


def _first(
    needed: Mapping[str, list[list[Condition]]], low: pd.Series, high: pd.Series
) -> str | None:
    """Return the first verdict one of whose lists of conditions holds, or None."""
    for verdict, lists in needed.items():
        for conditions in lists:
            if all(low[q] > bound if above else high[q] < bound for q, bound, above in conditions):
                return verdict
    return None


def _times(estimate: float, low: float, high: float, bound: float, above: bool) -> float:
    """Return how many times the sample a condition needs, at least 1."""
    half = estimate - low if above else high - estimate
    distance = abs(estimate - bound)
    power = 1 + norm.ppf(CHANCE) / norm.ppf(0.975)
    return max(1.0, (power * half / distance) ** 2) if distance else math.inf


def as_text(found: Recommendation, tolerance: float, available: tuple[int, int]) -> str:
    """Return the verdict in plain words (Markdown).

    Args:
        found: The verdict.
        tolerance: As for `recommend`.
        available: N and M: the whole pool, and all queries.
    """
    said = {
        USE_ICP: "**Use ICP:** the probe ranks training examples better than similarity does, and "
        f"less than {tolerance:g} worse than gradients. It needs log-probabilities only.",
        USE_GRADIENTS: "**Use gradients:** they rank training examples better than similarity "
        "does, and better than the probe.",
        NEITHER: "**Neither beats similarity:** the probe and gradients are both less than "
        f"{tolerance:g} better than it. Similarity, which needs neither, will do.",
    }
    numbers = f" (Differences of Spearman correlations: {'; '.join(found.differences)}.)"
    if found.settled:
        return said[found.verdict] + numbers
    head = "**Sample too small.** "
    likely = f"Its estimates speak for {found.method}, which is used for now. "
    if not found.known:
        return f"{head}It has too few rankings for an interval; {found.method} is used for now."
    if found.n is None:
        return (
            f"{head}{likely}The methods are so close to the rule's bounds that {MOST} times as "
            f"many examples would not tell them apart: take the easiest to run.{numbers}"
        )
    N, M = available
    more = (
        f"About {found.n} training examples by {found.m} queries would settle it with a chance "
        f"of {CHANCE:.0%}, if the estimates hold"
    )
    lacks = [
        f"{have} {name}"
        for need, have, name in ((found.n, N, "training examples"), (found.m, M, "queries"))
        if need > have
    ]
    more += f"; there are only {' and '.join(lacks)}, so more are needed." if lacks else "."
    return head + likely + more + numbers
