"""Log-likelihoods against one forward pass per pair."""

import numpy as np
import pytest
import torch
from helpers import ATOL, FAMILIES, RTOL, examples

from icprobe import models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bos", [False, True])
def test_all_pairs_equal_one_forward_pass_per_pair(tiny, family, bos):
    lm = tiny(family, bos)
    assert len(lm.bos) == bos
    queries = models.encode(lm, examples(7))
    contexts = [(), *(e.ids for e in models.encode(lm, examples(4, seed=1, words=20)))]
    expected = [[models.token_log_likelihoods(lm, q, c).sum() for q in queries] for c in contexts]
    actual = models.log_likelihoods(lm, queries, contexts)
    assert actual.dtype == np.float32 and actual.shape == (5, 7)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)
    assert np.std(expected) > 1, "the reference must tell pairs apart"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("tokens_per_forward", [1, 40, 100, 100_000])
def test_batching_and_order_do_not_matter(tiny, tokens_per_forward):
    lm = tiny()
    queries = models.encode(lm, examples(9))
    contexts = [e.ids for e in models.encode(lm, examples(5, seed=1, words=20))]
    whole = models.log_likelihoods(lm, queries, contexts)
    part = models.log_likelihoods(lm, queries, contexts, tokens_per_forward)
    np.testing.assert_allclose(part, whole, rtol=RTOL, atol=ATOL)
    backwards = models.log_likelihoods(lm, queries[::-1], contexts[::-1])
    np.testing.assert_allclose(backwards[::-1, ::-1], whole, rtol=RTOL, atol=ATOL)
    alone = models.log_likelihoods(lm, queries[3:4], contexts[2:3])
    np.testing.assert_allclose(alone, whole[2:3, 3:4], rtol=RTOL, atol=ATOL)


def test_float64_agrees_much_closer(tiny):
    lm = tiny(dtype="float64")
    queries = models.encode(lm, examples(6))
    contexts = [e.ids for e in models.encode(lm, examples(3, seed=1))]
    expected = [[models.token_log_likelihoods(lm, q, c).sum() for q in queries] for c in contexts]
    actual = models.log_likelihoods(lm, queries, contexts)
    # float32 is how results are kept; half a unit in its last place is all that may be lost
    np.testing.assert_allclose(actual, np.float32(expected), rtol=1.2e-7)


def test_the_reference_is_the_model_loss(tiny):
    lm = tiny()
    query = models.encode(lm, examples(1))[0]
    ids, mask = models.sequence(lm, query, (1, 2, 3))
    labels = torch.where(torch.tensor([mask]) == 1, torch.tensor([ids]), -100)
    loss = lm.model(torch.tensor([ids]), labels=labels).loss.item()
    nats = models.token_log_likelihoods(lm, query, (1, 2, 3))
    assert len(nats) == len(query.completion)
    assert -nats.mean() == pytest.approx(loss, rel=RTOL)


def test_what_the_model_cannot_read_is_an_error(tiny, tmp_path):
    lm = tiny()
    empty = models.Encoded("no prompt", (), (1,))
    with pytest.raises(ValueError, match="'no prompt': the prompt has no tokens"):
        models.log_likelihoods(lm, [empty])
    long = models.Encoded("long", (1,) * 300, (1,))
    with pytest.raises(ValueError, match=r"'long' with its longest context has 601 tokens.*512"):
        models.log_likelihoods(lm, [long], [(1,) * 300])


def test_scores_that_are_not_finite_are_an_error(tiny):
    lm = tiny()
    torch.nn.init.constant_(lm.model.get_output_embeddings().weight, float("nan"))
    queries = models.encode(lm, examples(2))
    with pytest.raises(FloatingPointError, match="'0-0'"):
        models.log_likelihoods(lm, queries)


@pytest.mark.real
def test_the_real_model_answers():
    lm = models.load("smollm2-135m-instruct", device="cpu")
    rows = [
        {"id": name, "prompt": "The capital of France is", "completion": f" {name}"}
        for name in ("Paris", "Berlin", "banana")
    ]
    queries = models.encode(lm, rows)
    context = models.text_ids(lm, "The capital of Italy is Rome.\n\n")
    nats = models.log_likelihoods(lm, queries, [(), context])
    assert (nats[:, 0] > nats[:, 1]).all() and (nats[:, 1] > nats[:, 2]).all()
    slow = [[models.token_log_likelihoods(lm, q, c).sum() for q in queries] for c in ((), context)]
    np.testing.assert_allclose(nats, slow, rtol=RTOL, atol=ATOL)
