"""Tables of agreement against plain loops and made-up truths."""

import datasets
import numpy as np
import pandas as pd
import pytest
from icprobe.correlation import CONDITIONS, Labels
from scipy.stats import kendalltau, spearmanr

from icprobe import correlation, statistics

QUICK = {"resamples": 20}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def labels_of(train, queries):
    """Make labels from "type content" strings; the task is both."""
    frames = []
    for names in (train, queries):
        rows = [(name, *name.split()) for name in names]
        frames.append(pd.DataFrame(rows, columns=["task", "type", "content"]))
    return Labels(*frames)


@pytest.fixture
def crossed():
    """Two types by two contents, 8 training examples and 3 queries each, in turns."""
    tasks = ["ask qasc", "answer qasc", "ask mctaco", "answer mctaco"]
    return labels_of(tasks * 8, tasks * 3)


def test_conditions_by_hand():
    labels = labels_of(["ask qasc", "ask mctaco", "answer qasc", "answer mctaco"], ["ask qasc"])
    assert labels.conditions().ravel().tolist() == [0, 1, 2, 3]
    # what is unknown is neither shared nor different, but a task is shared
    own = Labels(
        pd.DataFrame({"task": ["a", "b"], "type": "unknown", "content": "unknown"}),
        pd.DataFrame({"task": ["a", "a"], "type": "unknown", "content": "unknown"}),
    )
    assert own.conditions().tolist() == [[0, 0], [-1, -1]]
    rows = {"id": ["x"], "prompt": ["p"], "completion": [" c"]}
    one = datasets.Dataset.from_dict({**rows, "task": ["t"], "content": ["c"], "type": ["y"]})
    assert Labels.of(one, one).conditions().tolist() == [[0]]


def test_agreement_by_condition_is_that_of_plain_loops(crossed, rng):
    first = rng.normal(size=(32, 12))
    second = first + rng.normal(size=first.shape)
    second[crossed.conditions() == 3] *= -1  # where nothing is shared, they disagree
    table = correlation.by_condition(first, second, crossed, rng, permutations=99, **QUICK)
    groups, tasks = crossed.conditions(), crossed.queries["task"]
    for k, condition in enumerate(CONDITIONS):
        rhos = [
            spearmanr(*(x[groups[:, j] == k, j] for x in (first, second))).statistic
            for j in range(12)
        ]
        row = table[(table["level"] == "per query") & (table["condition"] == condition)].iloc[0]
        assert row["estimate"] == pytest.approx(np.mean(rhos))
        assert row["low"] <= row["estimate"] <= row["high"]
        assert (row["pairs"], row["ranked"], row["rankings"]) == (96, 8, 12)
        rhos = []
        for task in tasks.unique():
            mine = np.flatnonzero(tasks == task)
            rows = groups[:, mine[0]] == k
            rhos.append(spearmanr(*(x[rows][:, mine].mean(1) for x in (first, second))).statistic)
        row = table[(table["level"] == "per example") & (table["condition"] == condition)].iloc[0]
        assert row["estimate"] == pytest.approx(np.mean(rhos))
        assert row["rankings"] == 4
        one, other = (
            statistics.noise_ceiling(x, x, np.random.default_rng(1), tasks.to_numpy(), groups)
            for x in (first, second)
        )
        expected = np.sqrt(np.maximum(one.first[k], 0) * np.maximum(other.first[k], 0)) or np.nan
        assert row["ceiling"] == pytest.approx(expected, abs=0.1, nan_ok=True)
    by_name = table[table["level"] == "per query"].set_index("condition")
    less = by_name.loc["same task", "estimate"] - by_name.loc["neither", "estimate"]
    assert by_name.loc["same task less neither", "estimate"] == pytest.approx(less)
    assert by_name.loc["same task less neither", "low"] > 0
    assert by_name.loc["same task", "p"] == 0.01 == by_name.loc["neither", "p"]
    assert by_name["p"].isna().tolist() == [False] * 4 + [True] * 3


def test_conditions_that_are_not_there_are_unknown(rng):
    one = labels_of(["ask qasc"] * 8, ["ask qasc"] * 4)
    first, second = rng.normal(size=(2, 8, 4))
    table = correlation.by_condition(first, second, one, rng, permutations=9, **QUICK)
    known = table["condition"] == "same task"
    assert table.loc[known, ["estimate", "p"]].notna().all(axis=None)
    assert table.loc[~known, ["estimate", "low", "high", "p", "ceiling"]].isna().all(axis=None)
    # tasks that are not shared, and nothing known of them
    frame = pd.DataFrame({"task": ["a"] * 8, "type": "unknown", "content": "unknown"})
    nothing = Labels(frame, frame[:4].assign(task="b"))
    table = correlation.by_condition(first, second, nothing, rng, permutations=9, **QUICK)
    assert table[["estimate", "low", "high"]].isna().all(axis=None)


