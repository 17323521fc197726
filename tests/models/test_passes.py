"""Where a GPU's memory runs out, passes get smaller, and no block is lost."""

import numpy as np
import pytest
import torch
from helpers import ATOL, RTOL, close, encoded

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


def probing(lm, train, queries):
    return models.log_likelihoods(lm, queries, [one.ids for one in train])


def near(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    ("work", "alike", "most", "said"),
    [
        (probing, near, 300, "log-likelihoods: too little memory, now 512 tokens"),
        (gradient.gradient_dot, close, 200, "gradients: too little memory, now 192 tokens"),
    ],
)
def test_work_goes_on_with_smaller_passes(tiny, small_memory, work, alike, most, said):
    rows = encoded(tiny(), 16, 2, 20), encoded(tiny(), 6, 1, 20)
    expected = work(tiny(), *rows)
    lm, sizes = small_memory(most)
    with pytest.warns(UserWarning, match=said):
        alike(work(lm, *rows), expected)
    assert max(sizes) > most
    sizes.clear()
    work(lm, *rows)
    assert max(sizes) <= most, "what fits is remembered"


def test_a_sequence_that_does_not_fit_alone_is_an_error(small_memory):
    lm, _ = small_memory(5)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="1 tokens a pass"):
        models.log_likelihoods(lm, encoded(lm, 2, 1, 20))
    assert models.fitting(lm, "log-likelihoods", 999) == 999, "memory may be freed"
