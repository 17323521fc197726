"""Rankings and agreements for people: what they say is what the matrices say."""

import re

import numpy as np
import pandas as pd
import pytest
from helpers import UNITS, texts, three_methods
from jupyter_client.manager import start_new_kernel
from scipy import stats

from icprobe import statistics
from icprobe.artifact import explorer, views
from icprobe.data import paths

N, M = 30, 9
ALL, ANIMALS, COLOURS = range(M), [1, 4, 7], [0, 3, 6]
ENDS = ["low", "high", "rank_low", "rank_high"]


def made(methods: dict | None = None) -> views.Scores:
    """Return scores of three methods, or of others."""
    methods = methods or three_methods(N, M)
    units = {name: UNITS.get(name, "nats") for name in methods}
    return views.Scores(texts(N, "example"), texts(M, "query"), methods, units)


@pytest.fixture
def scores() -> views.Scores:
    return made()


def test_a_mean_has_the_interval_of_its_queries(scores):
    table = views.ranking(scores, "gain", ANIMALS)
    values = scores.methods["gain"][:, ANIMALS]
    expected = stats.ttest_1samp(values, 0, axis=1).confidence_interval()
    np.testing.assert_allclose(table["score"], values.mean(1))
    np.testing.assert_allclose(table[["low", "high"]], np.transpose(expected))
    assert table.index.tolist() == scores.train["id"].tolist()
    assert (table["queries"] == 3).all()
    assert (table["rank"].to_numpy() == stats.rankdata(-values.mean(1))).all()
    assert table[["rank_low", "rank_high"]].isna().all(axis=None)  # of so few queries
    single = views.ranking(scores, "gain", [3])
    np.testing.assert_array_equal(single["score"], scores.methods["gain"][:, 3])
    assert single[ENDS].isna().all(axis=None)


def test_ranks_are_as_sure_as_the_queries_are_alike(scores):
    alike = np.repeat(scores.methods["gain"][:, :1], M, axis=1)
    noise = np.random.default_rng(2).normal(size=(N, M))
    widths = []
    for spread in (0, 0.1, 1):
        table = views.ranking(made({"gain": alike + spread * noise}), "gain", ALL)
        assert table["rank_low"].between(1, table["rank"]).all()
        assert table["rank_high"].between(table["rank"], N).all()
        widths.append((table["rank_high"] - table["rank_low"]).mean())
    assert widths[0] == 0 < widths[1] < widths[2]


def test_what_was_not_measured_has_no_rank_and_takes_none(scores):
    table = views.ranking(scores, "step", ALL)
    assert table["rank"].dropna().sort_values().tolist() == list(range(1, 13))
    assert table.iloc[12:].drop(columns="queries").isna().all(axis=None)
    assert table["queries"].tolist() == [6] * 12 + [0] * 18
    assert table["rank_high"].max() == 12
    assert views.ranking(scores, "step", [0])["score"].isna().all()
    # of this task's three queries, two were measured
    inside = scores.methods["step"][:12, [3, 6]]
    some = views.ranking(scores, "step", COLOURS)["score"]
    np.testing.assert_allclose(some.iloc[:12], inside.mean(1))


def test_agreement_is_spearman_over_what_both_measured(scores):
    table = views.agreements(scores, ALL).set_index(["first", "second"])
    means = {name: scores.methods[name][:12, 2:8].mean(1) for name in ("gain", "step")}
    found, every = table.loc[("gain", "step")], table.loc[("gain", "cosine")]
    assert found["estimate"] == pytest.approx(stats.spearmanr(*means.values()).statistic)
    assert found[["examples", "queries"]].tolist() == [12, 6]
    assert every[["examples", "queries"]].tolist() == [N, M]
    assert every["low"] < every["estimate"] < every["high"]
    assert (found["high"] - found["low"]) > (every["high"] - every["low"])
    unmeasured = views.agreements(scores, [0]).set_index(["first", "second"]).loc[("gain", "step")]
    assert unmeasured["examples"] == 0 and np.isnan(unmeasured["estimate"])


def test_the_interval_for_one_query_holds_the_truth_as_often_as_it_says():
    # two normal variables of correlation r have Spearman 6 / pi arcsin(r / 2)
    r, draws, n = 0.6, 300, 60
    truth = 6 / np.pi * np.arcsin(r / 2)
    rng = np.random.default_rng(3)
    first = rng.normal(size=(n, draws))
    second = r * first + np.sqrt(1 - r**2) * rng.normal(size=(n, draws))
    scores = views.Scores(
        texts(n, "example"), texts(draws, "query"), {"a": first, "b": second}, {"a": "", "b": ""}
    )
    found = pd.concat(views.agreements(scores, [query]) for query in range(draws))
    held = found["low"].le(truth) & found["high"].ge(truth)
    # 300 draws: 95 % within three standard errors, which are 1.26 %
    assert abs(held.mean() - 0.95) < 0.038


def test_too_few_examples_have_no_agreement(scores):
    part = np.full((N, M), np.nan)
    part[: statistics.MIN_OBSERVATIONS - 1] = 1.0
    found = views.agreements(made({"gain": scores.methods["gain"], "part": part}), ALL)
    assert found[["estimate", "low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("largest", "digits"),
    [(250.0, 0), (99.0, 1), (3.0, 2), (0.5, 3), (4e-4, 6), (0.0, 0), (np.nan, 0)],
)
def test_scores_show_about_three_digits(largest, digits):
    assert views.decimals(made({"a": np.full((N, M), -largest)}), "a") == digits


def test_the_explorers_file_is_whole_and_small(scores, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    file = explorer.write(scores, "figures/page.html", "Which help?")
    assert [*(tmp_path / "figures").iterdir()] == [file]
    text = file.read_text("utf-8")
    assert len(text.encode()) < 2.3e6
    assert not re.search(
        r"""<(script|img|iframe)[^>]+src=|<link|@import""", text.split("<body>")[0]
    )
    for notice in ("Copyright (c) Anaconda", "SpryMedia Ltd", "Permission is hereby granted"):
        assert notice in text


@pytest.mark.slow
def test_a_notebook_shows_it_where_somebody_looks(tmp_path):
    manager, client = start_new_kernel()
    page = str(tmp_path / "page.html")
    code = f"from icprobe.artifact import explorer; explorer.frame({page!r})"
    shown = {True: [], False: []}
    for somebody, messages in shown.items():
        client.execute_interactive(
            code, allow_stdin=somebody, output_hook=messages.append, timeout=120
        )
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    assert not [one for one in shown[False] if one["msg_type"] == "execute_result"]
    (result,) = (one for one in shown[True] if one["msg_type"] == "execute_result")
    address = re.search(r'src="([^"]+)"', result["content"]["data"]["text/html"])[1]
    assert (paths.NOTEBOOKS / address).resolve() == tmp_path / "page.html"
