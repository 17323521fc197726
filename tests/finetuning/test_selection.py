"""Selections against brute force, their budgets, and files that come back."""

from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
from helpers import ATOL, RTOL
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from icprobe import data
from icprobe.finetuning import selection
from icprobe.finetuning.selection import Budget

seeds = st.integers(0, 2**32 - 1)
several_runs = settings(max_examples=150, deadline=None)

IDS = [f"r{k}" for k in range(20)]
POOL = datasets.Dataset.from_dict({"id": IDS, "prompt": [f"p{k}" for k in range(20)]})


def of_ids(ids):
    return pd.DataFrame(np.ones((len(ids), 2)), index=ids)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tokens(rng):
    return rng.integers(5, 200, size=90)


@pytest.fixture
def methods(rng):
    """Two methods that tell all examples apart, and one with many ties."""
    first, second, tied = rng.normal(size=90), rng.normal(size=90), rng.integers(4, size=90)
    return {"first": first, "second": second, "tied": tied.astype(float)}


@pytest.mark.parametrize("columns", [None, [3], [4, 0, 2], np.array([1, 1, 2])])
def test_values_are_means_over_the_queries_that_may_select(rng, columns):
    scores = rng.normal(size=(9, 5))
    chosen = range(5) if columns is None else columns
    expected = [np.mean([scores[i, j] for j in chosen]) for i in range(9)]
    assert selection.values(scores, 9, columns) == pytest.approx(expected)


@pytest.mark.parametrize("M", [3, 7, 11, 48])
def test_ties_of_whole_numbers_stay_ties(rng, M):
    helps = rng.random((60, M)) < 0.7
    found = selection.values(helps.astype(float), 60)
    assert len(np.unique(found)) == len(np.unique(helps.sum(1))) < 60


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_named_where_they_count(bad):
    scores = np.zeros((6, 4))
    scores[2, 1] = bad
    assert not selection.values(scores, 6, [0, 2, 3]).any()
    with pytest.raises(ValueError, match="row 2 and query 1"):
        selection.values(scores, 6, [3, 1])


@several_runs
@given(
    values=st.lists(st.integers(-2, 2), min_size=1, max_size=30),
    share=st.floats(0.01, 1),
    seed=seeds,
)
def test_a_lower_value_never_comes_before_a_higher(values, share, seed):
    values = np.array(values) / 3
    rows = selection.best(values, np.ones(len(values)), Budget(share), np.random.default_rng(seed))
    assert len(rows) == max(1, round(share * len(values)))
    assert (np.diff(rows) > 0).all()
    left = np.delete(values, rows)
    assert not len(left) or values[rows].min() >= left.max()


def test_ties_are_broken_at_random(rng):
    values = np.array([0.0, 2, 1, 1, 1, 0])
    runs = 2000
    counts = Counter(
        row
        for _ in range(runs)
        for row in selection.best(values, np.ones(6), Budget(0.5), rng).tolist()
    )
    assert counts[1] == runs
    assert not counts[0] and not counts[5]
    for row in (2, 3, 4):
        assert counts[row] / runs == pytest.approx(2 / 3, abs=0.045)  # four standard errors


@several_runs
@given(
    examples=st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 50)), min_size=1, max_size=30),
    share=st.floats(0.05, 1),
    seed=seeds,
)
def test_a_budget_of_tokens_is_never_exceeded_and_nearly_used_up(examples, share, seed):
    values, tokens = (np.array(column) for column in zip(*examples, strict=True))
    room = share * tokens.sum()
    arguments = values, tokens, Budget(share, "tokens"), np.random.default_rng(seed)
    if tokens.min() > room:
        with pytest.raises(ValueError, match=f"shortest.* {tokens.min()}"):
            selection.best(*arguments)
        return
    rows = selection.best(*arguments)
    over = room - tokens[rows].sum()
    assert over >= -1e-9
    assert (np.delete(tokens, rows) > over - 1e-9).all()  # no other one fits
    assert values[rows].max() == values[tokens <= room].max()


