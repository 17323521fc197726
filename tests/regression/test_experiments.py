"""Tables on synthetic regression: agreements, intervals, areas, findings, and their files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, ttest_1samp
from sklearn.metrics import roc_auc_score

from icprobe.regression import experiments, influence
from icprobe.regression.experiments import IN_DOMAIN
from icprobe.regression.learners import Ridge
from icprobe.regression.probing import gain, gain_and_score
from icprobe.regression.problems import Prior, Shift
from icprobe.regression.study import Study, agreement, interval
from icprobe.regression.training import Recipe, train
from icprobe.regression.transformer import Regressor, Shape, learner
from icprobe.scores import store

PRIOR = Prior(dimension=4)
SHAPE = Shape(pairs=4, width=8, layers=1, heads=2)


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Regressor(4, SHAPE).eval()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    networks = [network(0), network(1)]
    folder = tmp_path_factory.mktemp("scores")
    return Study(prior=PRIOR, networks=networks, scores_dir=folder, B=6, N=15, M=40, seed=3)


def by_task(first, second):
    """Agreement [B] of scores [B, N, M], by scipy."""
    means = zip(first.mean(2), second.mean(2), strict=True)
    return np.array([spearmanr(*pair).statistic for pair in means])


def gains_of(study, problems, k=0):
    """Gains [S, B, N, M] of all tasks at once."""
    return np.stack([gain(learner(network), problems, k) for network in study.networks])


def test_agreement_is_scipys_network_by_network():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(3, 15, 4)), rng.normal(size=(1, 15, 4))
    expected = [spearmanr(x.mean(1), second[0].mean(1)).statistic for x in first]
    np.testing.assert_allclose(agreement(first, second), expected)


def test_intervals_are_those_of_students_t():
    values = np.random.default_rng(0).normal(0.3, 1, size=(2, 8))
    found = interval(values)
    expected = ttest_1samp(values.mean(0), 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["estimate"] == pytest.approx(values.mean())
    assert found["network_sd"] == pytest.approx(values.mean(1).std(ddof=1))
    assert np.isnan(interval(values[:1])["network_sd"])
    values[0, 3] = np.nan
    assert np.isnan(interval(values)["low"])


# ------------------------------------------------------------------------------------- the files


def test_an_interrupted_table_goes_on_where_it_was(study, tmp_path):
    numbers = np.random.default_rng(0).normal(size=(6, 3)) * [1e-9, 1, 1e9]
    numbers[2, 1] = np.nan
    taken = []

    def compute(condition, tasks):
        for b in tasks:
            taken.append(b)
            if taken.count(4) == 1 and b == 4:
                raise KeyboardInterrupt
            yield {"one": numbers[b, 0], "two": numbers[b, 1:]}

    def tabulate(table="numbers", **changes):
        mine = replace(study, scores_dir=tmp_path, **changes)
        return mine.tabulate(table, {"a": {"which": "a"}}, compute)["a"]

    with pytest.raises(KeyboardInterrupt):
        tabulate()
    for _ in range(2):
        found = tabulate()
        assert taken == [0, 1, 2, 3, 4, 4, 5]  # what is finished is read
        np.testing.assert_array_equal(found["one"], numbers[:, :1].T)
        np.testing.assert_array_equal(found["two"], numbers[:, 1:].T)
    (file,) = (tmp_path / "regression").iterdir()
    for changes in ({"fresh": True}, {"networks": ()}, {"seed": 4}, {"table": "others"}):
        tabulate(**changes)
    assert len(taken) == 7 + 4 * 6 and len(list(file.parent.iterdir())) == 4
    whole = json.loads(file.read_text())
    one = whole["numbers"]["one"]
    for wrong in ([*one, [1.0]], one[:-1], [*one[:-1], ["x"]], [*one[:-1], [1.0, 2.0]], None):
        file.write_text(json.dumps(whole | {"numbers": whole["numbers"] | {"one": wrong}}))
        with pytest.raises(store.StoreError, match=file.name):
            tabulate()
    more = {name: [*tasks, tasks[-1]] for name, tasks in whole["numbers"].items()}
    for damaged in (json.dumps(whole | {"numbers": more}), json.dumps(whole)[:-9]):
        file.write_text(damaged)
        with pytest.raises(store.StoreError, match=file.name):
            tabulate()


# ------------------------------------------------------------------------------------ the tables


def test_in_domain_has_every_pair_and_knows_the_exact_ones(study):
    table = experiments.in_domain(study, [(0, 1), (2, 3)])
    assert len(table) == 4 * (2 * 8 + 3)  # own gradients of single contexts only
    exactly = table[table["influence"] == experiments.ADD_ONE].set_index(["probing", "k"])
    assert exactly.loc["gain of Bayes", "estimate"].tolist() == pytest.approx([1, 1])
    one = table[(table["k"] == 0) & (table["probing"] == "gain")].set_index("influence")
    # without pairs, the context's fit is the zero-shot state, and its Hessian a multiple of I
    rows = one.loc[one.index.str.contains("zero-shot|context's fit"), "estimate"]
    assert len(rows) == 3 and np.ptp(rows) < 1e-12
    # own gradients are held against the first network
    problems = study.problems()
    gains = gains_of(study, problems)[0]
    for form, products in influence.network_gradients(study.networks[0], problems).items():
        row = one.loc[f"network's gradients, {form}"]
        assert row["estimate"] == pytest.approx(by_task(gains, products).mean())
        assert np.isnan(row["network_sd"])
    problems = study.problems(K=2, C=3)
    tracin = influence.tracin_at_base(PRIOR, problems, 2)
    pair = (table["k"] == 2) & (table["influence"] == "TracIn at the context's fit")
    found = table[pair & (table["probing"] == "gain")]["estimate"].item()
    expected = [by_task(gains, tracin) for gains in gains_of(study, problems, 2)]
    assert found == pytest.approx(np.mean(expected))


def test_conditions_are_compared_task_by_task(study):
    table = experiments.under_shifts(study, {IN_DOMAIN: Shift(), "wide": Shift(scale=3)})
    first = table[table["condition"] == IN_DOMAIN].set_index("quantity")
    assert (first[["less", "less_low", "less_high"]].dropna() == 0).all(axis=None)
    other = table[table["condition"] == "wide"].set_index("quantity")
    np.testing.assert_allclose(other["less"], first["estimate"] - other["estimate"])
    problems = study.problems(Shift(scale=3))
    gains, tracin = gains_of(study, problems), influence.tracin_at_base(PRIOR, problems)
    of_networks = np.array([by_task(g, tracin) for g in gains])
    above = of_networks - by_task(gain(Ridge(PRIOR), problems), tracin)
    row = other.loc["gain less gain of Bayes, against TracIn"]
    assert row["estimate"] == pytest.approx(above.mean())
    assert row["low"] == pytest.approx(interval(above)["low"])
    assert other.loc["mean gain", "estimate"] == pytest.approx(gains.mean())
    helping = (gains.mean(3) > 0).mean()
    assert other.loc["share of examples that help", "estimate"] == pytest.approx(helping)
    scores = gain_and_score(Ridge(PRIOR), problems)[1]
    row = other.loc["ICP score of Bayes against TracIn"]
    assert row["estimate"] == pytest.approx(by_task(scores, tracin).mean())


def test_corrupted_labels_are_ranked(study):
    table = experiments.with_corrupted_labels(study).set_index(["corruption", "method"])
    assert len(table) == 3 * 9
    problems = study.problems(Shift(corruption="outlier"))
    # the first term of the exact gain, by hand
    rate = 1 / ((problems.x**2).sum(-1) + PRIOR.penalty)
    first = rate[..., None].numpy() * influence.tracin_at_base(PRIOR, problems)
    exact = influence.add_one(PRIOR, problems)
    gains, clean = gains_of(study, problems), ~problems.corrupted.numpy()
    for name, scores in {"add-one, exact": exact, "TracIn at the example's rate": first}.items():
        row = table.loc[("outlier", name)]
        areas = [roc_auc_score(c, s) for c, s in zip(clean, scores.mean(2), strict=True)]
        assert row["estimate"] == pytest.approx(np.mean(areas))
        rhos = [
            spearmanr(g[b][clean[b]].mean(1), scores[b][clean[b]].mean(1)).statistic
            for g in gains
            for b in range(6)
        ]
        assert row["rho_clean"] == pytest.approx(np.mean(rhos))
    row, mine = (table.loc[("outlier", name)] for name in ("add-one, exact", "gain"))
    assert row["estimate"] > 0.8
    assert row["less"] == pytest.approx(mine["estimate"] - row["estimate"])
    assert mine["rho"] == pytest.approx(1) and mine["less"] == 0


def test_a_number_by_hand_is_the_matrixs(study):
    table, problems = experiments.by_hand(study, 4, 2)["value"], study.problems()
    tracin = influence.tracin_at_base(PRIOR, problems)[0, 4, 2]
    assert table["TracIn: r_i r_q x_i . x_q"] == pytest.approx(tracin)
    bayes = gain(Ridge(PRIOR), problems)[0, 4, 2]
    assert table["gain of Bayes: rate T - rate^2 / 2 r_i^2 (x_i . x_q)^2"] == pytest.approx(bayes)
    mine = gains_of(study, problems)[0, 0, 4, 2]
    assert table["the network's gain"] == pytest.approx(mine, rel=1e-4)


def test_the_anchor_is_exact_and_converges(study):
    larger = replace(study, B=4, N=40, M=30, seed=0)
    table, error = experiments.anchor(larger, [1e-4, 0.1, 1.0], 3)
    assert error < 1e-10
    rho = table.pivot_table(index="rate", columns="quantity", values="estimate")
    assert rho.loc[1e-4, "gain and TracIn"] > 0.999
    assert rho.loc[1e-4, "ICP score and share of queries with TracIn above 0"] > 0.999
    assert rho.loc[1e-4, "ICP score and TracIn"] < 0.95
    assert rho.loc[1.0, "gain and TracIn"] < 0.5


def test_training_is_looked_at_after_each_snapshot(study):
    recipes = [Recipe(prior=PRIOR, shape=SHAPE, steps=4, batch=4, seed=s) for s in range(2)]
    table = experiments.in_training(study, recipes, [0, 4])
    assert table["steps"].tolist() == [0] * 4 + [4] * 4
    last = table[table["steps"] == 4].set_index("quantity")
    networks, problems = [train(recipe).network for recipe in recipes], study.problems()
    tracin = influence.tracin_at_base(PRIOR, problems)
    gains = gains_of(replace(study, networks=networks), problems)
    expected = np.mean([by_task(g, tracin) for g in gains])
    assert last.loc["gain against TracIn", "estimate"] == pytest.approx(expected)
    x, y = PRIOR.prompts(np.random.default_rng([study.seed, 1]), 6 * 100, 3)
    errors = [
        ((y[:, 2] - predict(x[:, :2], y[:, :2], x[:, 2:])[:, 0]) ** 2).mean().item()
        for predict in (*map(learner, networks), Ridge(PRIOR))
    ]
    excess = np.mean(errors[:2]) - errors[2]
    assert last.loc["error above ridge", "estimate"] == pytest.approx(excess) and excess > 0


def test_cost_has_a_row_a_dimension():
    table = experiments.cost([2, 3], Recipe(prior=PRIOR, shape=SHAPE, batch=4), 5, 4)
    assert table["pairs"].tolist() == [5, 7]
    assert (table.drop(columns=["dimension", "pairs"]) > 0).all(axis=None)
