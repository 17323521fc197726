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
may turn them round: beside each verdict stands the interval from resampling tasks, too, and
`by_task` has what each contributes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from icprobe import statistics
from icprobe.finetuning import judge as judging
from icprobe.finetuning.judge import Judge
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

    Args:
        results: By selection, one result for each of S seeds.
        untouched: Of the model before training.
        measure: One of `evaluation.MEASURES`; queries it does not apply to are left out of Q, and
            seeds whose models it was not taken of out of S.

    Raises:
        ValueError: If the selections do not have the same seeds and queries.
    """
    before = untouched.measures[measure]
    before = before[before.notna()]
    found, taken = {}, {}
    for name, runs in results.items():
        for run in runs:
            if not run.measures.index.equals(untouched.measures.index):
                raise ValueError(f"{name} was evaluated on other queries than the untouched model")
        values = np.stack([run.measures[measure][before.index] - before for run in runs])
        taken[name] = np.flatnonzero(~np.isnan(values).all(1)).tolist()
        found[name] = values[taken[name]]
    if len({tuple(seeds) for seeds in taken.values()}) > 1:
        raise ValueError(f"selections have different seeds: {taken}")
    return found


def seeds_mean(results: Sequence[RunResult]) -> pd.DataFrame:
    """Return each query's measures, averaged over the seeds that have them: Q rows."""
    measures = [outcome.measures for outcome in results]
    together = pd.concat(measures).groupby(level=0, sort=False).mean(numeric_only=True)
    return together.loc[measures[0].index]


def summary(
    gains: Mapping[str, np.ndarray], rng: np.random.Generator, resamples: int = 2000
) -> pd.DataFrame:
    """Return what each selection brings, with 95 % intervals over seeds and queries.

    Args:
        gains: [S, Q] by selection, see `gains`.
        rng: For the bootstrap.
        resamples: How many.

    Returns:
        One row each: selection, estimate, low, high (not numbers with fewer than `MIN_QUERIES`),
        seed_sd, seeds, queries. seed_sd is the standard deviation between seeds of the mean over
        queries; with one seed it is not known, and not in the interval.
    """
    names, measure, shape = _means(gains)
    rows = [{"selection": name} for name in names]
    frame = statistics.with_intervals(rows, measure, shape, rng, resamples)
    if shape[1] < MIN_QUERIES:
        frame[["low", "high"]] = np.nan
    of_seeds = np.stack(list(gains.values())).mean(2)
    seed_sd = of_seeds.std(axis=1, ddof=1) if shape[0] > 1 else np.nan
    return frame.assign(seed_sd=seed_sd, seeds=shape[0], queries=shape[1])


