"""The rule: what intervals decide, by cases, and what it decides where the truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from helpers import ATOL, RTOL
from sampled import mean_rho

from icprobe.statistics import recommendation as rule

GRAD = rule.GRADIENTS


def world(n, m, rng, icp, gradients, similarity, spread=0.0):
    """Return methods that go with the truth as they are told to (correlations of normal scores).

    What a method's correlation is differs between queries by `spread`.
    """

    def draw():
        return 0.5 * rng.standard_normal((n, 1)) + rng.standard_normal((n, m))

    effect, found = draw(), []
    for mean in (icp, gradients, similarity):
        rho = np.clip(mean + spread * rng.standard_normal(m), -0.95, 0.95)
        found.append(rho * effect + np.sqrt(1 - rho**2) * draw())
    return found[0], found[1], {"words": found[2], "noise": draw()}, effect


def agreed(icp_over, gradients_over, against, n=32, m=18, **others):
    """Return the table that `recommend` reads, from (estimate, low, high) of each difference."""
    rows = {"words": (0.1, np.nan, np.nan), "ICP minus words": icp_over}
    rows |= {"gradients minus words": gradients_over, **others, "ICP minus gradients": against}
    frame = pd.DataFrame(rows, index=["estimate", "low", "high"]).T
    return frame.rename_axis("quantity").reset_index().assign(unit="Spearman", n=n, m=m)


def test_agreements_are_means_of_spearman_over_queries(rng):
    gain, gradient, similar, effect = world(20, 6, rng, 0.4, 0.8, 0.3)
    found = rule.agreements(gain, gradient, similar, effect, rng, 50).set_index("quantity")

    alone = {"ICP": gain, "gradients": gradient, **similar}
    expected = {name: mean_rho(scores, effect) for name, scores in alone.items()}
    for name in similar:
        for one in ("ICP", "gradients"):
            expected[f"{one} minus {name}"] = expected[one] - expected[name]
    expected["ICP minus gradients"] = expected["ICP"] - expected["gradients"]
    assert list(found.index) == list(expected)
    np.testing.assert_allclose(found["estimate"], [*expected.values()], rtol=RTOL, atol=ATOL)
    assert (found["low"] <= found["estimate"]).all() and (found["estimate"] <= found["high"]).all()
    assert set(found["n"]) == {20} and set(found["m"]) == {6}


def test_methods_are_averaged_over_the_same_queries(rng):
    """Words that are the gains, but tell nothing apart for half of the queries: 0 there."""
    gain, gradient, _, effect = world(20, 6, rng, 0.6, 0.8, 0.3)
    words = np.where(np.arange(6) < 3, gain, 0.0)
    found = rule.agreements(gain, gradient, {"words": words}, effect, rng, 50)
    estimate = found.set_index("quantity")["estimate"]
    halves = [mean_rho(gain[:, part], effect[:, part]) for part in (slice(3), slice(3, 6))]
    assert estimate["words"] == pytest.approx(halves[0] / 2)
    assert estimate["ICP minus words"] == pytest.approx(halves[1] / 2)


@pytest.mark.parametrize(
    ("differences", "verdict", "method"),
    [
        # better than similarity, as good as gradients
        ([(0.3, 0.1, 0.5), (0.3, 0.1, 0.5), (0.0, -0.09, 0.09)], rule.USE_ICP, "ICP"),
        # measurably worse than gradients, but by less than the margin
        ([(0.3, 0.1, 0.5), (0.3, 0.1, 0.5), (-0.05, -0.09, -0.01)], rule.USE_ICP, "ICP"),
        ([(0.1, -0.1, 0.3), (0.4, 0.2, 0.6), (-0.3, -0.5, -0.1)], rule.USE_GRADIENTS, GRAD),
        # both beat similarity, and gradients beat the probe
        ([(0.2, 0.1, 0.3), (0.5, 0.3, 0.7), (-0.3, -0.5, -0.1)], rule.USE_GRADIENTS, GRAD),
        ([(-0.2, -0.4, 0.05), (0.0, -0.1, 0.09), (-0.2, -0.4, 0.1)], rule.NEITHER, "similarity"),
        # not told from similarity, which might be beaten by more than the margin
        ([(0.1, -0.1, 0.3), (0.15, -0.1, 0.4), (-0.05, -0.2, 0.1)], rule.TOO_SMALL, "ICP"),
        # gradients beat similarity, but may be no better than the probe
        ([(0.1, -0.1, 0.3), (0.3, 0.1, 0.5), (-0.2, -0.5, 0.1)], rule.TOO_SMALL, "gradients"),
    ],
)  # fmt: skip
def test_the_rule(differences, verdict, method):
    found = rule.recommend(agreed(*differences), tolerance=0.1)
    assert (found.verdict, found.method) == (verdict, method)
    assert found.settled == (verdict != rule.TOO_SMALL)
    assert (found.factor > 1) == (verdict == rule.TOO_SMALL)


def exact(icp, gradients, words, states):
    """Return a table without uncertainty, from agreements."""
    over = {
        "ICP minus states": (icp - states,) * 3,
        f"{GRAD} minus states": (gradients - states,) * 3,
    }
    return agreed((icp - words,) * 3, (gradients - words,) * 3, (icp - gradients,) * 3, **over)


def test_whatever_the_estimates_they_speak_for_one_verdict(rng):
    for rho in rng.uniform(-1, 1, (500, 4)):
        assert rule.recommend(exact(*rho)).settled


@pytest.mark.parametrize(
    ("agreements", "verdict"),
    [
        ((0.5, 0.5, 0.3, 0.4), rule.USE_ICP),
        ((0.5, 0.5, 0.3, 0.6), rule.NEITHER),
        ((0.2, 0.5, 0.3, 0.45), rule.USE_GRADIENTS),
        ((0.2, 0.5, 0.3, 0.55), rule.NEITHER),
    ],
)
def test_each_similarity_is_to_be_beaten(agreements, verdict):
    assert rule.recommend(exact(*agreements)).verdict == verdict


def test_few_queries_are_no_verdict():
    sure = (0.3, 0.1, 0.5), (0.3, 0.1, 0.5), (0.0, -0.09, 0.09)
    enough, few = (rule.recommend(agreed(*sure, m=m)) for m in (6, 5))
    assert enough.settled and few.verdict == rule.TOO_SMALL and few.m >= 6


def test_the_size_that_would_settle_it():
    # 0.1 above zero with half an interval of 0.2: four times the sample has an even chance
    found = rule.recommend(agreed((0.1, -0.1, 0.3), (0.1, -0.1, 0.3), (0.0, -0.05, 0.05)), 0.1)
    assert found.factor == pytest.approx(4 * ((1.960 + 0.842) / 1.960) ** 2, rel=1e-3)
    assert (found.n, found.m) == (math.ceil(found.factor * 32), math.ceil(found.factor * 18))
    enough, few = (rule.as_text(found, 0.1, available) for available in ((1000, 800), (100, 50)))
    for said in (enough, few):
        assert all(text in said for text in (f"{found.n} training", f"{found.m} queries", "80%"))
    assert "100 training examples" in few and "100 training examples" not in enough


def test_the_size_is_of_what_the_estimates_speak_for():
    """Neither method beats the noise by the margin; words are beaten, if not measurably."""
    below, above = (0.0, -0.3, 0.3), (0.15, -0.1, 0.2)
    noise = {f"{method} minus noise": below for method in ("ICP", GRAD)}
    found = rule.recommend(agreed(above, above, (0.0, -0.5, 0.5), **noise), 0.1)
    words = rule.recommend(agreed(below, below, (0.0, -0.5, 0.5)), 0.1)
    assert found.method == words.method == "similarity" and found.factor == words.factor


def test_no_size_would_settle_what_lies_on_a_bound():
    found = rule.recommend(agreed((0.0, -0.1, 0.1), (0.2, 0.1, 0.3), (-0.001, -0.2, 0.2)), 0.1)
    assert found.verdict == rule.TOO_SMALL and found.n is None
    assert "would not tell them apart" in rule.as_text(found, 0.1, (100, 50))


def test_too_few_rankings_are_no_verdict(rng):
    few = world(3, 5, rng, 0.9, 0.9, 0.0)
    found = rule.recommend(rule.agreements(*few, rng, 20))
    assert found.verdict == rule.TOO_SMALL and math.isinf(found.factor)
    assert "too few rankings" in rule.as_text(found, 0.1, (3, 5))


def test_a_tolerance_must_be_positive():
    with pytest.raises(ValueError, match=r"tolerance is 0.*above 0"):
        rule.recommend(agreed(*[(0.1, 0.0, 0.2)] * 3), tolerance=0)


@pytest.mark.parametrize(
    ("truth", "verdict"),
    [
        ((0.7, 0.7, 0.2), rule.USE_ICP),
        ((0.3, 0.8, 0.2), rule.USE_GRADIENTS),
        ((0.2, 0.2, 0.4), rule.NEITHER),
    ],
)
def test_large_samples_give_the_right_verdict_and_small_ones_no_wrong_one(truth, verdict):
    for n, m, allowed in ((16, 8, {verdict, rule.TOO_SMALL}), (120, 30, {verdict})):
        for seed in range(4):
            rng = np.random.default_rng(seed)
            found = rule.recommend(rule.agreements(*world(n, m, rng, *truth), rng, 200))
            assert found.verdict in allowed


@pytest.mark.parametrize(("n", "m", "spread"), [(24, 8, 0.0), (40, 6, 0.3)])
def test_the_size_asked_for_settles_it(n, m, spread):
    """If the estimates hold: intervals of small samples around the truth, then larger samples."""
    truth, tolerance = (0.6, 0.6, 0.3), 0.25

    def sampled(n, m, seed):
        rng = np.random.default_rng(seed)
        return rule.agreements(*world(n, m, rng, *truth, spread), rng, 200)

    tables = [sampled(n, m, seed) for seed in range(5)]
    table = tables[0]
    halves = np.mean([frame["high"] - frame["low"] for frame in tables], axis=0) / 2
    rho = {"ICP": 0.6, "gradients": 0.6, "words": 0.3, "noise": 0.0}
    of = {**rho, **{f"{a} minus {b}": rho[a] - rho[b] for a in rho for b in rho}}
    values = table["quantity"].map(of).to_numpy()
    held = table.assign(estimate=values, low=values - halves, high=values + halves)
    asked = rule.recommend(held, tolerance)
    assert 1 < asked.factor < 8
    larger = (sampled(asked.n, asked.m, 100 + seed) for seed in range(20))
    verdicts = [rule.recommend(table, tolerance).verdict for table in larger]
    settled = [verdict for verdict in verdicts if verdict != rule.TOO_SMALL]
    assert len(settled) >= 12  # of 16; of 60, it were 60 and 46
    assert settled.count(rule.USE_ICP) >= len(settled) - 3  # one in twenty intervals is wrong
