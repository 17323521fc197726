"""The reference scores are those of the committed laptop profile, and the figures are theirs."""

import hashlib
import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from icprobe.artifact.settings import FinetuningSettings, InfluenceSettings
from icprobe.data import paths
from icprobe.finetuning import lds
from icprobe.finetuning.recipe import Recipe
from icprobe.finetuning.tracin import TracIn
from icprobe.methods import icp, registry, training_effect
from icprobe.methods.gradient import (
    ClampedLog,
    EKFACInfluence,
    GradientProducts,
    MeanInfluence,
    ProjectedProducts,
    load_parts,
)
from icprobe.scores import load, store
from icprobe.statistics import conditions, method_findings


def kept_by(profile):
    """Return the methods whose scores a run of the laptop profile keeps, one for each store."""
    pools, kinds, bands = 1 + len(profile["condition_pools"]), 7, 6
    of_pools = ["gradient_cosine", "gradient_dot", "icp", "zero_shot", *registry.REGISTERED]
    return [
        *("clamped_log", "ekfac", "icp_neutral", "mean_influence", "tracin", *["projected"] * 5),
        *["training_effect"] * len(profile["steps"]),
        *["gradient_dot"] * (kinds + bands + 1),
        *of_pools * pools,
    ]


def test_a_fresh_clone_finds_its_scores_without_model_and_data(monkeypatch, tmp_path):
    monkeypatch.setenv("ICPROBE_CACHE", str(tmp_path / "empty"))
    settings = InfluenceSettings()
    profile, experiment = settings.model_dump(), settings.experiment()
    probed = load(experiment, icp.probing(profile["preamble"], neutral=True))
    gain, neutral_gain = icp.gains(probed)
    assert gain.shape == (profile["n_train"], profile["n_query"])
    assert not (tmp_path / "empty").exists()

    table = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "01_training_examples.csv")
    # the table keeps six digits
    np.testing.assert_allclose(table["mean_gain"], gain.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["icp_score"], icp.icp_score(gain), rtol=1e-5)
    np.testing.assert_allclose(table["mean_neutral_gain"], neutral_gain.mean(1), atol=1e-5)
    asked = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "01_queries.csv")
    np.testing.assert_allclose(asked["zero_shot"], probed["zero_shot"][0], rtol=1e-5)
    same_task = np.equal.outer(table["task"].to_numpy(), asked["task"].to_numpy())

    def places(kept):
        rows = pd.Index(table["id"]).get_indexer(kept.train_ids)
        return np.ix_(rows, pd.Index(asked["id"]).get_indexer(kept.query_ids))

    rng = np.random.default_rng(profile["seed"])
    tokens = table["tokens"].to_numpy()
    findings = method_findings.probing(gain, neutral_gain, same_task, tokens, rng)
    kept = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "01_findings.csv")
    pd.testing.assert_frame_equal(findings, kept, rtol=1e-5)

    if (paths.ROOT / ".git").exists():  # else nothing says what was in the archive
        listed = ["git", "ls-files", "*/manifest.json"]
        files = subprocess.check_output(listed, cwd=paths.REFERENCE_SCORES, text=True)
        names = [Path(file).parent.name.rpartition("-")[0] for file in files.split()]
        assert sorted(names) == sorted(kept_by(profile)), "no scores of other parameters"

    products = GradientProducts(loss_on=profile["loss_on"])
    dot, cosine = load(experiment, products).values()
    table = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "02_training_examples.csv")
    np.testing.assert_allclose(table["mean_product"], dot.mean(1), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(table["mean_cosine"], cosine.mean(1), rtol=1e-5, atol=1e-6)
    rng = np.random.default_rng(profile["seed"])
    findings = method_findings.gradients(dot, cosine, same_task, tokens, rng)
    kept = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "02_findings.csv")
    pd.testing.assert_frame_equal(findings, kept[: len(findings)], rtol=1e-5)
    other = kept.set_index("quantity")["estimate"]
    clamped, ekfac = (
        store.load(next(paths.REFERENCE_SCORES.glob(f"{name}-*")))
        for name in ("clamped_log", "ekfac")
    )
    plain, last = dot[places(clamped)], load_parts(experiment, products)["last 2 blocks"]
    rho = spearmanr(plain.ravel(), clamped.matrix().ravel()).statistic
    assert other["clamp and log against product, all pairs"] == pytest.approx(rho, rel=1e-5)
    flipped = (np.sign(plain) != np.sign(clamped.matrix())).mean()
    assert other["signs that clamp and log flips"] == pytest.approx(flipped, rel=1e-5)
    rho = spearmanr(last.ravel(), ekfac.matrix().ravel()).statistic
    (name,) = (name for name in other.index if name.startswith("EK-FAC against product, last"))
    assert other[name] == pytest.approx(rho, rel=1e-5)

    # agreement by condition, whose estimates need no resampling
    labels = conditions.Labels(table, asked)
    quick = {"resamples": 2, "permutations": 1}
    mine = conditions.by_condition(gain, cosine, labels, rng, **quick)
    kept = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "03_conditions.csv")
    kept = kept[(kept["pool"] == profile["train"]) & (kept["scores"] == "gain and cosine")]
    same = ["level", "condition", "estimate", "pairs", "ranked", "rankings"]
    pd.testing.assert_frame_equal(mine[same], kept[same].reset_index(drop=True), rtol=1e-5)

    # ground truth: what each method's scores say of the effect of the larger step
    sizes = {"n_train": profile["n_trained"], "n_query": profile["m_trained"]}
    part = replace(experiment, **sizes)
    steps = training_effect.planned(profile["steps"])
    effects = load(part, training_effect.TrainingEffect(steps, loss_on=profile["loss_on"]))
    effect = list(effects.values())[1]
    kept = next(store.find_all(paths.REFERENCE_SCORES, "training_effect"))

    # what else notebook 02 scores
    options = {"loss_on": profile["loss_on"]}
    sampled = {"n_train": profile["n_compared"], "n_query": profile["m_compared"]}
    some = replace(experiment, **sampled)
    recipe = Recipe(epochs=profile["tracin_epochs"], saves=profile["tracin_checkpoints"])
    load(some, [ClampedLog(**options), ProjectedProducts((2, 4, 8, 16, 32), **options)])
    forward = load(some, MeanInfluence(**options))["mean_influence"]
    expected = np.broadcast_to(plain.mean(1, keepdims=True), forward.shape)
    np.testing.assert_allclose(forward, expected, atol=1e-4 * abs(expected).max())
    load(experiment, [EKFACInfluence(profile["ekfac_blocks"], **options)])
    load(experiment, TracIn(recipe, **options))
    for suite, (N, M) in profile["condition_pools"].items():
        pool = replace(experiment, train=suite, queries=suite, n_train=N, n_query=M)
        load(pool, [*icp.probing(profile["preamble"]), products, *registry.baselines()])
    known = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "03_findings.csv")
    known = known.set_index("quantity")["estimate"]
    for name, scores in (("cosine", cosine), ("gain", gain)):
        mine = scores[places(kept)]
        rhos = [spearmanr(*pair).statistic for pair in zip(mine.T, effect.T, strict=True)]
        expected = known[f"{name} against training effect, per query"]
        assert np.mean(rhos) == pytest.approx(expected, rel=1e-5)


