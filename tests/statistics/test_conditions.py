"""Agreement by condition against plain loops and made-up truths."""

import numpy as np
import pandas as pd
import pytest
from sampled import labels_of, mean_rho
from scipy.stats import spearmanr
from statsmodels.stats.multitest import multipletests

from icprobe.statistics import conditions, correlation
from icprobe.statistics.conditions import CONDITIONS, Labels, Pool
from icprobe.statistics.inference import noise_ceiling

QUICK = {"resamples": 20, "permutations": 9}


def test_conditions_by_hand():
    labels = labels_of(["ask qasc", "ask mctaco", "answer qasc", "answer mctaco"], ["ask qasc"])
    assert labels.conditions().ravel().tolist() == [0, 1, 2, 3]
    # what is unknown is neither shared nor different, but a task is shared
    own = Labels(
        pd.DataFrame({"task": ["a", "b"], "type": "unknown", "content": "unknown"}),
        pd.DataFrame({"task": ["a", "a"], "type": "unknown", "content": "unknown"}),
    )
    assert own.conditions().tolist() == [[0, 0], [-1, -1]]


def test_agreement_by_condition_is_that_of_plain_loops(crossed, rng):
    first = rng.normal(size=(32, 12))
    second = first + rng.normal(size=first.shape)
    second[crossed.conditions() == 3] *= -1  # where nothing is shared, they disagree
    table = conditions.by_condition(first, second, crossed, rng, 20, 99)
    rows = table.set_index(["level", "condition"])
    groups, tasks = crossed.conditions(), crossed.queries["task"].to_numpy()
    for level, sets, count in (("per query", np.arange(12), 12), ("per example", tasks, 4)):
        for k, condition in enumerate(CONDITIONS):
            rhos = []
            for one in np.unique(sets):
                mine = np.ix_(groups[:, sets == one][:, 0] == k, sets == one)
                rhos.append(spearmanr(*(x[mine].mean(1) for x in (first, second))).statistic)
            row = rows.loc[level, condition]
            assert row["estimate"] == pytest.approx(np.mean(rhos))
            assert row["low"] <= row["estimate"] <= row["high"]
            assert (row["pairs"], row["ranked"], row["rankings"]) == (96, 8, count)
    ceiling = noise_ceiling(first, second, np.random.default_rng(1), tasks, groups)[1]
    found = rows.loc["per example"].loc[list(CONDITIONS), "ceiling"]
    np.testing.assert_allclose(found, ceiling, atol=0.1)
    by_name = rows.loc["per query"]
    less = by_name.loc["same task", "estimate"] - by_name.loc["neither", "estimate"]
    assert by_name.loc["same task less neither", "estimate"] == pytest.approx(less)
    assert by_name.loc["same task less neither", "low"] > 0
    assert by_name.loc["same task", "p"] == 0.01 == by_name.loc["neither", "p"]
    assert by_name["p"].isna().tolist() == [False] * 4 + [True] * 3


def test_conditions_that_are_not_there_are_unknown(rng):
    one = labels_of(["ask qasc"] * 8, ["ask qasc"] * 4)
    first, second = rng.normal(size=(2, 8, 4))
    table = conditions.by_condition(first, second, one, rng, **QUICK)
    known = table["condition"] == "same task"
    assert table.loc[known, ["estimate", "p"]].notna().all(axis=None)
    assert table.loc[~known, ["estimate", "low", "high", "p", "ceiling"]].isna().all(axis=None)
    # one task of several types is several sets
    one = labels_of(["ask qasc", "answer qasc"] * 4, ["ask qasc", "answer qasc"] * 2)
    for frame in (one.train, one.queries):
        frame["task"] = "mine"
    table = conditions.by_condition(first, second, one, rng, **QUICK)
    assert table["estimate"].notna().any()
    # tasks that are not shared, and nothing known of them
    frame = pd.DataFrame({"task": ["a"] * 8, "type": "unknown", "content": "unknown"})
    nothing = Labels(frame, frame[:4].assign(task="b"))
    table = conditions.by_condition(first, second, nothing, rng, **QUICK)
    assert table[["estimate", "low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize(("N", "M"), [(3, 1), (6, 1), (2, 5)])
def test_a_handful_is_unknown_and_no_error(rng, N, M):
    few = labels_of(["ask qasc"] * N, ["ask qasc"] * M)
    first, second = rng.normal(size=(2, N, M))
    table = conditions.by_condition(first, second, few, rng, **QUICK)
    assert len(table) == 14
    bins, _ = correlation.by_similarity(first, second, first, rng, resamples=20)
    assert len(bins) == 1, "too few for more"
    assert len(correlation.reliabilities({"a": first}, rng)) == 1


def test_agreement_by_task_is_that_of_tasks_with_tasks(crossed, rng):
    first, second = rng.normal(size=(2, 32, 12))
    table = conditions.agreement_by_task(first, second, crossed)
    train, queries = crossed.train["task"], crossed.queries["task"]
    for row in table.index:
        for column in table.columns:
            pairs = np.ix_(train == row, queries == column)
            assert table.loc[row, column] == pytest.approx(mean_rho(first[pairs], second[pairs]))


def test_contrasts_count_the_differences_above_zero():
    row = {"pool": "one", "scores": "both", "level": "per query"}
    lows = {"same task": 1, "same task less neither": 0.1, "same task less same type": -0.1}
    lows["same task less same content"] = np.nan
    table = pd.DataFrame([{**row, "condition": k, "low": x} for k, x in lows.items()])
    assert conditions.condition_contrasts(table).loc[("one", "both"), "per query"] == "1 of 2"


def test_the_best_of_many_p_values_is_corrected(crossed, rng):
    first, second = rng.normal(size=(2, 32, 12))
    one = Pool(crossed, first, second, second, {}, {})
    table = conditions.by_condition_and_pool({"a": one, "b": one}, rng, resamples=10)
    tested = table["p"].notna()
    expected = multipletests(table["p"][tested], method="holm")[1]
    assert tested.sum() == 2 * 2 * 2 * 4  # pools, forms, levels, conditions
    np.testing.assert_allclose(table.loc[tested, "p_holm"], expected)
    assert table.loc[~tested, "p_holm"].isna().all()


def test_sentences_on_extremes_leave_out_differences():
    table = pd.DataFrame(
        [
            ("per query", "same task", 0.9, 0.86, 0.95),
            ("per query", "neither", 0.1, 0.0, 0.2),
            ("per query", "same task less neither", 0.95, 0.9, 0.99),
            ("per query", "same type", *[np.nan] * 3),
        ],
        columns=["level", "condition", "estimate", "low", "high"],
    ).assign(pool="a", scores="b")
    highest, lowest, above = conditions.extremes(table)
    assert "0.90 (0.86 to 0.95) (a, same task" in highest and "0.10" in lowest
    assert above.startswith("Of 2 conditions, 1 ")
    assert len(conditions.extremes(table[3:])) == 1
