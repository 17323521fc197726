"""Where two attribution methods agree, how far they could, and what else would agree as well.

Every function takes finished matrices [N, M] (positive = helps) and returns a table.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, rankdata

from icprobe.statistics.bootstrap import Measure, with_intervals
from icprobe.statistics.conditions import Pool, of_tasks
from icprobe.statistics.inference import p_value, with_ceiling
from icprobe.statistics.measures import (
    agreements,
    average_over_sets,
    in_common,
    of_row_sums,
    with_differences,
)
from icprobe.statistics.ranks import MIN_OBSERVATIONS

# baselines that are similarities, by their titles in `methods`
SIMILARITIES = ("words (TF-IDF)", "hidden states")

# methods by name, each a matrix [N, M]
Methods = Mapping[str, np.ndarray]

# "example", "query" or "pair" (see `measures`), or groups [N, M]: each query ranks the training
# examples of a group alone, and groups are averaged
Level = str | np.ndarray


def agreement_table(
    first: Methods,
    second: Methods,
    levels: Mapping[str, Level],
    rng: np.random.Generator,
    given: Sequence[np.ndarray] = (),
    resamples: int = 1000,
) -> pd.DataFrame:
    """Return the agreement of each of the first methods with each of the second, at each level.

    One row each: level, first, second, estimate, low, high. `given` are covariates [N, M].
    """
    matrices = [*first.values()], [*second.values()]
    tables = []
    for name, level in levels.items():
        pairs = itertools.product([name], first, second)
        rows = pd.DataFrame(pairs, columns=["level", "first", "second"])
        measure, shape = _agreements(*matrices, level, given), matrices[0][0].shape
        tables.append(with_intervals(rows, measure, shape, rng, resamples, "fisher"))
    return pd.concat(tables, ignore_index=True)


def _agreements(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    level: Level,
    given: Sequence[np.ndarray] = (),
) -> Measure:
    """Return the measure of agreements [A, B]; groups are averaged where they are known."""
    level, groups = (level, None) if isinstance(level, str) else ("query", level)
    measure = agreements(first, second, level, groups, given)

    def averaged(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        values = measure(rows, columns)
        return average_over_sets(values[None], np.ones(len(values)))[0]

    return averaged


def rank_measures(
    first: np.ndarray, second: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return Spearman's and Kendall's of row means, and what the best and worst have in common.

    Rows of quantity, estimate, low, high, chance, p (of Spearman's, by permutation).
    """
    N = len(first)
    kendall = of_row_sums(lambda a, b: kendalltau(a, b).statistic, first, second)
    measures = [
        ("Spearman", agreements([first], [second], "example"), 0.0),
        ("Kendall", kendall, 0.0),
    ]
    for fraction, end in itertools.product((0.1, 0.25, 0.5), ("top", "bottom")):
        k = max(1, round(fraction * N))
        common = functools.partial(in_common, k=k, end=end)
        measures.append((f"{end} {k} in common", of_row_sums(common, first, second), k / N))
    rows = []
    for name, measure, chance in measures:
        kind = "percentile" if chance else "fisher"
        row = with_intervals([{"quantity": name}], measure, first.shape, rng, resamples, kind)
        rows.append(row.assign(chance=chance))
    table = pd.concat(rows, ignore_index=True)
    table.loc[0, "p"] = p_value(first, second, rng)
    return table


def reliabilities(methods: Methods, rng: np.random.Generator) -> pd.DataFrame:
    """Return each method's `inference.reliability`: method, reliability, low, high."""
    columns = ["reliability", "reliability_low", "reliability_high"]
    rows = [
        (name, *with_ceiling(scores, scores, rng).loc[0, columns])
        for name, scores in methods.items()
    ]
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

    Each query's training examples are cut into bins of equal size by their similarity [N, M] to it.
    One row per bin: similarity (mean), estimate, low, high; and the slope of a line through the
    bins (agreement per bin) with its interval.
    """
    bins = max(1, min(bins, len(first) // MIN_OBSERVATIONS))
    groups = ((rankdata(similarity, axis=0, method="ordinal") - 1) * bins // len(first)).astype(int)
    measure = agreements([first], [second], "query", groups)

    def with_slope(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        values = measure(rows, columns)[:, 0, 0]
        known = np.isfinite(values)
        line = np.polyfit(np.arange(bins)[known], values[known], 1) if known.sum() > 1 else [np.nan]
        return np.append(values, line[0])

    kinds = np.repeat(["fisher", "normal"], [bins, 1])
    similar = [*(similarity[groups == k].mean() for k in range(bins)), np.nan]
    rows = pd.DataFrame({"similarity": similar})
    table = with_intervals(rows, with_slope, first.shape, rng, resamples, kinds)
    return table[:-1], tuple(table.loc[bins, ["estimate", "low", "high"]])


def partial_correlations(
    effect: np.ndarray, causes: Methods, rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return how an effect's row means go with each of two causes', alone and given the other."""
    rows = []
    for cause, other in itertools.permutations(causes):
        for name, given in (("nothing", []), (other, [causes[other]])):
            measure = agreements([effect], [causes[cause]], "example", given=given)
            row = [{"cause": cause, "given": name}]
            rows.append(with_intervals(row, measure, effect.shape, rng, resamples, "fisher"))
    return pd.concat(rows, ignore_index=True)


