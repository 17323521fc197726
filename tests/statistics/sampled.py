"""Measures and labels that several tests of statistics make."""

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from icprobe import statistics
from icprobe.statistics.conditions import Labels


def whole(measure, shape):
    """Return the measure of all rows and columns."""
    return measure(*map(np.arange, shape))


def agreement(first, second, level="query", groups=None, given=()):
    """Return the measure "agreement of two matrices"."""
    measure = statistics.agreements([first], [second], level, groups, given)
    return lambda rows, columns: measure(rows, columns)[0, 0, 0]


def mean_rho(first, second):
    """Return the mean over columns of Spearman's rho by scipy."""
    return np.mean([spearmanr(*both).statistic for both in zip(first.T, second.T, strict=True)])


def labels_of(train, queries):
    """Make labels from "type content" strings; the task is both."""
    frames = []
    for names in (train, queries):
        rows = [(name, *name.split()) for name in names]
        frames.append(pd.DataFrame(rows, columns=["task", "type", "content"]))
    return Labels(*frames)
