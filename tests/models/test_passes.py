"""Where a GPU's memory runs out, passes get smaller, and no block is lost."""

import numpy as np
import pytest
import torch
from helpers import ATOL, RTOL, examples

from icprobe import models
from icprobe.methods import gradient
from icprobe.models import passes


@pytest.fixture
def small_memory(tiny, monkeypatch):
    """Let the model's passes run out of memory where they have too many tokens."""

    def limit(most: int):
        lm = tiny()
        monkeypatch.setattr(passes, "_fitting", {})
        forward, sizes = lm.model.forward, []

        def limited(input_ids, **inputs):
            sizes.append(input_ids.numel())
            if input_ids.numel() > most:
                raise torch.OutOfMemoryError("out of memory")
            return forward(input_ids=input_ids, **inputs)

        monkeypatch.setattr(lm.model, "forward", limited)
        return lm, sizes

    return limit


def test_log_likelihoods_go_on_with_smaller_passes(tiny, small_memory):
    queries, contexts = (
        models.encode(tiny(), examples(n, seed, 20)) for n, seed in ((6, 1), (16, 2))
    )
    contexts = [context.ids for context in contexts]
    expected = models.log_likelihoods(tiny(), queries, contexts)
    lm, sizes = small_memory(300)
    with pytest.warns(UserWarning, match="log-likelihoods: too little memory, now 512 tokens"):
        found = models.log_likelihoods(lm, queries, contexts)
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=ATOL)
    assert max(sizes) > 300
    sizes.clear()
    models.log_likelihoods(lm, queries, contexts)
    assert max(sizes) <= 300, "what fits is remembered"


def test_gradients_go_on_with_smaller_passes(tiny, small_memory):
    train, queries = (models.encode(tiny(), examples(n, seed, 20)) for n, seed in ((9, 1), (5, 2)))
    expected = gradient.gradient_dot(tiny(), train, queries)
    lm, sizes = small_memory(200)
    with pytest.warns(UserWarning, match="gradients: too little memory, now 192 tokens"):
        found = gradient.gradient_dot(lm, train, queries)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * abs(expected).max())
    assert max(sizes) > 200
    sizes.clear()
    gradient.gradient_dot(lm, train, queries)
    assert max(sizes) <= 200


def test_a_sequence_that_does_not_fit_alone_is_an_error(small_memory):
    lm, _ = small_memory(5)
    rows = models.encode(lm, examples(2, 1, 20))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="1 tokens a pass"):
        models.log_likelihoods(lm, rows)
    assert models.fitting(lm, "log-likelihoods", 999) == 999, "memory may be freed"
