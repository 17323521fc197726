"""What made a run: the checkout's state, and where models and data come from."""

import shutil
import subprocess

from icprobe.artifact import provenance
from icprobe.data import paths


def git(root, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_git_state(tmp_path):
    assert provenance.git_state(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert "error" in provenance.git_state(tmp_path)  # nothing is committed yet
    (tmp_path / "a file").write_text("1")
    shutil.copy(paths.ROOT / ".gitignore", tmp_path)
    results = [tmp_path / "figures" / "laptop", tmp_path / "data" / "scores" / "laptop"]
    reference = tmp_path / "data" / "scores" / "reference"
    for folder in (*results, reference):
        folder.mkdir(parents=True)
        (folder / "result.csv").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    clean = {"revision": git(tmp_path, "rev-parse", "HEAD"), "changed": []}
    assert provenance.git_state(tmp_path) == clean
    for folder in results:
        (folder / "result.csv").write_text("2")  # a result says nothing of the code
    assert provenance.git_state(tmp_path) == clean
    (tmp_path / "a file").rename(tmp_path / "ä file")
    (reference / "result.csv").write_text("2")  # which a run reads
    changed = {"a file", "ä file", "data/scores/reference/result.csv"}
    assert set(provenance.git_state(tmp_path)["changed"]) == changed
    within = tmp_path / "unpacked"
    within.mkdir()
    assert provenance.git_state(within) is None  # the repository above is another one


def test_sources_are_told_without_loading(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parameters = {"model": "smollm2-135m-instruct", "queries": "no/such-data-set"}
    found = provenance.sources(parameters | {"condition_pools": {"crossed": [8, 4]}})
    assert found["model"]["sha256"] and found["suite crossed, query"]["limit"] == 4
    assert "no/such-data-set" in found["queries"]["unknown"]
    assert provenance.sources({"seed": 0, "output_dir": "x", "published_dir": ""}) == {}


def test_an_edited_file_has_another_identity_whichever_parameter_names_it(tmp_path):
    (tmp_path / "published").mkdir()
    files = {
        "training pool": ("train", "pool.jsonl"),
        "queries": ("queries", "wanted.jsonl"),
        "evaluation queries": ("evaluation", "held_out.jsonl"),
        "timings": ("compared", "cost.csv"),
        "published scores": ("published_dir", "published/scores.json"),
    }
    for _, name in files.values():
        (tmp_path / name).write_text("{}")
    given = {parameter: str(tmp_path / name) for parameter, name in files.values()}
    given["published_dir"] = str(tmp_path / "published")
    before = provenance.sources(given)
    assert set(before) == set(files) and "unknown" not in str(before)
    for title, (_, name) in files.items():
        (tmp_path / name).write_text("{ }")
        after = provenance.sources(given)
        assert [other for other in before if after[other] != before[other]] == [title]
        (tmp_path / name).write_text("{}")
