"""Gains by hand, intervals against explicit loops, and what the test of equivalence promises."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student

from icprobe.finetuning import comparison
from icprobe.finetuning.comparison import FULL, findings
from icprobe.finetuning.training_runs import RunResult

PAIRS = [("a", "b"), ("b", "a"), ("a", FULL), ("a", "a")]
SHARES = ["share", "share_low", "share_high", "tost_low", "tost_high", "p_equivalent"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def outcome(**measures):
    index = ["q10", "q2", "q1"][: len(next(iter(measures.values())))]  # not in order
    frame = pd.DataFrame(measures, index=index, dtype=float)
    return RunResult(curve=pd.DataFrame(), measures=frame, answers={})


def made(rng, S=3, Q=12, full=1.0, noise=0.3, **means):
    """Gains of selections around a mean, the full pool among them."""
    means = {FULL: full, "a": 0.5, "b": 0.4, **means}
    return {name: mean + noise * rng.normal(size=(S, Q)) for name, mean in means.items()}


def differences(gains, pairs=PAIRS, margin=0.1, rng=0, resamples=400, tasks=None):
    rng, tasks = np.random.default_rng(rng), tasks or ["t"] * len(gains[FULL][0])
    return comparison.differences(gains, pairs, margin, rng, resamples, tasks)


def one(gains, pair=("a", "b"), **more):
    return differences(gains, [pair], **more).iloc[0]


def looped(gains, seed, resamples):
    """Mean gains of resamples of seeds and queries, the plain way: [resamples] by selection.

    Shares of the drawn seeds deviate from 1 / S by a factor more than they were drawn: that of so
    few seeds, and that of Student's t.
    """
    rng, (S, Q) = np.random.default_rng(seed), gains[FULL].shape
    found = {name: [] for name in gains}
    longer = student.ppf(0.975, S - 1) / norm.ppf(0.975) if S > 1 else 1
    stretch = longer * np.sqrt(S / (S - 1)) if S > 1 else 1
    for _ in range(resamples):
        seeds, queries = rng.integers(S, size=S).tolist(), rng.integers(Q, size=Q)
        weights = [1 / S + stretch * (seeds.count(s) / S - 1 / S) for s in range(S)]
        for name, values in gains.items():
            of_seeds = [np.mean([values[s, q] for q in queries]) for s in range(S)]
            found[name].append(sum(w * mean for w, mean in zip(weights, of_seeds, strict=True)))
    return {name: np.array(means) for name, means in found.items()}


def test_gains_by_hand():
    untouched = outcome(nats=[-1, -2, -3], correct=[np.nan, 1, 0])
    runs = {
        "a": [
            outcome(nats=[-1, -1, -1], correct=[np.nan, 1, 1]),
            outcome(nats=[-2, -2, -2], correct=[np.nan] * 3),  # not taken of this seed's model
        ],
        "b": [untouched, outcome(nats=[-1, -2, -3], correct=[np.nan] * 3)],
    }
    nats, correct = (comparison.gains(runs, untouched, name) for name in ("nats", "correct"))
    for found, expected in (
        (nats, {"a": [[0, 1, 2], [-1, 0, 1]], "b": [[0, 0, 0]] * 2}),
        (correct, {"a": [[0, 1]], "b": [[0, 0]]}),
    ):
        assert {name: values.tolist() for name, values in found.items()} == expected


def test_the_mean_is_over_the_seeds_that_have_a_measure():
    first = outcome(nats=[-1, -2, -3], correct=[np.nan, 1, 0], words=[5, 6, np.nan])
    second = outcome(nats=[-3, -2, -4], correct=[np.nan, 0, 0])
    turned = second._replace(measures=second.measures[::-1])  # queries are matched by name
    expected = {"nats": [-2, -2, -3.5], "correct": [np.nan, 0.5, 0], "words": [5, 6, np.nan]}
    expected = pd.DataFrame(expected, index=first.measures.index)
    for other in (second, turned):
        pd.testing.assert_frame_equal(comparison.seeds_mean([first, other]), expected)


@pytest.mark.parametrize("S", [1, 2, 3])
def test_the_summary_is_of_means_with_looped_intervals(rng, S):
    gains = made(rng, S=S)
    table = comparison.summary(gains, np.random.default_rng(7), 200)
    assert table["selection"].tolist() == [FULL, "a", "b"]
    assert table["estimate"].tolist() == pytest.approx([x.mean() for x in gains.values()])
    assert (table[["seeds", "queries"]] == [S, 12]).all(axis=None)
    for row, means in zip(table.itertuples(), looped(gains, 7, 200).values(), strict=True):
        assert (row.low, row.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


@pytest.mark.parametrize("resamples", [200, 399])
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_differences_are_of_means_with_looped_intervals(rng, resamples, noise):
    gains = made(rng, noise=noise)
    table = differences(gains, margin=0.2, rng=7, resamples=resamples)
    assert list(zip(table["first"], table["second"], strict=True)) == PAIRS
    means = looped(gains, 7, resamples)
    whole = gains[FULL].mean()
    for row, (first, second) in zip(table.itertuples(), PAIRS, strict=True):
        difference, drawn = gains[first].mean() - gains[second].mean(), means[first] - means[second]
        assert row.estimate == pytest.approx(difference, abs=1e-12)
        assert row.share == pytest.approx(difference / whole, abs=1e-12)
        shares, drawn = np.sort(drawn / means[FULL]), np.sort(drawn)
        assert row.p_equivalent == pytest.approx(
            max((1 + (end * shares >= 0.2).sum()) / (1 + resamples) for end in (-1, 1))
        )
        # the ends are resamples, next to where percentiles lie
        ends = [("", 0.025, drawn), ("tost_", 0.05, shares), ("share_", 0.025, shares)]
        for name, level, of in ends:
            at = int(np.ceil(level * (1 + resamples))) - 2
            low, high = getattr(row, f"{name}low"), getattr(row, f"{name}high")
            assert (low, high) == pytest.approx((of[at], of[-1 - at]), abs=1e-12)
            percentile = np.percentile(of, 100 * level)
            assert of[at - 1] - 1e-12 <= percentile <= of[at + 2] + 1e-12
        held = {"better": row.low > 0, "worse": row.high < 0}
        held["equivalent"] = row.tost_low > -0.2 and row.tost_high < 0.2
        said = " and ".join(name for name, holds in held.items() if holds)
        assert row.verdict == (said or "undecided")


@pytest.mark.parametrize(("S", "Q"), [(2, 12), (3, 5)])
def test_few_seeds_or_queries_give_no_verdict(rng, S, Q):
    gains = made(rng, S=S, Q=Q, a=0.9, b=0.4, noise=0.01)
    whole = made(rng, a=0.9, b=0.4, noise=0.01)
    few, enough = one(gains, margin=0.7), one(whole, margin=0.7)
    assert enough["verdict"] == "better and equivalent" and enough[SHARES].notna().all()
    assert few["verdict"] == "undecided" and few[SHARES[1:]].isna().all()
    assert few["share"] == pytest.approx(0.5, abs=0.05) and few["low"] > 0
    # the sentence has what there is
    lines = [comparison.as_text(row.to_frame().T, 0.7)[0] for row in (few, enough)]
    assert all(line.startswith("a: ") and f"{few['share']:+.2f}"[:4] in line for line in lines)
    assert "nan" not in lines[0] and f"{enough['share_low']:+.2f}" in lines[1]
    assert comparison.summary(gains, rng, 100)[["low", "high"]].isna().all(axis=None) == (Q < 6)


@pytest.mark.slow
@pytest.mark.parametrize(("S", "times"), [(3, 1), (3, 3), (5, 3)])
def test_intervals_of_few_seeds_cover_the_truth(rng, S, times):
    """Seeds differ by the standard error of the queries, or by three times this."""
    runs, Q, truth = 300, 48, 0.3
    covered = 0
    for k in range(runs):
        of_queries, of_seeds = rng.normal(size=Q), times * rng.normal(size=(S, 1)) / np.sqrt(Q)
        gains = {FULL: np.ones((S, Q)), "a": truth + of_queries + of_seeds, "b": np.zeros((S, Q))}
        row = one(gains, resamples=200, rng=k)
        covered += row["low"] <= truth <= row["high"]
    assert covered / runs >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)


def test_intervals_over_tasks_are_longer_where_tasks_differ(rng):
    tasks, S = np.repeat(["a", "b", "c", "d"], 12), 3
    noise = 0.1 * rng.normal(size=48)
    alike, of_one = np.full(48, 0.3) + noise, np.where(tasks == "a", 1.2, 0.0) + noise
    gains = {FULL: np.ones(48), "alike": alike, "of one": of_one, "b": np.zeros(48)}
    gains = {name: np.tile(values, (S, 1)) for name, values in gains.items()}
    pairs = [("alike", "b"), ("of one", "b")]
    table = differences(gains, pairs, tasks=tasks.tolist())
    assert table["share"].tolist() == pytest.approx([0.3, 0.3], abs=0.05)
    assert (table["low"] > 0).all()
    (alike, of_one), (_, high) = table["tasks_low"], table["tasks_high"]
    assert alike > 0.2 and of_one <= 0.02 < 0.6 < high
    plain = differences(gains, pairs, resamples=50)
    assert plain[["tasks_low", "tasks_high"]].isna().all(axis=None)

    contributions = comparison.by_task(gains, pairs, tasks)
    sums = contributions.groupby("first", sort=False)["contribution"].sum()
    assert sums.tolist() == pytest.approx(table["share"].tolist())
    mine = contributions.set_index(["first", "task"]).loc[("of one", "a")]
    assert mine["queries"] == 12 and mine["estimate"] == pytest.approx(1.2, abs=0.1)
    assert mine["contribution"] == pytest.approx(0.3, abs=0.03)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    resamples=st.sampled_from([2, 18, 19, 20, 38, 39, 40, 99, 110, 199]),
    full=st.sampled_from([1.0, 0.2, 0.05]),
)
def test_p_is_below_five_percent_just_where_the_inner_interval_is_within(seed, resamples, full):
    """Without exception: the interval's ends are the resamples at which p (with its +1) changes."""
    gains = made(np.random.default_rng(seed), S=3, Q=8, full=full, noise=0.2)
    row = one(gains, resamples=resamples)
    if np.isnan(row["share"]):
        assert np.isnan(row[["tost_low", "tost_high", "p_equivalent"]].tolist()).all()
        return
    end = max(-row["tost_low"], row["tost_high"])
    if np.isinf(end):
        assert one(gains, margin=1e9, resamples=resamples)["p_equivalent"] >= 0.05
        return
    margins = [end * factor for factor in (0.5, 0.999, 1, 1.001, 2)]
    p = [one(gains, margin=margin, resamples=resamples)["p_equivalent"] for margin in margins]
    assert [value < 0.05 for value in p] == [False, False, False, True, True]
    assert p == sorted(p, reverse=True)  # a larger margin is never less equivalent
    # 95 % are never narrower than 90 %
    assert np.isnan(row["share_low"]) or row["share_low"] <= row["tost_low"]
    assert np.isnan(row["share_high"]) or row["share_high"] >= row["tost_high"]


