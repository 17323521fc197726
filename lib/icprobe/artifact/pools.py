"""Finished scores of the pools that notebooks compare."""

from icprobe.methods import icp, registry
from icprobe.methods.gradient import GradientProducts, load_parts
from icprobe.scores import Experiment, load
from icprobe.statistics.conditions import Labels, Pool


def read_pool(experiment: Experiment, how_to_make: str, preamble: str = "", **options: str) -> Pool:
    """Return what notebooks 01 and 02 made of a pool.

    Args:
        experiment: What was scored.
        how_to_make: What to run if the scores are not there, for the error message.
        preamble: Of the probe.
        **options: Of the gradients, see `GradientProducts`.

    Raises:
        scores.ScoresNotFound: If something is not there.
    """
    products = GradientProducts(**options)
    found = load(experiment, products, how_to_make)
    return Pool(
        labels=Labels.of(*experiment.load_data()),
        gain=icp.gains(load(experiment, icp.probing(preamble), how_to_make))[0],
        product=found["gradient_dot"],
        cosine=found["gradient_cosine"],
        baselines=load(experiment, registry.baselines(), how_to_make),
        parts=load_parts(experiment, products),
    )
