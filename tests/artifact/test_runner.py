"""The runner: real papermill runs of tiny notebooks in a temporary tree."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from icprobe.artifact import plan, runner
from icprobe.artifact.parameters import schemas
from icprobe.artifact.settings import CostSettings, FinetuningSettings, PublishedSettings
from icprobe.data import paths

MINE = 'profile = "laptop"\noutput_dir = "figures/laptop"\nn = 4\nlabel = "x"\nfresh = False'
# with the parameters of notebook 07, and checked as they are there
KNOWN = "\n".join(f"{name} = {x.default!r}" for name, x in PublishedSettings.model_fields.items())
CHECK = "from icprobe.artifact.settings import PublishedSettings\nif 0: PublishedSettings.of({})"

# each run leaves one line that says what ran, where, and with which parameters
TELL = """
import json, pathlib, sys
names = ["profile", "output_dir", "n", "label", "fresh", "resamples"]
told = {name: value for name, value in globals().items() if name in names}
told |= {"notebook": "NOTEBOOK", "python": sys.executable}
with pathlib.Path("told.jsonl").open("a") as file:
    print(json.dumps(told), file=file)
"""


def write_notebook(root: Path, name: str, parameters: str, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    # a kernel of this name is registered nowhere: the runner's own Python must serve
    kernel = {"name": "elsewhere", "display_name": "Elsewhere", "language": "python"}
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def tell(name: str) -> str:
    return TELL.replace("NOTEBOOK", name)


def told(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "told.jsonl").read_text().splitlines()]


def write_profile(root: Path, name: str, **values: object) -> None:
    (root / "notebooks" / "profiles" / f"{name}.yaml").write_text(yaml.safe_dump(values))


def recorded(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "run.json").read_text())["notebooks"]


def statuses(folder: Path) -> list[str]:
    return [one["status"] for one in recorded(folder).values()]


@pytest.fixture
def root(tmp_path) -> Path:
    """Write a notebook of one's own, one with settings, two profiles; the name has a space."""
    root = tmp_path / "a checkout"
    (root / "notebooks" / "profiles").mkdir(parents=True)
    write_notebook(root, "01_mine", MINE, tell("01_mine"))
    write_notebook(root, "02_known", KNOWN, CHECK, tell("02_known"))
    write_profile(root, "laptop", profile="laptop")
    write_profile(root, "smoke", profile="smoke", output_dir="figures/smoke", n=1, resamples=7)
    return root


def test_runs_in_order_with_the_profile_in_this_environment(root, monkeypatch, tmp_path, capsys):
    write_notebook(root, "draft", "a = 1  # not numbered, so never run", "1 / 0")
    write_notebook(root, "01_mine-Copy1", "a = 1  # a copy that Jupyter makes", "1 / 0")
    write_notebook(root, "02_own", KNOWN, CHECK, tell("02_own"))  # a copy of one's own
    # a user's own kernel called python3 must not be taken
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/nowhere/python"], "display_name": "Foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)

    assert runner.main(["smoke"], root) == 0

    first, second, third = told(root)  # written to the working directory, so that is the root
    names = ["01_mine", "02_known", "02_own"]
    assert [one["notebook"] for one in (first, second, third)] == names
    assert first["python"] == sys.executable
    assert (first["profile"], first["n"], first["label"]) == ("smoke", 1, "x")
    assert second["resamples"] == 7 and "n" not in second  # it does not declare it

    folder = root / "figures" / "smoke"
    copies = sorted(path.stem for path in (folder / "notebooks").iterdir())
    rows = recorded(folder)
    assert copies == list(rows) == names and set(statuses(folder)) == {"done"}
    assert all(0 < row["minutes"] < 2 for row in rows.values())
    assert all(0.01 < row["gib"] < 4 for row in rows.values())  # a kernel with nothing loaded
    assert rows["01_mine"]["parameters"]["n"] == 1
    (log,) = (folder / "logs").iterdir()
    assert "'profile': 'smoke'" in log.read_text()
    out = capsys.readouterr().out
    assert "[3/3] 02_own" in out and "GiB" in out and f"report: {folder / 'report.html'}" in out


