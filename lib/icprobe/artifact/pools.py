"""Finished scores of the pools that notebooks compare."""

from icprobe.methods import icp, registry
from icprobe.methods.gradient import GradientProducts, load_parts
from icprobe.scores import Experiment, load
from icprobe.statistics.conditions import Labels, Pool


def read_pool(experiment: Experiment, how_to_make: str, preamble: str = "", **options: str) -> Pool:
    """Return what notebooks 01 and 02 made of a pool; options are those of `GradientProducts`.

    Raises:
        scores.ScoresNotFound: If something is not there; says how to make it.
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
