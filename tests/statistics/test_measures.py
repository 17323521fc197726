"""Agreements against scipy, closed forms and plain loops."""

import itertools

import numpy as np
import pytest
from sampled import related, whole
from scipy.stats import kendalltau, rankdata, spearmanr

from icprobe import statistics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng):
    return related(rng)


def test_agreements_are_scipys(pair, rng):
    first, second = pair
    rows, columns = rng.integers(30, size=30), rng.integers(8, size=8)
    a, b = (matrix[rows][:, columns] for matrix in pair)
    expected = spearmanr(a.mean(1), b.mean(1)).statistic
    assert statistics.agreement(first, second, "example")(rows, columns) == pytest.approx(expected)
    expected = spearmanr(a.ravel(), b.ravel()).statistic
    assert statistics.agreement(first, second, "pair")(rows, columns) == pytest.approx(expected)
    expected = np.mean([spearmanr(a[:, j], b[:, j]).statistic for j in range(8)])
    assert statistics.agreement(first, second)(rows, columns) == pytest.approx(expected)


def test_within_a_condition_each_query_ranks_its_own_pairs(pair, rng):
    first, second = pair
    mask = rng.random(first.shape) < 0.4
    mask[:, 2] = False
    mask[:3, 2] = True  # too few
    rows, columns = rng.integers(30, size=30), np.array([0, 0, 2, 3, 5, 5, 7, 1])
    expected = []
    for j in columns[columns != 2]:
        kept = rows[mask[rows, j]]
        expected.append(spearmanr(first[kept, j], second[kept, j]).statistic)
    measure = statistics.agreement(first, second, mask=mask)
    if mask[rows, 2].sum() < statistics.MIN_OBSERVATIONS:
        assert measure(rows, columns) == pytest.approx(np.mean(expected))
    offsets = 100 * np.arange(8)  # a query's level is nobody's agreement
    shifted = statistics.agreement(first + offsets, second + offsets, mask=mask)
    assert whole(shifted, first.shape) == pytest.approx(whole(measure, first.shape))
    none = statistics.agreement(first, second, mask=np.zeros_like(mask))
    assert np.isnan(whole(none, first.shape))


def test_sets_of_queries_are_averaged_and_weigh_as_many_as_were_drawn(pair, rng):
    first, second = pair
    tasks = np.array(list("aabbbacc"))
    rows, columns = rng.integers(30, size=30), np.array([0, 0, 1, 3, 3, 4, 5, 2])  # none of c
    expected = 0
    for task, weight in (("a", 4), ("b", 4)):
        mine = columns[tasks[columns] == task]
        a, b = (matrix[rows][:, mine].mean(1) for matrix in pair)
        expected += weight / 8 * spearmanr(a, b).statistic
    measure = statistics.agreement(first, second, tasks)
    assert measure(rows, columns) == pytest.approx(expected)
    with pytest.raises(ValueError, match="level is 'task'"):
        statistics.agreement(first, second, "task")


@pytest.mark.parametrize("level", ["query", "pair", "labels"])
def test_a_table_of_many_is_many_tables_of_one(pair, rng, level):
    first, second = pair
    others = [rng.normal(size=first.shape).round() + x for x in pair]
    if level == "labels":
        level = np.array([0, 0, 1, 1, 1, 2, 2, 2])
        groups = rng.integers(-1, 2, size=(30, 3))[:, level]
    else:
        groups = rng.integers(-1, 2, size=first.shape)
    for given in ([], [rng.normal(size=first.shape)]):
        table = statistics.agreements([first, *others], [second, first], level, groups, given)
        for rows, columns in (
            (np.arange(30), np.arange(8)),
            (rng.integers(30, size=30), rng.integers(8, size=8)),
        ):
            found = table(rows, columns)
            assert found.shape == (2, 3, 2)
            for (group, a, b), value in np.ndenumerate(found):
                one = [first, *others][a], [second, first][b]
                alone = statistics.agreement(*one, level, groups == group, given)
                assert value == pytest.approx(alone(rows, columns), nan_ok=True)


def test_groups_without_pairs_have_no_agreement_and_dilute_none(pair):
    first, second = pair
    groups = np.where(np.arange(8) < 3, 0, 2) + np.zeros((30, 1), int)
    found = whole(statistics.agreements([first], [second], "query", groups), first.shape)[:, 0, 0]
    rho = [spearmanr(first[:, j], second[:, j]).statistic for j in range(8)]
    assert found[[0, 2]] == pytest.approx([np.mean(rho[:3]), np.mean(rho[3:])])
    assert np.isnan(found[1])


def test_a_set_lies_in_one_group():
    scores = np.arange(20.0).reshape(5, 4)
    groups = np.array([[0, 1, 0, 0]] * 5)
    with pytest.raises(ValueError, match="must be in the same groups"):
        statistics.agreements([scores], [scores], np.array([0, 0, 1, 1]), groups)


def test_a_matrix_that_does_not_vary_agrees_with_nothing_and_spoils_nothing(pair):
    first, second = pair
    constant = np.ones_like(first)
    for given in ([], [second**2]):
        table = statistics.agreements([constant, first], [second], given=given)
        found = whole(table, first.shape)
        alone = whole(statistics.agreement(first, second, given=given), first.shape)
        assert np.isnan(found[0, 0, 0]) and found[0, 1, 0] == pytest.approx(alone)


