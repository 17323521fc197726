"""A run becomes the reference by one command, without texts, checkpoints or unfinished scores."""

import json

import numpy as np
import pytest

from icprobe.artifact import publish
from icprobe.data import paths
from icprobe.scores import store


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    for name, folder in (
        ("FIGURES", "figures/reference"),
        ("SCORES", "data/scores/reference"),
        ("NETWORKS", "data/networks"),
    ):
        monkeypatch.setattr(paths, f"REFERENCE_{name}", tmp_path / folder)
    return tmp_path


def write(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps({"name": file}))


def make_scores(root, name: str, blocks: int) -> store.ScoreStore:
    """Make a store of two blocks, of which so many are finished."""
    made = store.open(root / "data/scores/mine", name, {}, ["a", "b"], ["q"], block_size=1)
    for block in range(blocks):
        made.write(block, np.ones((1, 1)))
    return made


def test_what_is_finished_replaces_what_was_there_and_texts_stay(root):
    copied = {
        "figures/mine/01_findings.csv": "figures/reference/mine/01_findings.csv",
        "figures/mine/01_scatter.png": "figures/reference/mine/01_scatter.png",
        "figures/mine/claims.json": "figures/reference/mine/claims.json",
        "figures/mine/logs/timing.csv": "figures/reference/mine/timing.csv",
        "data/scores/mine/finetuned/training-02.json": (
            "data/scores/reference/finetuned/training-02.json"
        ),
        "data/scores/mine/regression/one_shot-03.json": (
            "data/scores/reference/regression/one_shot-03.json"
        ),
        "data/scores/mine/networks/d5.safetensors": "data/networks/d5.safetensors",
    }
    left = (
        "figures/mine/08_selected.jsonl",
        "figures/mine/08_explorer.html",
        "figures/mine/notebooks/01.ipynb",
        "data/scores/mine/finetuned/training-02.jsonl",
        "data/scores/mine/finetuned/training-02/checkpoint-1/model.safetensors",
    )
    write(root, *copied, *left, "figures/reference/mine/claims.json")
    begun = root / "data/scores/mine/regression/begun-04.json"
    begun.write_text(json.dumps({"identity": {"B": 2}, "numbers": {"gain": [[0.5]]}}))
    finished = make_scores(root, "icp", blocks=2)
    make_scores(root, "gradient_dot", blocks=1)
    there = f"data/scores/reference/{finished.folder.name}"
    stale = "figures/reference/mine/01_old.pdf", f"{there}/part-00002.parquet"
    others = "figures/reference/mine/02_findings.csv", "figures/reference/mine/cost.csv"
    write(root, *stale, *others)
    publish.publish("mine")
    reference = [*(root / "figures/reference").rglob("*"), *(root / "data/networks").rglob("*")]
    reference += (root / "data/scores/reference").rglob("*")
    files = {str(path.relative_to(root)): path.read_bytes() for path in reference if path.is_file()}
    scores = {f"{there}/{file.name}": file.read_bytes() for file in finished.folder.iterdir()}
    texts = {target: source for source, target in copied.items()} | {one: one for one in others}
    texts = {file: json.dumps({"name": text}).encode() for file, text in texts.items()}
    assert files == texts | scores


def test_scores_may_lie_in_a_folder_of_another_name(root):
    write(root, "figures/long/04_lds.csv", "data/scores/laptop/finetuned/training-01.json")
    made = publish.publish("long", "laptop")
    assert root / "data/scores/reference/finetuned/training-01.json" in made and len(made) == 2


def test_a_run_that_is_not_there_is_named(root, capsys):
    assert publish.main(["other"]) == 2
    assert "figures/other" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["manifest.json", "part-00001.parquet", "begun.json"])
def test_what_is_damaged_is_named_and_nothing_is_replaced(root, capsys, which):
    made = make_scores(root, "icp", blocks=2)
    write(root, "data/scores/mine/regression/begun.json", "figures/mine/01_findings.csv")
    old = f"data/scores/reference/{made.folder.name}/part-00001.parquet"
    write(root, old)
    (file,) = (root / "data/scores/mine").rglob(which)
    file.write_bytes(file.read_bytes()[:-9])
    assert publish.main(["mine"]) == 2
    assert which in capsys.readouterr().err
    assert json.loads((root / old).read_text()) == {"name": old}
    assert not (root / "figures/reference").exists()
