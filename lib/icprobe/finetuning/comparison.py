"""Compare models that were fine-tuned on different selections, query by query and seed by seed.

What a selection brings is its models' mean measure over S seeds and Q evaluation queries, less that
of the untouched model. All selections have the same seeds and queries, so differences are paired.
Seeds and queries are resampled together (`statistics.bootstrap_ci`).

Two selections are held to be equivalent if their difference is within a margin, a fraction of what
the full pool brings that is fixed beforehand, by two one-sided tests (TOST, Schuirmann 1987): at
5 %, that is where the 90 % interval of their difference, as such a fraction, lies within it. The
full pool's gain is resampled, too, so a gain that is uncertain itself makes no narrow margin.

Seed deviations are scaled by sqrt(S / (S - 1)) and by t / z quantiles (few-seed correction): S
resampled seeds would give (S - 1) / S of the variance, and few say little of it. With fewer than
`MIN_SEEDS` there is no verdict. Verdicts are not corrected for the number of pairs.

Intervals are for new queries of the same tasks. Where differences are some tasks' alone, new tasks
may turn them round: so there is an interval from resampling tasks, too.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from icprobe import statistics
from icprobe.finetuning.training_runs import RunResult
from icprobe.statistics import MIN_QUERIES

FULL = "full pool"
LEVEL = 0.05  # of the equivalence test
MIN_SEEDS = 3  # below, the noise of training is not in the intervals, or hardly

BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"


def gains(
    results: Mapping[str, Sequence[RunResult]], untouched: RunResult, measure: str
) -> dict[str, np.ndarray]:
    """Return what each selection's models gain on each query: [S, Q] by name, positive = better.

    Left out are queries that the measure does not apply to, and seeds that it was not taken of.
    """
    before = untouched.measures[measure].dropna()
    found = {}
    for name, runs in results.items():
        gained = np.stack([run.measures[measure][before.index] - before for run in runs])
        found[name] = gained[~np.isnan(gained).all(axis=1)]
    return found


def seeds_mean(results: Sequence[RunResult]) -> pd.DataFrame:
    """Return each query's measures, averaged over the seeds that have them: Q rows."""
    measures = [result.measures for result in results]
    return pd.concat(measures).groupby(level=0, sort=False).mean(numeric_only=True)


def summary(
    gains: Mapping[str, np.ndarray], rng: np.random.Generator, resamples: int = 2000
) -> pd.DataFrame:
    """Return what each selection brings, with 95 % intervals over seeds and queries.

    There is none with fewer than `MIN_QUERIES`. seed_sd is the standard deviation between seeds of
    the mean over queries; with one seed it is not known, and not in the interval.
    """
    measure, (S, Q) = _means(gains)
    estimate, low, high = statistics.bootstrap_ci(measure, (S, Q), rng, resamples)
    if Q < MIN_QUERIES:
        low = high = np.nan
    of_seeds = np.stack(list(gains.values())).mean(2)
    seed_sd = of_seeds.std(axis=1, ddof=1) if S > 1 else np.nan
    columns = {"selection": list(gains), "estimate": estimate, "low": low, "high": high}
    return pd.DataFrame(columns | {"seed_sd": seed_sd, "seeds": S, "queries": Q})


