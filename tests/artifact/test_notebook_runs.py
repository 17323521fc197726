"""Notebooks from end to end: the real model in the smoke profile, local stand-ins elsewhere."""

import json
import re
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from helpers import save_tiny

from icprobe import data
from icprobe.artifact import runner
from icprobe.artifact.settings import RegressionSettings
from icprobe.data import paths
from icprobe.methods import baselines, icp
from icprobe.scores import Experiment, load
from icprobe.statistics import recommendation


def reference(number: str, folder: str) -> list[str]:
    """Return the names of a notebook's committed results: what every run of it writes."""
    return sorted(file.name for file in (paths.REFERENCE_FIGURES / folder).glob(f"{number}_*"))


# of the notebooks that compute; 07, which reads published files, is run in test_authors_files.py
RESULTS = {number: reference(number, "laptop") for number in ("01", "02", "03", "04", "05", "06")}
POOL = "08_pool.jsonl"  # written where training examples copy a query, as two of the demo's do
RESULTS["08"] = [name for name in reference("08", "demo") if name != POOL]
NOTEBOOKS = {number: next(paths.NOTEBOOKS.glob(f"{number}_*.ipynb")) for number in RESULTS}


def run(number: str, given: dict, *arguments: str, profile: str = "laptop") -> int:
    """Run notebooks as run_all.sh does, with these parameters."""
    words = [text for name, value in given.items() for text in ("-p", name, str(value))]
    return runner.main([profile, "--only", number, *arguments, *words])


def places(folder: Path) -> dict[str, str]:
    return {"output_dir": str(folder / "figures"), "scores_dir": str(folder / "scores")}


def results(folder, number):
    return sorted(file.name for file in (folder / "figures").glob(f"{number}_*"))


def executed(folder, number):
    return nbformat.read(folder / "figures" / "notebooks" / NOTEBOOKS[number].name, as_version=4)


def printed(folder, number):
    cells = executed(folder, number).cells
    outputs = (output for cell in cells for output in cell.get("outputs", []))
    return "".join(output.get("text", "") for output in outputs)


def written(folder) -> dict[str, bytes]:
    """Return the bytes of all figures and tables."""
    kept = (folder / "figures").iterdir()
    return {file.name: file.read_bytes() for file in kept if re.match(r"\d\d_|claims", file.name)}


def scores_of(folder) -> dict[Path, tuple[int, bytes]]:
    """Return when each file of scores was written, in nanoseconds, and its bytes."""
    parts = (folder / "scores").rglob("part-*")
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in parts}


def by_papermill(number, given, folder, cwd) -> None:
    papermill.execute_notebook(
        NOTEBOOKS[number], folder / "copy.ipynb", given, cwd=cwd, progress_bar=False,
        kernel_name="python3",
    )  # fmt: skip


def write_own(folder: Path) -> dict:
    """Return papermill parameters for a tiny model and data of one's own, in files."""
    examples = [json.loads(line) for line in (paths.ROOT / "data/demo.jsonl").open()]
    for name, rows in (("pool", examples[:14]), ("wanted", examples[14:19])):
        lines = (json.dumps({k: row[k] for k in ("prompt", "completion", "task")}) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        **places(folder),
        "model": str(save_tiny(folder / "model", "llama")),
        "train": str(folder / "pool.jsonl"),
        "queries": str(folder / "wanted.jsonl"),
    }


@pytest.fixture
def own(tmp_path):
    return write_own(tmp_path)


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[Path, dict]:
    """Return a folder with the results of 01 and 02 on data of one's own, and their parameters."""
    folder = tmp_path_factory.mktemp("scored")
    given = write_own(folder) | {"n_train": None, "n_query": None, "condition_pools": {}}
    for number in ("01", "02"):
        by_papermill(number, given, folder, paths.NOTEBOOKS)  # as Jupyter does
    return folder, given


def test_jupyter_papermill_and_run_all_give_the_same_files(scored):
    """By papermill from finished scores, which are not touched; by run_all.sh with --fresh."""
    folder, given = scored
    first, made = scores_of(folder), written(folder)
    assert {*RESULTS["01"], *RESULTS["02"]} <= made.keys()
    for number in ("01", "02"):
        by_papermill(number, given, folder, folder)
    assert (scores_of(folder), written(folder)) == (first, made)
    assert run("01,02", given, "--fresh") == 0
    assert written(folder) == made
    fresh = scores_of(folder)
    assert fresh.keys() == first.keys()
    assert all(fresh[file][0] > first[file][0] for file in first)
    assert all(fresh[file][1] == first[file][1] for file in first)