def taken_in_turn(scores, k, rng):
    """Go round the queries, in a new order each time: the plain way."""
    ties = np.array([rng.random(len(scores)) for _ in scores.T]).T
    left, chosen = set(range(len(scores))), []
    while len(chosen) < k:
        for j in rng.permutation(scores.shape[1]):
            if left:
                chosen.append(max(left, key=lambda i: (scores[i, j], ties[i, j])))
                left.remove(chosen[-1])
    return sorted(chosen[:k])


@pytest.mark.parametrize("M", [1, 2, 7, 40])
@pytest.mark.parametrize("share", [0.01, 0.3, 1])
def test_queries_choose_in_turn_what_is_left(rng, M, share):
    scores = rng.integers(5, size=(30, M)).astype(float)
    for seed in range(5):
        found = selection.in_turn(scores, np.ones(30), Budget(share), np.random.default_rng(seed))
        expected = taken_in_turn(scores, max(1, round(share * 30)), np.random.default_rng(seed))
        assert found.tolist() == expected


@pytest.mark.parametrize("size", [1, 9, 45, 100])
def test_a_matched_choice_has_as_many_of_each_length(rng, size):
    tokens = rng.permutation(np.arange(100)) + 7  # all different, so that the parts are known
    part = (tokens - 7) * selection.LENGTH_BINS // 100
    rows = rng.permutation(100)[:size]
    found = selection.length_matched(rows, tokens, rng)
    assert (np.diff(found) > 0).all()
    assert Counter(part[found].tolist()) == Counter(part[rows].tolist())
    # its tokens are between those of the shortest and the longest of these parts
    shortest, longest = (sum(f(tokens[part == part[i]]) for i in rows) for f in (min, max))
    assert shortest <= tokens[found].sum() <= longest


def chosen(methods, tokens, contrasted, seed=0, turns=None, lengths=None):
    lengths = tokens if lengths is None else lengths
    return selection.choose(methods, contrasted, turns or {}, tokens, lengths, Budget(0.2), seed)


def rows_of(selections):
    return {name: rows.tolist() for name, rows in selections.items()}


def test_choose_names_all_selections(methods, tokens):
    found = chosen(methods, tokens, ["first", "tied"])
    assert list(found) == [
        "full pool", "random", "first, top", "second, top", "tied, top", "first, bottom",
        "tied, bottom", "random, as long as first", "random, as long as tied",
    ]  # fmt: skip
    assert found.pop("full pool").tolist() == list(range(90))
    assert {len(rows) for rows in found.values()} == {18}
    worst = sorted(range(90), key=lambda i: methods["first"][i])[:18]
    assert found["first, bottom"].tolist() == sorted(worst)
    others = np.setdiff1d(np.arange(90), found["tied, bottom"])
    assert methods["tied"][found["tied, bottom"]].max() <= methods["tied"][others].min()


def test_each_selection_has_a_stream_of_its_own(methods, tokens):
    every = rows_of(chosen(methods, tokens, methods, turns={"first": np.eye(90, 3)}))
    assert len(every["first, in turn"]) == 18
    for left_out in methods:
        fewer = {name: x for name, x in methods.items() if name != left_out}
        for contrasted in (fewer, []):
            found = rows_of(chosen(fewer, tokens, contrasted))
            assert found.items() <= every.items()
            assert not any(left_out in name for name in found)


def test_another_seed_changes_what_is_random_and_nothing_else(methods, tokens):
    one, again, other = (rows_of(chosen(methods, tokens, methods, seed=s)) for s in (0, 0, 1))
    certain = [f"{name}, {end}" for name in ("first", "second") for end in ("top", "bottom")]
    assert {name for name in one if one[name] == other[name]} == {"full pool", *certain}
    assert one == again


