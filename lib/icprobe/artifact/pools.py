"""Finished scores of the pools that notebooks compare."""

import numpy as np

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


def trained_tokens(experiment: Experiment, made_by: str, loss_on: str) -> np.ndarray:
    """Return how many tokens of each training example its loss was over: [N, M].

    Args:
        experiment: What was scored.
        made_by: What to run if the numbers are not there, for the error message.
        loss_on: "completion" or "text".

    Raises:
        store.ScoresNotFound: If they are not there.
    """
    on_text = loss_on == "text"
    method = methods.TEXT_TOKENS if on_text else methods.REGISTERED["completion_length"]
    return methods.find(experiment, made_by, [method])[method.name]
