"""Where two attribution methods agree, how far they could, and what else would agree as well.

Every function takes finished matrices [N, M] (positive = helps) and returns a table. `rng` draws
the bootstrap's `resamples`, halvings and permutations.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from icprobe.statistics.bootstrap import Measure, bootstrap_ci
from icprobe.statistics.conditions import Pool, of_tasks
from icprobe.statistics.inference import p_value, with_ceiling
from icprobe.statistics.measures import agreement, agreements, kendall, overlap
from icprobe.statistics.ranks import MIN_OBSERVATIONS

# baselines that are similarities, by their titles in `methods`
SIMILARITIES = ("words (TF-IDF)", "hidden states")

# methods by name, each a matrix [N, M]
Methods = Mapping[str, np.ndarray]

# a level of `measures`, or one with groups [N, M] to rank within, whose agreements are averaged
Level = str | np.ndarray | tuple[str | np.ndarray, np.ndarray]


def agreement_table(
    first: Methods,
    second: Methods,
    levels: Mapping[str, Level],
    rng: np.random.Generator,
    given: Sequence[np.ndarray] = (),
    resamples: int = 1000,
) -> pd.DataFrame:
    """Return the agreement of each of the first methods with each of the second, at each level.

    Args:
        first: A methods.
        second: B methods.
        levels: By name, see `Level`.
        rng: See this module.
        given: Covariates [N, M], see `agreements`.
        resamples: See this module.

    Returns:
        One row each: level, first, second, estimate, low, high.
    """
    rows = []
    for name, level in levels.items():
        methods = [*first.values()], [*second.values()]
        measure = _agreements(*methods, level, given)
        numbers = bootstrap_ci(measure, methods[0][0].shape, rng, resamples, "fisher")
        rows += [
            (name, a, b, *(x[i, j] for x in numbers))
            for i, a in enumerate(first)
            for j, b in enumerate(second)
        ]
    return pd.DataFrame(rows, columns=["level", "first", "second", "estimate", "low", "high"])


def rank_measures(
    first: np.ndarray, second: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return agreements of row means as ranks: quantity, estimate, low, high, chance, p.

    Spearman (p by permutation), Kendall, and the share that the best and the worst tenth, quarter
    and half have in common.
    """
    N = len(first)
    measures = {
        "Spearman": (agreement(first, second, "example"), 0.0, "fisher"),
        "Kendall": (kendall(first, second), 0.0, "fisher"),
    }
    for share in (0.1, 0.25, 0.5):
        k = max(1, round(share * N))
        for end in ("top", "bottom"):
            common = overlap(first, second, k, end)
            measures[f"{end} {k} in common"] = (common, k / N, "percentile")
    rows = []
    for name, (measure, chance, kind) in measures.items():
        found = bootstrap_ci(measure, first.shape, rng, resamples, kind)
        rows.append((name, *map(float, found), chance))
    table = pd.DataFrame(rows, columns=["quantity", "estimate", "low", "high", "chance"])
    table.loc[table["quantity"] == "Spearman", "p"] = p_value(first, second, rng)
    return table


def reliabilities(methods: Methods, rng: np.random.Generator) -> pd.DataFrame:
    """Return each method's split-half reliability over queries: method, reliability, low, high.

    Intervals are over training examples; see `noise_ceiling` for why.
    """
    rows = []
    for name, scores in methods.items():
        found = with_ceiling(scores, scores, rng)
        rows.append((name, *(found[f"first{end}"][0] for end in ("", "_low", "_high"))))
    return pd.DataFrame(rows, columns=["method", "reliability", "low", "high"])