def test_a_section_and_overrides_are_for_those_that_declare_them(root, capsys):
    section = {"n": 7, "output_dir": "figures/own"}
    write_profile(root, "smoke", profile="smoke", output_dir="figures/smoke", for_01_mine=section)
    assert runner.main(["smoke"], root) == 0
    first, second = told(root)
    assert (first["n"], first["output_dir"]) == (7, "figures/own")
    assert second["output_dir"] == "figures/smoke"
    # where the run itself is recorded is the profile's
    assert (root / "figures" / "smoke" / "notebooks" / "01_mine.ipynb").exists()

    arguments = ["-p", "n", "9", "--only", "1", "smoke", "-p", "label", "-1e-3"]
    assert runner.main(arguments, root) == 0
    assert (told(root)[-1]["n"], told(root)[-1]["label"]) == (9, -0.001)
    own = root / "figures" / "own"  # its results lie nowhere else
    assert (own / "notebooks" / "01_mine.ipynb").exists() and (own / "report.html").exists()

    elsewhere = root.parent / "elsewhere"
    assert runner.main([*arguments, "-p", "output_dir", str(elsewhere)], root) == 0
    assert (elsewhere / "notebooks" / "01_mine.ipynb").exists()
    assert (elsewhere / "run.json").exists() and list((elsewhere / "logs").iterdir())


def test_minutes_are_those_of_fresh_runs_of_the_profile(root, capsys):
    """A notebook that cannot be had is skipped; what is known of others stays."""
    want = "from icprobe.data import assets\nraise assets.Unavailable('offline\\nget it by hand')"
    write_notebook(root, "02_known", KNOWN, CHECK, want)
    folder = root / "figures" / "laptop"
    timing = folder / "logs" / "timing.csv"
    timing.parent.mkdir(parents=True)
    timing.write_text("notebook,minutes,cores,processor,icprobe\n03_third,1.5,2,Some CPU,0.0.1\n")
    assert runner.main(["--fresh"], root) == 0
    assert told(root)[0]["fresh"] is True
    known = pd.read_csv(timing).set_index("notebook")
    assert list(known.index) == ["01_mine", "03_third"] and (known["minutes"] > 0).all()
    out = capsys.readouterr().out
    assert "SKIPPED: 02_known\n\noffline\nget it by hand" in out
    assert [path.name for path in (folder / "notebooks").iterdir()] == ["01_mine.ipynb"]
    assert statuses(folder) == ["done", "skipped"] and recorded(folder)["02_known"]["gib"] is None
    timing.unlink()
    assert runner.main(["--fresh", "--only", "01", "-p", "n", "4"], root) == 0
    assert not timing.exists()  # not the profile as it stands


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["lapdog"], ["'lapdog'", "laptop, smoke"]),
        (["--only", "01,07"], ["07", "01_mine, 02_known"]),
        (["--only", "first"], ["first"]),
        (["-p", "label2", "y"], ["-p label2", "close: label"]),
        (["-p", "resamples", "many"], ["-p: resamples is 'many'", "integer", "(02_known)"]),
        (["-p", "resamples", "1.5"], ["resamples is 1.5", "integer"]),
        (["-p", "resamples", ""], ["resamples is ''", "integer"]),
        (["-p", "n"], ["-p NAME VALUE"]),
        (["-p", "output_dir", "~nosuchuser/mine"], ["output_dir is '~nosuchuser/mine'", "home"]),
        (["-p", "output_dir", "x" * 300], ["output_dir is 'xxx", "too long"]),
        (["-p", "output_dir", "notebooks/01_mine.ipynb/x"], ["output_dir", "01_mine.ipynb"]),
        (["--only", "02", "-p", "n", "2"], ["-p n", "no notebook of this run"]),
    ],
)
def test_usage_errors_come_before_anything_runs(root, capsys, arguments, parts):
    assert runner.main(arguments, root) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not (root / "figures").exists() and not (root / "told.jsonl").exists()


