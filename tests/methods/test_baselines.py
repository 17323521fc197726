"""Baselines against closed forms and one plain forward pass per example."""

import math

import numpy as np
import pytest
import torch
from helpers import ATOL, FAMILIES, RTOL, examples

from icprobe import models
from icprobe.methods import baselines
from icprobe.methods.gradient import losses
from icprobe.methods.hidden_states import mean_states
from icprobe.scores import compute


def row(text, completion=" "):
    return {"id": text, "prompt": text, "completion": completion}


def scored(method, lm, train, queries, max_length=None):
    return compute(method, lm, train, queries, max_length)[method.name]


def test_lengths_are_those_of_the_examples(tiny):
    lm = tiny(bos=True)  # a token is a byte
    train = [row("abc", " de"), row("ü", " x")]
    queries = examples(3)
    found = scored(baselines.Length(), lm, train, queries)
    assert found.tolist() == [[6] * 3, [4] * 3]
    found = scored(baselines.CompletionLength(), lm, train, queries)
    assert found.tolist() == [[3] * 3, [2] * 3]
    assert scored(baselines.QueryLength(), lm, queries, train).tolist() == [[3, 2]] * 3
    with pytest.warns(UserWarning, match="prompts lost tokens"):
        cut = scored(baselines.Length(), lm, train, train, max_length=5)
    assert cut.tolist() == [[4] * 2, [4] * 2], "what the model reads, less BOS"
    assert cut.dtype == np.float32


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("loss_on", losses.LOSSES)
def test_trained_tokens_are_those_of_the_loss(tiny, bos, loss_on):
    lm = tiny(bos=bos)
    train = [row("abc", " de"), row("ü")]
    learnt = losses.loss_inputs(lm, models.encode(lm, train), loss_on)[1].bincount().tolist()
    assert baselines.trained_tokens(lm, train, loss_on).tolist() == learnt
    if loss_on == "text":
        assert scored(baselines.TextTokens(), lm, train, train[:1])[:, 0].tolist() == learnt


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
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_lexical_similarity_has_bounds(tiny):
    train = [row("Same words", " twice"), row("nothing in common"), row("?!", " ...")]
    queries = [row("TWICE same", " words"), row("other", " text")]
    np.testing.assert_allclose(
        scored(baselines.Lexical(), tiny(), train, queries), [[1, 0], [0, 0], [0, 0]]
    )
    with pytest.raises(ValueError, match="empty vocabulary"):
        scored(baselines.Lexical(), tiny(), [row("?")], [row("!")])


def states(lm, example, layer):
    """Return the hidden states of one sequence, from the whole model, without padding."""
    ids, _ = models.sequence(lm, example)
    with torch.no_grad():
        output = lm.model(torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[layer][0].double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bos", "layer"), [(False, None), (True, 0), (True, 2), (False, -1)])
def test_embeddings_equal_one_forward_pass_per_example(tiny, family, bos, layer):
    lm = tiny(family, bos)
    train, queries = examples(6, words=20), examples(4, seed=1)
    encoded = models.encode(lm, train + queries)
    place = 1 if layer is None else layer  # of 3 blocks
    means = np.array([states(lm, example, place)[1:].mean(0) for example in encoded])
    for centre in (True, False):
        vectors = means - means.mean(0) if centre else means
        expected = [[u @ v / math.sqrt(u @ u * (v @ v)) for v in vectors[6:]] for u in vectors[:6]]
        actual = scored(baselines.Embedding(layer, centre), lm, train, queries)
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
    encoded = models.encode(lm, examples(9, words=20))
    whole = mean_states(lm, encoded)
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", budget)
    threads(n_threads)
    np.testing.assert_allclose(mean_states(lm, encoded), whole, rtol=RTOL, atol=ATOL)
    backwards = mean_states(lm, encoded[::-1])
    np.testing.assert_allclose(backwards[::-1], whole, rtol=RTOL, atol=ATOL)


def test_the_first_token_does_not_tell_the_length(tiny):
    lm = tiny()
    # input embeddings of one first token and then always the same: with it, means differ by length
    rows = [{"id": str(n), "prompt": "a" + "x" * n, "completion": "x"} for n in (1, 5, 9)]
    means = mean_states(lm, models.encode(lm, rows), layer=0)
    np.testing.assert_allclose(means, means[:1].repeat(3, 0), rtol=RTOL)
    similar = scored(baselines.Embedding(0, centre=False), lm, rows[:2], rows[2:])
    np.testing.assert_allclose(similar, 1, rtol=RTOL)


def test_what_cannot_be_embedded_is_named(tiny):
    lm = tiny()
    single = models.Encoded("single", (), (65,))
    with pytest.raises(ValueError, match="'single' has one token"):
        mean_states(lm, [single])
    bos = tiny(bos=True)
    np.testing.assert_allclose(
        mean_states(bos, [single])[0], states(bos, single, 1)[1], rtol=RTOL, atol=ATOL
    )
    long = [{"id": "long", "prompt": "x" * 600, "completion": " y"}]
    with pytest.raises(ValueError, match="'long' has 602 tokens"):
        scored(baselines.Embedding(), lm, examples(2), long)
    with pytest.raises(ValueError, match=r"layer is 4, the model has 0 .* to 3"):
        scored(baselines.Embedding(4), lm, examples(2), examples(2))
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer("q").input_ids] = torch.nan
    rows = [{**row("ab", " c"), "id": "fine"}, {**row("aq", " c"), "id": "broken"}]
    with pytest.raises(FloatingPointError, match="'broken'"):
        scored(baselines.Embedding(), lm, rows, rows[:1])


def test_own_loss_is_the_reference_per_token(tiny, monkeypatch):
    monkeypatch.setattr(baselines, "TOGETHER", 3)
    lm = tiny("gpt_neox", bos=True)
    train = examples(7)
    encoded = models.encode(lm, train)
    expected = [-models.token_log_likelihoods(lm, example).mean() for example in encoded]
    actual = scored(baselines.OwnLoss(), lm, train, examples(2, seed=1))
    assert actual.shape == (7, 2) and actual.dtype == np.float32
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
