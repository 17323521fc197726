"""Every figure of the notebooks, in one style, and the tables beside them.

A function here draws one picture from matrices and frames and returns it; `save` and `save_table`
write to a folder, whole or not at all.
"""

from icprobe.figures.curves import (
    bands,
    budgets,
    correlation_by_query,
    durations,
    frontier,
    gain_distribution,
    learning_curves,
    overlap_curves,
    projection_error,
)
from icprobe.figures.heatmaps import (
    agreement_by_task,
    agreement_heatmaps,
    layer_shares,
    shares,
    task_heatmap,
)
from icprobe.figures.interval_plots import (
    agreement_by_similarity,
    equivalence,
    intervals,
    neutral_control,
    ranked,
)
from icprobe.figures.scatters import (
    against,
    length_against_score,
    marked_scatters,
    overshoot,
    scatter_with_margins,
    score_density,
)
from icprobe.figures.style import discard, save, save_table
