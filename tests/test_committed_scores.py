"""The committed scores are those of the committed laptop profile, and the figures are theirs."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from icprobe import icp, influence, paths
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
    expected = ["clamped_log", "ekfac", "gradient_cosine", "gradient_cosine", "gradient_dot"]
    expected += ["gradient_dot", "icp", "icp_neutral", *["projected"] * 5, "zero_shot"]
    assert methods == expected, "no scores of other parameters"

    found = influence.find(experiment, "run ./run_all.sh --fresh", loss_on=profile["loss_on"])
    table = pd.read_csv(paths.resolve(profile["output_dir"]) / "02_training_examples.csv")
    np.testing.assert_allclose(table["mean_product"], found.dot.mean(1), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(table["mean_cosine"], found.cosine.mean(1), rtol=1e-5, atol=1e-6)
    rng = np.random.default_rng(profile["seed"])
    findings = influence.findings(found, same_task, table["tokens"].to_numpy(), rng)
    kept = pd.read_csv(paths.resolve(profile["output_dir"]) / "02_findings.csv")
    pd.testing.assert_frame_equal(findings, kept[: len(findings)], rtol=1e-5)