def test_selections_are_reproducible():
    # a change of these rows means other selections, and all trainings anew
    found = rows_of(chosen({"tied": np.arange(20) % 3}, np.arange(20) % 7, ["tied"], seed=3))
    assert found == {
        "full pool": list(range(20)),
        "random": [1, 6, 18, 19],
        "tied, top": [2, 5, 8, 14],
        "tied, bottom": [0, 3, 6, 18],
        "random, as long as tied": [0, 2, 14, 18],
    }


def test_lengths_of_what_is_learnt_are_matched(methods, tokens, rng):
    name, learnt = "random, as long as first", rng.permutation(90)
    of_all, of_learnt, again = (
        rows_of(chosen(methods, *lengths, ["first"], lengths=other))
        for lengths, other in (((tokens,), None), ((tokens,), learnt), ((learnt,), None))
    )
    assert of_all.pop(name) != of_learnt[name] == again[name]
    assert of_all.items() <= of_learnt.items()


@several_runs
@given(n=st.integers(1, 20), seed=seeds)
def test_selected_are_the_best_means_best_first(n, seed):
    scores = np.random.default_rng(seed).integers(3, size=(20, 4)).astype(float)
    found = selection.select(POOL, scores, n, columns=[3, 1])
    means = (scores[:, 1] + scores[:, 3]) / 2
    assert found["score"][:] == sorted(means, reverse=True)[:n]
    assert [means[IDS.index(name)] for name in found["id"]] == found["score"][:]
    assert len(set(found["id"])) == n


def test_what_is_selected_has_the_pools_columns_and_is_the_same_each_time():
    scores = of_ids(IDS)
    found = selection.select(POOL, scores, fraction=0.25)
    assert found.column_names == ["id", "prompt", "score"] and len(found) == 5
    assert found.to_list() == selection.select(POOL, scores, n=5).to_list()
    assert all(row["prompt"][1:] == row["id"][1:] for row in found)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "n is None and fraction is None"),
        ({"n": 1, "fraction": 0.5}, "n is 1 and fraction is 0.5"),
        *(({"n": n}, f"n is {n}.* to 20") for n in (0, 21, 1.0)),
        *(({"fraction": fraction}, f"fraction is {fraction}") for fraction in (0, 2.0)),
        ({"n": 1, "scores": np.ones((5, 4))}, r"\(5, 4\), expected \[20, M\]"),
        ({"n": 1, "scores": np.ones(20)}, r"\(20,\), expected \[20, M\]"),
        ({"n": 1, "columns": [0, 2]}, r"\[0, 2\], expected .* 0 to 1"),
        ({"n": 1, "columns": [-1, 1]}, r"columns are \[-1, 1\]"),
        ({"n": 1, "columns": []}, r"columns are \[\]"),
        ({"n": 1, "scores": of_ids([*IDS[:3], *IDS[:2:-1]])}, "row 3 .*'r19'.*'r3'"),
        ({"n": 1, "scores": of_ids(IDS[:19])}, "row 19 .*None.*'r19'"),
        ({"n": 1, "scores": of_ids([*IDS, "x"])}, "row 20 .*'x'.*None"),
    ],
)
def test_what_cannot_be_selected_is_named(asked, said):
    with pytest.raises(ValueError, match=said):
        selection.select(POOL, **{"scores": np.ones((20, 2)), **asked})


def test_overlaps_by_hand():
    selections = {"all": np.arange(4), "two": np.array([0, 3]), "one": np.array([1])}
    found = selection.overlaps(selections, {"two": [0, 3], "last": [1, 2, 3]})
    assert list(found.index) == list(selections) and list(found) == ["two", "last"]
    assert found.to_numpy().tolist() == [[0.5, 0.75], [1, 0.5], [0, 1]]


