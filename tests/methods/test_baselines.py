"""Rivals against closed forms and one plain forward pass per example."""

import math

import numpy as np
import pytest
import torch
from conftest import ATOL, FAMILIES, RTOL
from test_lm import examples

from icprobe import baselines, gradients
from icprobe import lm as language_model


def row(text, completion=" "):
    return {"prompt": text, "completion": completion}


def test_lengths_are_those_of_the_training_examples(tiny):
    lm = tiny(bos=True)  # a token is a byte
    train = [{"id": "a", **row("abc", " de")}, {"id": "b", **row("ü", " x")}]
    queries = examples(3)
    assert baselines.length(lm, train, queries).tolist() == [[6] * 3, [4] * 3]
    assert baselines.length(lm, train, queries, part="completion").tolist() == [[3] * 3, [2] * 3]
    with pytest.warns(UserWarning, match="prompts lost tokens"):
        cut = baselines.length(lm, train, queries, max_length=5)
    assert cut.tolist() == [[4] * 3, [4] * 3], "what the model reads, less BOS"
    assert cut.dtype == np.float32
    with pytest.raises(ValueError, match="part is 'prompt'"):
        baselines.length(lm, train, queries, part="prompt")


def test_lexical_similarity_by_hand():
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
    actual = baselines.lexical(train, queries)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_lexical_similarity_has_bounds():
    train = [row("Same words", " twice"), row("nothing in common"), row("?!", " ...")]
    queries = [row("TWICE same", " words"), row("other", " text")]
    np.testing.assert_allclose(baselines.lexical(train, queries), [[1, 0], [0, 0], [0, 0]])
    with pytest.raises(ValueError, match="empty vocabulary"):
        baselines.lexical([row("?")], [row("!")])


def states(lm, example, layer):
    """Return the hidden states of one sequence, from the whole model, without padding."""
    ids, _ = language_model.sequence(lm, example)
    with torch.no_grad():
        output = lm.model(torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[layer][0].double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bos", "layer"), [(False, None), (True, 0), (True, 2), (False, -1)])
def test_embeddings_equal_one_forward_pass_per_example(tiny, family, bos, layer):
    lm = tiny(family, bos)
    train, queries = examples(6, words=20), examples(4, seed=1)
    encoded = language_model.encode(lm, train + queries)
    place = 1 if layer is None else layer  # of 3 blocks
    means = np.array([states(lm, example, place)[1:].mean(0) for example in encoded])
    for centre in (True, False):
        vectors = means - means.mean(0) if centre else means
        expected = [[u @ v / math.sqrt(u @ u * (v @ v)) for v in vectors[6:]] for u in vectors[:6]]
        actual = baselines.embedding(lm, train, queries, layer=layer, centre=centre)
        assert actual.dtype == np.float32 and actual.shape == (6, 4)
        np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)
        assert np.std(expected) > 0.01, "the reference must tell pairs apart"


@pytest.fixture
def threads():
    """Return a function that sets torch's threads; they are set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_batches_order_and_threads_do_not_matter(tiny, monkeypatch, threads, budget, n_threads):
    lm = tiny("gpt2")
    encoded = language_model.encode(lm, examples(9, words=20))
    whole = baselines.mean_states(lm, encoded)
    monkeypatch.setitem(gradients.TOKENS_PER_PASS, "cpu", budget)
    threads(n_threads)
    np.testing.assert_allclose(baselines.mean_states(lm, encoded), whole, rtol=RTOL, atol=ATOL)
    backwards = baselines.mean_states(lm, encoded[::-1])
    np.testing.assert_allclose(backwards[::-1], whole, rtol=RTOL, atol=ATOL)


def test_the_first_token_does_not_tell_the_length(tiny):
    lm = tiny()
    # input embeddings of one first token and then always the same: with it, means differ by length
    rows = [{"id": str(n), "prompt": "a" + "x" * n, "completion": "x"} for n in (1, 5, 9)]
    means = baselines.mean_states(lm, language_model.encode(lm, rows), layer=0)
    np.testing.assert_allclose(means, means[:1].repeat(3, 0), rtol=RTOL)
    similar = baselines.embedding(lm, rows[:2], rows[2:], layer=0, centre=False)
    np.testing.assert_allclose(similar, 1, rtol=RTOL)


def test_what_cannot_be_embedded_is_named(tiny):
    lm = tiny()
    single = language_model.Encoded("single", (), (65,))
    with pytest.raises(ValueError, match="'single' has one token"):
        baselines.mean_states(lm, [single])
    bos = tiny(bos=True)
    np.testing.assert_allclose(
        baselines.mean_states(bos, [single])[0], states(bos, single, 1)[1], rtol=RTOL, atol=ATOL
    )
    long = [{"id": "long", "prompt": "x" * 600, "completion": " y"}]
    with pytest.raises(ValueError, match="'long' has 602 tokens"):
        baselines.embedding(lm, examples(2), long)
    with pytest.raises(ValueError, match=r"layer is 4, the model has 0 .* to 3"):
        baselines.embedding(lm, examples(2), examples(2), layer=4)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer("q").input_ids] = torch.nan
    rows = [{"id": "fine", **row("ab", " c")}, {"id": "broken", **row("aq", " c")}]
    with pytest.raises(FloatingPointError, match="'broken'"):
        baselines.embedding(lm, rows, rows[:1])


def test_own_loss_is_the_reference_per_token(tiny, monkeypatch):
    monkeypatch.setattr(baselines, "TOGETHER", 3)
    lm = tiny("gpt_neox", bos=True)
    train = language_model.encode(lm, examples(7))
    expected = [-language_model.token_log_likelihoods(lm, example).mean() for example in train]
    actual = baselines.own_loss(lm, train, examples(2, seed=1))
    assert actual.shape == (7, 2) and actual.dtype == np.float32
    np.testing.assert_allclose(actual, np.tile(expected, (2, 1)).T, rtol=RTOL, atol=ATOL)
    assert np.std(expected) > 0.1 and (actual > 0).all()
    with pytest.raises(ValueError, match=r"'0'.*no tokens"):
        baselines.own_loss(lm, [{"id": "0", **row("", " y")}], train)


def test_random_scores_are_standard_normal_and_repeatable():
    scores = baselines.random(200, 100, np.random.default_rng(0))
    # 20,000 draws: the mean's standard error is 0.007, the deviation's 0.005
    assert abs(scores.mean()) < 0.03 and abs(scores.std() - 1) < 0.02
    assert abs(np.corrcoef(scores[:, 0], scores[:, 1])[0, 1]) < 0.3
    assert (scores == baselines.random(200, 100, np.random.default_rng(0))).all()
    assert scores.dtype == np.float32


def test_the_same_answer_is_the_same_whatever_its_case():
    train = [{"completion": text} for text in (" Yes.", " no", "yes. ")]
    queries = [{"completion": text} for text in (" yes.", " No")]
    expected = [[1, 0], [0, 1], [1, 0]]
    assert baselines.same_completion(train, queries).tolist() == expected
