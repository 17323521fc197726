"""Sweeps: real papermill runs of a tiny notebook over a grid, in a temporary tree."""

import json
import signal
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from icprobe import sweep

PARAMETERS = """
profile: "str" = "laptop"  # which profile
output_dir: "str" = "figures/laptop"  # results
scores_dir: "str" = "data/scores/laptop"  # finished scores
n: "int or None" = 4  # how many
share: "float" = 0.5  # of them
label: "str" = "x"  # free text
seed: "int" = 0  # from 0
fresh: "bool" = False  # compute anew
""".strip()

# leaves a line that tells what it was given, and tables like those of a real notebook
WORK = """
import json, pathlib
print(json.dumps(NAMES), file=pathlib.Path("told.jsonl").open("a"))
if n is None and not pathlib.Path("mended").exists():
    raise ValueError("n is needed")
folder = pathlib.Path(output_dir)
folder.mkdir(parents=True, exist_ok=True)
(folder / "01_findings.csv").write_text(f"quantity,n,estimate\\na,7,{share:.3f}\\nb,8,1e-07\\n")
(folder / "01_other.csv").write_text("k\\n1\\n")
"""
NAMES = ["profile", "output_dir", "scores_dir", "n", "share", "label", "fresh"]


@pytest.fixture
def root(tmp_path) -> Path:
    """Two notebooks, the first of which works, and two profiles."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    told = WORK.replace("NAMES", f"{{k: globals()[k] for k in {NAMES}}}")
    for name, parameters, source in (
        ("01_first", PARAMETERS, told),
        ("02_second", 'm: "int" = 1  # another', "1 / 0"),
    ):
        cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        cells.append(nbformat.v4.new_code_cell(source))
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    laptop = {"profile": "laptop", "n": 4}
    smoke = {"profile": "smoke", "n": 8, "m": 3, "fresh": True, "scores_dir": "data/scores/smoke"}
    smoke |= {"for_01_first": {"n": 1}, "for_02_second": {"m": 4}}
    for name, values in (("laptop", laptop), ("smoke", smoke)):
        (tmp_path / "notebooks" / "profiles" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def told(root) -> list[dict]:
    file = root / "told.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def collected(root, name="01_findings.csv", folder="figures/sweep") -> pd.DataFrame:
    return pd.read_csv(root / folder / name, dtype=str, keep_default_na=False)


def test_all_combinations_are_run_apart_and_collected(root, capsys):
    grid = ["-p", "share", "1", "0.25", "-p", "label", "", "--- -p"]
    assert sweep.main(["01", "--profile", "smoke", *grid], root) == 0
    ran = told(root)
    assert [(line["share"], line["label"]) for line in ran] == [
        (1.0, ""), (1.0, "--- -p"), (0.25, ""), (0.25, "--- -p"),
    ]  # fmt: skip
    assert isinstance(ran[0]["share"], float)
    assert all(line["n"] == 1 and line["profile"] == "smoke" for line in ran)
    assert {line["scores_dir"] for line in ran} == {"data/scores/smoke"}
    assert not any(line["fresh"] for line in ran)  # the profile says so, but scores are shared
    folders = [line["output_dir"] for line in ran]
    assert len(set(folders)) == 4
    assert all(Path(folder).parent == Path("figures/sweep/01_first") for folder in folders)
    assert (root / folders[0] / "notebooks" / "01_first.ipynb").exists()

    table = collected(root)
    assert list(table) == ["share", "label", "quantity", "n", "estimate"]
    assert list(table["share"]) == ["1.0"] * 4 + ["0.25"] * 4
    assert list(table["label"][:4]) == ["", "", "--- -p", "--- -p"]
    assert list(table["estimate"][:2]) == ["1.000", "1e-07"]  # as the notebook wrote it
    out = capsys.readouterr().out
    assert "[4/4] 01_first: share 0.25, label '--- -p'" in out
    assert "table: " in out and "8 rows" in out
    (log,) = (root / "figures" / "sweep" / "logs").glob("*.log")
    assert "01_first, cell 1 of" in log.read_text()


def test_finished_combinations_are_kept_and_the_grid_may_grow(root, capsys):
    assert sweep.main(["01_first", "-p", "n", "1", "2"], root) == 0
    assert sweep.main(["1", "-p", "n", "1", "2", "3", "2"], root) == 0
    assert [line["n"] for line in told(root)] == [1, 2, 3]
    assert capsys.readouterr().out.count("finished before") == 2
    table = collected(root)  # the notebook's table has a column of this name, too
    assert list(table) == ["n (parameter)", "quantity", "n", "estimate"]
    assert list(table["n (parameter)"]) == ["1", "1", "2", "2", "3", "3"]

    assert sweep.main(["01", "-p", "n", "2", "--table", "other"], root) == 0
    assert list(collected(root, "01_other.csv")["n"]) == ["2"]
    assert len(told(root)) == 3

    # another place for scores changes no result, nor does the usual value; the profile's may
    assert (
        sweep.main(["01", "-p", "n", "2", "-p", "scores_dir", "there", "-p", "seed", "0"], root)
        == 0
    )
    assert len(told(root)) == 3
    assert sweep.main(["01", "--profile", "smoke", "-p", "n", "2"], root) == 0
    assert len(told(root)) == 4

    assert sweep.main(["01", "-p", "n", "2", "--fresh"], root) == 0
    assert (len(told(root)), told(root)[-1]["fresh"]) == (5, True)


def test_a_failure_is_reported_and_stops_nothing(root, capsys):
    arguments = ["01", "-p", "n", "None", "3", "--output", "out"]
    assert sweep.main(arguments, root) == 1
    assert [line["n"] for line in told(root)] == [None, 3]
    end = capsys.readouterr().out.partition("[2/2]")[2]
    assert "not finished: n None\nValueError: n is needed" in end
    assert set(collected(root, folder="out")["n (parameter)"]) == {"3"}

    (root / "mended").touch()
    assert sweep.main(arguments, root) == 0
    assert [line["n"] for line in told(root)[2:]] == [None]
    assert set(collected(root, folder="out")["n (parameter)"]) == {"None", "3"}

    (root / "mended").unlink()
    assert sweep.main([*arguments, "--fresh"], root) == 1  # and no old result stands for it
    assert set(collected(root, folder="out")["n (parameter)"]) == {"3"}


def test_an_interruption_ends_the_sweep_and_it_goes_on_from_there(root, monkeypatch):
    path = root / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    working = notebook.cells[1].source
    # what a terminal's Ctrl-C does, as soon as the second combination runs
    parent = "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(20)"
    notebook.cells[1].source = f"if n == 2:\n    {parent.replace(chr(10), chr(10) + '    ')}"
    notebook.cells[1].source += f"\n{working}"
    nbformat.write(notebook, path)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        assert sweep.main(["01", "-p", "n", "1", "2", "3"], root) == 130
    finally:
        signal.signal(signal.SIGINT, usual)
    assert [line["n"] for line in told(root)] == [1]
    assert set(collected(root)["n (parameter)"]) == {"1"}
    notebook.cells[1].source = working
    nbformat.write(notebook, path)
    assert sweep.main(["01", "-p", "n", "1", "2", "3"], root) == 0
    assert [line["n"] for line in told(root)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["03"], ["no notebook '03'", "01_first, 02_second"]),
        (["01", "--profile", "smke"], ["unknown profile 'smke'", "Did you mean smoke?"]),
        (["01", "-p", "n"], ["-p n: write -p NAME VALUE VALUE ..."]),
        (["01", "-p"], ["-p: write -p NAME VALUE VALUE ..."]),
        (["01", "-p", "n", "1", "-p", "n", "2"], ["-p n: write all its values after one -p"]),
        (["01", "-p", "lable", "y"], ["-p lable", "Did you mean label?"]),
        (["01", "-p", "m", "1"], ["-p m: no notebook declares"]),
        (["01", "-p", "output_dir", "a"], ["-p output_dir", "--output"]),
        (["01", "-p", "fresh", "true"], ["-p fresh", "--fresh"]),
        (["01", "-p", "seed", "0", "-1", "-p", "n", "a"], ["seed is -1", "n is 'a'"]),
        (["02"], ["02_second has no output_dir"]),
    ],
)
def test_mistakes_are_found_before_anything_runs(root, capsys, arguments, parts):
    assert sweep.main(arguments, root) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ")
    assert not (root / "figures").exists() and not told(root)
    for part in parts:
        assert part in err


def test_mistakes_in_the_profile_are_found_too(root, capsys):
    (root / "notebooks" / "profiles" / "smoke.yaml").write_text("rate: 1")
    assert sweep.main(["01", "--profile", "smoke"], root) == 2
    assert "smoke.yaml rate: no notebook declares" in capsys.readouterr().err


def test_a_table_that_there_is_not_is_an_error_that_names_those_there_are(root, capsys):
    assert sweep.main(["01", "--table", "finding"], root) == 1
    out = capsys.readouterr().out
    assert "wrote no 01_finding.csv. It wrote: findings, other" in out


def test_help_says_what_it_does(root, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["--help"], root)
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in (*sweep.OPTIONS[3:6], "-p NAME VALUE VALUE", "laptop, smoke", "figures/sweep"):
        assert part in out
