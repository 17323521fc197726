"""Tables for people: what they say is what the matrices say."""

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import UNITS, texts, three_methods
from scipy import stats

from icprobe import data, paths, statistics, views

N, M = 30, 9


@pytest.fixture
def scores() -> views.Scores:
    train, queries = texts(N, "example"), texts(M, "query")
    return views.Scores(train=train, queries=queries, methods=three_methods(N, M), units=UNITS)


def test_a_mean_has_the_interval_of_its_queries(scores):
    table = views.ranking(scores, "gain", task="animals")
    values = scores.methods["gain"][:, [1, 4, 7]]
    expected = stats.ttest_1samp(values, 0, axis=1).confidence_interval()
    np.testing.assert_allclose(table["score"], values.mean(1))
    np.testing.assert_allclose(table["low"], expected.low)
    np.testing.assert_allclose(table["high"], expected.high)
    assert table.index.tolist() == scores.train["id"].tolist()
    assert (table["queries"] == 3).all()
    assert (table["rank"].to_numpy() == stats.rankdata(-values.mean(1))).all()
    assert table[["rank_low", "rank_high"]].isna().all(axis=None)  # of so few queries
    table = views.ranking(scores, "gain")
    assert (table["rank_low"] <= table["rank"]).all()
    assert (table["rank"] <= table["rank_high"]).all()
    assert ((table["rank_low"] >= 1) & (table["rank_high"] <= N)).all()
    quick = views.ranking(scores, "gain", intervals=False)
    ranges = ["rank_low", "rank_high"]
    assert quick[ranges].isna().all(axis=None)
    pd.testing.assert_frame_equal(quick.drop(columns=ranges), table.drop(columns=ranges))


def test_ranks_are_as_sure_as_the_queries_are_alike(scores):
    alike = np.repeat(scores.methods["gain"][:, :1], M, axis=1)
    noise = np.random.default_rng(2).normal(size=(N, M))
    widths = []
    for spread in (0, 0.1, 1):
        methods = {"gain": alike + spread * noise}
        made = views.Scores(
            train=scores.train, queries=scores.queries, methods=methods, units={"gain": "nats"}
        )
        table = views.ranking(made, "gain")
        widths.append((table["rank_high"] - table["rank_low"]).mean())
    assert widths[0] == 0 < widths[1] < widths[2]


def test_a_single_query_has_no_intervals(scores):
    table = views.ranking(scores, "gain", query="query-3")
    np.testing.assert_array_equal(table["score"], scores.methods["gain"][:, 3])
    assert table[["low", "high", "rank_low", "rank_high"]].isna().all(axis=None)


def test_what_was_not_measured_has_no_rank_and_takes_none(scores):
    table = views.ranking(scores, "step")
    assert table["rank"].dropna().sort_values().tolist() == list(range(1, 13))
    assert table.iloc[12:].drop(columns="queries").isna().all(axis=None)
    assert table["queries"].tolist() == [6] * 12 + [0] * 18
    assert table["rank_high"].max() == 12
    assert views.ranking(scores, "step", query="query-0")["score"].isna().all()
    # of this task's three queries, two were measured
    inside = scores.methods["step"][:12, [3, 6]]
    some = views.ranking(scores, "step", task="colours")["score"]
    np.testing.assert_allclose(some.iloc[:12], inside.mean(1))


def test_equal_scores_share_the_better_place():
    values = np.array([[3.0], [1], [np.nan], [3], [0]])
    np.testing.assert_array_equal(views.ranks(values)[:, 0], [1, 3, np.nan, 1, 4])


def test_extremes_are_the_ends_of_the_ranking(scores):
    table = views.extremes(scores, "gain", query="query-2", top=4)
    order = np.argsort(-scores.methods["gain"][:, 2])
    assert table.loc["highest", "id"].tolist() == [f"example-{i}" for i in order[:4]]
    assert table.loc["lowest", "id"].tolist() == [f"example-{i}" for i in order[::-1][:4]]
    others = views.ranking(scores, "cosine", query="query-2")["rank"]
    assert (table["rank by cosine"].to_numpy() == others[table["id"]].to_numpy()).all()
    assert "rank by gain" not in table
    assert table.loc[("highest", 1), "completion"] == f" answer {order[0]}"


def test_no_example_is_at_both_ends(scores):
    table = views.extremes(scores, "step", top=9)
    assert len(table.loc["highest"]) == 9 and len(table.loc["lowest"]) == 3
    assert table["id"].is_unique


def test_a_filter_leaves_ranks_as_they_are(scores):
    table = views.extremes(scores, "gain", among="sums", top=20)
    assert len(table) == 10 and (table["task"] == "sums").all()
    ranked = views.ranking(scores, "gain")["rank"]
    assert (table["rank"].to_numpy() == ranked[table["id"]].to_numpy()).all()


def test_whom_an_example_helps_and_hurts(scores):
    table = views.helped(scores, "example-5", top=M)
    gains, found = scores.methods["gain"][5], table[table["method"] == "gain"]
    helps, hurts = (found.loc[found["end"] == end, "score"].tolist() for end in ("helps", "hurts"))
    assert helps == sorted(gains[gains > 0])[::-1] and hurts == sorted(gains[gains < 0])
    assert found["place"].tolist() == [*range(1, len(helps) + 1), *range(1, len(hurts) + 1)]
    for row in found.itertuples():
        ranked = views.ranking(scores, "gain", query=row.query)
        assert row.rank == ranked.loc["example-5", "rank"]
    step = table[table["method"] == "step"]
    assert (step["ranked"] == 12).all() and len(step) == 6
    assert "step" not in views.helped(scores, "example-20")["method"].tolist()