@pytest.mark.parametrize("full", [-1.0, 0.0])
def test_without_a_gain_of_the_full_pool_nothing_is_equivalent(rng, full):
    gains = made(rng, a=0.5, b=0.1, noise=0.05) | {FULL: np.full((3, 12), full)}
    for pair, verdict in ((("a", "b"), "better"), (("a", "a"), "undecided")):
        row = one(gains, pair)
        assert row[SHARES].isna().all()
        assert row[["estimate", "low", "high"]].notna().all()
        assert row["verdict"] == verdict


@pytest.mark.parametrize(("noise", "unknown"), [(2.2, 0.05), (1.75, 0.025), (1.3, 0)])
def test_a_gain_that_is_not_positive_in_some_resamples_makes_intervals_wider(rng, noise, unknown):
    around = rng.normal(size=12)
    full = 0.9 + noise * (around - around.mean()) / around.std() + np.zeros((3, 1))
    gains = made(rng, a=0.5, b=0.48, noise=0.01) | {FULL: full}
    means = looped(gains, 0, 400)
    bad = (means[FULL] <= 0).mean()
    assert unknown < bad < {0.05: 0.1, 0.025: 0.05, 0: 0.025}[unknown], "or this says nothing"
    row, itself = one(gains, margin=0.5), one(gains, ("a", "a"))
    shares = ((means["a"] - means["b"]) / means[FULL])[means[FULL] > 0]
    low, high = np.percentile(shares, [5, 95])
    assert row["p_equivalent"] >= bad and itself["p_equivalent"] >= bad
    if unknown == 0.05:
        assert (row["tost_low"], row["tost_high"]) == (-np.inf, np.inf)
        assert (itself["tost_low"], itself["tost_high"]) == (-np.inf, np.inf)
        assert row["verdict"] in ("better", "undecided") and itself["verdict"] == "undecided"
    else:
        assert row["tost_low"] < low and row["tost_high"] > high
        assert np.isfinite([row["tost_low"], row["tost_high"]]).all()
        assert itself["verdict"] == "equivalent"
    outer = row[["share_low", "share_high"]]
    assert outer.notna().all() if unknown == 0 else outer.isna().all()


