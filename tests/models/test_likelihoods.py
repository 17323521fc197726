"""Log-likelihoods against one forward pass per pair."""

import numpy as np
import pytest
import torch
from helpers import ATOL, FAMILIES, RTOL, encoded

from icprobe import models
from icprobe.models import likelihoods


def one_by_one(lm, queries, contexts):
    """Return log-likelihoods [C, M] by one forward pass per pair."""
    return [[models.token_log_likelihoods(lm, q, c).sum() for q in queries] for c in contexts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bos", [False, True])
def test_all_pairs_equal_one_forward_pass_per_pair(tiny, family, bos):
    lm = tiny(family, bos)
    assert len(lm.bos) == bos
    queries = encoded(lm, 7, 0)
    contexts = [(), *(one.ids for one in encoded(lm, 4, 1, words=20))]
    expected = one_by_one(lm, queries, contexts)
    actual = models.log_likelihoods(lm, queries, contexts)
    assert actual.dtype == np.float32 and actual.shape == (5, 7)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)
    assert np.std(expected) > 1, "the reference must tell pairs apart"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("tokens", [1, 40, 100, 100_000])
def test_batching_and_order_do_not_matter(tiny, monkeypatch, tokens):
    lm = tiny()
    queries = encoded(lm, 9, 0)
    contexts = [one.ids for one in encoded(lm, 5, 1, words=20)]
    whole = models.log_likelihoods(lm, queries, contexts)
    monkeypatch.setitem(likelihoods.TOKENS_PER_FORWARD, "cpu", tokens)
    part = models.log_likelihoods(lm, queries, contexts)
    np.testing.assert_allclose(part, whole, rtol=RTOL, atol=ATOL)
    backwards = models.log_likelihoods(lm, queries[::-1], contexts[::-1])
    np.testing.assert_allclose(backwards[::-1, ::-1], whole, rtol=RTOL, atol=ATOL)
    alone = models.log_likelihoods(lm, queries[3:4], contexts[2:3])
    np.testing.assert_allclose(alone, whole[2:3, 3:4], rtol=RTOL, atol=ATOL)


def test_float64_agrees_much_closer(tiny):
    lm = tiny(dtype="float64")
    queries, contexts = encoded(lm, 6, 0), [one.ids for one in encoded(lm, 3, 1)]
    actual = models.log_likelihoods(lm, queries, contexts)
    expected = np.float32(one_by_one(lm, queries, contexts))
    # float32 is how results are kept; half a unit in its last place is all that may be lost
    np.testing.assert_allclose(actual, expected, rtol=1.2e-7)


def test_the_reference_is_the_model_loss(tiny):
    lm = tiny()
    query = encoded(lm, 1, 0)[0]
    ids, mask = models.sequence(lm, query, (1, 2, 3))
    labels = torch.where(torch.tensor([mask]) == 1, torch.tensor([ids]), -100)
    loss = lm.model(torch.tensor([ids]), labels=labels).loss.item()
    nats = models.token_log_likelihoods(lm, query, (1, 2, 3))
    assert len(nats) == len(query.completion)
    assert -nats.mean() == pytest.approx(loss, rel=RTOL)


def test_what_cannot_be_scored_is_an_error(tiny):
    lm = tiny()
    empty = models.Encoded("no prompt", (), (1,))
    with pytest.raises(ValueError, match="'no prompt': the prompt has no tokens"):
        models.log_likelihoods(lm, [empty])
    long = models.Encoded("long", (1,) * 300, (1,))
    with pytest.raises(ValueError, match=r"'long' with its longest context has 601 tokens.*512"):
        models.log_likelihoods(lm, [long], [(1,) * 300])
    torch.nn.init.constant_(lm.model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(FloatingPointError, match="'0-0'"):
        models.log_likelihoods(lm, encoded(lm, 2, 0))


def test_models_that_cannot_be_packed_are_refused(tiny, monkeypatch):
    models.check_packing(tiny("mistral"))
    lm = tiny()
    models.check_packing(lm)
    forward = lm.model.forward

    def deaf(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", deaf)
    for refusing in (lm, *map(tiny, ("bloom", "mpt", "mamba", "lfm2"))):
        with pytest.raises(ValueError, match="takes no packed rows"):
            models.check_packing(refusing)
