"""Reliabilities, ceilings and p-values against closed forms and plain loops."""

import numpy as np
import pytest
from sampled import related, whole

from icprobe import statistics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng):
    return related(rng)


@pytest.mark.parametrize("M", [3, 5, 20])
def test_reliability_is_that_of_the_model(rng, M):
    """Row means of signal + noise: the correlation of two sets of M queries is known."""
    N, noise = 8000, 2.0
    scores = rng.normal(size=(N, 1)) + noise * rng.normal(size=(N, M))
    pearson = 1 / (1 + noise**2 / M)
    spearman = 6 / np.pi * np.arcsin(pearson / 2)  # of normal variables
    assert statistics.reliability(scores, rng) == pytest.approx(spearman, abs=0.02)
    assert statistics.reliability(np.arange(10.0)[:, None] + np.zeros(5), rng) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least two queries"):
        statistics.reliability(scores[:, :1], rng)


def test_the_ceiling_of_two_noisy_views_of_one_truth(rng):
    """Truth that correlates 0.8, noise of each query's own, and noise that both methods share."""
    N, M = 4000, 16
    truth = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=N)
    shared = rng.normal(size=(N, M))  # what a query does to both is no agreement
    first, second = (truth[:, [k]] + 2 * shared + rng.normal(size=(N, M)) for k in (0, 1))
    found = statistics.noise_ceiling(first, second, rng, splits=20)
    pearson = 1 / (1 + 5 / M)
    spearman = 6 / np.pi * np.arcsin(pearson / 2)
    assert found.first[0] == pytest.approx(spearman, abs=0.02)
    assert found.ceiling[0] == pytest.approx(np.sqrt(found.first[0] * found.second[0]))
    # rank correlation of the truth
    assert found.disattenuated[0] == pytest.approx(6 / np.pi * np.arcsin(0.4), abs=0.04)


def test_the_ceiling_by_group_and_set_is_that_of_each_alone(pair):
    first, second = (np.concatenate([matrix, matrix[::-1] ** 2]) for matrix in pair)
    sets, groups = np.repeat([0, 1], 4), np.repeat([0, 1], 30)[:, None] + np.zeros(8, int)
    groups[:, 4:] = 1 - groups[:, 4:]
    splits = 400
    found = statistics.noise_ceiling(first, second, np.random.default_rng(0), sets, groups, splits)
    for group in (0, 1):
        own = []
        for columns in (slice(0, 4), slice(4, 8)):
            rows = groups[:, columns][:, 0] == group
            a, b = first[rows, columns], second[rows, columns]
            alone = statistics.noise_ceiling(a, b, np.random.default_rng(1), splits=splits)
            own.append(alone.first[0])
        assert found.first[group] == pytest.approx(np.mean(own), abs=0.02)


def test_p_values(rng):
    x = np.arange(8.0)[:, None]
    # 8! orders, of which two are as extreme as the identity
    assert statistics.p_value(x, x, rng, permutations=10**5) == pytest.approx(2 / 40320, rel=1e-9)
    strangers = [
        statistics.p_value(*rng.normal(size=(2, 30, 2)), rng, permutations=199) for _ in range(200)
    ]
    assert np.mean(np.array(strangers) <= 0.2) == pytest.approx(0.2, abs=0.12)


def test_p_values_within_a_task_do_not_see_tasks(rng):
    tasks = np.repeat(["a", "b", "c"], 8)
    level = 10 * np.repeat([0, 1, 2], 8)[:, None]  # all the agreement there is
    noise = [
        statistics.p_values_within(
            *(level + rng.normal(size=(24, 6)) for _ in range(2)), tasks, rng, permutations=59
        )[0]
        for _ in range(100)
    ]
    assert np.mean(np.array(noise) <= 0.2) == pytest.approx(0.2, abs=0.16)
    truth = level + rng.normal(size=(24, 6))
    # tasks that disagree do not hide that examples agree
    other = -2 * level + 3 * (truth - level) + rng.normal(size=(24, 6))
    assert statistics.p_values_within(truth, other, tasks, rng, permutations=199)[0] == 0.005
    with pytest.raises(ValueError, match="must be in the same groups"):
        statistics.p_values_within(truth, truth, tasks, rng, groups=np.eye(24, 6, dtype=int))
    groups = np.where(np.arange(24) < 16, 0, 1)[:, None] + np.zeros(6, int)
    found = statistics.p_values_within(truth, truth, tasks, rng, groups=groups, permutations=99)
    assert found.tolist() == [0.01, 0.01]
    # a query whose scores do not vary, or has no pair in a group, does not count in it
    flat = truth.copy()
    flat[:, 2] = 1
    groups[16:, 4] = -1
    found = statistics.p_values_within(flat, truth, tasks, rng, groups=groups, permutations=99)
    assert found.tolist() == [0.01, 0.01]


def test_permuted_rankings_are_those_of_permuted_matrices(rng):
    """Against the plain way: exchange, rank again, correlate again."""
    first, second = rng.normal(size=(2, 12, 5))
    first[:, 0] = second[:, 0] = np.arange(12)
    tasks = np.repeat(["a", "b"], 6)
    groups = np.repeat([0, 1], 6)[:, None] + np.zeros(5, int)
    null = []
    for _ in range(1500):
        order = np.concatenate([rng.permutation(6), 6 + rng.permutation(6)])
        measure = statistics.agreements([first[order]], [second], "query", groups)
        null.append(whole(measure, first.shape)[:, 0, 0])
    observed = whole(statistics.agreements([first], [second], "query", groups), first.shape)
    null, centre = np.array(null), np.mean(null, axis=0)
    expected = (np.abs(null - centre) >= np.abs(observed[:, 0, 0] - centre)).mean(0)
    found = statistics.p_values_within(first, second, tasks, rng, groups=groups)
    assert found == pytest.approx(expected, abs=0.05)  # four standard errors
