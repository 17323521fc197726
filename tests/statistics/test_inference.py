"""Reliabilities, ceilings and p-values against closed forms and plain loops."""

import numpy as np
import pytest
from sampled import agreement, whole

from icprobe.statistics import inference
from icprobe.statistics.inference import noise_ceiling, p_value, p_values_within, reliability

EXPECTED = 6 / np.pi  # Spearman's rho of normal variables is this times arcsin(Pearson's / 2)


@pytest.mark.parametrize("M", [3, 5, 20])
def test_reliability_is_that_of_the_model(rng, M):
    """Row means of signal + noise: the correlation of two sets of M queries is known."""
    N, noise = 8000, 2.0
    scores = rng.normal(size=(N, 1)) + noise * rng.normal(size=(N, M))
    spearman = EXPECTED * np.arcsin(1 / (1 + noise**2 / M) / 2)
    assert reliability(scores, rng) == pytest.approx(spearman, abs=0.02)
    assert reliability(np.arange(10.0)[:, None] + np.zeros(5), rng) == pytest.approx(1)
    assert np.isnan(reliability(scores[:, :1], rng)), "one query has no halves"


def test_the_ceiling_of_two_noisy_views_of_one_truth(rng):
    """Truth that correlates 0.8, noise of each query's own, and noise that both methods share."""
    N, M = 4000, 16
    truth = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=N)
    shared = rng.normal(size=(N, M))  # what a query does to both is no agreement
    first, second = (truth[:, [k]] + 2 * shared + rng.normal(size=(N, M)) for k in (0, 1))
    found = dict(zip(inference.CEILING, noise_ceiling(first, second, rng, splits=20), strict=True))
    spearman = EXPECTED * np.arcsin(1 / (1 + 5 / M) / 2)
    assert found["reliability"][0] == pytest.approx(spearman, abs=0.02)
    assert found["ceiling"][0] == pytest.approx(spearman, abs=0.02)  # of both alike
    # rank correlation of the truth
    assert found["disattenuated"][0] == pytest.approx(EXPECTED * np.arcsin(0.4), abs=0.04)


def test_the_ceiling_by_group_and_set_is_that_of_each_alone(pair):
    first, second = (np.concatenate([matrix, matrix[::-1] ** 2]) for matrix in pair)
    sets, groups = np.repeat([0, 1], 4), np.repeat([0, 1], 30)[:, None] + np.zeros(8, int)
    groups[:, 4:] = 1 - groups[:, 4:]
    splits = 400
    found = noise_ceiling(first, second, np.random.default_rng(0), sets, groups, splits)[0]
    for group in (0, 1):
        own = []
        for columns in (slice(0, 4), slice(4, 8)):
            rows = groups[:, columns][:, 0] == group
            a, b = first[rows, columns], second[rows, columns]
            own.append(noise_ceiling(a, b, np.random.default_rng(1), splits=splits)[0, 0])
        assert found[group] == pytest.approx(np.mean(own), abs=0.02)


def test_p_values(rng):
    x = np.arange(8.0)[:, None]
    # 8! orders, of which two are as extreme as the identity
    assert p_value(x, x, rng, permutations=10**5) == pytest.approx(2 / 40320, rel=1e-9)
    strangers = [p_value(*rng.normal(size=(2, 30, 2)), rng, permutations=199) for _ in range(200)]
    assert np.mean(np.array(strangers) <= 0.2) == pytest.approx(0.2, abs=0.12)


def test_p_values_within_a_task_do_not_see_tasks(rng):
    tasks, one = np.repeat(["a", "b", "c"], 8), np.zeros((24, 6), int)
    level = 10 * np.repeat([0, 1, 2], 8)[:, None]  # all the agreement there is
    noise = [
        p_values_within(
            *(level + rng.normal(size=(24, 6)) for _ in range(2)), tasks, rng, "query", one, 59
        )[0]
        for _ in range(100)
    ]
    assert np.mean(np.array(noise) <= 0.2) == pytest.approx(0.2, abs=0.16)
    truth = level + rng.normal(size=(24, 6))
    # tasks that disagree do not hide that examples agree
    other = -2 * level + 3 * (truth - level) + rng.normal(size=(24, 6))
    assert p_values_within(truth, other, tasks, rng, "query", one, 199)[0] == 0.005
    # a query whose scores do not vary, or has no pair in a group, does not count in it
    groups = np.where(np.arange(24) < 16, 0, 1)[:, None] + one
    flat = truth.copy()
    flat[:, 2] = 1
    groups[16:, 4] = -1
    found = p_values_within(flat, truth, tasks, rng, "query", groups, 99)
    assert found.tolist() == [0.01, 0.01]


def test_permuted_rankings_are_those_of_permuted_matrices(rng):
    """Against the plain way: exchange, rank again, correlate again."""
    first, second = rng.normal(size=(2, 12, 5))
    first[:, 0] = second[:, 0] = np.arange(12)
    tasks = np.repeat(["a", "b"], 6)
    groups = np.repeat([0, 1], 6)[:, None] + np.zeros(5, int)

    def agreements(first):
        return [
            whole(agreement(first, second, groups=np.where(groups == k, 0, -1)), first.shape)
            for k in (0, 1)
        ]

    orders = [np.concatenate([rng.permutation(6), 6 + rng.permutation(6)]) for _ in range(1500)]
    null = np.array([agreements(first[order]) for order in orders])
    centre = null.mean(axis=0)
    expected = (np.abs(null - centre) >= np.abs(agreements(first) - centre)).mean(0)
    found = p_values_within(first, second, tasks, rng, "query", groups)
    assert found == pytest.approx(expected, abs=0.05)  # four standard errors
