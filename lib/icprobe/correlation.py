"""Where two attribution methods agree, how far they could, and what else would agree as well.

Every function takes finished matrices [N, M] (positive = helps) and returns a table. Intervals are
95 % bootstrap intervals over training examples and queries together, see `statistics`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import datasets
import numpy as np
import pandas as pd
from scipy.stats import rankdata

from icprobe import statistics
from icprobe.methods import icp, registry
from icprobe.methods.gradient import GradientProducts, load_parts
from icprobe.scores import Experiment, load

CONDITIONS = ("same task", "same type", "same content", "neither")

# rivals that are similarities, by their titles in `methods`
SIMILARITIES = ("words (TF-IDF)", "hidden states")

# methods by name, each a matrix [N, M]
Methods = Mapping[str, np.ndarray]

# a level of `statistics`, or one with groups [N, M] to rank within, whose agreements are averaged
Level = str | np.ndarray | tuple[str | np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Labels:
    """What training examples and queries are about.

    Attributes:
        train: N rows with columns task, type and content.
        queries: M rows like them.
    """

    train: pd.DataFrame
    queries: pd.DataFrame

    @classmethod
    def of(cls, pool: datasets.Dataset, queries: datasets.Dataset) -> "Labels":
        """Take the labels of examples (see `data.load`)."""
        columns = ["task", "type", "content"]
        return cls(*(rows.select_columns(columns).to_pandas() for rows in (pool, queries)))

    def same(self, column: str) -> np.ndarray:
        """Return whether pairs share their task, type or content: [N, M] bool."""
        return np.equal.outer(*(frame[column].to_numpy() for frame in (self.train, self.queries)))

    def conditions(self) -> np.ndarray:
        """Return each pair's condition, its place in `CONDITIONS`: whole numbers [N, M].

        "same type" is of another content, "same content" of another type; sharing both counts as
        the same task. Pairs of other tasks whose type or content is unknown have none: -1.
        """
        same_type, same_content = self.same("type"), self.same("content")
        known = ~np.logical_or.outer(
            *((frame[["type", "content"]] == "unknown").any(axis=1).to_numpy()
              for frame in (self.train, self.queries))
        )  # fmt: skip
        same_task = self.same("task") | (known & same_type & same_content)
        conditions = np.select([same_task, same_type, same_content], [0, 1, 2], 3)
        return np.where(same_task | known, conditions, -1)

    @staticmethod
    def kinds(frame: pd.DataFrame) -> np.ndarray:
        """Return one label for each task, type and content: all of a label are in one condition."""
        return (frame["task"] + "\0" + frame["type"] + "\0" + frame["content"]).to_numpy(str)


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
        rng: For the bootstrap.
        given: Covariates [N, M], see `statistics.agreements`.
        resamples: How many.

    Returns:
        One row each: level, first, second, estimate, low, high.
    """
    rows = []
    for name, level in levels.items():
        methods = [*first.values()], [*second.values()]
        measure = _agreements(*methods, level, given)
        numbers = statistics.estimated(measure, methods[0][0].shape, rng, resamples, "fisher")
        rows += [
            (name, a, b, *(x[i, j] for x in numbers))
            for i, a in enumerate(first)
            for j, b in enumerate(second)
        ]
    return pd.DataFrame(rows, columns=["level", "first", "second", "estimate", "low", "high"])