def differences(
    gains: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[str, str]],
    margin: float,
    rng: np.random.Generator,
    resamples: int = 2000,
    tasks: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return how much more one selection brings than another, and whether they are equivalent.

    Args:
        gains: [S, Q] by selection, `FULL` among them.
        pairs: Names of the first and the second of each comparison.
        margin: Of equivalence, a fraction of what the full pool brings.
        rng: For the bootstrap.
        resamples: How many.
        tasks: [Q] of the queries; one for all by default.

    Returns:
        One row a pair: first, second; estimate, low, high (95 %) of the difference; share,
        share_low, share_high (95 %), tost_low, tost_high (90 %), the same as fractions of what the
        full pool brings, not a number where that is not positive (and where it is not in some
        resamples, wider, up to no 95 % and an infinite 90 %); p_equivalent, of TOST; verdict:
        "better" or "worse" where the 95 % interval does not hold zero, "equivalent" where TOST's
        p is below 5 %, both, or "undecided"; tasks_low and tasks_high, the 95 % interval of share
        where tasks are drawn, too (not a number with a single task). With fewer than `MIN_SEEDS`
        or `MIN_QUERIES` all are undecided, and intervals of fractions and p not numbers.

    Raises:
        ValueError: As `check`, or if a name is unknown.
    """
    check(margin, resamples)
    compared, shape = _compared(gains, pairs)
    values = statistics.bootstrap_replicates(compared, shape, rng, resamples)
    estimate, share = compared(*map(np.arange, shape))
    low, high = _tested(estimate, values[:, 0], LEVEL / 2)
    share_low, share_high = _tested(share, values[:, 1], LEVEL / 2)
    tost_low, tost_high = _tested(share, values[:, 1], LEVEL)
    tasks_low, tasks_high = _over_tasks(compared, shape, share, tasks, rng, resamples)
    columns = {
        "estimate": estimate, "low": low, "high": high, "share": share,
        "share_low": np.where(np.isinf(share_low), np.nan, share_low),
        "share_high": np.where(np.isinf(share_high), np.nan, share_high),
        "tost_low": tost_low, "tost_high": tost_high,
        "p_equivalent": tost(share, values[:, 1], margin), "margin": margin,
        "verdict": "", "tasks_low": tasks_low, "tasks_high": tasks_high,
    }  # fmt: skip
    table = pd.DataFrame(pairs, columns=["first", "second"]).assign(**columns)
    table["verdict"] = [_verdict(row) for row in table.itertuples()]
    if shape[0] < MIN_SEEDS or shape[1] < MIN_QUERIES:
        unknown = table.loc[:, "share_low":"p_equivalent"].columns
        table[[*unknown, "tasks_low", "tasks_high"]] = np.nan
        table["verdict"] = UNDECIDED
    return table


def check(margin: float, resamples: int) -> None:
    """Raise ValueError if the margin is not positive, or there are too few resamples."""
    if not margin > 0:
        raise ValueError(f"margin is {margin!r}, expected a positive fraction")
    if resamples < 2:
        raise ValueError(f"there are {resamples} resamples, expected at least 2")


def _compared(gains: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]]):
    """Return the measure of all differences and their fractions [2, P], and the shape (S, Q)."""
    names, measure, shape = _means(gains)
    unknown = {name for pair in (*pairs, (FULL,)) for name in pair} - set(names)
    if unknown:
        raise ValueError(f"no selection {sorted(unknown)[0]!r}, there are: {', '.join(names)}")
    first, second = ([names.index(pair[k]) for pair in pairs] for k in (0, 1))

    def compared(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        means = measure(rows, columns)
        difference, full = means[first] - means[second], means[names.index(FULL)]
        return np.stack([difference, difference / full if full > 0 else difference * np.nan])

    return compared, shape


def _over_tasks(compared, shape, share, tasks, rng, resamples) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval [P] of fractions where tasks are drawn, too; see `differences`."""
    labels = np.zeros(shape[1]) if tasks is None else np.asarray(tasks)
    members = [np.flatnonzero(labels == task) for task in pd.unique(labels)]
    if len(members) < 2:
        return np.full(len(share), np.nan), np.full(len(share), np.nan)
    values = []
    for _ in range(resamples):
        seeds = rng.integers(shape[0], size=shape[0])
        drawn = [members[task] for task in rng.integers(len(members), size=len(members))]
        queries = np.concatenate([rng.choice(mine, len(mine)) for mine in drawn])
        values.append(compared(seeds, queries)[1])
    return statistics.confidence_interval(share, np.array(values))