LAPTOP = FinetuningSettings().model_dump()


def test_parts_of_renamed_stores_keep_their_bytes():
    """As committed before keys had the version of the template."""
    listed = (Path(__file__).parent / "reference_parts.txt").read_text().split()
    digests = {
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in paths.REFERENCE_SCORES.glob("*/part-*.parquet")
    }
    assert digests.issuperset(listed)


@pytest.fixture(scope="module")
def records():
    """Return the records of committed trainings by what they were evaluated on."""
    files = sorted((paths.REFERENCE_SCORES / "finetuned").glob("*.json"))
    found = [json.loads(file.read_text()) for file in files]
    for file, record in zip(files, found, strict=True):
        assert store.key("training", record["identity"]) == file.stem
    recipe = {name: LAPTOP[name] for name in ("epochs", "batch_size", "rate", "lora_rank")}
    trained = [record for record in found if record["identity"]["recipe"]]
    for record in trained:  # a recipe is written as it was, to the letter: it is in the key
        written = record["identity"]["recipe"]
        assert json.dumps(asdict(Recipe(**written))) == json.dumps(written)
    assert all(recipe.items() <= record["identity"]["recipe"].items() for record in trained)
    asked = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "01_queries.csv")["id"].tolist()
    of_subsets = [record for record in found if record["queries"] == asked]
    sizes = {len(record["queries"]) for record in found if record["queries"] != asked}
    alike = {
        n: [r for r in found if len(r["queries"]) == n and r["queries"] != asked] for n in sizes
    }
    return {"subsets": of_subsets, **alike}