LEVEL_RUNS = 1000  # standard error of a share of 5 %: 0.7 %


@pytest.mark.parametrize(
    ("truth", "noise", "least", "most"),
    [
        # percentiles of 40 queries are a little short: 5.6 % for normal noise
        (0.1, 0.2, 0.03, 0.077), (-0.1, 0.2, 0.03, 0.077), (0.1, 0.02, 0.03, 0.077),
        (0.1, 1.0, 0, 0), (0.0, 1.0, 0, 0), (0.15, 0.2, 0, 0.01),
        (0.0, 0.1, 0.99, 1),
    ],
)  # fmt: skip
def test_tost_keeps_its_level_and_has_power(rng, truth, noise, least, most):
    """Of 1000 selections whose queries are independent, those found equivalent to another."""
    S, Q = 3, 40  # seeds that are the same: no noise of theirs
    gains = {FULL: np.ones((S, Q)), "other": np.zeros((S, Q))}
    names = [f"{k}" for k in range(LEVEL_RUNS)]
    gains |= {name: truth + noise * rng.normal(size=Q) + np.zeros((S, 1)) for name in names}
    table = differences(gains, [(name, "other") for name in names], resamples=999)
    found = (table["p_equivalent"] < 0.05).mean()
    assert least <= found <= most
    assert table["verdict"].str.contains("equivalent").mean() == found


