"""Measures of queries against one forward pass per token or option, and scores made by hand."""

import collections

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ATOL, FAMILIES, RTOL, examples, questions

from icprobe import models
from icprobe.finetuning import evaluation
from icprobe.finetuning.evaluation import MEASURES

OPEN = ["exact_match", "rouge_l"]


def token_nats(lm, row, completion, max_length=None):
    (example,) = models.encode(lm, [row | {"completion": completion}], max_length)
    return models.token_log_likelihoods(lm, example)


@pytest.mark.parametrize("family", FAMILIES)
def test_nats_per_token_and_the_likeliest_of_all_options(tiny, family):
    """That is by the sum over tokens, not the mean."""
    lm, queries = tiny(family, bos=family == "llama"), questions([2, 3, 0, 4, 1, 5, 0, 2, 3, 2])
    found = evaluation.evaluate(lm, queries, n_answered=0)
    assert list(found.index) == [query["id"] for query in queries]
    expected = [token_nats(lm, query, query["completion"]).mean() for query in queries]
    np.testing.assert_allclose(found["nats_per_token"], expected, rtol=RTOL, atol=ATOL)
    for query, correct in zip(queries, found["correct"], strict=True):
        options = query["options"] or []
        nats = {option: token_nats(lm, query, option).sum() for option in options}
        assert np.isnan(correct) or correct == (max(nats, key=nats.get) == query["completion"])
        assert np.isnan(correct) == (not options)
    assert set(found["correct"].dropna()) == {0.0, 1.0}


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_are_cut_as_everywhere(tiny, bos):
    lm, options = tiny(bos=bos), [" abc.", " e a.", " dba."]
    long = [query | {"prompt": "x" * 50 + query["prompt"]} for query in questions([0, 0])]
    long += [
        row | {"completion": options[0], "options": options, "prompt": row["prompt"] * 5}
        for row in examples(12, 5)
    ]

    def right(query, max_length):
        nats = [token_nats(lm, query, option, max_length).sum() for option in options]
        return np.argmax(nats) == 0

    with pytest.warns(UserWarning, match="prompts lost tokens at the left"):
        found = evaluation.evaluate(lm, long, max_length=20)
        cut = models.encode(lm, long, 20)
        likeliest = [right(query, 20) for query in long[2:]]
    assert likeliest != [right(query, None) for query in long[2:]], "it makes a difference"
    expected = [models.token_log_likelihoods(lm, row).mean() for row in cut]
    np.testing.assert_allclose(found["nats_per_token"], expected, rtol=RTOL, atol=ATOL)
    assert found["correct"].tolist()[2:] == likeliest
    assert found["answer"].dropna().tolist() == evaluation.answers(lm, cut[:2])


@torch.inference_mode()
def slowly(lm, prompt, new_tokens=evaluation.ANSWER_TOKENS):
    """Return the ids of the greedy continuation, one whole forward pass a token."""
    ids = [*lm.bos, *prompt]
    for _ in range(new_tokens):
        token = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == lm.tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids[len(lm.bos) + len(prompt) :]


def said(lm, prompt, new_tokens=evaluation.ANSWER_TOKENS):
    return lm.tokenizer.decode(slowly(lm, prompt, new_tokens), skip_special_tokens=True)


def first_line(text):
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def end_often(lm, prompts):
    """Let the model end lines and answers often: swap these tokens with favourites of its."""
    often = collections.Counter(token for prompt in prompts for token in slowly(lm, prompt))
    (newline,) = lm.tokenizer("\n", add_special_tokens=False).input_ids
    ends = [newline, lm.tokenizer.eos_token_id]
    favourites = [token for token, _ in often.most_common(9) if token not in ends][1:3]
    head = lm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # where it is the input's, too
    head.weight.data[[*ends, *favourites]] = head.weight.data[[*favourites, *ends]]


def prompts(lm):
    """Return encoded queries of many lengths, to which the model's answers end in all ways."""
    queries = models.encode(lm, examples(14, 1, words=20))
    assert len({len(query.prompt) for query in queries}) > 7
    end_often(lm, [query.prompt for query in queries[:5]])
    return queries