@pytest.mark.parametrize("M", [7, 12, 48])
def test_means_of_zeros_and_ones_keep_their_ties(rng, M):
    first, second = rng.random((40, M)) < 0.7, rng.normal(size=(40, M))
    assert len(np.unique(first.sum(1))) < 40, "there are ties"
    for columns in (np.arange(M), rng.integers(M, size=M)):
        measure = statistics.agreement(first.astype(float), second, "example")
        expected = spearmanr(first[:, columns].sum(1), second[:, columns].sum(1)).statistic
        assert measure(np.arange(40), columns) == pytest.approx(expected, abs=1e-12)


def test_contrasts_are_of_sets_that_have_both(rng):
    first, second = rng.normal(size=(2, 20, 4))
    groups = np.repeat([0, 1], 10)[:, None] + np.zeros(4, int)
    groups[2:10, 3] = -1  # too few of the first group
    found = whole(statistics.contrasts(first, second, "query", groups, 3), first.shape)
    rho = np.array([
        [spearmanr(first[rows, j], second[rows, j]).statistic for j in range(4)]
        for rows in (slice(10), slice(10, 20))
    ])  # fmt: skip
    expected = [rho[0, :3].mean(), rho[1].mean(), np.nan, (rho[0] - rho[1])[:3].mean(), np.nan]
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("n, known", [(10, False), (11, False), (12, True)])
def test_covariates_cost_observations(rng, n, known):
    first, second, *given = rng.normal(size=(10, n, 1))
    for more in ([], [np.ones((n, 1))]):  # one that does not vary costs none
        measure = statistics.agreement(first, second, "example", given=[*given, *more])
        assert np.isfinite(whole(measure, first.shape)) == known


def test_kendall_is_scipys(pair, rng):
    first, second = pair
    rows, columns = rng.integers(30, size=30), rng.integers(8, size=8)
    a, b = (matrix[rows][:, columns].sum(1) for matrix in pair)
    found = statistics.kendall(first, second)(rows, columns)
    assert found == pytest.approx(kendalltau(a, b).statistic)


def test_partial_correlation_is_that_of_residuals(pair, rng):
    first, second = pair
    given = [rng.normal(size=first.shape) + first, rng.normal(size=first.shape) + second]

    def residuals(x, others):
        design = np.column_stack([np.ones(len(x)), *map(rankdata, others)])
        y = rankdata(x)
        return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]

    def partial(values):
        a, b, *others = values
        return np.corrcoef(residuals(a, others), residuals(b, others))[0, 1]

    matrices = [first, second, *given]
    expected = partial([matrix.mean(1) for matrix in matrices])
    measure = statistics.agreement(first, second, "example", given=given)
    assert whole(measure, first.shape) == pytest.approx(expected)
    expected = partial([matrix.ravel() for matrix in matrices])
    measure = statistics.agreement(first, second, "pair", given=given)
    assert whole(measure, first.shape) == pytest.approx(expected)
    expected = np.mean([partial([matrix[:, j] for matrix in matrices]) for j in range(8)])
    measure = statistics.agreement(first, second, given=given)
    assert whole(measure, first.shape) == pytest.approx(expected)
    constant = statistics.agreement(first, second, given=[*given, np.ones_like(first)])
    assert whole(constant, first.shape) == pytest.approx(expected)  # explains nothing
    itself = statistics.agreement(first, second, "example", given=[first])
    assert np.isnan(whole(itself, first.shape))  # nothing is left


def test_overlap_by_hand_and_with_ties():
    first = np.array([[5.0], [4], [3], [2], [1]])
    second = np.array([[5.0], [1], [4], [2], [3]])
    for k, end, expected in (
        (2, "top", 1 / 2), (3, "top", 2 / 3), (5, "top", 1), (1, "bottom", 0), (2, "bottom", 1 / 2),
    ):  # fmt: skip
        measure = statistics.overlap(first, second, k, end)
        assert whole(measure, first.shape) == pytest.approx(expected), (k, end)
    tied = np.array([[2.0], [1], [1], [1], [0]])
    others = [
        len({0, *chosen} & {0, 2, 4}) / 3 for chosen in itertools.combinations((1, 2, 3), 2)
    ]  # the three best of `second` are 0, 2 and 4
    measure = statistics.overlap(tied, second, 3)
    assert whole(measure, tied.shape) == pytest.approx(np.mean(others))
    with pytest.raises(ValueError, match="k is 6, expected 1 to 5"):
        statistics.overlap(first, second, 6)
    with pytest.raises(ValueError, match="end is 'middle'"):
        statistics.overlap(first, second, 2, "middle")


def test_joint_shuffles_change_nothing_and_a_minus_the_sign(pair, rng):
    first, second = pair
    groups = rng.integers(-1, 2, size=first.shape)
    measure = statistics.agreements([first], [second], "query", groups)
    expected = whole(measure, first.shape)
    mixed = np.ix_(rng.permutation(30), rng.permutation(8))
    shuffled = statistics.agreements([first[mixed]], [second[mixed]], "query", groups[mixed])
    np.testing.assert_allclose(whole(shuffled, first.shape), expected)
    negated = statistics.agreements([-first], [second], "query", groups)
    np.testing.assert_allclose(whole(negated, first.shape), -expected)