def test_one_task_of_several_types_is_several_sets(rng):
    one = labels_of(["ask qasc", "answer qasc"] * 8, ["ask qasc", "answer qasc"] * 4)
    for frame in (one.train, one.queries):
        frame["task"] = "mine"
    first, second = rng.normal(size=(2, 16, 8))
    table = correlation.by_condition(first, second, one, rng, permutations=9, **QUICK)
    assert table["estimate"].notna().any()


@pytest.mark.parametrize(("N", "M"), [(3, 1), (6, 1), (2, 5)])
def test_a_handful_is_unknown_and_no_error(rng, N, M):
    few = labels_of(["ask qasc"] * N, ["ask qasc"] * M)
    first, second = rng.normal(size=(2, N, M))
    table = correlation.by_condition(first, second, few, rng, permutations=9, **QUICK)
    assert len(table) == 14
    bins, _ = correlation.by_similarity(first, second, first, rng, **QUICK)
    assert len(bins) == 1, "too few for more"
    assert len(correlation.reliabilities({"a": first}, rng)) == 1


def test_cells_are_agreements_of_tasks_with_tasks(crossed, rng):
    first, second = rng.normal(size=(2, 32, 12))
    table = correlation.cells(first, second, crossed)
    train, queries = crossed.train["task"], crossed.queries["task"]
    for row in table.index:
        for column in table.columns:
            pairs = np.ix_(train == row, queries == column)
            a, b = first[pairs], second[pairs]
            rhos = [spearmanr(a[:, j], b[:, j]).statistic for j in range(3)]
            assert table.loc[row, column] == pytest.approx(np.mean(rhos))


def test_agreement_that_grows_with_similarity_has_a_slope(rng):
    similarity = rng.random((60, 10))
    first = rng.normal(size=(60, 10))
    second = similarity * first + (1 - similarity) * rng.normal(size=first.shape)
    bins, (slope, low, high) = correlation.by_similarity(first, second, similarity, rng, 4, **QUICK)
    assert bins["similarity"].is_monotonic_increasing and len(bins) == 4
    assert 0 < low < slope < high
    lowest = similarity.argsort(axis=0).argsort(axis=0) < 15
    rhos = [spearmanr(first[lowest[:, j], j], second[lowest[:, j], j]).statistic for j in range(10)]
    assert bins["estimate"][0] == pytest.approx(np.mean(rhos))


def test_rank_measures_and_their_chance(rng):
    first, second = rng.normal(size=(2, 40, 6)) + rng.normal(size=(40, 1))
    table = correlation.rank_measures(first, second, rng).set_index("quantity")
    means = first.mean(1), second.mean(1)
    assert table.loc["Kendall", "estimate"] == pytest.approx(kendalltau(*means).statistic)
    top = [set(np.argsort(-mean)[:10]) for mean in means]
    row = table.loc["top 10 in common"]
    assert (row["estimate"], row["chance"]) == (len(top[0] & top[1]) / 10, 0.25)


def test_a_table_names_every_pair(rng):
    a, b, c = rng.normal(size=(3, 20, 5))
    levels = {"per example": "example", "per query": "query"}
    table = correlation.agreement_table({"a": a, "b": b}, {"c": c}, levels, rng, **QUICK)
    names = table[["level", "first", "second"]].to_numpy().tolist()
    assert names == [[level, x, "c"] for level in levels for x in "ab"]
    row = table.set_index(["level", "first"]).loc[("per example", "b")]
    assert row["estimate"] == pytest.approx(spearmanr(b.mean(1), c.mean(1)).statistic)


def test_reliabilities_by_method(rng):
    signal = rng.normal(size=(200, 1))
    methods = {
        "sure": signal + 0.1 * rng.normal(size=(200, 10)),
        "noise": rng.normal(size=(200, 10)),
    }
    table = correlation.reliabilities(methods, rng).set_index("method")
    assert table.loc["sure", "low"] > 0.98 and table.loc["noise", "low"] < 0.2


def test_row_norms_are_the_lengths_of_gradients(rng):
    train, queries = rng.normal(size=(30, 6)), rng.normal(size=(9, 6))
    lengths = np.linalg.norm(train, axis=1)
    product = train @ queries.T
    cosine = product / np.outer(lengths, np.linalg.norm(queries, axis=1))
    cosine[3, 2] = product[3, 2] = 0  # nothing can be told from this one
    found = correlation.row_norms(product, cosine)
    np.testing.assert_allclose(found, lengths / np.median(lengths), rtol=0.2)
    np.testing.assert_allclose(found / found[0], lengths / lengths[0], rtol=1e-9)