def given_the_answer(
    pools: Mapping[str, Pool], rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return how far gain and cosine agree per query, beyond sharing the query's completion."""
    rows = []
    for name, pool in pools.items():
        same = pool.baselines["same_completion"]
        for given, covariates in (("nothing", []), ("same completion", [same])):
            measure = agreements([pool.gain], [pool.cosine], "query", given=covariates)
            row = [{"pool": name, "given": given}]
            row = with_intervals(row, measure, same.shape, rng, resamples, "fisher")
            rows.append(row.assign(sharing=int(same.sum())))
    return pd.concat(rows, ignore_index=True)


def levels_of_truth(tasks: Sequence[str], M: int) -> dict[str, Level]:
    """Return the levels at which methods are held against the truth, of training examples' tasks.

    To agree "per query" it is enough to tell which tasks help a query, but not "within a task".
    """
    return {"per query": "query", "within a task": of_tasks(tasks, M), "per example": "example"}


def against_baselines(
    proxies: Methods,
    truth: np.ndarray,
    tasks: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Return how much better one method agrees with the truth than another, at each level.

    `truth` [N, M] are training effects, `tasks` [N] those of the training examples. The best
    similarity is the better of `SIMILARITIES` at a level. Columns are those of findings.
    """
    names = ["gain", "gain over neutral", "cosine", "product"]
    methods = [proxies[name] for name in (*names, *SIMILARITIES)]
    names.append("best similarity")
    similar = [(name, "best similarity") for name in names[:3]]
    pairs = {
        "per query": [*similar, ("cosine", "gain"), ("cosine", "product")],
        "within a task": [*similar, ("cosine", "gain")],
        "per example": [*similar[:1], ("gain", "product")],
    }

    def with_best(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        *rho, words, states = measure(rows, columns)[:, 0]
        return np.array([*rho, np.fmax(words, states)])

    tables = []
    for level, ranked in levels_of_truth(tasks, truth.shape[1]).items():
        measure = _agreements(methods, [truth], ranked)
        quantities = [f"{one} less {other}, {level}" for one, other in pairs[level]]
        rows = pd.DataFrame({"quantity": [*names, *quantities], "unit": "Spearman"})
        differences = with_differences(with_best, names, pairs[level])
        table = with_intervals(rows, differences, truth.shape, rng, resamples, "normal")
        tables.append(table[len(names) :])
    return pd.concat(tables, ignore_index=True).assign(n=len(truth))


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
    """Return the numbers to keep (quantity, unit, estimate, low, high, n) of one pool's tables.

    These are by condition, and by level: of the whole pool, and of methods with the training effect
    (predicted). Shapes are (N, M) of these two.
    """
    forms = by_level["first"] + " and " + by_level["second"]
    by_level = by_level[forms.isin(conditions["scores"])]
    scores = conditions["scores"].str.replace(" and ", " against ")
    level = conditions["level"].map({"per example": "", "per query": ", per query"})
    whole = by_level["first"] + " against " + by_level["second"] + ", whole pool, "
    of_truth = predicted["first"] + " against training effect, " + predicted["level"]
    ranked = conditions["ranked"].fillna(conditions["ranked"].iloc[0])  # differences: the first's
    frames = [
        conditions.assign(quantity=scores + ", " + conditions["condition"] + level, n=ranked),
        by_level.assign(quantity=whole + by_level["level"], n=shape[0]),
        predicted.assign(quantity=of_truth, n=truth_shape[0]),
    ]
    frame = pd.concat(frames, ignore_index=True).assign(unit="Spearman").astype({"n": int})
    return frame[["quantity", "unit", "estimate", "low", "high", "n"]]