@dataclass(frozen=True)
class Pool:
    """Finished scores of one pool and its queries, all [N, M], and what they are about.

    Attributes:
        labels: Task, type and content.
        gain: From probing, nats.
        product: Gradient dot products, nats per unit of learning rate.
        cosine: The same over both gradients' norms.
        rivals: All registered `methods`, by name.
        parts: Of the products, see `gradient.load_parts`.
    """

    labels: Labels
    gain: np.ndarray
    product: np.ndarray
    cosine: np.ndarray
    rivals: dict[str, np.ndarray]
    parts: dict[str, np.ndarray]

    @classmethod
    def read(
        cls, experiment: Experiment, how_to_make: str, preamble: str = "", **options: str
    ) -> "Pool":
        """Read what notebooks 01 and 02 made; `options` are those of `GradientProducts`.

        Raises:
            scores.ScoresNotFound: If something is not there.
        """
        products = GradientProducts(**options)
        found = load(experiment, products, how_to_make)
        return cls(
            Labels.of(*experiment.load_data()),
            icp.gains(load(experiment, icp.probing(preamble), how_to_make))[0],
            found["gradient_dot"],
            found["gradient_cosine"],
            load(experiment, registry.baselines(), how_to_make),
            load_parts(experiment, products),
        )

    @property
    def forms(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The published forms of both scores, and those that keep most of either."""
        return {
            "ICP score and product": ((self.gain > 0).astype(float), self.product),
            "gain and cosine": (self.gain, self.cosine),
        }


def rank_measures(
    first: np.ndarray, second: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return agreements of row means as ranks: quantity, estimate, low, high, chance, p.

    Spearman (p by permutation), Kendall, and the share that the best and the worst tenth, quarter
    and half have in common.

    Args:
        first: [N, M].
        second: [N, M].
        rng: For the bootstrap and the permutations.
        resamples: How many.
    """
    N = len(first)
    measures = {
        "Spearman": (statistics.agreement(first, second, "example"), 0.0, "fisher"),
        "Kendall": (statistics.kendall(first, second), 0.0, "fisher"),
    }
    for share in (0.1, 0.25, 0.5):
        k = max(1, round(share * N))
        for end in ("top", "bottom"):
            overlap = statistics.overlap(first, second, k, end)
            measures[f"{end} {k} in common"] = (overlap, k / N, "percentile")
    rows = []
    for name, (measure, chance, kind) in measures.items():
        found = statistics.estimated(measure, first.shape, rng, resamples, kind)
        rows.append((name, *map(float, found), chance))
    table = pd.DataFrame(rows, columns=["quantity", "estimate", "low", "high", "chance"])
    table.loc[table["quantity"] == "Spearman", "p"] = statistics.p_value(first, second, rng)
    return table


def reliabilities(methods: Methods, rng: np.random.Generator) -> pd.DataFrame:
    """Return each method's split-half reliability over queries: method, reliability, low, high.

    Intervals are over training examples; see `statistics.noise_ceiling` for why.
    """
    rows = []
    for name, scores in methods.items():
        found = with_ceiling(scores, scores, rng)
        rows.append((name, *(found[f"first{end}"][0] for end in ("", "_low", "_high"))))
    return pd.DataFrame(rows, columns=["method", "reliability", "low", "high"])


def with_ceiling(
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    level: str | np.ndarray = "example",
    groups: np.ndarray | None = None,
    resamples: int = 100,
) -> dict[str, np.ndarray]:
    """Return the fields of `statistics.Ceiling` [G], and their intervals over training examples.

    The ends of an interval have the field's name with _low and _high. Not numbers for one query.
    """
    N, M = first.shape
    if M < 2 and isinstance(level, str):  # one query has no halves
        ends = ("", "_low", "_high")
        names = [one.name for one in fields(statistics.Ceiling)]
        return {f"{name}{end}": np.full(1, np.nan) for name in names for end in ends}
    where = {"level": level, "groups": groups}
    found = vars(statistics.noise_ceiling(first, second, rng, **where))
    resampled = []
    for _ in range(resamples):  # fewer halvings will do: what they add to the spread is little
        rows = rng.integers(N, size=N)
        ceiling = statistics.noise_ceiling(first, second, rng, splits=10, rows=rows, **where)
        resampled.append(vars(ceiling))
    for name in tuple(found):
        both = statistics.ends(found[name], np.array([one[name] for one in resampled]))
        found |= dict(zip((f"{name}_low", f"{name}_high"), both, strict=True))
    return found


def by_condition(
    first: np.ndarray,
    second: np.ndarray,
    labels: Labels,
    rng: np.random.Generator,
    resamples: int = 1000,
    permutations: int = 4999,
) -> pd.DataFrame:
    """Return the agreement within each similarity condition, and the differences from the first.

    Each ranking is of the training examples in one condition with one query ("per query"), or with
    the queries of one task by their mean ("per example", the published aggregation where pool and
    queries are chosen to meet the condition).

    Args:
        first: [N, M].
        second: [N, M].
        labels: Of the N training examples and M queries.
        rng: For the bootstrap, the halvings and the permutations.
        resamples: Of the bootstrap.
        permutations: Permutations for the p-values; 0 for none.

    Returns:
        One row per level and condition, then per level and difference ("same task less neither"):
        level, condition, estimate, low, high (differences as in `statistics.contrasts`); of
        conditions also pairs, ranked (training examples
        in a ranking, the median), rankings (that could be made), p (null hypothesis: the methods
        agree on tasks at most), and per example the fields of `with_ceiling`. What there is none of
        is not a number.
    """
    groups = labels.conditions()
    sets = labels.kinds(labels.queries)
    several = pd.Series(sets).value_counts().min() > 1
    names = [*CONDITIONS, *(f"{CONDITIONS[0]} less {other}" for other in CONDITIONS[1:])]
    kinds = np.array(["fisher"] * 4 + ["normal"] * 3)
    in_condition = np.array([(groups == k).sum(0) for k in range(len(CONDITIONS))])  # [4, M]
    frames = []
    for name, level in (("per query", "query"), ("per example", sets)):
        frame = pd.DataFrame({"level": name, "condition": names})
        measure = statistics.contrasts(first, second, level, groups, len(CONDITIONS))
        numbers = statistics.estimated(measure, first.shape, rng, resamples, kinds)
        frame = frame.assign(**dict(zip(("estimate", "low", "high"), numbers, strict=True)))
        of_conditions = {
            "pairs": in_condition.sum(1),
            "ranked": [np.median(row[row > 0]) if row.any() else 0 for row in in_condition],
            "rankings": statistics.rankings(first, second, level, groups),
        }
        if permutations:
            options = {"level": level, "groups": groups, "permutations": permutations}
            rows = labels.kinds(labels.train)
            of_conditions["p"] = statistics.p_values_within(first, second, rows, rng, **options)
        if name == "per example" and several:
            found = with_ceiling(first, second, rng, level, groups)
            of_conditions |= {
                key: found[key] for key in found if key.startswith(("ceiling", "disattenuated"))
            }
        for key, values in of_conditions.items():
            frame[key] = pd.Series(values)  # differences, and conditions without pairs, have none
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def by_condition_and_pool(
    pools: Mapping[str, Pool], rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return `by_condition` of every pool's two `Pool.forms`, with columns pool and scores.

    Its p-values with Holm's correction for their number stand in p_holm.
    """
    found = [
        by_condition(*pair, pool.labels, rng, resamples).assign(pool=name, scores=scores)
        for name, pool in pools.items()
        for scores, pair in pool.forms.items()
    ]
    table = pd.concat(found, ignore_index=True)
    tested = table["p"].notna()
    table.loc[tested, "p_holm"] = statistics.holm(table.loc[tested, "p"])
    return table


def weakening(conditions: pd.DataFrame) -> pd.DataFrame:
    """Return where the agreement is measurably higher in the same task than elsewhere (claim C2).

    Args:
        conditions: See `by_condition_and_pool`.

    Returns:
        Rows are pools and scores, columns the levels: "2 of 3" says that two of the three
        differences have an interval above zero.
    """
    differences = conditions[~conditions["condition"].isin(CONDITIONS)].dropna(subset="low")
    counted = {"values": "above", "aggfunc": lambda above: f"{above.sum()} of {len(above)}"}
    above = differences.assign(above=differences["low"] > 0)
    return above.pivot_table(index=["pool", "scores"], columns="level", sort=False, **counted)


def cells(first: np.ndarray, second: np.ndarray, labels: Labels) -> pd.DataFrame:
    """Return the mean per-query agreement by task of the training example (row) and of the query.

    Args:
        first: [N, M].
        second: [N, M].
        labels: Of the N training examples and M queries.
    """
    train, queries = labels.train["task"].to_numpy(), labels.queries["task"].to_numpy()
    rows, groups = pd.unique(train), of_tasks(train, len(queries))
    measure = statistics.agreements([first], [second], "query", groups)
    all_rows = np.arange(len(train))
    columns = {
        task: measure(all_rows, np.flatnonzero(queries == task))[:, 0, 0]
        for task in pd.unique(queries)
    }
    return pd.DataFrame(columns, index=rows)


def by_similarity(
    first: np.ndarray,
    second: np.ndarray,
    similarity: np.ndarray,
    rng: np.random.Generator,
    bins: int = 5,
    resamples: int = 1000,
) -> tuple[pd.DataFrame, tuple[float, float, float]]:
    """Return the per-query agreement among training examples that are about equally similar.

    Each query's training examples are cut into bins of equal size by their similarity to it.

    Args:
        first: [N, M].
        second: [N, M].
        similarity: [N, M].
        rng: For the bootstrap.
        bins: How many, fewer in a pool too small for so many.
        resamples: How many.

    Returns:
        One row per bin: similarity (mean), estimate, low, high; and the slope of a line through
        the bins (agreement per bin) with its interval.
    """
    bins = max(1, min(bins, len(first) // statistics.LEAST))
    groups = ((rankdata(similarity, axis=0, method="ordinal") - 1) * bins // len(first)).astype(int)
    measure = statistics.agreements([first], [second], "query", groups, count=bins)
    kinds = np.array(["fisher"] * bins + ["normal"])

    def with_slope(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        values = measure(rows, columns)[:, 0, 0]
        known = np.isfinite(values)
        slope = (
            np.polyfit(np.arange(bins)[known], values[known], 1)[0] if known.sum() > 1 else np.nan
        )
        return np.append(values, slope)

    estimate, low, high = statistics.estimated(with_slope, first.shape, rng, resamples, kinds)
    frame = pd.DataFrame({"similarity": [_mean(similarity[groups == k]) for k in range(bins)]})
    frame = frame.assign(estimate=estimate[:-1], low=low[:-1], high=high[:-1])
    return frame, (estimate[-1], low[-1], high[-1])


def competing(
    effect: np.ndarray, causes: Methods, rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return how an effect's row means go with each of two causes', alone and given the other.

    Args:
        effect: [N, M].
        causes: Two matrices [N, M] by name.
        rng: For the bootstrap.
        resamples: How many.

    Returns:
        One row each: cause, given, estimate, low, high.
    """
    rows = []
    for cause, other in (tuple(causes), tuple(causes)[::-1]):
        for given in ([], [other]):
            covariates = [causes[name] for name in given]
            measure = statistics.agreement(effect, causes[cause], "example", given=covariates)
            numbers = statistics.estimated(measure, effect.shape, rng, resamples, "fisher")
            rows.append((cause, *(given or ["nothing"]), *map(float, numbers)))
    return pd.DataFrame(rows, columns=["cause", "given", "estimate", "low", "high"])


def given_the_answer(
    pools: Mapping[str, Pool], rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return how far gain and cosine agree, and do so beyond sharing the query's completion.

    Returns:
        One row each: pool, given ("nothing" or "same completion"), estimate, low, high (per query),
        sharing (pairs that share it).
    """
    rows = []
    for name, pool in pools.items():
        same = pool.rivals["same_completion"]
        for given, covariates in (("nothing", []), ("same completion", [same])):
            measure = statistics.agreement(pool.gain, pool.cosine, "query", given=covariates)
            numbers = statistics.estimated(measure, same.shape, rng, resamples, "fisher")
            rows.append((name, given, *map(float, numbers), int(same.sum())))
    return pd.DataFrame(rows, columns=["pool", "given", "estimate", "low", "high", "sharing"])


def extremes(conditions: pd.DataFrame, threshold: float = 0.85) -> list[str]:
    """Return sentences on the best and the worst condition, and on those above a threshold.

    Args:
        conditions: See `by_condition_and_pool`.
        threshold: The summary of the paper that has such a correlation says 0.85.
    """
    known = conditions[conditions["condition"].isin(CONDITIONS)].dropna(subset="estimate")
    if known.empty:
        return ["No condition has enough pairs for an agreement."]
    known = known.sort_values("estimate")
    lines = []
    for end, row in (("highest", known.iloc[-1]), ("lowest", known.iloc[0])):
        where = ", ".join(row[["pool", "condition", "level", "scores"]])
        interval = f"{row['estimate']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        lines.append(f"The {end} agreement within a condition: {interval} ({where}).")
    above, sure = (known["estimate"] > threshold).sum(), (known["low"] > threshold).sum()
    lines.append(
        f"Of {len(known)} conditions, {above} have an estimate above {threshold}, {sure} the whole "
        "interval."
    )
    return lines


def rivalry(
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
        rng: For the bootstrap.
        resamples: How many.
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
        estimate, low, high = statistics.estimated(less, truth.shape, rng, resamples, "normal")
        quantities = [f"{one} less {other}, {level}" for one, other in pairs[level]]
        frame = pd.DataFrame({"quantity": quantities, "unit": "Spearman"})
        frames.append(frame.assign(estimate=estimate, low=low, high=high, n=len(truth)))
    return pd.concat(frames, ignore_index=True)


def _differences(
    measure: statistics.Measure, names: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> statistics.Measure:
    """Return the measure of pairs' differences, from that of the names and two similarities."""

    def measured(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        *rho, words, states = measure(rows, columns)[:, 0]
        found = {**dict(zip(names, rho, strict=True)), "best similarity": np.fmax(words, states)}
        return np.array([found[one] - found[other] for one, other in pairs])

    return measured


def levels_of_truth(tasks: Sequence[str], M: int) -> dict[str, Level]:
    """Return the levels at which methods are held against the truth.

    To agree "per query" it is enough to tell which tasks help a query; "within a task", each query
    ranks the training examples of one task alone.

    Args:
        tasks: [N] of the training examples.
        M: Number of queries.
    """
    within = "query", of_tasks(tasks, M)
    return {"per query": "query", "within a task": within, "per example": "example"}


def of_tasks(tasks: Sequence[str], M: int) -> np.ndarray:
    """Return groups [N, M] of pairs whose training examples have the same task."""
    return np.repeat(pd.factorize(np.asarray(tasks))[0][:, None], M, axis=1)


def row_norms(product: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Return the length of each training example's gradient, up to a factor they share: [N].

    A product is the cosine times both lengths, so a row's product over cosine is its length times
    each query's; queries whose cosine is too small to divide by are left out by the median.

    Args:
        product: [N, M] gradient dot products.
        cosine: [N, M] their cosines.
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
    forms = {
        "ICP score and product": ("ICP score", "product"),
        "gain and cosine": ("gain", "cosine"),
    }
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
) -> statistics.Measure:
    """Return the measure of agreements [A, B]; groups are averaged where they are known."""
    level, groups = level if isinstance(level, tuple) else (level, None)
    measure = statistics.agreements(first, second, level, groups, given)

    def averaged(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        values = measure(rows, columns)
        known = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            return np.where(known, values, 0).sum(0) / known.sum(0)

    return averaged


def _mean(values: np.ndarray) -> float:
    """Return the mean, not a number for none."""
    return float(values.mean()) if len(values) else np.nan
