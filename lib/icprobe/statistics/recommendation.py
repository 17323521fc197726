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
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm

from icprobe.statistics.bootstrap import MIN_QUERIES, with_intervals
from icprobe.statistics.measures import by_set, with_differences
from icprobe.statistics.results import as_text as findings_as_text

ICP, GRADIENTS, SIMILARITY = "ICP", "gradients", "similarity"
TOLERANCE = 0.1

USE_ICP = "use ICP"
USE_GRADIENTS = "use gradients"
NEITHER = "neither beats similarity"
TOO_SMALL = "sample too small"
METHODS = {USE_ICP: ICP, USE_GRADIENTS: GRADIENTS, NEITHER: SIMILARITY}

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
    """Return how well methods [n, m] rank what a training step does, and the differences.

    Rows of quantity ("ICP", "ICP minus gradients", ...), unit, estimate, low, high, n, m. A method
    that scores all examples alike for a query ranks none of them: its correlation counts as 0
    there, so that all methods are averaged over the same queries. Not numbers where no query has a
    ranking, as in a sample of fewer than four examples.
    """
    names = [ICP, GRADIENTS, *similarities]
    pairs = [(one, name) for name in similarities for one in (ICP, GRADIENTS)] + [(ICP, GRADIENTS)]
    of_queries = by_set([gain, gradient, *similarities.values()], [effect], "query")

    def measure(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        rho, weights = of_queries(rows, columns)
        rho = rho[0, :, :, 0]  # [queries, methods]
        ranked = np.isfinite(rho).any(axis=1)  # not where the step did the same to all
        if not ranked.any():
            return np.full(len(names), np.nan)
        rho = np.where(np.isnan(rho), 0.0, rho)  # scores were all alike
        return np.average(rho[ranked], 0, weights[ranked])

    quantities = [*names, *(f"{one} minus {other}" for one, other in pairs)]
    rows = pd.DataFrame({"quantity": quantities, "unit": "Spearman"})
    kinds = np.repeat(["fisher", "normal"], [len(names), len(pairs)])
    measure = with_differences(measure, names, pairs)
    n, m = effect.shape
    return with_intervals(rows, measure, (n, m), rng, resamples, kinds).assign(n=n, m=m)


@dataclass(frozen=True)
class Recommendation:
    """What to do, and why.

    The method is what to score the whole pool with: "ICP", "gradients" or "similarity"; where the
    sample is too small, what its estimates speak for (similarity if there are none). A sample of
    factor times the size, n by m, would settle it with a chance of `CHANCE` if the estimates hold
    (1 where it is settled; infinite and None if none would).
    """

    verdict: str
    method: str
    factor: float
    n: int | None
    m: int | None
    differences: tuple[str, ...]  # those that decide, as phrases with their intervals
    known: bool  # whether there were enough rankings for intervals

    @property
    def settled(self) -> bool:
        """Whether the sample was large enough."""
        return self.verdict != TOO_SMALL


def recommend(agreed: pd.DataFrame, tolerance: float = TOLERANCE) -> Recommendation:
    """Return the verdict by the rule of this module, from the table of `agreements`.

    Intervals shrink with the root of the sample (noise of single pairs shrinks faster, so this is
    rather too many). With estimates e at a distance |e - t| from a bound t, and half-lengths h, a
    sample (h / |e - t|)^2 times as large has an even chance that its interval keeps to the bound;
    for a chance of 80 % it takes about twice that.

    Raises:
        ValueError: If the tolerance d is not above 0.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance!r}, expected a number above 0")
    deciding = agreed[agreed["quantity"].str.contains(" minus ")]
    said = findings_as_text(deciding)
    differences = tuple(f"{name} {numbers}" for name, numbers in said.items())
    n, m = int(agreed["n"].iloc[0]), int(agreed["m"].iloc[0])

    known = bool(np.isfinite(deciding["low"]).all())
    times = _times_needed(deciding.set_index("quantity"), tolerance, known)
    settled = next((verdict for verdict in times if times[verdict] < 1), None)
    if settled and known and m >= MIN_QUERIES:
        return Recommendation(settled, METHODS[settled], 1.0, n, m, differences, known)
    likely = next((verdict for verdict in times if np.isfinite(times[verdict])), None)
    method = METHODS.get(likely, SIMILARITY)
    if not known or not likely:
        return Recommendation(TOO_SMALL, method, math.inf, None, None, differences, known)
    power = 1 + norm.ppf(CHANCE) / norm.ppf(0.975)
    factor = max(1.0, power**2 * times[likely])
    sizes = (None, None)
    if factor <= MOST:
        sizes = math.ceil(factor * n), max(MIN_QUERIES, math.ceil(factor * m))
    return Recommendation(TOO_SMALL, method, factor, *sizes, differences, known)


def _times_needed(rows: pd.DataFrame, tolerance: float, known: bool) -> dict[str, float]:
    """Return by verdict how many times the sample has an even chance of it; below 1, it holds."""
    estimate = rows["estimate"]
    low, high = (rows["low"], rows["high"]) if known else (estimate, estimate)

    def times(one: str, other: str, bound: float, above: bool) -> float:
        difference = f"{one} minus {other}"
        e = estimate[difference]
        half = e - low[difference] if above else high[difference] - e
        distance = e - bound if above else bound - e
        return (half / distance) ** 2 if distance > 0 else math.inf

    methods, similar = (ICP, GRADIENTS), set(rows.index.str.split(" minus ").str[1]) - {GRADIENTS}
    beats = {one: max(times(one, other, 0, above=True) for other in similar) for one in methods}
    by_less = [
        max(times(one, other, tolerance, above=False) for one in methods) for other in similar
    ]
    return {
        USE_ICP: max(beats[ICP], times(ICP, GRADIENTS, -tolerance, above=True)),
        USE_GRADIENTS: max(beats[GRADIENTS], times(ICP, GRADIENTS, 0, above=False)),
        NEITHER: min(by_less),
    }


def as_text(found: Recommendation, tolerance: float, available: tuple[int, int]) -> str:
    """Return the verdict in plain words (Markdown); `available` are the whole pool's N and M."""
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
    if not found.known:
        return f"{head}It has too few rankings for an interval; {found.method} is used for now."
    head += f"Its estimates speak for {found.method}, which is used for now. "
    if found.n is None:
        return (
            f"{head}The methods are so close to the rule's bounds that {MOST} times as many "
            f"examples would not tell them apart: take the easiest to run.{numbers}"
        )
    needed = zip((found.n, found.m), available, ("training examples", "queries"), strict=True)
    lacks = [f"{have} {name}" for need, have, name in needed if need > have]
    more = f"; there are only {' and '.join(lacks)}, so more are needed" if lacks else ""
    return (
        f"{head}About {found.n} training examples by {found.m} queries would settle it with a "
        f"chance of {CHANCE:.0%}, if the estimates hold{more}.{numbers}"
    )