def by_similarity(
    first: np.ndarray,
    second: np.ndarray,
    similarity: np.ndarray,
    rng: np.random.Generator,
    bins: int = 5,
    resamples: int = 1000,
) -> tuple[pd.DataFrame, tuple[float, float, float]]:
    """Return the per-query agreement among training examples that are about equally similar.

    Each query's training examples are cut into bins of equal size by their similarity [N, M] to it
    (fewer bins in a pool too small for so many).

    Returns:
        One row per bin: similarity (mean), estimate, low, high; and the slope of a line through
        the bins (agreement per bin) with its interval.
    """
    bins = max(1, min(bins, len(first) // MIN_OBSERVATIONS))
    groups = ((rankdata(similarity, axis=0, method="ordinal") - 1) * bins // len(first)).astype(int)
    measure = agreements([first], [second], "query", groups, count=bins)
    kinds = np.array(["fisher"] * bins + ["normal"])

    def with_slope(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        values = measure(rows, columns)[:, 0, 0]
        known = np.isfinite(values)
        line = np.polyfit(np.arange(bins)[known], values[known], 1) if known.sum() > 1 else [np.nan]
        return np.append(values, line[0])

    estimate, low, high = bootstrap_ci(with_slope, first.shape, rng, resamples, kinds)
    frame = pd.DataFrame({"similarity": [_mean(similarity[groups == k]) for k in range(bins)]})
    frame = frame.assign(estimate=estimate[:-1], low=low[:-1], high=high[:-1])
    return frame, (estimate[-1], low[-1], high[-1])


def partial_correlations(
    effect: np.ndarray, causes: Methods, rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return how an effect's row means go with each of two causes', alone and given the other.

    One row each: cause, given, estimate, low, high.
    """
    rows = []
    for cause, other in (tuple(causes), tuple(causes)[::-1]):
        for given in ([], [other]):
            covariates = [causes[name] for name in given]
            measure = agreement(effect, causes[cause], "example", given=covariates)
            numbers = bootstrap_ci(measure, effect.shape, rng, resamples, "fisher")
            rows.append((cause, *(given or ["nothing"]), *map(float, numbers)))
    return pd.DataFrame(rows, columns=["cause", "given", "estimate", "low", "high"])


def given_the_answer(
    pools: Mapping[str, Pool], rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return how far gain and cosine agree, and do so beyond sharing the query's completion.

    One row each: pool, given ("nothing" or "same completion"), estimate, low, high (per query),
    sharing (pairs that share it).
    """
    rows = []
    for name, pool in pools.items():
        same = pool.baselines["same_completion"]
        for given, covariates in (("nothing", []), ("same completion", [same])):
            measure = agreement(pool.gain, pool.cosine, "query", given=covariates)
            numbers = bootstrap_ci(measure, same.shape, rng, resamples, "fisher")
            rows.append((name, given, *map(float, numbers), int(same.sum())))
    return pd.DataFrame(rows, columns=["pool", "given", "estimate", "low", "high", "sharing"])


def levels_of_truth(tasks: Sequence[str], M: int) -> dict[str, Level]:
    """Return the levels at which methods are held against the truth.

    To agree "per query" it is enough to tell which tasks help a query; "within a task", each query
    ranks the training examples of one of the `tasks` [N] alone.
    """
    within = "query", of_tasks(tasks, M)
    return {"per query": "query", "within a task": within, "per example": "example"}


def against_baselines(
    proxies: Methods,
    truth: np.ndarray,
    tasks: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Return how much better one method agrees with the truth than another, in findings' columns.

    Per query, per query among training examples of one task, and per example. The best similarity
    is the better of `SIMILARITIES` at each of these.

    Args:
        proxies: With gain, gain over neutral, product, cosine and both `SIMILARITIES`.
        truth: [N, M] training effects.
        tasks: [N] labels of the training examples.
        rng: See this module.
        resamples: See this module.
    """
    names = ["gain", "gain over neutral", "cosine", "product"]
    methods = [proxies[name] for name in (*names, *SIMILARITIES)]
    similar = [(name, "best similarity") for name in names[:3]]
    pairs = {
        "per query": [*similar, ("cosine", "gain"), ("cosine", "product")],
        "within a task": [*similar, ("cosine", "gain")],
        "per example": [*similar[:1], ("gain", "product")],
    }
    frames = []
    for level, ranked in levels_of_truth(tasks, truth.shape[1]).items():
        less = _differences(_agreements(methods, [truth], ranked), names, pairs[level])
        estimate, low, high = bootstrap_ci(less, truth.shape, rng, resamples, "normal")
        quantities = [f"{one} less {other}, {level}" for one, other in pairs[level]]
        frame = pd.DataFrame({"quantity": quantities, "unit": "Spearman"})
        frames.append(frame.assign(estimate=estimate, low=low, high=high, n=len(truth)))
    return pd.concat(frames, ignore_index=True)


def _differences(
    measure: Measure, names: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> Measure:
    """Return the measure of pairs' differences, from that of the names and two similarities."""

    def measured(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        *rho, words, states = measure(rows, columns)[:, 0]
        found = {**dict(zip(names, rho, strict=True)), "best similarity": np.fmax(words, states)}
        return np.array([found[one] - found[other] for one, other in pairs])

    return measured


def row_norms(product: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Return the length of each training example's gradient, up to a factor they share: [N].

    A product is the cosine times both lengths, so a row's product over cosine is its length times
    each query's; queries whose cosine is too small to divide by are left out by the median.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        both = np.where(cosine == 0, np.nan, product / cosine)
    return np.nanmedian(both / np.nanmedian(both, axis=0), axis=1)


def findings(
    conditions: pd.DataFrame,
    by_level: pd.DataFrame,
    predicted: pd.DataFrame,
    shape: tuple[int, int],
    truth_shape: tuple[int, int],
) -> pd.DataFrame:
    """Return the numbers to keep: quantity, unit, estimate, low, high, n.

    Args:
        conditions: Rows of `by_condition` for one pool, with a column scores; n is ranked.
        by_level: Rows of `agreement_table` for the whole pool, whose N is n.
        predicted: Rows of `agreement_table` with the training effect.
        shape: (N, M) of the pool.
        truth_shape: (N, M) of the training effect.
    """
    forms = {f"{a} and {b}": (a, b) for a, b in (("ICP score", "product"), ("gain", "cosine"))}
    rows = []
    for row in conditions.itertuples():
        level = "" if row.level == "per example" else f", {row.level}"
        name = f"{' against '.join(forms[row.scores])}, {row.condition}{level}"
        rows.append((name, row.estimate, row.low, row.high, row.ranked))
    for row in by_level.itertuples():
        if (row.first, row.second) in forms.values():
            name = f"{row.first} against {row.second}, whole pool, {row.level}"
            rows.append((name, row.estimate, row.low, row.high, shape[0]))
    for row in predicted.itertuples():
        name = f"{row.first} against training effect, {row.level}"
        rows.append((name, row.estimate, row.low, row.high, truth_shape[0]))
    frame = pd.DataFrame(rows, columns=["quantity", "estimate", "low", "high", "n"])
    frame.insert(1, "unit", "Spearman")
    frame["n"] = frame["n"].fillna(frame["n"][0]).astype(int)  # differences: of the first
    return frame


def _agreements(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    level: Level,
    given: Sequence[np.ndarray] = (),
) -> Measure:
    """Return the measure of agreements [A, B]; groups are averaged where they are known."""
    level, groups = level if isinstance(level, tuple) else (level, None)
    measure = agreements(first, second, level, groups, given)

    def averaged(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        values = measure(rows, columns)
        known = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            return np.where(known, values, 0).sum(0) / known.sum(0)

    return averaged


def _mean(values: np.ndarray) -> float:
    """Return the mean, not a number for none."""
    return float(values.mean()) if len(values) else np.nan