def by_task(
    gains: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], tasks: Sequence[str]
) -> pd.DataFrame:
    """Return what each task contributes to differences of selections.

    Args:
        gains: [S, Q] by selection, `FULL` among them.
        pairs: Names of the first and the second of each comparison.
        tasks: [Q] of the queries.

    Returns:
        One row a pair and task: first, second, task, queries, estimate (mean difference there),
        and contribution, as a fraction of what the full pool brings: these sum to the pair's.
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


def tost(estimate: np.ndarray, values: np.ndarray, margin: float) -> np.ndarray:
    """Return the bootstrap p-values [P] of two one-sided tests for being within +-margin.

    The larger of two: of the hypothesis that the truth is at or below -margin, and at or above
    margin, each the fraction of resamples there (unknown ones are on both sides).

    Args:
        estimate: [P] of the sample; where it is unknown, so is p.
        values: [resamples, P] of resamples.
        margin: Positive.
    """
    beyond = [~(values > -margin), ~(values < margin)]
    p = np.max([(1 + side.sum(0)) / (1 + len(values)) for side in beyond], axis=0)
    return np.where(np.isnan(estimate), np.nan, p)


def _tested(estimate: np.ndarray, values: np.ndarray, level: float) -> tuple:
    """Return low and high [P]: `tost` has p below a level where a margin is wider than both.

    Resamples in which the value is unknown are on both sides, so that too many of them make the
    interval infinite.
    """
    steps = int(level * len(values))  # of 1 / (1 + resamples) each: the highest p below the level
    outer = np.full((1, *estimate.shape), -np.inf)
    low, low_of_negated = (
        np.sort(np.concatenate([outer, np.where(np.isnan(x), -np.inf, x)]), axis=0)[steps]
        for x in (values, -values)
    )
    known = ~np.isnan(estimate)
    return np.where(known, low, np.nan), np.where(known, -low_of_negated, np.nan)


def _verdict(row) -> str:
    holds = {BETTER: row.low > 0, WORSE: row.high < 0, EQUIVALENT: row.p_equivalent < LEVEL}
    return " and ".join(name for name, true in holds.items() if true) or UNDECIDED


def _means(gains: Mapping[str, np.ndarray]):
    """Return names, the measure of all mean gains [K] at once, and the shape (S, Q)."""
    names, values = list(gains), np.stack(list(gains.values()))
    _, S, Q = values.shape
    if not S or not Q:
        raise ValueError("there are no queries that this measure applies to, or was taken of")

    def measure(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        # how often each was drawn does for a mean
        of_queries = values @ np.bincount(columns, minlength=Q) / len(columns)
        drawn = np.bincount(rows, minlength=S) / len(rows)
        if S > 1:
            longer = t.ppf(1 - LEVEL / 2, S - 1) / norm.ppf(1 - LEVEL / 2)
            drawn = 1 / S + longer * np.sqrt(S / (S - 1)) * (drawn - 1 / S)
        return of_queries @ drawn

    return names, measure, (S, Q)


def findings(table: pd.DataFrame, margin: float, n: int) -> pd.DataFrame:
    """Return the differences as findings that claims are judged by.

    Args:
        table: See `differences`.
        margin: Of equivalence.
        n: Evaluation queries.

    Returns:
        For each pair "<first> less <second>" with its 95 % interval, and "room within the margin"
        of this difference: how far inside +-margin it is, the 90 % interval's nearer end as the
        low one, so that this is above zero where TOST finds equivalence. As fractions of what the
        full pool brings: quantity, unit, estimate, low, high, n.
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
    """Return what methods bring at each size, with the full pool as the end of each.

    Args:
        summaries: One for each size, see `summary`, with a column examples; the first one has the
            full pool.
        names: Selections to follow.

    Returns:
        One row each: method, examples, estimate, low, high, seeds, queries.
    """
    table = pd.concat(summaries, ignore_index=True).rename(columns={"selection": "method"})
    full = table[table["method"] == FULL]
    ends = [full.assign(method=name) for name in names]
    return pd.concat([table[table["method"].isin(names)], *ends], ignore_index=True)


def win_rates(
    judge: Judge,
    queries: Sequence[dict],
    results: Mapping[str, Sequence[RunResult]],
    pairs: Sequence[tuple[str, str]],
    cache: str | Path,
    rng: np.random.Generator,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Return how often a judge prefers the first selection's answers, with 95 % intervals.

    Args:
        judge: See `judge.Judge`.
        queries: The evaluation queries.
        results: By selection, one result a seed, with answers.
        pairs: Names of the first and the second of each comparison.
        cache: File of finished verdicts.
        rng: For the bootstrap over seeds and queries.
        resamples: How many.

    Returns:
        One row a pair: first, second, estimate (fraction of wins, 0.5 = neither is better), low,
        high, seeds, queries.

    Raises:
        ValueError: If no open query was answered.
        judge.JudgeError: If the judge cannot be asked; finished verdicts are kept.
    """
    answering = {n: [run for run in runs if run.answers] for n, runs in results.items()}
    answered = [set(run.answers) for runs in answering.values() for run in runs]
    asked = [query for query in queries if all(query["id"] in ids for ids in answered)]
    if not answered or not asked:
        raise ValueError("there are no open queries with answers to judge: raise n_answered")
    prompts, completions = ([query[name] for query in asked] for name in ("prompt", "completion"))
    rows = []
    for first, second in pairs:
        wins = []
        for one, other in zip(answering[first], answering[second], strict=True):
            texts = ([run.answers[query["id"]] for query in asked] for run in (one, other))
            wins.append(judging.win_rates(judge, prompts, completions, *texts, cache=cache))
        won = np.stack(wins)
        measure = statistics.pair_mean(won, np.ones(won.shape, dtype=bool))
        found = statistics.bootstrap_ci(measure, won.shape, rng, resamples)
        rows.append((first, second, *found, *won.shape))
    names = ["first", "second", "estimate", "low", "high", "seeds", "queries"]
    return pd.DataFrame(rows, columns=names)


def as_text(table: pd.DataFrame, margin: float) -> list[str]:
    """Return a sentence for each difference, see `differences`."""
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
