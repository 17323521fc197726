"""Matrices and labels that several tests of statistics take."""

import numpy as np
import pytest
from sampled import labels_of


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng):
    """Two related matrices [N, M] with ties, of whole numbers so that sums are exact."""
    first = rng.normal(scale=5, size=(30, 8)).round()
    return first, (first + rng.normal(scale=5, size=first.shape)).round()


@pytest.fixture
def crossed():
    """Two types by two contents, 8 training examples and 3 queries each, in turns."""
    tasks = ["ask qasc", "answer qasc", "ask mctaco", "answer mctaco"]
    return labels_of(tasks * 8, tasks * 3)