@pytest.mark.parametrize(
    ("profile", "parts"),
    [
        ("resmaples: 1", ["laptop.yaml resmaples", "close: resamples"]),
        ("resamples: '4'", ["laptop.yaml: resamples is '4'", "a number in quotes is text"]),
        ("- n", ["laptop.yaml", "mapping"]),
        ("n: [", ["laptop.yaml", "YAML"]),
        ("for_03_third: {n: 2}", ["laptop.yaml for_03_third"]),
        ("for_01_mine: 3", ["laptop.yaml for_01_mine", "mapping"]),
        ("for_01_mine:", ["laptop.yaml for_01_mine", "mapping"]),
        ("for_01_mine: {resamples: 3}", ["for_01_mine resamples"]),
        ("for_02_known: {resamples: 0}", ["resamples is 0", "(02_known)"]),
    ],
)
def test_mistakes_in_a_profile(root, capsys, profile, parts):
    (root / "notebooks" / "profiles" / "laptop.yaml").write_text(profile)
    if "mapping" in parts:
        assert runner.main(["--help"], root) == 2
    assert runner.main([], root) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert not (root / "figures").exists()


def test_notebooks_that_cannot_be_read(root, capsys):
    path = write_notebook(root, "03_third", "n = len('four')")
    assert runner.main(["--only", "01"], root) == 2
    assert "03_third.ipynb, parameters cell: n is len('four')" in capsys.readouterr().err
    path.write_text("not a notebook")
    assert runner.main([], root) == 2
    assert "03_third.ipynb" in capsys.readouterr().err
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    assert runner.main([], root) == 2
    assert "no notebooks in" in capsys.readouterr().err


def test_all_wrong_values_are_listed_once(root, capsys):
    write_notebook(root, "03_known", KNOWN, CHECK)
    assert runner.main(["-p", "resamples", "many", "-p", "output_dir", ""], root) == 2
    err = capsys.readouterr().err
    assert "resamples is 'many'" in err and "output_dir is ''" in err
    assert err.count("(02_known, 03_known)") == 2 and len(err.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "settings", "name", "value"),
    [
        ("12", FinetuningSettings, "model", "12"),
        ("none", FinetuningSettings, "model", "none"),
        ("None", CostSettings, "compared", None),
        ("1e-4", FinetuningSettings, "rate", 1e-4),
        ("True", FinetuningSettings, "fresh", True),
        ("[a, 1]", FinetuningSettings, "rivals", ["a", 1]),
        ("[[sgd, 1.0e-4]]", CostSettings, "steps", [["sgd", 1e-4]]),
        ("{prompt: question}", FinetuningSettings, "train_columns", {"prompt": "question"}),
        ("[a", FinetuningSettings, "rivals", "[a"),  # for the check to judge
    ],
)
def test_values_are_read_as_the_declared_type(text, settings, name, value):
    parsed = plan.parse(text, schemas(settings)[name])
    assert parsed == value and type(parsed) is type(value)


def test_help_lists_parameters_with_type_and_meaning(root, capsys):
    assert runner.main(["smoke", "--only", "02", "--help"], root) == 0
    out = capsys.readouterr().out
    assert "resamples = 7" in out and "int from 2: resamples of" in out and "label" not in out


