"""The rule: what intervals decide, by cases, and what it decides where the truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from conftest import ATOL, RTOL
from scipy.stats import spearmanr

from icprobe import advice

GRAD = advice.GRADIENTS
DECIDING = (advice.ICP_OVER, advice.GRADIENTS_OVER, advice.ICP_AGAINST)


def world(n, m, rng, icp, gradients, similarity):
    """Return methods that go with the truth as they are told to (correlations of normal scores)."""

    def draw():
        return 0.5 * rng.standard_normal((n, 1)) + rng.standard_normal((n, m))

    effect = draw()
    found = [rho * effect + math.sqrt(1 - rho**2) * draw() for rho in (icp, gradients, similarity)]
    return found[0], found[1], {"words": found[2], "noise": draw()}, effect


def agreed(icp_over, gradients_over, against, n=32, m=18):
    """Return the table that `advise` reads, from (estimate, low, high) of each difference."""
    rows = zip(DECIDING, (icp_over, gradients_over, against), strict=True)
    frame = pd.DataFrame(
        [(name, *numbers) for name, numbers in rows],
        columns=["quantity", "estimate", "low", "high"],
    )
    return frame.assign(unit="Spearman", n=n, m=m)


def test_agreements_are_means_of_spearman_over_queries():
    rng = np.random.default_rng(0)
    gain, gradient, similar, effect = world(20, 6, rng, 0.4, 0.8, 0.3)
    found = advice.agreements(gain, gradient, similar, effect, rng, 50).set_index("quantity")

    def mean(scores):
        return np.mean(
            [spearmanr(*pair).statistic for pair in zip(scores.T, effect.T, strict=True)]
        )

    best = max(map(mean, similar.values()))
    expected = {
        "ICP": mean(gain),
        "gradients": mean(gradient),
        "words": mean(similar["words"]),
        "noise": mean(similar["noise"]),
        "similarity": best,
        "ICP less similarity": mean(gain) - best,
        "gradients less similarity": mean(gradient) - best,
        "ICP less gradients": mean(gain) - mean(gradient),
    }
    assert list(found.index) == list(expected)
    np.testing.assert_allclose(found["estimate"], [*expected.values()], rtol=RTOL, atol=ATOL)
    assert (found["low"] <= found["estimate"]).all() and (found["estimate"] <= found["high"]).all()
    assert set(found["n"]) == {20} and set(found["m"]) == {6}


def test_agreements_say_what_does_not_fit():
    good, short = np.zeros((5, 3)), np.zeros((5, 2))
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"words has shape \(5, 2\).*\(5, 3\)"):
        advice.agreements(good, good, {"words": short}, good, rng)
    with pytest.raises(ValueError, match="at least one is needed"):
        advice.agreements(good, good, {}, good, rng)


@pytest.mark.parametrize(
    ("differences", "verdict", "method"),
    [
        # better than similarity, as good as gradients
        ([(0.3, 0.1, 0.5), (0.3, 0.1, 0.5), (0.0, -0.09, 0.09)], advice.USE_ICP, "ICP"),
        # measurably worse than gradients, but by less than the margin
        ([(0.3, 0.1, 0.5), (0.3, 0.1, 0.5), (-0.05, -0.09, -0.01)], advice.USE_ICP, "ICP"),
        ([(0.1, -0.1, 0.3), (0.4, 0.2, 0.6), (-0.3, -0.5, -0.1)], advice.USE_GRADIENTS, GRAD),
        # both beat similarity, and gradients beat the probe
        ([(0.2, 0.1, 0.3), (0.5, 0.3, 0.7), (-0.3, -0.5, -0.1)], advice.USE_GRADIENTS, GRAD),
        ([(-0.2, -0.4, 0.05), (0.0, -0.1, 0.09), (-0.2, -0.4, 0.1)], advice.NEITHER, "similarity"),
        # not told from similarity, which might be beaten by more than the margin
        ([(0.1, -0.1, 0.3), (0.15, -0.1, 0.4), (-0.05, -0.2, 0.1)], advice.TOO_SMALL, "ICP"),
        # gradients beat similarity, but may be no better than the probe
        ([(0.1, -0.1, 0.3), (0.3, 0.1, 0.5), (-0.2, -0.5, 0.1)], advice.TOO_SMALL, "gradients"),
    ],
)  # fmt: skip
def test_the_rule(differences, verdict, method):
    found = advice.advise(agreed(*differences), margin=0.1)
    assert (found.verdict, found.method) == (verdict, method)
    assert found.settled == (verdict != advice.TOO_SMALL)
    assert (found.factor > 1) == (verdict == advice.TOO_SMALL)


def test_whatever_the_estimates_they_speak_for_one_verdict():
    rng = np.random.default_rng(0)
    for icp, gradients in rng.uniform(-1, 1, (500, 2)):
        exact = [(x, x, x) for x in (icp, gradients, icp - gradients)]
        assert advice.advise(agreed(*exact)).settled


def test_the_size_that_would_settle_it():
    # 0.1 above zero with half an interval of 0.2: four times the sample; the other is settled
    found = advice.advise(agreed((0.1, -0.1, 0.3), (0.1, -0.1, 0.3), (0.0, -0.05, 0.05)), 0.1)
    assert found.factor == pytest.approx(4)
    assert (found.n, found.m) == (128, 72)
    said = advice.in_words(found, 0.1, (1000, 80))
    assert "About 128 training examples by 72 queries would settle it" in said
    assert "there are only" not in said
    assert "there are only 100 training examples and 50 queries" in advice.in_words(
        found, 0.1, (100, 50)
    )


def test_no_size_would_settle_what_lies_on_a_bound():
    found = advice.advise(agreed((0.0, -0.1, 0.1), (0.2, 0.1, 0.3), (-0.001, -0.2, 0.2)), 0.1)
    assert found.verdict == advice.TOO_SMALL and found.n is None
    assert "would not tell them apart" in advice.in_words(found, 0.1, (100, 50))


def test_too_few_rankings_are_no_verdict():
    rng = np.random.default_rng(0)
    few = world(3, 5, rng, 0.9, 0.9, 0.0)
    found = advice.advise(advice.agreements(*few, rng, 20))
    assert found.verdict == advice.TOO_SMALL and math.isinf(found.factor)
    assert "too few rankings" in advice.in_words(found, 0.1, (3, 5))


def test_a_margin_must_be_positive():
    with pytest.raises(ValueError, match=r"margin is 0.*above 0"):
        advice.advise(agreed(*[(0.1, 0.0, 0.2)] * 3), margin=0)


@pytest.mark.parametrize(
    ("truth", "verdict"),
    [
        ((0.7, 0.7, 0.2), advice.USE_ICP),
        ((0.3, 0.8, 0.2), advice.USE_GRADIENTS),
        ((0.2, 0.2, 0.4), advice.NEITHER),
    ],
)
def test_large_samples_give_the_right_verdict_and_small_ones_no_wrong_one(truth, verdict):
    for n, m, allowed in ((16, 6, {verdict, advice.TOO_SMALL}), (120, 30, {verdict})):
        for seed in range(4):
            rng = np.random.default_rng(seed)
            found = advice.advise(advice.agreements(*world(n, m, rng, *truth), rng, 200))
            assert found.verdict in allowed


def test_the_size_asked_for_settles_it():
    """Of samples as large as too small ones ask for, most are settled, and none is wrong."""
    verdicts = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        small = advice.advise(advice.agreements(*world(30, 10, rng, 0.6, 0.6, 0.2), rng, 200))
        if not small.settled and small.n:
            larger = world(small.n, small.m, rng, 0.6, 0.6, 0.2)
            verdicts.append(advice.advise(advice.agreements(*larger, rng, 200)).verdict)
    assert len(verdicts) >= 4
    assert set(verdicts) <= {advice.USE_ICP, advice.TOO_SMALL}
    assert verdicts.count(advice.USE_ICP) > len(verdicts) / 2
