"""Tables of agreement against plain loops and made-up truths."""

import numpy as np
import pytest
from sampled import agreement, whole
from scipy.stats import kendalltau, spearmanr

from icprobe.statistics import correlation
from icprobe.statistics.conditions import Pool


def test_agreement_that_grows_with_similarity_has_a_slope(rng):
    similarity = rng.random((60, 10))
    first = rng.normal(size=(60, 10))
    second = similarity * first + (1 - similarity) * rng.normal(size=first.shape)
    bins, (slope, low, high) = correlation.by_similarity(first, second, similarity, rng, 4, 20)
    assert bins["similarity"].is_monotonic_increasing and len(bins) == 4
    assert 0 < low < slope < high
    lowest = similarity.argsort(axis=0).argsort(axis=0) < 15
    rhos = [spearmanr(first[lowest[:, j], j], second[lowest[:, j], j]).statistic for j in range(10)]
    assert bins["estimate"][0] == pytest.approx(np.mean(rhos))


def test_rank_measures_and_their_chance(rng):
    first, second = rng.normal(size=(2, 40, 6)) + rng.normal(size=(40, 1))
    table = correlation.rank_measures(first, second, rng).set_index("quantity")
    means = first.mean(1), second.mean(1)
    assert table.loc["Kendall", "estimate"] == pytest.approx(kendalltau(*means).statistic)
    top = [set(np.argsort(-mean)[:10]) for mean in means]
    row = table.loc["top 10 in common"]
    assert (row["estimate"], row["chance"]) == (len(top[0] & top[1]) / 10, 0.25)


def test_a_table_names_every_pair(rng):
    a, b, c = rng.normal(size=(3, 20, 5))
    levels = {"per example": "example", "per query": "query"}
    table = correlation.agreement_table({"a": a, "b": b}, {"c": c}, levels, rng, (), 20)
    names = table[["level", "first", "second"]].to_numpy().tolist()
    assert names == [[level, x, "c"] for level in levels for x in "ab"]
    row = table.set_index(["level", "first"]).loc[("per example", "b")]
    assert row["estimate"] == pytest.approx(spearmanr(b.mean(1), c.mean(1)).statistic)


def test_reliabilities_by_method(rng):
    signal = rng.normal(size=(200, 1))
    methods = {
        "sure": signal + 0.1 * rng.normal(size=(200, 10)),
        "noise": rng.normal(size=(200, 10)),
    }
    table = correlation.reliabilities(methods, rng).set_index("method")
    assert table.loc["sure", "low"] > 0.98 and table.loc["noise", "low"] < 0.2


def test_row_norms_are_the_lengths_of_gradients(rng):
    train, queries = rng.normal(size=(30, 6)), rng.normal(size=(9, 6))
    lengths = np.linalg.norm(train, axis=1)
    product = train @ queries.T
    cosine = product / np.outer(lengths, np.linalg.norm(queries, axis=1))
    cosine[3, 2] = product[3, 2] = 0  # nothing can be told from this one
    found = correlation.row_norms(product, cosine)
    np.testing.assert_allclose(found, lengths / np.median(lengths), rtol=0.2)
    np.testing.assert_allclose(found / found[0], lengths / lengths[0], rtol=1e-9)


def test_an_advantage_over_a_baseline_is_the_difference_of_agreements(rng):
    """Truth is a level of each task, which similarities know, and a detail, which they do not."""
    tasks = np.repeat(list("abcd"), 10)
    level, detail = np.repeat(rng.normal(size=(4, 8)), 10, axis=0), rng.normal(size=(40, 8))
    truth = 3 * level + detail
    proxies = {"gain": detail, "product": truth**3, "cosine": truth, "hidden states": level}
    proxies |= {"gain over neutral": detail + level, "words (TF-IDF)": level}
    noise = {"words (TF-IDF)": 9}
    proxies = {k: x + noise.get(k, 0.1) * rng.normal(size=x.shape) for k, x in proxies.items()}
    table = correlation.against_baselines(proxies, truth, tasks, rng, 50).set_index("quantity")

    def rho(name, level="query", rows=slice(None)):
        return whole(agreement(proxies[name][rows], truth[rows], level), truth[rows].shape)

    for quantity, expected in {
        "gain less best similarity, per query": rho("gain") - rho("hidden states"),
        "cosine less product, per query": rho("cosine") - rho("product"),
        "gain less product, per example": rho("gain", "example") - rho("product", "example"),
        "cosine less gain, within a task": np.mean(
            [rho("cosine", rows=tasks == t) - rho("gain", rows=tasks == t) for t in "abcd"]
        ),
    }.items():
        assert table.loc[quantity, "estimate"] == pytest.approx(expected)
    assert table.loc["gain less best similarity, per query", "high"] < 0
    assert table.loc["gain less best similarity, within a task", "low"] > 0


def test_of_two_causes_the_real_one_is_left(rng):
    cause = rng.normal(size=(80, 6)) + 3 * rng.normal(size=(80, 1))
    shadow = cause + 3 * rng.normal(size=(80, 1))
    effect = cause + rng.normal(size=(80, 6))
    table = correlation.partial_correlations(effect, {"cause": cause, "shadow": shadow}, rng, 20)
    found = table.set_index(["cause", "given"])["estimate"]
    assert found["cause", "nothing"] > found["cause", "shadow"] > 0.8
    assert found["shadow", "nothing"] > 0.5 > 0.3 > abs(found["shadow", "cause"])


def test_an_agreement_of_answers_is_none_beyond_them(crossed, rng):
    same = (rng.random((32, 12)) < 0.5).astype(float)
    gain, cosine = (2 * same + 0.1 * rng.normal(size=same.shape) for _ in range(2))
    one = Pool(crossed, gain, cosine, cosine, {"same_completion": same}, {})
    table = correlation.given_the_answer({"a": one}, rng, 20).set_index("given")
    assert table.loc["nothing", "estimate"] > 0.6
    assert abs(table.loc["same completion", "estimate"]) < 0.2
    assert table["sharing"].tolist() == [same.sum()] * 2
