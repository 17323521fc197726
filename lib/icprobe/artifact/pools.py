"""Finished scores of the pools that notebooks compare."""

from icprobe import icp, influence, methods
from icprobe.experiment import Experiment
from icprobe.statistics.conditions import Labels, Pool


def read_pool(experiment: Experiment, made_by: str, preamble: str = "", **options: str) -> Pool:
    """Return what notebooks 01 and 02 made of a pool.

    Args:
        experiment: What was scored.
        made_by: What to run if the scores are not there, for the error message.
        preamble: Of the probe.
        **options: Of the gradients, see `influence.find`.

    Raises:
        store.ScoresNotFound: If something is not there.
    """
    found = influence.find(experiment, made_by, **options)
    return Pool(
        labels=Labels.of(*experiment.load_data()),
        gain=icp.find(experiment, made_by, preamble, neutral=False).gain,
        product=found.dot,
        cosine=found.cosine,
        baselines=methods.find(experiment, made_by),
        parts=found.parts,
    )
