"""Baselines against closed forms and one plain forward pass per example."""

import math

import numpy as np
import pytest
import torch
from helpers import ATOL, FAMILIES, RTOL, encoded, examples

from icprobe import models
from icprobe.methods import baselines
from icprobe.methods.gradient import losses
from icprobe.methods.hidden_states import mean_states
from icprobe.scores import compute


def row(text, completion=" "):
    return {"id": text, "prompt": text, "completion": completion}


def scored(method, lm, train, queries, max_length=None):
    found = compute(method, lm, train, queries, max_length)[method.name]
    assert found.dtype == np.float32 and found.shape == (len(train), len(queries))
    return found


def test_lengths_are_those_of_the_examples(tiny):
    lm = tiny(bos=True)  # a token is a byte
    train = [row("abc", " de"), row("ü", " x")]
    queries = examples(3)
    assert scored(baselines.Length(), lm, train, queries).tolist() == [[6] * 3, [4] * 3]
    assert scored(baselines.CompletionLength(), lm, train, queries).tolist() == [[3] * 3, [2] * 3]
    assert scored(baselines.QueryLength(), lm, queries, train).tolist() == [[3, 2]] * 3
    with pytest.warns(UserWarning, match="prompts lost tokens"):
        cut = scored(baselines.Length(), lm, train, train, max_length=5)
    assert cut.tolist() == [[4] * 2, [4] * 2], "what the model reads, less BOS"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("loss_on", losses.LOSSES)
def test_trained_tokens_are_those_of_the_loss(tiny, bos, loss_on):
    lm = tiny(bos=bos)
    train = [row("abc", " de"), row("ü")]
    learnt = [
        len(losses.loss_inputs(lm, [example], loss_on)[1]) for example in models.encode(lm, train)
    ]
    assert scored(baselines.trained_tokens(loss_on), lm, train, train[:1])[:, 0].tolist() == learnt


def test_lexical_similarity_by_hand(tiny):
    train, queries = [row("A b", " b"), row("c", " 7")], [row("b: 7", "\n7!")]

    def weight(n_texts_with_word):
        return 1 + math.log((1 + 3) / (1 + n_texts_with_word))

    one, two = weight(1), weight(2)
    # words and how often: (a 1, b 2), (c 1, 7 1), (b 1, 7 2)
    norms = [math.hypot(one, 2 * two), math.hypot(one, two), math.hypot(two, 2 * two)]
    expected = [
        [2 * two * two / (norms[0] * norms[2])],
        [two * 2 * two / (norms[1] * norms[2])],
    ]
    actual = scored(baselines.Lexical(), tiny(), train, queries)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_lexical_similarity_has_bounds(tiny):
    train = [row("Same words", " twice"), row("nothing in common"), row("?!", " ...")]
    queries = [row("TWICE same", " words"), row("other", " text")]
    actual = scored(baselines.Lexical(), tiny(), train, queries)
    np.testing.assert_allclose(actual, [[1, 0], [0, 0], [0, 0]])


def states(lm, example):
    """Return the hidden states [T, H] after the first of 3 blocks, from the whole model."""
    ids, _ = models.sequence(lm, example)
    with torch.no_grad():
        output = lm.model(torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[1][0].double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bos", [False, True])
def test_embeddings_equal_one_forward_pass_per_example(tiny, family, bos):
    lm = tiny(family, bos)
    train, queries = examples(6, words=20), examples(4, seed=1)
    means = [states(lm, one)[1:].mean(0) for one in models.encode(lm, train + queries)]
    vectors = means - np.mean(means, axis=0)
    expected = [[u @ v / math.sqrt(u @ u * (v @ v)) for v in vectors[6:]] for u in vectors[:6]]
    actual = scored(baselines.Embedding(), lm, train, queries)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)
    assert np.std(expected) > 0.01, "the reference must tell pairs apart"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_batches_order_and_threads_do_not_matter(tiny, monkeypatch, budget):
    lm = tiny("gpt2")
    rows = encoded(lm, 9, 0, words=20)
    whole = mean_states(lm, rows)
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", budget)
    np.testing.assert_allclose(mean_states(lm, rows), whole, rtol=RTOL, atol=ATOL)
    backwards = mean_states(lm, rows[::-1])
    np.testing.assert_allclose(backwards[::-1], whole, rtol=RTOL, atol=ATOL)


def test_what_cannot_be_embedded_is_named(tiny):
    lm = tiny()
    long = [{"id": "long", "prompt": "x" * 600, "completion": " y"}]
    with pytest.raises(ValueError, match=r"'long' .* has 602 tokens"):
        scored(baselines.Embedding(), lm, examples(2), long)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer("q").input_ids] = torch.nan
    rows = [{**row("ab", " c"), "id": "fine"}, {**row("aq", " c"), "id": "broken"}]
    with pytest.raises(FloatingPointError, match="'broken'"):
        mean_states(lm, models.encode(lm, rows))


def test_own_loss_is_the_reference_per_token(tiny):
    lm = tiny("gpt_neox", bos=True)
    train = examples(7)
    expected = [-models.token_log_likelihoods(lm, one).mean() for one in models.encode(lm, train)]
    actual = scored(baselines.OwnLoss(), lm, train, examples(2, seed=1))
    np.testing.assert_allclose(actual, np.tile(expected, (2, 1)).T, rtol=RTOL, atol=ATOL)
    assert np.std(expected) > 0.1 and (actual > 0).all()
    with pytest.raises(ValueError, match=r"'0'.*no tokens"):
        scored(baselines.OwnLoss(), lm, [{**row("", " y"), "id": "0"}], train)


def test_random_scores_are_standard_normal_and_repeatable(tiny):
    train, queries = examples(200), examples(100, seed=1)
    scores = scored(baselines.Random(), tiny(), train, queries)
    # 20,000 draws: the mean's standard error is 0.007, the deviation's 0.005
    assert abs(scores.mean()) < 0.03 and abs(scores.std() - 1) < 0.02
    assert abs(np.corrcoef(scores[:, 0], scores[:, 1])[0, 1]) < 0.3
    assert (scores == scored(baselines.Random(), tiny(), train, queries)).all()
    assert (scores != scored(baselines.Random(1), tiny(), train, queries)).any()


def test_the_same_answer_is_the_same_whatever_its_case(tiny):
    train = [row(str(k), text) for k, text in enumerate((" Yes.", " no", "yes. "))]
    queries = [row(str(k), text) for k, text in enumerate((" yes.", " No"))]
    expected = [[1, 0], [0, 1], [1, 0]]
    assert scored(baselines.SameCompletion(), tiny(), train, queries).tolist() == expected
