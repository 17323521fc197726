"""Counts and lengths by hand, and copies of queries: found where they are, and only there."""

import datasets
import numpy as np
import pytest

from icprobe import data, models
from icprobe.finetuning import data_checks


def rows(*texts, task="t"):
    prompts, completions = zip(*texts, strict=True)
    ids = [f"{task}-{k}" for k in range(len(texts))]
    kinds = dict.fromkeys(("task", "content", "type"), [task] * len(texts))
    return datasets.Dataset.from_dict(
        {"id": ids, "prompt": prompts, "completion": completions, **kinds}
    )


def test_summary_counts_lengths_and_repetitions(tiny):
    lm = tiny()
    pool = rows(("one two", " a"), ("one  two", " a"), ("one two", " b"), ("three", " cde"))
    queries = rows(("four", " x"), task="q")
    encoded = tuple(models.encode(lm, part) for part in (pool, queries))
    found = data_checks.summary(pool, queries, encoded)
    assert found["examples"].to_list() == [4, 1]
    assert found["repeated"].to_list() == [1, 0]  # but for white space
    assert found["contradicted"].to_list() == [1, 0]
    assert found["glued"].to_list() == [0, 0]
    # one token a byte
    assert found["prompt tokens (most)"].to_list() == [8, 4]
    assert found["completion tokens (most)"].to_list() == [4, 2]
    assert found["prompt tokens (median)"].to_list() == [7, 4]


def test_completions_without_a_space_and_truncated_prompts_are_counted(tiny):
    pool = rows(("one", "two"), ("one", " two"), ("one ", "two"), ("", "two"), ("o" * 9, " two"))
    with pytest.warns(UserWarning, match="lost tokens"):
        encoded = models.encode(tiny(), pool, max_length=10)
    found = data_checks.summary(pool, pool, (encoded, encoded))
    assert found[["glued", "truncated"]].to_numpy().tolist() == [[1, 1]] * 2


SENTENCE = "the cook burnt the fish and then charged every guest for the lemon"


def test_copies_of_queries_are_found():
    pool = rows(
        ("Is it good?\n" + SENTENCE, " no"),
        ("Is it good?\n" + SENTENCE.replace("every", "each"), " no"),
        ("Is it good?\nwarm bread and soft butter made a very nice start", " yes"),
        ("Is it good?\n" + " ".join(sorted(SENTENCE.split())), " no"),
    )
    queries = rows(
        ("Is it good?\na table by the window with a view of the sea", " yes"),
        ("Is it good? " + SENTENCE, " no"),
        task="q",
    )
    found = data_checks.near_duplicates(pool, queries)
    assert found["example"].to_list() == ["t-0", "t-1"]  # the same words in another order are none
    assert found["kind"].to_list() == ["same text", "near copy"]
    assert found["query"].to_list() == ["q-1", "q-1"]
    assert found["shared"][0] == 1 and data_checks.NEAR < found["shared"][1] < 1
    assert found["row"].to_list() == [0, 1]
    assert len(data_checks.near_duplicates(pool, queries, near=1.0)) == 1


def test_every_text_may_be_too_short_for_runs_of_words():
    pool, queries = rows(("a", " b"), ("c", " d")), rows(("c", " d"), ("e", " f"), task="q")
    found = data_checks.near_duplicates(pool, queries)
    assert found[["example", "query", "kind"]].to_numpy().tolist() == [["t-1", "q-0", "same text"]]


def test_a_query_within_a_longer_text_is_found():
    longer = f"{' '.join(f'word{k}' for k in range(200))} {SENTENCE} {' '.join('abcdefgh' * 9)}"
    found = data_checks.near_duplicates(
        rows((longer, " yes"), ("a b c d e f", " g")), rows((SENTENCE, " no"), task="q")
    )
    assert found["example"].to_list() == ["t-0"]


def test_what_may_be_selected():
    pool, queries = rows((SENTENCE, " a"), ("x y z", " b")), rows((SENTENCE, " a"), task="q")
    copies = data_checks.near_duplicates(pool, queries)
    assert data_checks.selectable(2, copies).tolist() == [1]
    assert data_checks.selectable(2, copies, keep=True).tolist() == [0, 1]
    with pytest.raises(ValueError, match="keep_copies"):
        data_checks.selectable(1, copies)


def test_the_demo_has_copies_to_show_and_no_equal_texts():
    pool, queries = data.load("data/demo.jsonl"), data.load("data/demo_queries.jsonl")
    data.check_disjoint(pool, queries)
    found = data_checks.near_duplicates(pool, queries)
    assert set(found["kind"]) == {"near copy"}
    assert found["example"].to_list() == ["food_remarks-7", "words-7"]
    assert set(pool["task"]) == set(queries["task"])
    assert np.unique(queries["prompt"]).size == len(queries)