def test_agreement_is_spearman_over_what_both_measured(scores):
    table = views.agreements(scores).set_index(["first", "second"])
    means = {name: scores.methods[name][:12, 2:8].mean(1) for name in ("gain", "step")}
    found = table.loc[("gain", "step")]
    assert found["estimate"] == pytest.approx(stats.spearmanr(*means.values()).statistic)
    assert found[["examples", "queries"]].tolist() == [12, 6]
    every = table.loc[("gain", "cosine")]
    assert every[["examples", "queries"]].tolist() == [N, M]
    assert every["low"] < every["estimate"] < every["high"]
    assert (found["high"] - found["low"]) > (every["high"] - every["low"])
    alone = views.agreements(scores, query="query-0").set_index(["first", "second"])
    assert alone.loc[("gain", "step"), "examples"] == 0
    assert np.isnan(alone.loc[("gain", "step"), "estimate"])


def test_the_interval_for_one_query_holds_the_truth_as_often_as_it_says():
    # two normal variables of correlation r have Spearman 6 / pi arcsin(r / 2)
    r, draws, n = 0.6, 300, 60
    truth = 6 / np.pi * np.arcsin(r / 2)
    rng = np.random.default_rng(3)
    first = rng.normal(size=(n, draws))
    second = r * first + np.sqrt(1 - r**2) * rng.normal(size=(n, draws))
    made = views.Scores(
        train=texts(n, "example"), queries=texts(draws, "query"),
        methods={"a": first, "b": second}, units={"a": "nats", "b": "nats"},
    )  # fmt: skip
    held = 0
    for query in made.queries["id"]:
        row = views.agreements(made, query=query).iloc[0]
        held += row["low"] <= truth <= row["high"]
    # 300 draws: 95 % within three standard errors, which are 1.26 %
    assert abs(held / draws - 0.95) < 0.038


def test_too_few_examples_have_no_agreement(scores):
    part = np.full((N, M), np.nan)
    part[: statistics.MIN_OBSERVATIONS - 1] = 1.0
    made = views.Scores(
        train=scores.train, queries=scores.queries,
        methods={"gain": scores.methods["gain"], "part": part}, units={"gain": "", "part": ""},
    )  # fmt: skip
    assert views.agreements(made)[["estimate", "low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("largest", "digits"), [(250.0, 0), (99.0, 1), (3.0, 2), (0.5, 3), (4e-4, 6), (0.0, 0)]
)
def test_scores_show_about_three_digits(scores, largest, digits):
    made = views.Scores(
        train=scores.train, queries=scores.queries,
        methods={"a": np.full((N, M), -largest)}, units={"a": "nats"},
    )  # fmt: skip
    assert views.decimals(made, "a") == digits


def test_numbers_carry_their_sign():
    assert [views.number(x, 2) for x in (1.5, -0.25, 0.0, -0.001)] == [
        "+1.50", "−0.25", "0.00", "0.00",
    ]  # fmt: skip


def test_of_data_sets():
    pool = data.load(paths.ROOT / "data" / "demo.jsonl")
    matrix = np.zeros((len(pool), len(pool)), dtype=np.float32)
    made = views.Scores.of(pool, pool, {"gain": matrix}, {"gain": "nats"}, note="made up")
    assert made.shape == matrix.shape and made.note == "made up"
    assert made.train["prompt"].tolist() == pool["prompt"][:]
    with pytest.raises(ValueError, match="queries have no column 'task'"):
        views.Scores.of(pool, pool.remove_columns("task"), {"gain": matrix}, {"gain": "nats"})
    assert isinstance(pool, datasets.Dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {}, "units": {}}, "no methods"),
        ({"units": {}}, "'gain' has no unit"),
        ({"units": {"gain": "nats", "lift": "nats"}}, "a unit for 'lift', but no scores"),
        ({"methods": {"gain": np.zeros((M, N))}}, r"'gain' are \[9, 30\], expected \[30, 9\]"),
        ({"methods": {"gain": np.full((N, M), np.inf)}}, "'gain' have an infinite number"),
        ({"methods": {"gain": np.full((N, M), np.nan)}}, "'gain' has no score of any pair"),
        ({"train": texts(N, "example").assign(id="same")}, "two training examples have the id"),
        ({"queries": texts(M, "query").drop(columns="prompt")}, "queries have no column 'prompt'"),
        ({"queries": texts(0, "query")}, "no queries"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    whole = {
        "train": texts(N, "example"), "queries": texts(M, "query"),
        "methods": {"gain": np.zeros((N, M))}, "units": {"gain": "nats"},
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        views.Scores(**whole | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: views.ranking(s, "product"), "no method 'product', expected one of"),
        (lambda s: views.ranking(s, "gain", query="query-99"), "no query has the id 'query-99'"),
        (lambda s: views.ranking(s, "gain", task="verbs"), "no query has the task 'verbs'"),
        (lambda s: views.ranking(s, "gain", query="query-1", task="sums"), "one of them"),
        (lambda s: views.extremes(s, "gain", among="verbs"), "no training example is of the task"),
        (lambda s: views.extremes(s, "gain", top=0), "top is 0"),
        (lambda s: views.helped(s, "query-1"), "no training example has the id 'query-1'"),
        (lambda s: views.helped(s, "example-1", top=0), "top is 0"),
    ],
)
def test_what_there_is_not_is_an_error(scores, call, message):
    with pytest.raises(ValueError, match=message):
        call(scores)
