"""The committed scores are those of the committed laptop profile, and the figures are theirs."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import spearmanr

from icprobe import icp, influence, paths, store
from icprobe.experiment import Experiment


def test_a_fresh_clone_finds_its_scores_without_model_and_data(monkeypatch, tmp_path):
    monkeypatch.setenv("ICPROBE_CACHE", str(tmp_path / "empty"))
    profile = yaml.safe_load((paths.NOTEBOOKS / "profiles" / "laptop.yaml").read_text())
    names = Experiment.__dataclass_fields__.keys()
    experiment = Experiment(**{name: profile[name] for name in names})
    probe = icp.find(experiment, "run ./run_all.sh --fresh", preamble=profile["preamble"])
    assert probe.gain.shape == (profile["n_train"], profile["n_query"])
    assert not (tmp_path / "empty").exists()

    table = pd.read_csv(paths.resolve(profile["output_dir"]) / "01_training_examples.csv")
    # the table keeps six digits
    np.testing.assert_allclose(table["mean_gain"], probe.gain.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["icp_score"], icp.icp_score(probe.gain), rtol=1e-5)
    np.testing.assert_allclose(table["mean_neutral_gain"], probe.neutral_gain.mean(1), atol=1e-5)
    asked = pd.read_csv(paths.resolve(profile["output_dir"]) / "01_queries.csv")
    np.testing.assert_allclose(asked["zero_shot"], probe.zero_shot, rtol=1e-5)
    same_task = np.equal.outer(table["task"].to_numpy(), asked["task"].to_numpy())
    rng = np.random.default_rng(profile["seed"])
    findings = icp.findings(probe, same_task, table["tokens"].to_numpy(), rng)
    kept = pd.read_csv(paths.resolve(profile["output_dir"]) / "01_findings.csv")
    pd.testing.assert_frame_equal(findings, kept, rtol=1e-5)

    listed = ["git", "ls-files", "*/manifest.json"]
    files = subprocess.check_output(listed, cwd=paths.resolve(profile["scores_dir"]), text=True)
    methods = sorted(Path(file).parent.name.rpartition("-")[0] for file in files.split())
    expected = ["clamped_log", "ekfac", "gradient_cosine", "gradient_dot", "gradient_dot"]
    expected += ["icp", "icp_neutral", *["projected"] * 5, "zero_shot"]
    assert methods == expected, "no scores of other parameters"

    last = [rf"\.({'|'.join(str(29 - k) for k in reversed(range(profile['ekfac_blocks'])))})\."]
    options = {"loss_on": profile["loss_on"], "parts": last}
    found = influence.find(experiment, "run ./run_all.sh --fresh", **options)
    table = pd.read_csv(paths.resolve(profile["output_dir"]) / "02_training_examples.csv")
    np.testing.assert_allclose(table["mean_product"], found.dot.mean(1), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(table["mean_cosine"], found.cosine.mean(1), rtol=1e-5, atol=1e-6)
    rng = np.random.default_rng(profile["seed"])
    findings = influence.findings(found, same_task, table["tokens"].to_numpy(), rng)
    kept = pd.read_csv(paths.resolve(profile["output_dir"]) / "02_findings.csv")
    pd.testing.assert_frame_equal(findings, kept[: len(findings)], rtol=1e-5)
    other = kept.set_index("quantity")["estimate"]
    folder = paths.resolve(profile["scores_dir"])
    clamped, ekfac = (
        store.load(next(folder.glob(f"{name}-*"))) for name in ("clamped_log", "ekfac")
    )
    rows, columns = (
        [list(ids).index(one) for one in part]
        for ids, part in ((table["id"], clamped.train_ids), (asked["id"], clamped.query_ids))
    )
    plain, (last,) = found.dot[np.ix_(rows, columns)], found.parts.values()
    rho = spearmanr(plain.ravel(), clamped.matrix().ravel()).statistic
    assert other["clamp and log against product, all pairs"] == pytest.approx(rho, rel=1e-5)
    flipped = (np.sign(plain) != np.sign(clamped.matrix())).mean()
    assert other["signs that clamp and log flips"] == pytest.approx(flipped, rel=1e-5)
    rho = spearmanr(last.ravel(), ekfac.matrix().ravel()).statistic
    (name,) = (name for name in other.index if name.startswith("EK-FAC against product, last"))
    assert other[name] == pytest.approx(rho, rel=1e-5)