def test_correlation_comes_from_finished_scores(scored, own, capsys):
    folder, given = scored
    assert run("03", own | {"resamples": 20}) == 1
    assert "./run_all.sh laptop --only 01,02" in capsys.readouterr().out
    scores = scores_of(folder)
    assert run("03", given | {"resamples": 20}) == 0
    assert results(folder, "03") == RESULTS["03"]
    assert scores_of(folder) == scores
    claims = json.loads((folder / "figures" / "claims.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in claims}
    # nothing in these data is said to share type or content, and 07 has not run
    assert verdicts["C2"] == "not testable here"
    assert verdicts["C3"] == verdicts["rho > 0.85"] == "not run"


@pytest.mark.slow
def test_finetuning_goes_on_where_it_stopped_and_gives_the_same_files(scored):
    """On a half of one's own queries; an interrupted run is one whose last records are missing."""
    folder, given = scored
    more = {"seeds": 3, "subsets": 6, "subset_share": 0.5, "budget": 0.3, "n_evaluation": None}
    more |= {"budgets": [0.5], "lora_rank": 2, "rate": 0.01, "budget_unit": "tokens"}
    given = {name: value for name, value in given.items() if name != "condition_pools"} | more
    assert run("04", given) == 0
    assert results(folder, "04") == reference("04", "laptop_long")
    records = sorted((folder / "scores" / "finetuned").glob("*.json"))
    first = {file: file.read_bytes() for file in records}
    made = written(folder)
    tables = {name: content for name, content in made.items() if name.endswith(".csv")}
    for file in records[::5]:
        file.unlink()
    assert run("04", given) == 0
    assert first == {file: file.read_bytes() for file in records}
    assert tables == {name: written(folder)[name] for name in tables}
    said = printed(folder, "04")
    assert "N = 14, selecting queries 3, evaluation queries 2" in said
    counts = re.findall(r"trainings: reused (\d+) of (\d+)", said)
    assert len(counts) == 4  # the untouched model, selections, another size, subsets
    assert sum(int(n) - int(reused) for reused, n in counts) == len(records[::5])
    claims = json.loads((folder / "figures" / "claims.json").read_text())
    judged = {claim["verdict"] for claim in claims if claim["notebook"] == "04"}
    assert judged <= {"reproduced", "partly", "not reproduced", "not testable here"}
    selected = data.load(folder / "figures" / "selected" / "icp_score_top.jsonl")
    assert set(selected["completion"]) < set(data.load(given["train"])["completion"])


def test_your_own_data_need_three_parameters(tmp_path, own):
    """By papermill, and by run_all.sh from finished scores: the same files."""
    by_papermill("08", own, tmp_path, tmp_path)
    assert results(tmp_path, "08") == RESULTS["08"]
    scores, made = scores_of(tmp_path), written(tmp_path)
    assert run("08", own) == 0
    assert "sample: 14 of 14 training examples, 5 of 5 queries" in printed(tmp_path, "08")
    assert (scores_of(tmp_path), written(tmp_path)) == (scores, made)


def test_of_your_own_data_a_sample_decides_and_the_pool_is_scored(tmp_path, own):
    """With a copy of a query in the pool, which is found, marked, and not selected."""
    pool, queries = (Path(own[name]) for name in ("train", "queries"))
    pool.write_text(pool.read_text() + "\n" + queries.read_text().splitlines()[0])
    sample = {"n_sample": 6, "m_sample": 3, "budget": 0.5, "method": "ICP", "resamples": 50}
    sources = {name: own[name] for name in ("scores_dir", "model", "train", "queries")}
    experiment = Experiment(**sources, max_length=512)
    with pytest.warns(UserWarning, match="1 text is both query and training example"):
        train, asked = experiment.load_data()
    assert run("08", own | sample) == 0
    folder = tmp_path / "figures"
    scores = pd.read_csv(folder / "08_scores.csv")
    assert scores["id"].to_list() == train["id"]
    (copy,) = scores.index[scores["copy_of"].notna()]
    assert copy == 14 and scores["copy_of"][copy] == asked["id"][0]
    assert not scores["selected"][copy] and scores["selected"].sum() == 7  # half of 14
    assert not set(scores) & {"prompt", "completion", "text"}
    # the sample that decides is of the pool without it
    cleaned = data.load(folder / "08_pool.jsonl")
    assert cleaned["id"] == [one for one in train["id"] if one != train["id"][copy]]
    assert f"-p train {folder / '08_pool.jsonl'}" in printed(tmp_path, "08")
    assert "-p seed 0 -p budget 0.5 -p budget_unit examples" in printed(tmp_path, "08")
    chosen = data.load(folder / "08_selected.jsonl")
    assert set(chosen["id"]) == set(scores["id"][scores["selected"]])
    assert chosen["score"] == sorted(chosen["score"], reverse=True)
    gain, _ = icp.gains(load(experiment, icp.probing()))
    np.testing.assert_allclose(scores["score"], gain.mean(axis=1), rtol=1e-5)
    verdict = pd.read_csv(folder / "08_verdict.csv").iloc[0]
    agreed = pd.read_csv(folder / "08_findings.csv")
    assert verdict["verdict"] == recommendation.recommend(agreed).verdict
    assert set(agreed["n"]) == {6} and set(agreed["m"]) == {3}
    assert "1 of 15 training examples are, or resemble, a query" in printed(tmp_path, "08")


@pytest.mark.slow
def test_of_your_own_data_one_query_and_labels_of_a_kind_will_do(tmp_path, own):
    """One query; no task, but contents; all in so few examples that there is no ranking."""
    rows = [json.loads(line) for line in Path(own["train"]).read_text().splitlines()]
    rows = [{"prompt": r["prompt"], "completion": r["completion"], "content": f"c{k % 2}"}
            for k, r in enumerate(rows)]  # fmt: skip
    Path(own["train"]).write_text("\n".join(map(json.dumps, rows)))
    query = Path(own["queries"]).read_text().splitlines()[0]
    Path(own["queries"]).write_text(query)
    stale = tmp_path / "figures" / "08_pool.jsonl"  # of other data, with copies of queries
    stale.parent.mkdir()
    stale.write_text("{}")
    assert run("08", own | {"resamples": 20}) == 0
    assert not stale.exists()
    assert results(tmp_path, "08") == RESULTS["08"]
    verdict = pd.read_csv(tmp_path / "figures" / "08_verdict.csv").iloc[0]
    assert verdict["verdict"] == recommendation.TOO_SMALL


def test_a_pool_of_copies_is_refused_before_anything_is_scored(tmp_path, own, capsys):
    assert run("08", own | {"queries": own["train"]}) == 1
    assert "all 14 training examples copy a query" in capsys.readouterr().out
    assert not (tmp_path / "scores").exists()


def test_the_committed_page_is_what_the_notebook_writes():
    page = (paths.REFERENCE_FIGURES / "demo" / "08_explorer.html").read_text("utf-8")
    for name in ("explorer.js", "explorer.css"):
        assert (paths.ROOT / "lib/icprobe/artifact/page" / name).read_text("utf-8") in page, name


@pytest.mark.skipif(not (paths.ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize("folder", ["laptop", "your_data", "mine"])
def test_files_with_texts_are_not_for_git(folder):
    for name in ("08_explorer.html", "08_selected.jsonl", "08_pool.jsonl", "selected/x.jsonl"):
        command = ["git", "check-ignore", "-q", f"figures/{folder}/{name}"]
        assert subprocess.run(command, cwd=paths.ROOT, check=False).returncode == 0, name


def test_synthetic_regression_reuses_its_networks(tmp_path):
    """Small, and without any model: the same tables again from networks that are kept."""
    small = yaml.safe_load((paths.NOTEBOOKS / "profiles" / "smoke.yaml").read_text())
    known = RegressionSettings.model_fields.keys() - {"profile", "fresh"}
    changes = {name: value for name, value in small.items() if name in known} | places(tmp_path)
    changes |= {"network_steps": 20, "networks_dir": f"{tmp_path}/networks"}
    tables = []
    for reused in (0, 4):
        assert run("05", changes) == 0
        assert results(tmp_path, "05") == RESULTS["05"]
        assert printed(tmp_path, "05").count("networks: reused") == reused
        found = (tmp_path / "figures").glob("05_*.csv")
        tables.append({f.name: f.read_bytes() for f in found if f.name != "05_cost.csv"})
    assert tables[0] == tables[1]
    claims = json.loads((tmp_path / "figures" / "claims.json").read_text())
    verdicts = {claim["id"]: claim["verdict"] for claim in claims if claim["notebook"] == "05"}
    assert len(verdicts) == 5 and "not run" not in verdicts.values()


@pytest.mark.real
@pytest.mark.slow
def test_the_smoke_profile_runs_and_always_computes(tmp_path):
    own = places(tmp_path) | {"networks_dir": f"{tmp_path}/networks"}
    assert run(",".join(RESULTS), own, profile="smoke") == 0
    for number in RESULTS:
        assert results(tmp_path, number) == RESULTS[number]
        if number == "04":
            assert "trainings: reused 0 of 1 from" in printed(tmp_path, number)
        cells = [c for c in executed(tmp_path, number).cells if "figures.save(" in c.source]
        shown = [c for c in cells if "\nif subsets:" not in c.source]  # 0 in smoke
        assert len(shown) == sum(name.endswith(".png") for name in RESULTS[number])
        for cell in shown:
            assert sum("image/png" in output.get("data", {}) for output in cell.outputs) == 1
    table = pd.read_csv(tmp_path / "figures" / "01_training_examples.csv")
    assert len(table) == 12 and table["icp_score"].between(0, 1).all()
    table = pd.read_csv(tmp_path / "figures" / "02_training_examples.csv")
    assert len(table) == 12 and table["mean_cosine"].between(-1, 1).all()


@pytest.mark.slow
def test_the_paper_profile_with_local_stand_ins(tmp_path):
    """Everything of paper.yaml but the sources: columns, preamble, dtype and lengths."""
    profile = yaml.safe_load((paths.NOTEBOOKS / "profiles" / "paper.yaml").read_text())
    examples = [json.loads(line) for line in (paths.ROOT / "data/demo.jsonl").open()]
    alpaca = [
        {"instruction": row["prompt"], "input": "", "output": row["completion"].strip()}
        for row in examples[:9]
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(alpaca), tmp_path / "alpaca.parquet")
    kmeans = [{"text": row["prompt"], "target": row["completion"]} for row in examples[9:13]]
    (tmp_path / "kmeans.jsonl").write_text("\n".join(json.dumps(row) for row in kmeans))
    model = save_tiny(tmp_path / "model", "gpt_neox", positions=2048)
    sources = {
        "model": str(model),
        "train": str(tmp_path / "alpaca.parquet"),
        "queries": str(tmp_path / "kmeans.jsonl"),
    }
    # 06 would time for ten minutes, and 05 train at its full size
    given = sources | places(tmp_path) | {"m_timed": "[1, 3]", "timing_repeats": 1}
    expected_of = {number: files for number, files in RESULTS.items() if number != "05"}
    # without labels there are no conditions to draw
    expected_of["03"] = [file for file in RESULTS["03"] if "conditions.p" not in file]
    assert run(",".join(expected_of), given, profile="paper") == 0
    for number, expected in expected_of.items():
        assert results(tmp_path, number) == expected

    names = ["n_train", "n_query", "dtype", "max_length", "train_columns", "query_columns"]
    kept = {name: profile[name] for name in names}
    experiment = Experiment(scores_dir=str(tmp_path / "scores"), **sources, **kept)
    gain, _ = icp.gains(load(experiment, icp.probing(profile["preamble"], neutral=True)))
    assert gain.shape == (9, 4)
    pool, _ = experiment.load_data()
    first = alpaca[0]
    assert pool[0]["prompt"] == f"Instruction: {first['instruction']} \nResponse:"
    assert pool[0]["completion"] == f" {first['output']}"
    assert profile["preamble"] == icp.PUBLISHED_PREAMBLE
    # the loss is on the text, and nothing predicts its first token
    assert profile["loss_on"] == "text"
    tokens = load(experiment, baselines.TextTokens())["text_tokens"]
    assert (tokens == load(experiment, baselines.Length())["length"] - 1).all()