def test_what_is_written_comes_back_best_first(tmp_path, rng):
    pool = data.load("data/demo.jsonl")
    values, rows = rng.normal(size=len(pool)).round(1), np.sort(rng.permutation(len(pool))[:20])
    ends = ["top", "bottom", "in turn"]
    chosen = dict.fromkeys([*(f"own loss, {end}" for end in ends), "full pool"], rows)
    folder = tmp_path / "new" / "selected"
    selection.write(pool, chosen, {"own loss": values}, folder)
    names = ["own_loss_top", "own_loss_bottom", "own_loss_in_turn", "full_pool"]
    assert {file.stem for file in folder.iterdir()} == {*names, "written"}
    by_id = {row["id"]: (i, row) for i, row in enumerate(pool)}
    for name in names:
        back = data.load(folder / f"{name}.jsonl")
        assert {by_id[each][0] for each in back["id"]} == set(rows.tolist())
        scored = name in names[:2]
        if scored:
            assert back["score"] == sorted(values[rows], reverse=True)
        else:  # what the mean did not choose has no score, and the order of the pool
            assert back["id"] == [pool[int(i)]["id"] for i in rows]
        for row in back:
            i, original = by_id[row["id"]]
            assert row == {**original, **({"score": values[i]} if scored else {})}


def test_a_ranking_has_means_with_students_intervals(rng):
    scores = rng.normal(size=(6, 9))
    found = selection.ranking(scores)
    for row, mine in zip(scores, found.itertuples(), strict=True):
        interval = stats.ttest_1samp(row, 0).confidence_interval(0.95)
        np.testing.assert_allclose((mine.low, mine.high), interval, rtol=RTOL, atol=ATOL)
        assert mine.score == pytest.approx(row.mean())
        assert mine.helped == (row > 0).mean()
    assert found.sort_values("place")["score"].is_monotonic_decreasing
    assert sorted(found["place"]) == [1, 2, 3, 4, 5, 6]
    assert selection.ranking(scores[:, :1])["low"].isna().all()  # one query has no interval


def test_any_text_comes_back(tmp_path):
    row = {**dict.fromkeys(data.COLUMNS, "x"), "prompt": 'é\u2028"\n\\', "completion": " 😀\t"}
    selection.write([row], {"random": [0]}, {}, tmp_path)
    back = data.load(tmp_path / "random.jsonl")[0]
    assert (back["prompt"], back["completion"]) == (row["prompt"], row["completion"])


def test_selections_take_the_place_of_earlier_ones(tmp_path):
    row = dict.fromkeys(data.COLUMNS, "x")
    foreign = ["notes.txt", "own_pool.jsonl", "gain_top.jsonl"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    selection.write([row] * 3, {"full pool": range(3), "random": [1]}, {}, tmp_path)
    selection.write([row], {"random": [0]}, {}, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        *foreign, "random.jsonl", selection.WRITTEN,
    }  # fmt: skip
    with pytest.raises(FileExistsError, match=r"gain_top\.jsonl would be replaced"):
        selection.write([row], {"gain, top": [0], "random": [0]}, {"gain": [1]}, tmp_path)
    assert {(tmp_path / name).read_text() for name in foreign} == {"mine"}
    assert data.load(tmp_path / "random.jsonl")["prompt"] == ["x"]


@pytest.mark.parametrize("written", ["{", "null", "[1]", '{"a": 1}', '["../own.jsonl"]', '["own"]'])
def test_a_list_of_earlier_selections_that_is_no_such_list_removes_nothing(tmp_path, written):
    folder = tmp_path / "selected"
    folder.mkdir()
    kept = {
        tmp_path / "own.jsonl": "mine",
        folder / "own": "mine",
        folder / "written.json": written,
    }
    for file, text in kept.items():
        file.write_text(text)
    with pytest.raises(ValueError, match=r"written\.json is damaged or foreign"):
        selection.write([dict.fromkeys(data.COLUMNS, "x")], {"random": [0]}, {}, folder)
    assert {file: file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == kept
