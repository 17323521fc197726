"""What training examples and queries are about, and agreement by how much of it they share.

Every function takes finished matrices [N, M] (positive = helps) and returns a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from icprobe.statistics.bootstrap import with_intervals
from icprobe.statistics.inference import p_values_within, with_ceiling
from icprobe.statistics.measures import agreements, by_set, contrasts

CONDITIONS = ("same task", "same type", "same content", "neither")


@dataclass(frozen=True)
class Labels:
    """What training examples and queries are about: N and M rows with task, type and content."""

    train: pd.DataFrame
    queries: pd.DataFrame

    @classmethod
    def of(cls, pool: Mapping, queries: Mapping) -> "Labels":
        """Take the labels of data sets or other mappings that have these columns."""
        columns = ("task", "type", "content")
        return cls(*(pd.DataFrame({k: list(rows[k]) for k in columns}) for rows in (pool, queries)))

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


@dataclass(frozen=True)
class Pool:
    """Finished scores of one pool and its queries, all [N, M], and what they are about."""

    labels: Labels
    gain: np.ndarray  # from probing, nats
    product: np.ndarray  # of gradients, nats per unit of learning rate
    cosine: np.ndarray  # of gradients
    baselines: dict[str, np.ndarray]  # what else scores pairs, by name
    parts: dict[str, np.ndarray]  # products of some layers only, by name

    @property
    def forms(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The published forms of both scores, and those that keep most of either."""
        return {
            "ICP score and product": ((self.gain > 0).astype(float), self.product),
            "gain and cosine": (self.gain, self.cosine),
        }


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

    One row per level and condition or difference ("same task less neither"): level, condition,
    estimate, low, high (see `contrasts`); of conditions also pairs, ranked (training examples in a
    ranking, the median), rankings (that could be made), p (`p_values_within` tasks), and per
    example `with_ceiling`. What there is none of is not a number.
    """
    groups = labels.conditions()
    tasks, sets = labels.kinds(labels.train), labels.kinds(labels.queries)
    names = [*CONDITIONS, *(f"{CONDITIONS[0]} less {other}" for other in CONDITIONS[1:])]
    kinds = np.repeat(["fisher", "normal"], [len(CONDITIONS), len(CONDITIONS) - 1])
    in_condition = np.array([(groups == k).sum(0) for k in range(len(CONDITIONS))])  # [4, M]
    pairs = in_condition.sum(1)
    ranked = [np.median(row[row > 0]) if row.any() else 0 for row in in_condition]
    frames = []
    for name, level in (("per query", "query"), ("per example", sets)):
        of_sets = by_set([first], [second], level, groups, count=len(CONDITIONS))
        frame = pd.DataFrame({"level": name, "condition": names})
        frame = with_intervals(frame, contrasts(of_sets), first.shape, rng, resamples, kinds)
        known = np.isfinite(of_sets(*map(np.arange, first.shape))[0]).sum((1, 2, 3))
        rankings = np.where(pairs > 0, known, np.nan)
        of_conditions = pd.DataFrame({"pairs": pairs, "ranked": ranked, "rankings": rankings})
        p = p_values_within(first, second, tasks, rng, level, groups, permutations)
        of_conditions["p"] = pd.Series(p)  # the last conditions may have no pairs
        if name == "per example":
            ceiling = with_ceiling(first, second, rng, level, groups)
            of_conditions = of_conditions.join(ceiling.filter(regex="ceiling|disattenuated"))
        frames.append(frame.join(of_conditions))
    return pd.concat(frames, ignore_index=True)


def by_condition_and_pool(
    pools: Mapping[str, Pool], rng: np.random.Generator, resamples: int = 1000
) -> pd.DataFrame:
    """Return `by_condition` of every pool's forms: also pool, scores and p_holm (Holm's p)."""
    found = [
        by_condition(*pair, pool.labels, rng, resamples).assign(pool=name, scores=scores)
        for name, pool in pools.items()
        for scores, pair in pool.forms.items()
    ]
    table = pd.concat(found, ignore_index=True)
    tested = table["p"].notna()
    table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    return table


def condition_contrasts(conditions: pd.DataFrame) -> pd.DataFrame:
    """Return where the agreement is measurably higher in the same task than elsewhere (claim C2).

    Rows are pools and scores, columns the levels: "2 of 3" differences have an interval above zero.
    """
    differences = conditions[~conditions["condition"].isin(CONDITIONS)].dropna(subset="low")
    counted = {"values": "above", "aggfunc": lambda above: f"{above.sum()} of {len(above)}"}
    above = differences.assign(above=differences["low"] > 0)
    return above.pivot_table(index=["pool", "scores"], columns="level", sort=False, **counted)


def extremes(conditions: pd.DataFrame, threshold: float = 0.85) -> list[str]:
    """Return sentences on the best and the worst condition, and on those above a threshold.

    A summary of the paper says 0.85.
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


def agreement_by_task(first: np.ndarray, second: np.ndarray, labels: Labels) -> pd.DataFrame:
    """Return the mean agreement per query, by task of the training example (row) and query."""
    train, queries = labels.train["task"].to_numpy(), labels.queries["task"].to_numpy()
    measure = agreements([first], [second], "query", of_tasks(train, len(queries)))
    columns = {
        task: measure(np.arange(len(train)), np.flatnonzero(queries == task))[:, 0, 0]
        for task in pd.unique(queries)
    }
    return pd.DataFrame(columns, index=pd.unique(train))


def of_tasks(tasks: Sequence[str], M: int) -> np.ndarray:
    """Return groups [N, M] of pairs whose training examples have the same task."""
    return np.repeat(pd.factorize(np.asarray(tasks))[0][:, None], M, axis=1)
