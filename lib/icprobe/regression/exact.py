"""Where everything is exact: one example and one query by hand, and the one-step attention."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from icprobe.regression import influence, probing
from icprobe.regression.learners import LinearAttention
from icprobe.regression.problems import Prior, Problems, draw
from icprobe.regression.study import agreement, interval
from icprobe.regression.transformer import Regressor, learner


def by_hand(prior: Prior, network: Regressor, problems: Problems, i: int, j: int) -> pd.DataFrame:
    """Return one example and one query of the first problem, number by number: what, value.

    Args:
        prior: Of the problems.
        network: Which is shown the example.
        problems: See `problems.draw`.
        i: Of the example.
        j: Of the query.
    """
    x, y = problems.x[0, i], problems.y[0, i]
    query, answer = problems.queries[0, j], problems.answers[0, j]
    centre, predict = prior.centre, learner(network)
    nothing = problems.base_x[:1, 0, :0], problems.base_y[:1, 0, :0]
    r, r_q = y - x @ centre, answer - query @ centre
    rate = 1 / (x @ x + prior.penalty)
    before, after = (
        predict(*context, query[None, None])[0, 0]
        for context in (nothing, (x[None, None], y[None, None]))
    )
    values = {
        "label of the example, less its zero-shot prediction: r_i": r,
        "label of the query, less its zero-shot prediction: r_q": r_q,
        "how alike their covariates are: x_i . x_q": x @ query,
        "TracIn: r_i r_q x_i . x_q": r * r_q * (x @ query),
        "rate of the Bayes learner's step: 1 / (|x_i|^2 + penalty)": rate,
        "gain of Bayes: rate T - rate^2 / 2 r_i^2 (x_i . x_q)^2": rate * r * r_q * (x @ query)
        - rate**2 / 2 * (r * (x @ query)) ** 2,
        "the network's prediction without the example": before,
        "the network's prediction after the example": after,
        "the network's gain": ((answer - before) ** 2 - (answer - after) ** 2) / 2,
    }
    return pd.DataFrame({"value": {name: float(value) for name, value in values.items()}})


def anchor(
    prior: Prior, rates: Sequence[float], rng: np.random.Generator, B: int, N: int, M: int, k: int
) -> tuple[pd.DataFrame, float]:
    """Return how the exact one-step attention agrees with TracIn, by its rate, and its error.

    Args:
        prior: Of tasks; steps start at zero.
        rates: Of the step.
        rng: Draws the problems.
        B: Problems.
        N: Examples.
        M: Queries.
        k: Pairs before the example where the formula is checked a second time.

    Returns:
        One row a rate and quantity: rate, quantity, and `interval`'s columns, one-shot; and the
        largest difference of a gain, one-shot or after k pairs, from `influence.step_gain`:
        rate * T - rate^2 / 2 * r_i^2 (x_i . x_q)^2.
    """
    problems = draw(prior, rng, B, N, M, K=k)
    start = torch.zeros(prior.dimension, dtype=torch.float64)
    w = start.expand(B, -1)
    products = influence.tracin(problems, w)
    rows, error = [], 0.0
    for rate in rates:
        attention = LinearAttention(rate, start)
        gains, scores = probing.gain_and_score(attention, problems)
        moved = influence.after_attention_step(problems, k, attention)
        later = probing.gain(attention, problems, k)
        for found, expected in ((gains, problems), (later, moved)):
            error = max(error, np.abs(found - influence.step_gain(expected, w, rate)).max())
        compared = {
            "gain and TracIn": (gains, products),
            "ICP score and TracIn": (scores, products),
            "ICP score and share of queries with TracIn above 0": (scores, products > 0),
        }
        for quantity, pair in compared.items():
            rho = agreement(*pair)[None]  # of tasks rather than networks
            rows.append({"rate": rate, "quantity": quantity, **interval(rho)})
    return pd.DataFrame(rows), error
