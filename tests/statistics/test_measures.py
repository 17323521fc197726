"""Agreements against scipy, closed forms and plain loops."""

import itertools

import numpy as np
import pytest
from sampled import agreement, mean_rho, whole
from scipy.stats import rankdata, spearmanr

from icprobe import statistics
from icprobe.statistics import measures


def test_agreements_are_scipys(pair, rng):
    rows, columns = rng.integers(30, size=30), rng.integers(8, size=8)
    a, b = (matrix[rows][:, columns] for matrix in pair)
    for level, expected in {
        "example": spearmanr(a.mean(1), b.mean(1)).statistic,
        "pair": spearmanr(a.ravel(), b.ravel()).statistic,
        "query": mean_rho(a, b),
    }.items():
        assert agreement(*pair, level)(rows, columns) == pytest.approx(expected)


def test_in_a_group_each_query_ranks_its_own_pairs(pair, rng):
    first, second = pair
    mask = rng.random(first.shape) < 0.4
    mask[:, 2] = False
    mask[:3, 2] = True  # too few
    groups = np.where(mask, 0, -1)
    rows, columns = rng.permutation(30), np.array([0, 0, 2, 3, 5, 5, 7, 1])
    expected = [
        spearmanr(first[mask[:, j], j], second[mask[:, j], j]).statistic
        for j in columns[columns != 2]
    ]
    measure = agreement(first, second, groups=groups)
    assert measure(rows, columns) == pytest.approx(np.mean(expected))
    offsets = 100 * np.arange(8)  # a query's level is nobody's agreement
    shifted = agreement(first + offsets, second + offsets, groups=groups)
    assert whole(shifted, first.shape) == pytest.approx(whole(measure, first.shape))
    none = agreement(first, second, groups=np.full_like(groups, -1))
    assert np.isnan(whole(none, first.shape))


def test_sets_of_queries_are_averaged_and_weigh_as_many_as_were_drawn(pair, rng):
    tasks = np.array(list("aabbbacc"))
    rows, columns = rng.integers(30, size=30), np.array([0, 0, 1, 3, 3, 4, 5, 2])  # none of c
    expected = 0
    for task, weight in (("a", 4), ("b", 4)):
        mine = columns[tasks[columns] == task]
        a, b = (matrix[rows][:, mine].mean(1) for matrix in pair)
        expected += weight / 8 * spearmanr(a, b).statistic
    assert agreement(*pair, tasks)(rows, columns) == pytest.approx(expected)


@pytest.mark.parametrize("level", ["query", "labels"])
def test_a_table_of_many_is_many_tables_of_one(pair, rng, level):
    first, second = pair
    others = [rng.normal(size=first.shape).round() + x for x in pair]
    groups = rng.integers(-1, 2, size=first.shape)
    if level == "labels":
        level = np.array([0, 0, 1, 1, 1, 2, 2, 2])
        groups = groups[:, level]
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
                alone = agreement(*one, level, np.where(groups == group, 0, -1), given)
                assert value == pytest.approx(alone(rows, columns), nan_ok=True)


def test_groups_without_pairs_have_no_agreement_and_dilute_none(pair):
    first, second = pair
    groups = np.where(np.arange(8) < 3, 0, 2) + np.zeros((30, 1), int)
    found = whole(statistics.agreements([first], [second], "query", groups), first.shape)[:, 0, 0]
    ends = [mean_rho(first[:, part], second[:, part]) for part in (slice(3), slice(3, 8))]
    assert found == pytest.approx([ends[0], np.nan, ends[1]], nan_ok=True)


@pytest.mark.parametrize(
    ("level", "message"),
    [("task", "level is 'task'"), (np.array([0, 0, 1, 1]), "must be in the same groups")],
)
def test_what_does_not_fit_is_said(level, message):
    scores, groups = np.arange(20.0).reshape(5, 4), np.array([[0, 1, 0, 0]] * 5)
    with pytest.raises(ValueError, match=message):
        agreement(scores, scores, level, groups)


def test_a_matrix_that_does_not_vary_agrees_with_nothing_and_spoils_nothing(pair):
    first, second = pair
    for given in ([], [second**2]):
        both = [np.ones_like(first), first]
        table = statistics.agreements(both, [second], "query", given=given)
        found = whole(table, first.shape)[0, :, 0]
        alone = whole(agreement(first, second, given=given), first.shape)
        assert found == pytest.approx([np.nan, alone], nan_ok=True)


@pytest.mark.parametrize("M", [7, 12, 48])
def test_means_of_zeros_and_ones_keep_their_ties(rng, M):
    first, second = rng.random((40, M)) < 0.7, rng.normal(size=(40, M))
    assert len(np.unique(first.sum(1))) < 40, "there are ties"
    for columns in (np.arange(M), rng.integers(M, size=M)):
        measure = agreement(first.astype(float), second, "example")
        expected = spearmanr(first[:, columns].sum(1), second[:, columns].sum(1)).statistic
        assert measure(np.arange(40), columns) == pytest.approx(expected, abs=1e-12)


def test_contrasts_are_of_sets_that_have_both(rng):
    first, second = rng.normal(size=(2, 20, 4))
    groups = np.repeat([0, 1], 10)[:, None] + np.zeros(4, int)
    groups[2:10, 3] = -1  # too few of the first group
    of_sets = measures.by_set([first], [second], "query", groups, count=3)
    found = whole(measures.contrasts(of_sets), first.shape)
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
        measure = agreement(first, second, "example", given=[*given, *more])
        assert np.isfinite(whole(measure, first.shape)) == known


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
    of_queries = np.mean([partial([matrix[:, j] for matrix in matrices]) for j in range(8)])
    for level, covariates, expected in (
        ("example", given, partial([matrix.mean(1) for matrix in matrices])),
        ("query", given, of_queries),
        ("query", [*given, np.ones_like(first)], of_queries),  # a constant explains nothing
        ("example", [first], np.nan),  # nothing is left
    ):
        found = whole(agreement(first, second, level, given=covariates), first.shape)
        assert found == pytest.approx(expected, nan_ok=True)


def test_overlap_by_hand_and_with_ties():
    first, second = np.array([5.0, 4, 3, 2, 1]), np.array([5.0, 1, 4, 2, 3])
    for k, end, expected in (
        (2, "top", 1 / 2), (3, "top", 2 / 3), (5, "top", 1), (1, "bottom", 0), (2, "bottom", 1 / 2),
    ):  # fmt: skip
        assert measures.in_common(first, second, k, end) == pytest.approx(expected), (k, end)
    tied = np.array([2.0, 1, 1, 1, 0])
    others = [
        len({0, *chosen} & {0, 2, 4}) / 3 for chosen in itertools.combinations((1, 2, 3), 2)
    ]  # the three best of `second` are 0, 2 and 4
    assert measures.in_common(tied, second, 3) == pytest.approx(np.mean(others))
