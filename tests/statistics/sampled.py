"""Matrices, labels and measures that several tests of statistics take."""

import numpy as np
import pandas as pd

from icprobe.statistics.conditions import Labels


def whole(measure, shape):
    """Return the measure of all rows and columns."""
    return measure(*map(np.arange, shape))


def related(rng):
    """Return two related matrices [N, M] with ties, of whole numbers so that sums are exact."""
    first = rng.normal(scale=5, size=(30, 8)).round()
    return first, (first + rng.normal(scale=5, size=first.shape)).round()


def labels_of(train, queries):
    """Make labels from "type content" strings; the task is both."""
    frames = []
    for names in (train, queries):
        rows = [(name, *name.split()) for name in names]
        frames.append(pd.DataFrame(rows, columns=["task", "type", "content"]))
    return Labels(*frames)