def test_a_failing_notebook_stops_the_run(root, capsys):
    folder = root / "figures" / "laptop"
    assert runner.main(["--only", "02"], root) == 0
    good = folder / "notebooks" / "02_known.ipynb"
    before = good.read_bytes()
    broken = "ready = True\nfor share in [0.5, 0]:\n    print('share', share)\n    1 / share"
    write_notebook(root, "02_known", KNOWN, "print('fine')", broken)
    write_notebook(root, "03_third", KNOWN, tell("03_third"))
    capsys.readouterr()

    assert runner.main([], root) == 1

    out = capsys.readouterr().out
    assert "FAILED: 02_known" in out and "ZeroDivisionError: division by zero" in out
    failed = good.with_name("02_known.failed.ipynb")
    assert f"half-executed copy: {failed}" in out and "not run" in out
    assert "An Exception was encountered" in failed.read_text()
    assert good.read_bytes() == before  # the last good copy is not touched
    assert not list(good.parent.glob("*.partial.ipynb"))
    assert statuses(folder) == ["done", "failed"]
    assert recorded(folder)["02_known"]["error"] == "ZeroDivisionError: division by zero"
    assert [line["notebook"] for line in told(root)] == ["02_known", "01_mine"]
    log = max((folder / "logs").iterdir()).read_text()
    assert "share 0.5" in log and "ZeroDivisionError" in log

    write_notebook(root, "02_known", KNOWN)
    assert runner.main(["--only", "02"], root) == 0
    assert not failed.exists()  # mended


def test_a_dead_kernel_is_called_so(root, capsys):
    kill = "import os, signal\nprint('about to', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(root, "01_mine", MINE, kill)
    assert runner.main(["smoke"], root) == 1
    out, err = capsys.readouterr()
    assert f"FAILED: 01_mine\n\n{runner.DEAD}" in out
    assert "Traceback" not in out + err
    assert (root / "figures" / "smoke" / "notebooks" / "01_mine.failed.ipynb").exists()


def test_memory_of_what_a_notebook_starts_and_data_that_change_are_recorded(root):
    (root / "timings.csv").write_text("1")
    change = "import pathlib\npathlib.Path('timings.csv').write_text('2')"
    # touches every page of 300 MiB
    hold = "import time\nheld = bytearray(300 * 2**20)\nheld[::4096] = bytes(300 * 2**8)"
    code = f"{hold}\ntime.sleep(2)"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}], check=True)"
    parameters = f"{MINE}\ncompared = {str(root / 'timings.csv')!r}"
    write_notebook(root, "01_mine", parameters, change, start)
    write_notebook(root, "02_known", parameters, "import time; time.sleep(1)")
    assert runner.main([], root) == 0
    first, second = recorded(root / "figures" / "laptop").values()
    assert first["gib"] - second["gib"] == pytest.approx(300 / 1024, abs=0.05)
    assert "changed" in first["error"] and second["error"] == ""


@pytest.mark.parametrize("folder", [".", "notebooks", "figures/laptop"])
def test_results_never_overwrite_sources_or_other_results(capsys, folder):
    kinds = ("notebooks/*.ipynb", "figures/laptop/0*")
    sources = [file for kind in kinds for file in paths.ROOT.glob(kind)]
    before = {file: file.read_bytes() for file in sources}
    assert runner.main(["smoke", "--only", "05", "-p", "output_dir", folder]) == 2
    assert f"-p: output_dir is {folder!r}" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in sources} == before
    assert not (paths.ROOT / "logs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_a_table_and_no_kernel(root, number):
    wait = (
        "import os, pathlib, time\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(100)"
    )
    write_notebook(root, "01_mine", MINE, wait)
    code = (
        "from icprobe.artifact import runner; from pathlib import Path; "
        f"runner.command(Path({str(root)!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "smoke"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs, such as these tests may be, ignore SIGINT, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    pid_file = root / "pid"
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    kernel = int(pid_file.read_text())
    os.kill(kernel, 0)  # it is there
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)

    assert process.returncode == 130
    assert "Traceback" not in out + err and "Error" not in out + err and "destroyed" not in err
    assert "the same command" in out and "half-executed copy: " in out and "not run" in out
    assert statuses(root / "figures" / "smoke") == ["interrupted"]
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