def differences(
    gains: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[str, str]],
    margin: float,
    rng: np.random.Generator,
    resamples: int,
    tasks: Sequence[str],
) -> pd.DataFrame:
    """Return how much more one selection brings than another, and whether they are equivalent.

    Args:
        gains: [S, Q] by selection, `FULL` among them.
        pairs: Names of the first and the second of each comparison.
        margin: Of equivalence, a fraction of what the full pool brings.
        rng: For the bootstrap.
        resamples: How many.
        tasks: [Q] of the queries.

    Returns:
        One row a pair: first, second; estimate, low, high (95 %) of the difference; share,
        share_low, share_high (95 %), tost_low, tost_high (90 %), the same as fractions of what the
        full pool brings, not a number where that is not positive (and where it is not in some
        resamples, wider, up to no 95 % and an infinite 90 %); p_equivalent, of TOST; verdict, by
        the 95 % interval and p, or "undecided"; tasks_low and tasks_high, the 95 % interval of
        share where tasks are drawn, too. With fewer than `MIN_SEEDS` or `MIN_QUERIES` all are
        undecided, and intervals of fractions and p not numbers.
    """
    means, shape = _means(gains)
    names = list(gains)
    first, second = ([names.index(pair[k]) for pair in pairs] for k in (0, 1))

    def compared(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        found = means(rows, columns)
        difference, full = found[first] - found[second], found[names.index(FULL)]
        return np.stack([difference, difference / full if full > 0 else difference * np.nan])

    drawn = statistics.bootstrap_replicates(compared, shape, rng, resamples)
    estimate, share = compared(*map(np.arange, shape))
    low, high = _tested(estimate, drawn[:, 0], LEVEL / 2)
    share_low, share_high = _tested(share, drawn[:, 1], LEVEL / 2)
    tost_low, tost_high = _tested(share, drawn[:, 1], LEVEL)
    tasks_low, tasks_high = _over_tasks(compared, shape, share, tasks, rng, resamples)
    columns = {
        "estimate": estimate, "low": low, "high": high, "share": share,
        "share_low": np.where(np.isinf(share_low), np.nan, share_low),
        "share_high": np.where(np.isinf(share_high), np.nan, share_high),
        "tost_low": tost_low, "tost_high": tost_high,
        "p_equivalent": tost(share, drawn[:, 1], margin), "margin": margin,
        "verdict": "", "tasks_low": tasks_low, "tasks_high": tasks_high,
    }  # fmt: skip
    table = pd.DataFrame(pairs, columns=["first", "second"]).assign(**columns)
    table["verdict"] = [_verdict(row) for row in table.itertuples()]
    if shape[0] < MIN_SEEDS or shape[1] < MIN_QUERIES:
        unknown = table.loc[:, "share_low":"p_equivalent"].columns
        table[[*unknown, "tasks_low", "tasks_high"]] = np.nan
        table["verdict"] = UNDECIDED
    return table


def _means(gains: Mapping[str, np.ndarray]):
    """Return the measure of all mean gains, with the few-seed correction, and (S, Q)."""
    values = np.stack(list(gains.values()))
    _, S, Q = values.shape

    def measure(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        # how often each was drawn does for a mean
        of_queries = values @ np.bincount(columns, minlength=Q) / len(columns)
        drawn = np.bincount(rows, minlength=S) / len(rows)
        if S > 1:
            longer = t.ppf(1 - LEVEL / 2, S - 1) / norm.ppf(1 - LEVEL / 2)
            drawn = 1 / S + longer * np.sqrt(S / (S - 1)) * (drawn - 1 / S)
        return of_queries @ drawn

    return measure, (S, Q)


def _tested(estimate: np.ndarray, values: np.ndarray, level: float) -> tuple:
    """Return low and high [P]: `tost` has p below a level where a margin is wider than both.

    Unknown values [resamples, P] are on both sides: too many of them make the interval infinite.
    """
    steps = int(level * len(values))  # of 1 / (1 + resamples) each: the highest p below the level
    known, unknown = ~np.isnan(estimate), np.isnan(values)
    below = np.sort(np.where(unknown, -np.inf, values), axis=0)
    above = np.sort(np.where(unknown, np.inf, values), axis=0)
    low, high = (below[steps - 1], above[-steps]) if steps else (-np.inf, np.inf)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def tost(estimate: np.ndarray, values: np.ndarray, margin: float) -> np.ndarray:
    """Return the bootstrap p-values [P] of two one-sided tests for being within +-margin.

    The larger of two: of the hypothesis that the truth is at or below -margin, and at or above
    margin, each the fraction of resamples [resamples, P] there (unknown ones are on both sides).
    """
    beyond = [~(values > -margin), ~(values < margin)]
    p = np.max([(1 + side.sum(0)) / (1 + len(values)) for side in beyond], axis=0)
    return np.where(np.isnan(estimate), np.nan, p)


def _over_tasks(compared, shape, share, tasks, rng, resamples) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval [P] of fractions where tasks are drawn, too; see `differences`."""
    members = [np.flatnonzero(np.asarray(tasks) == task) for task in pd.unique(np.asarray(tasks))]
    if len(members) < 2:
        return np.full(len(share), np.nan), np.full(len(share), np.nan)
    values = []
    for _ in range(resamples):
        seeds = rng.integers(shape[0], size=shape[0])
        drawn = [members[task] for task in rng.integers(len(members), size=len(members))]
        queries = np.concatenate([rng.choice(mine, len(mine)) for mine in drawn])
        values.append(compared(seeds, queries)[1])
    return statistics.confidence_interval(share, np.array(values))


def _verdict(row) -> str:
    holds = {BETTER: row.low > 0, WORSE: row.high < 0, EQUIVALENT: row.p_equivalent < LEVEL}
    return " and ".join(name for name, true in holds.items() if true) or UNDECIDED


def by_task(
    gains: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], tasks: Sequence[str]
) -> pd.DataFrame:
    """Return what each task contributes to `differences`: a row a pair and task.

    The estimate is the mean difference there; the contribution is a fraction of what the full pool
    brings, and these sum to the pair's.
    """
    tasks = np.asarray(tasks)
    full = np.mean(gains[FULL])
    rows = []
    for first, second in pairs:
        of_queries = (gains[first] - gains[second]).mean(0)
        for task in pd.unique(tasks):
            mine = of_queries[tasks == task]
            contribution = mine.sum() / len(tasks) / full if full > 0 else np.nan
            rows.append((first, second, task, len(mine), mine.mean(), contribution))
    names = ["first", "second", "task", "queries", "estimate", "contribution"]
    return pd.DataFrame(rows, columns=names)


def findings(table: pd.DataFrame, margin: float, n: int) -> pd.DataFrame:
    """Return `differences` as findings that claims are judged by, over n evaluation queries.

    For each pair "<first> less <second>" and its "room within the margin": how far inside +-margin
    it is, the 90 % interval's nearer end as the low one, so that this is above zero where TOST
    finds equivalence. As fractions of what the full pool brings.
    """
    rows = []
    for row in table.itertuples():
        name = f"{row.first} less {row.second}"
        rows.append((name, row.share, row.share_low, row.share_high))
        ends = np.array([row.tost_low, row.tost_high])
        least = margin - np.abs(ends).max()
        most = margin - (0 if ends[0] <= 0 <= ends[1] else np.abs(ends).min())
        rows.append((f"{name}: room within the margin", margin - abs(row.share), least, most))
    frame = pd.DataFrame(rows, columns=["quantity", "estimate", "low", "high"])
    frame.insert(1, "unit", "share of the full pool's gain")
    return frame.assign(n=n)


def by_size(summaries: Sequence[pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    """Return rows of `summary`, by method, at each size, with the full pool as the end of each.

    Summaries have a column examples, too; the first one has the full pool.
    """
    table = pd.concat(summaries, ignore_index=True).rename(columns={"selection": "method"})
    full = table[table["method"] == FULL]
    ends = [full.assign(method=name) for name in names]
    return pd.concat([table[table["method"].isin(names)], *ends], ignore_index=True)


def as_text(table: pd.DataFrame, margin: float) -> list[str]:
    """Return a sentence for each of `differences`."""
    said = {
        BETTER: "better models than",
        WORSE: "worse models than",
        EQUIVALENT: f"models equivalent (within {margin:.0%} of the full pool's gain) to those of",
        UNDECIDED: "models that cannot be distinguished from, nor called equivalent to, those of",
    }
    few = f"fewer than {MIN_SEEDS} seeds or {MIN_QUERIES} queries: no interval"
    return [
        f"{row.first}: {' and '.join(said[part] for part in row.verdict.split(' and '))} "
        f"{row.second} ({row.share:+.2f}, "
        f"{few if np.isnan(row.share_low) else f'{row.share_low:+.2f} to {row.share_high:+.2f}'})."
        for row in table.itertuples()
    ]