@pytest.mark.parametrize(
    ("family", "end"), [*((family, True) for family in [*FAMILIES, "opt"]), ("gpt2", False)]
)
def test_answers_are_first_lines_of_slow_greedy_ones(tiny, monkeypatch, family, end):
    """Read together with others of other lengths, or alone, and whether they end or not."""
    lm = tiny(family, bos=family == "llama")
    queries = prompts(lm)
    if not end:
        lm.tokenizer.eos_token = None
    whole = [said(lm, query.prompt) for query in queries]
    expected = [first_line(text) for text in whole]
    assert expected != [text.strip() for text in whole], "some go on after the line"
    monkeypatch.setattr(evaluation, "ANSWERS_AT_ONCE", 5)
    assert evaluation.answers(lm, queries) == expected
    assert [evaluation.answers(lm, [query])[0] for query in queries[:3]] == expected[:3]
    short = [first_line(said(lm, query.prompt, 3)) for query in queries]
    assert evaluation.answers(lm, queries, 3) == short != expected
    assert evaluation.answers(lm, queries, several_lines=True) == [text.strip() for text in whole]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "do_sample": True, "temperature": 9.0},
        {"min_new_tokens": 24},
    ],
)
def test_answers_are_greedy_whatever_the_model_comes_with(tiny, settings):
    lm = tiny("gpt2")
    queries = prompts(lm)
    lm.model.generation_config.update(**settings)
    expected = [first_line(said(lm, query.prompt)) for query in queries]
    assert evaluation.answers(lm, queries) == expected


def test_an_answer_has_several_lines_where_a_completion_has(tiny):
    lm, queries = tiny("gpt2"), [row | {"options": None} for row in examples(9, 1, words=20)]
    encoded = models.encode(lm, queries)
    end_often(lm, [query.prompt for query in encoded[:5]])
    one_line = evaluation.answers(lm, encoded)
    several = evaluation.answers(lm, encoded, several_lines=True)
    assert one_line != several
    assert evaluation.evaluate(lm, queries)["answer"].tolist() == one_line
    queries[3]["completion"] += "\nmore"
    assert evaluation.evaluate(lm, queries)["answer"].tolist() == several
    assert evaluation.answers(lm, []) == []


@pytest.mark.parametrize(
    ("answer", "completion", "exact", "overlap"),
    [
        ("The cat sat.", " the cat sat", 1, 1),
        ("cat sat", " the cat sat", 1, 2 * 1 * (2 / 3) / (1 + 2 / 3)),  # articles do not count
        ("the dog sat", " the cat sat", 0, 2 / 3),
        ("sat cat the", " the cat sat", 0, 1 / 3),  # in order
        ("b d", " c b c d", 0, 2 * 1 * (2 / 4) / (1 + 2 / 4)),  # not in one piece
        ("cats", " cat", 0, 0),
        ("1,000", " 1000", 1, 0),
        ("", " x", 0, 0),
    ],
)
def test_answers_are_compared_in_words(answer, completion, exact, overlap):
    found = evaluation._compared(answer, completion)
    assert found == pytest.approx({"exact_match": exact, "rouge_l": overlap})


@pytest.mark.parametrize(
    ("n_options", "n"),
    [([2, 0, 3, 0, 0], None), ([2, 0, 3, 0, 0], 2), ([2, 3], None), ([0, 0], 0), ([0, 0], 9)],
)
def test_measures_stand_where_they_apply_and_are_asked_for(tiny, n_options, n):
    """Of the open questions the first n, of which each has its own answer."""
    lm, queries = tiny(bos=True), questions(n_options)
    found = evaluation.evaluate(lm, queries, n_answered=n)
    assert list(found) == [*MEASURES, "answer"]
    assert {str(found[measure].dtype) for measure in MEASURES} == {"float64"}
    closed = np.array(n_options) > 0
    answered = ~closed & (np.cumsum(~closed) <= (len(closed) if n is None else n))
    assert found["nats_per_token"].notna().all()
    np.testing.assert_array_equal(found["correct"].notna(), closed)
    for column in (*OPEN, "answer"):
        np.testing.assert_array_equal(found[column].notna(), answered)
    encoded = models.encode(lm, queries)
    for k in np.flatnonzero(answered):
        assert found["answer"].iloc[k] == evaluation.answers(lm, [encoded[k]])[0]


def test_means_by_task_are_over_queries_to_which_a_measure_applies():
    nan = float("nan")
    results = pd.DataFrame(
        {
            "nats_per_token": [-1.0, -2.0, -3.0, -6.0],
            "correct": [1.0, nan, 0.0, nan],
            "exact_match": [nan, 1.0, nan, 0.0],
            "rouge_l": [nan, 0.5, nan, nan],
            "answer": [None, "x", None, "y"],
        },
        index=list("abcd"),
    )
    table = evaluation.by_task(results, ["z", "y", "z", "y"])
    expected = pd.DataFrame(
        [[-2.0, 0.5, nan, nan], [-4.0, nan, 0.5, 0.5], [-3.0, 0.5, 0.5, 0.5]],
        index=["z", "y", "all"],
        columns=list(MEASURES),
    )
    pd.testing.assert_frame_equal(table, expected)
