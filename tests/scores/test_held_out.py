"""Queries that evaluate: of a suite, a file or a half of one's own, and never seen before."""

import json

import numpy as np
import pytest
from helpers import keep_suite

from icprobe import data
from icprobe.data import paths
from icprobe.scores import Experiment


def texts(name, numbers):
    """Rows whose texts are equal where their numbers are."""
    return [
        {"id": f"{name}-{i}", "prompt": f"What is {i}?", "completion": f" {i}!"} for i in numbers
    ]


@pytest.fixture
def source(tmp_path):
    """Return a function that writes rows to a file, and returns its name."""

    def write(rows, name="several"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


@pytest.fixture
def own(source):
    """Return a function that makes an experiment on 30 examples and 20 queries of one's own."""
    pool = source(texts("t", range(30)), "t")
    queries = source(texts("q", range(100, 120)), "q")

    def make(**changes):
        known = {"scores_dir": "none", "model": "none", "train": pool, "queries": queries}
        return Experiment(**{**known, **changes})

    return make


def ids(what, columns):
    return [what.load_data()[1][int(j)]["id"] for j in columns]


# ------------------------------------------------------------------------------- one's own halves


@pytest.mark.parametrize("n_query", [None, 2, 3, 9])
def test_own_queries_are_halved(own, n_query):
    what = own(n_query=n_query)
    M = n_query or 20
    selecting, found = what.held_out()
    assert len(found) == M // 2 and len(selecting) == M - M // 2
    assert (np.diff(selecting) > 0).all()
    assert sorted([*ids(what, selecting), *found["id"]]) == sorted(what.load_data()[1]["id"])
    assert found.column_names == what.load_data()[1].column_names


def test_halves_are_random_by_the_seed(own):
    halves = {seed: own(seed=seed).held_out()[1]["id"] for seed in range(40)}
    assert len({tuple(half) for half in halves.values()}) == 40
    assert own(seed=3).held_out()[1]["id"] == halves[3]
    often = np.bincount([int(name[2:]) - 100 for half in halves.values() for name in half])
    assert (abs(often - 20) < 4 * np.sqrt(40 / 4)).all()  # four standard errors


def test_few_of_a_half_are_random_ones_and_move_no_query(own):
    what = own()
    selecting, whole = what.held_out()
    before = set()
    for n in range(1, 11):
        same, found = what.held_out(n=n)
        assert same.tolist() == selecting.tolist()
        assert len(found) == n and before < set(found["id"]) <= set(whole["id"])
        before = set(found["id"])
    assert what.held_out(n=11)[1]["id"] == whole["id"]  # a half has no more
    places = set()
    for seed in range(15):
        order = own(seed=seed).held_out()[1]["id"]
        places.add(order.index(own(seed=seed).held_out(n=1)[1]["id"][0]))
    assert len(places) > 5  # not the first ones of a file, which may be of one task


def test_equal_prompts_are_on_one_side(own, source):
    prompts = [f"Who is {i}?" for i in range(8)]
    rows = [
        {"id": f"{i}-{k}", "prompt": prompt, "completion": f" {k}!"}
        for k in range(3)
        for i, prompt in enumerate(prompts)
    ]
    for seed in range(10):
        what = own(queries=source(rows), seed=seed)
        selecting, found = what.held_out()
        assert len(found) == len(selecting) == 12
        assert not {name[0] for name in ids(what, selecting)} & {name[0] for name in found["id"]}


def test_one_query_cannot_do_both(own, source):
    same = [{**row, "prompt": "What?"} for row in texts("q", range(3))]
    for what in (own(n_query=1), own(queries=source(same))):
        with pytest.raises(data.DataError, match=r"\.jsonl: one query cannot both select and eval"):
            what.held_out()
    selecting, found = own(n_query=1).held_out(source(texts("e", range(200, 205)), "e"))
    assert selecting.tolist() == [0] and len(found) == 5


def test_of_queries_that_are_also_training_examples_the_held_out_are_errors(own, source):
    queries = source(texts("p", [*range(100, 110), 7, 8]))
    for seed in range(8):
        held = {int(j) for j in np.random.default_rng(seed).permutation(12)[:6]}
        what = own(queries=queries, seed=seed)
        with pytest.warns(UserWarning, match="2 texts are both query and training example"):
            rows = what.load_data()[1]
        if held & {10, 11}:
            with pytest.raises(data.DataError, match=r"evaluation query 'p-[78]' = training exam"):
                what.held_out()
        else:
            assert set(what.held_out()[1]["id"]) == {rows[j]["id"] for j in held}


def test_a_query_that_is_there_twice_may_not_be_in_both_halves(own, source):
    rows = [*texts("q", range(100, 106)), {**texts("q", [100])[0], "id": "twin"}]
    sides = []
    for seed in range(12):
        selecting, found = own(queries=source(rows), seed=seed).held_out()
        sides.append(len({"q-100", "twin"} & set(found["id"])))
        assert len({0, 6} & set(selecting)) == 2 - sides[-1]
    assert set(sides) == {0, 2}
    rows[-1] |= {"prompt": "What  is 100?"}  # white space makes another prompt, and the same text
    parted = 0
    for seed in range(12):
        try:
            own(queries=source(rows), seed=seed).held_out()
        except data.DataError as error:
            assert "'q-100'" in str(error) and "'twin'" in str(error)
            parted += 1
    assert 0 < parted < 12


# ---------------------------------------------------------------------------------- another file


def test_with_an_evaluation_file_all_queries_select(own, source):
    what, file = own(), source(texts("e", range(200, 209)))
    selecting, found = what.held_out(file)
    assert selecting.tolist() == list(range(20))
    assert found.to_list() == data.load(file).to_list()
    assert what.held_out(file, n=4)[1].to_list() == data.load(file, limit=4).to_list()
    renamed = what.held_out(file, columns={"completion": "<{completion}>"})[1]
    assert renamed["completion"][0] == "< 200!>"
    with pytest.raises(data.DataError, match="10 examples asked for, 9 are there"):
        what.held_out(file, n=10)


@pytest.mark.parametrize(
    ("number", "said"), [(7, "= training example 't-7'"), (105, "= query 'q-105'")]
)
def test_a_query_that_evaluates_is_no_training_example_and_does_not_select(
    own, source, number, said
):
    with pytest.raises(data.DataError, match=f"evaluation query 'e-{number}' {said}") as raised:
        own().held_out(source(texts("e", [200, number])))
    assert "e-200" not in str(raised.value)


# --------------------------------------------------------------------------------------- a suite

SUITE = {
    "description": "made up",
    "seed": 3,
    "splits": {"train": 12, "query": 6, "evaluation": 6},
    "input_chars": [1, 100],
    "completion_chars": [1, 20],
    "passage": ".+",
    "types": {"ask": {"instruction": "Ask.", "label": "Question:"}},
    "tasks": {
        name: {"bigbench": name, "content": name, "type": "ask"} for name in ("first", "second")
    },
}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Return the name of a suite of two made-up tasks."""
    numbers = range(100)
    tasks = {
        name: [{"input": f"{name} {i}", "target": f"{i}"} for i in numbers]
        for name in SUITE["tasks"]
    }
    return keep_suite(monkeypatch, tmp_path, SUITE, tasks)


def check_evaluation_split(what, n=None):
    pool, queries = what.load_data()
    selecting, found = what.held_out(n=n)
    assert selecting.tolist() == list(range(len(queries)))
    evaluation = data.load(what.queries, "evaluation", n, what.seed)
    assert found.to_list() == evaluation.to_list()
    seen = {row["prompt"] for table in (pool, queries) for row in table}
    assert not seen & set(found["prompt"])
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_of_a_suite_the_evaluation_split_is_held_out(own, suite, seed):
    what = own(train=suite, queries=suite, n_query=5, seed=seed)
    whole = check_evaluation_split(what)
    assert len(whole) == 12
    assert check_evaluation_split(what, 5).to_list() == whole.to_list()[:5]
    with pytest.raises(data.DataError, match="13 examples asked for, 12 are there"):
        what.held_out(n=13)
    # another split that is named is not disjoint by itself
    with pytest.raises(data.DataError, match="= training example 'first-"):
        what.held_out(split="train")
    with pytest.raises(data.DataError, match="= query 'second-"):
        what.held_out(split="query")


def test_pools_and_evaluations_may_be_suites_or_files(own, suite, source):
    assert len(check_evaluation_split(own(queries=suite))) == 12  # the pool is a file
    selecting, found = own().held_out(suite, n=3)
    assert len(selecting) == 20 and len(found) == 3
    selecting, found = own(train=suite, queries=suite).held_out(source(texts("e", range(5))))
    assert len(selecting) == 12 and len(found) == 5
    assert len(own(train=suite).held_out()[1]) == 10  # own queries are halved


@pytest.mark.real
@pytest.mark.parametrize("name", sorted(file.stem for file in paths.SUITES.glob("*.yaml")))
def test_the_shipped_suites_have_queries_to_evaluate_on(own, name):
    found = check_evaluation_split(own(train=name, queries=name))
    assert len(found) >= 12
