"""Statistics against scipy, closed forms and plain loops."""

import itertools

import numpy as np
import pytest
from scipy.stats import kendalltau, norm, rankdata, spearmanr

from icprobe import statistics


def whole(measure, shape):
    return measure(*map(np.arange, shape))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng):
    """Two related matrices [N, M] with ties, whole numbers so that their sums are exact."""
    first = rng.normal(scale=5, size=(30, 8)).round()
    return first, (first + rng.normal(scale=5, size=first.shape)).round()


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
    if mask[rows, 2].sum() < statistics.LEAST:
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


def test_intervals_of_a_table_are_those_of_its_entries(pair):
    first, second = pair
    table = statistics.agreements([first, second], [second])
    one = statistics.agreement(first, second)
    _, low, high = statistics.estimated(table, first.shape, np.random.default_rng(1), 50)
    alone = statistics.estimated(one, first.shape, np.random.default_rng(1), 50)
    assert (low[0, 0, 0], high[0, 0, 0]) == pytest.approx(alone[1:])


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


def test_an_interval_needs_most_of_its_resamples(rng):
    """One pair is all that there is: half of the resamples do not have it."""
    first, second = np.zeros((12, 6)), rng.normal(size=(12, 6))
    first[3, 2] = 1
    measure = statistics.agreement(first, second, "example")
    assert np.isfinite(whole(measure, first.shape))
    assert np.isnan(statistics.estimated(measure, first.shape, rng, 100, "fisher")[1:]).all()
    with pytest.raises(ValueError, match="there are 1 resamples, expected at least 2"):
        statistics.estimated(measure, first.shape, rng, 1)


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


def test_overlap_of_strangers_is_chance(rng):
    first, second = rng.normal(size=(2, 4000, 1))
    measure = statistics.overlap(first, second, 1000)
    assert whole(measure, first.shape) == pytest.approx(0.25, abs=0.04)  # four standard errors


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


def test_intervals_cover(rng):
    """A mean of row effects + column effects + noise: its standard error has a closed form."""
    N, M, runs, hits = 25, 25, 200, 0
    for _ in range(runs):
        values = rng.normal(size=(N, 1)) + rng.normal(size=M) + rng.normal(size=(N, M))
        measure = statistics.pair_mean(values, np.ones_like(values, dtype=bool))
        _, low, high = statistics.estimated(measure, (N, M), rng, resamples=200)
        hits += low <= 0 <= high
    # resampling both sides is a little generous; resampling pairs would cover 40 %
    assert 0.90 <= hits / runs <= 1.0
    exact = 2 * norm.ppf(0.975) * np.sqrt(1 / N + 1 / M + 1 / (N * M))
    assert high - low == pytest.approx(exact, rel=0.35)


def test_the_interval_of_a_correlation_covers(rng):
    """Means of truths that correlate, with noise of each query's own: the target is without it."""
    N, M, runs = 60, 12, 100
    target = 6 / np.pi * np.arcsin(0.8 / (1 + 1 / M) / 2)  # over these M queries' like
    covered = {"fisher": 0, "percentile": 0}
    for _ in range(runs):
        truth = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=N).T
        first, second = (one[:, None] + rng.normal(size=(N, M)) for one in truth)
        measure = statistics.agreement(first, second, "example")
        for kind in covered:
            _, low, high = statistics.estimated(measure, (N, M), rng, 100, kind)
            covered[kind] += low <= target <= high
    assert 0.92 * runs <= covered["fisher"]
    assert covered["percentile"] < covered["fisher"]  # why there is another


def test_ends_by_hand(rng):
    values = rng.normal(0.5, 0.1, size=(4000, 3))
    low, high = statistics.ends(
        np.array([0.5, 0.4, 0.3]), values, np.array(["percentile", "normal", "fisher"])
    )
    assert (low[0], high[0]) == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=0.015)
    assert (low[1], high[1]) == pytest.approx((0.4 - 0.196, 0.4 + 0.196), abs=0.01)
    spread = 1.96 * np.arctanh(values[:, 2]).std(ddof=1)
    assert low[2] == pytest.approx(np.tanh(np.arctanh(0.3) - spread), abs=1e-3)
    perfect = statistics.ends(np.array([1.0]), np.ones((9, 1)), "fisher")
    assert perfect[0][0] <= 1 <= perfect[1][0]
    assert np.isnan(statistics.ends(np.array([np.nan]), values[:, :1], "fisher")).all()
    with pytest.raises(ValueError, match="kind is 'exact'"):
        statistics.ends(np.array([0.5]), values[:, :1], "exact")


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


def test_holm_by_hand():
    adjusted = statistics.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm([0.9, 0.8]), [1, 1])