def test_rivalry_is_the_difference_of_agreements(rng):
    """Truth is a level of each task, which similarities know, and a detail, which they do not."""
    tasks = np.repeat(list("abcd"), 10)
    level, detail = np.repeat(rng.normal(size=(4, 8)), 10, axis=0), rng.normal(size=(40, 8))
    truth = 3 * level + detail
    proxies = {"gain": detail, "product": truth**3, "cosine": truth, "hidden states": level}
    proxies |= {"gain over neutral": detail + level, "words (TF-IDF)": level}
    noise = {"words (TF-IDF)": 9}
    proxies = {k: x + noise.get(k, 0.1) * rng.normal(size=x.shape) for k, x in proxies.items()}
    table = correlation.rivalry(proxies, truth, tasks, rng, 50).set_index("quantity")

    def rho(name, level="query", rows=slice(None)):
        both = proxies[name][rows], truth[rows]
        return statistics.agreement(*both, level)(*map(np.arange, both[0].shape))

    for quantity, expected in {
        "gain less best similarity, per query": rho("gain") - rho("hidden states"),
        "cosine less product, per query": rho("cosine") - rho("product"),
        "gain less product, per example": rho("gain", "example") - rho("product", "example"),
        "cosine less gain, within a task": np.mean(
            [rho("cosine", rows=tasks == t) - rho("gain", rows=tasks == t) for t in "abcd"]
        ),
    }.items():
        assert table.loc[quantity, "estimate"] == pytest.approx(expected)
    assert table.loc["gain less best similarity, per query", "high"] < 0
    assert table.loc["gain less best similarity, within a task", "low"] > 0


def test_weakening_counts_the_differences_above_zero(crossed, rng):
    row = {"pool": "one", "scores": "both", "level": "per query"}
    lows = {"same task": 1, "same task less neither": 0.1, "same task less same type": -0.1}
    lows["same task less same content"] = np.nan
    table = pd.DataFrame([{**row, "condition": k, "low": x} for k, x in lows.items()])
    assert correlation.weakening(table).loc[("one", "both"), "per query"] == "1 of 2"


def test_the_best_of_many_p_values_is_corrected(crossed, rng):
    first, second = rng.normal(size=(2, 32, 12))
    rivals = {"lexical": first}
    one = correlation.Pool(crossed, first, second, second, rivals, {})
    table = correlation.by_condition_and_pool({"a": one, "b": one}, rng, resamples=10)
    tested = table["p"].notna()
    assert tested.sum() == 2 * 2 * 2 * 4  # pools, forms, levels, conditions
    np.testing.assert_allclose(table.loc[tested, "p_holm"], statistics.holm(table["p"][tested]))
    assert table.loc[~tested, "p_holm"].isna().all()


def test_of_two_causes_the_real_one_is_left(rng):
    cause = rng.normal(size=(80, 6)) + 3 * rng.normal(size=(80, 1))
    shadow = cause + 3 * rng.normal(size=(80, 1))
    effect = cause + rng.normal(size=(80, 6))
    table = correlation.competing(effect, {"cause": cause, "shadow": shadow}, rng, 20)
    found = table.set_index(["cause", "given"])["estimate"]
    assert found["cause", "nothing"] > found["cause", "shadow"] > 0.8
    assert found["shadow", "nothing"] > 0.5 > 0.3 > abs(found["shadow", "cause"])


def test_an_agreement_of_answers_is_none_beyond_them(crossed, rng):
    same = (rng.random((32, 12)) < 0.5).astype(float)
    gain, cosine = (2 * same + 0.1 * rng.normal(size=same.shape) for _ in range(2))
    one = correlation.Pool(crossed, gain, cosine, cosine, {"same_completion": same}, {})
    table = correlation.given_the_answer({"a": one}, rng, 20).set_index("given")
    assert table.loc["nothing", "estimate"] > 0.6
    assert abs(table.loc["same completion", "estimate"]) < 0.2
    assert table["sharing"].tolist() == [same.sum()] * 2


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
    highest, lowest, above = correlation.extremes(table)
    assert "0.90 (0.86 to 0.95) (a, same task" in highest and "0.10" in lowest
    assert above == "Of 2 conditions, 1 have an estimate above 0.85, 1 the whole interval."
    assert correlation.extremes(table[3:])[0].startswith("No condition")