def test_committed_trainings_on_subsets_are_the_profiles(records):
    found = records["subsets"]
    assert len(found) == 32 * LAPTOP["subset_seeds"]  # those of the README's longer run
    size = round(LAPTOP["subset_share"] * LAPTOP["n_train"])
    assert {len(record["examples"]) for record in found} == {size}


def test_the_committed_lds_is_over_all_queries_that_have_scores(records):
    """By hand, from the trainings' records and the scores of all queries, whether they select."""
    experiment = FinetuningSettings().experiment()
    gain = icp.gains(load(experiment, icp.probing(LAPTOP["preamble"])))[0]
    ids = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "01_training_examples.csv")["id"]
    rows = {name: row for row, name in enumerate(ids)}
    by_subset = {}
    for record in records["subsets"]:
        subset = tuple(rows[name] for name in record["examples"])
        by_subset.setdefault(subset, []).append(record["measures"]["nats_per_token"])
    share = LAPTOP["subset_share"]
    assert set(by_subset) == set(lds.subsets(len(ids), 32, share, LAPTOP["seed"]))
    predicted = np.array([gain[list(subset)].sum(0) for subset in by_subset])
    measured = np.array([np.mean(runs, axis=0) for runs in by_subset.values()])
    M = LAPTOP["n_query"]
    assert predicted.shape == measured.shape == (32, M)
    rhos = [spearmanr(predicted[:, j], measured[:, j]).statistic for j in range(M)]
    table = pd.read_csv(paths.REFERENCE_FIGURES / "laptop_long" / "04_lds.csv")
    kept = table.set_index("quantity").loc["LDS of gain"]
    assert kept["estimate"] == pytest.approx(np.mean(rhos), rel=1e-5)
    assert (kept["queries"], kept["n"]) == (M, 32)


@pytest.mark.parametrize(
    ("folder", "queries", "seeds"),
    [
        ("laptop", LAPTOP["n_evaluation"], LAPTOP["seeds"]),
        ("laptop_long", 192, 5),
    ],
)
def test_committed_trainings_are_those_of_the_committed_figures(records, folder, queries, seeds):
    assert set(records) == {"subsets", LAPTOP["n_evaluation"], 192}
    folder, alike = paths.REFERENCE_FIGURES / folder, records[queries]
    (before,) = (record for record in alike if record["identity"]["recipe"] is None)
    assert {tuple(record["queries"]) for record in alike} == {tuple(before["queries"])}

    def gain(of_selection):
        assert sorted(r["identity"]["recipe"]["seed"] for r in of_selection) == list(range(seeds))
        mean = np.mean([np.mean(r["measures"]["nats_per_token"]) for r in of_selection])
        return mean - np.mean(before["measures"]["nats_per_token"])

    table = pd.read_csv(folder / "04_results.csv")
    table = table[table["measure"] == "nats_per_token"].set_index("selection")
    assert (table[["seeds", "queries"]] == [seeds, queries]).all(axis=None)
    full = gain([record for record in alike if len(record["examples"]) == LAPTOP["n_train"]])
    assert table.loc["full pool", "estimate"] == pytest.approx(full, rel=1e-5)

    # the best by ICP score, chosen by hand from the committed gains; ties may fall either way
    scores = pd.read_csv(paths.REFERENCE_FIGURES / "laptop" / "01_training_examples.csv")
    scores = scores.set_index("id")["icp_score"]
    k = round(LAPTOP["budget"] * LAPTOP["n_train"])
    threshold = scores.sort_values(ascending=False).iloc[k - 1]
    surely, possibly = set(scores[scores > threshold].index), set(scores[scores >= threshold].index)
    best = gain(
        [r for r in alike if len(r["examples"]) == k and surely <= set(r["examples"]) <= possibly]
    )
    assert table.loc["ICP score, top", "estimate"] == pytest.approx(best, rel=1e-5)

    # and the claims that rest on it
    pairs = pd.read_csv(folder / "04_differences.csv").set_index(["first", "second"])
    claims = {c["id"]: c for c in json.loads((folder / "claims.json").read_text())}
    product = table.loc["product, top", "estimate"]
    assert claims["C3"]["estimate"] == pytest.approx((best - product) / full, rel=1e-3)
    assert claims["C3"]["estimate"] == pytest.approx(
        pairs.loc[("ICP score, top", "product, top"), "share"], rel=1e-4
    )
