"""Statistics of score matrices [N, M] (positive = helps): agreement of methods, with intervals.

Intervals are 95 % bootstrap intervals over training examples and queries together. The tables that
notebooks show are made by `method_findings` (headline numbers of probing and of gradients),
`conditions`, `correlation`, `authors_scores` (the published scores) and `recommendation` (which
method to use).
"""

from icprobe.statistics.bootstrap import (
    MIN_QUERIES,
    bootstrap_ci,
    bootstrap_replicates,
    confidence_interval,
    with_intervals,
)
from icprobe.statistics.inference import with_ceiling
from icprobe.statistics.measures import agreements, pair_mean, with_differences
from icprobe.statistics.ranks import MIN_OBSERVATIONS
from icprobe.statistics.results import as_text, compared, findings, pairs_agree