@pytest.mark.slow
def test_tost_keeps_its_level_with_an_uncertain_gain_of_the_full_pool(rng):
    runs, S, Q = 300, 3, 40  # standard error 1.3 %
    found = 0
    for _ in range(runs):
        both, full = (noise * rng.normal(size=(1, Q)) for noise in (0.05, 1.5))
        # what is uncertain is mostly how wide the margin is
        gains = {FULL: 1 + full, "a": 0.1 + both, "b": np.zeros((1, Q))}
        gains = {name: np.repeat(values, S, axis=0) for name, values in gains.items()}
        found += one(gains, resamples=299)["p_equivalent"] < 0.05
    assert 0.01 <= found / runs <= 0.09


@pytest.mark.parametrize("resamples", [50, 400])
def test_there_is_room_within_the_margin_just_where_tost_finds_equivalence(rng, resamples):
    verdicts = set()
    for b in (0.3, 0.38, 0.42, 0.46, 0.5, 0.62):
        table = differences(made(rng, b=b, noise=0.05), resamples=resamples)
        found = findings(table, 0.1, 12)
        assert (found["unit"] == "share of the full pool's gain").all() and (found["n"] == 12).all()
        whole, room = found[::2], found[1::2]
        assert whole["quantity"].tolist() == [f"{one} less {other}" for one, other in PAIRS]
        expected = table[["share", "share_low", "share_high"]].to_numpy()
        np.testing.assert_array_equal(whole[["estimate", "low", "high"]], expected)
        equivalent = table["verdict"].str.contains("equivalent").tolist()
        assert (room["low"] > 0).tolist() == equivalent
        ends = table[["tost_low", "tost_high"]].abs().to_numpy()
        assert room["low"].tolist() == pytest.approx(list(0.1 - ends.max(axis=1)))
        assert room["estimate"].tolist() == pytest.approx(list(0.1 - table["share"].abs()))
        holds_zero = (table["tost_low"] <= 0) & (table["tost_high"] >= 0)
        nearest = np.where(holds_zero, 0, ends.min(axis=1))
        assert room["high"].tolist() == pytest.approx(list(0.1 - nearest))
        verdicts.add(equivalent[0])
    assert verdicts == {True, False}


def test_sizes_end_with_the_full_pool(rng):
    small, large = (
        comparison.summary(made(rng), rng, 20).assign(examples=sizes)
        for sizes in ([90, 8, 8], [90, 20, 22])
    )
    table = comparison.by_size([large, small[1:]], ["a", "b"])
    found = {name: sorted(mine["examples"]) for name, mine in table.groupby("method")}
    assert found == {"a": [8, 20, 90], "b": [8, 22, 90]}
    assert set(table["estimate"][table["examples"] == 90]) == {large["estimate"][0]}
