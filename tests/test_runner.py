"""The runner: real papermill runs of tiny notebooks in a temporary tree."""

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from icprobe import __version__, runner

PARAMETERS = """
profile = "laptop"  # which profile
output_dir = "figures/laptop"  # results
n = 4  # how many
rate = 0.5  # per step
label = "x"  # free text
option = None  # anything
names = ["a"]  # a list
fresh = False  # compute anew
""".strip()

# each run leaves one line that says what ran, where, and with which parameters
TELL = """
import json, pathlib, sys
told = {name: value for name, value in globals().items() if name in NAMES}
told |= {"notebook": "NOTEBOOK", "python": sys.executable}
with pathlib.Path("told.jsonl").open("a") as file:
    print(json.dumps(told), file=file)
"""


def write_notebook(root: Path, name: str, parameters: str, *sources: str) -> Path:
    cells = [nbformat.v4.new_markdown_cell("# A story")]
    cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    # a kernel of this name is registered nowhere: the runner's own Python must serve
    kernel = {"name": "elsewhere", "display_name": "Elsewhere", "language": "python"}
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def tell(name: str) -> str:
    names = ["profile", "output_dir", "n", "rate", "label", "option", "names", "fresh", "steps"]
    return TELL.replace("NAMES", repr(names)).replace("NOTEBOOK", name)


def told(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "told.jsonl").read_text().splitlines()]


def write_profile(root: Path, name: str, **values: object) -> None:
    (root / "notebooks" / "profiles" / f"{name}.yaml").write_text(yaml.safe_dump(values))


def records(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def root(tmp_path) -> Path:
    """Two small notebooks and two profiles, in a folder whose name has a space."""
    root = tmp_path / "a checkout"
    (root / "notebooks" / "profiles").mkdir(parents=True)
    write_notebook(root, "01_first", PARAMETERS, tell("01_first"))
    write_notebook(root, "02_second", "steps = 3  # how many\nn = 4  # how many", tell("02_second"))
    write_profile(root, "laptop", profile="laptop", n=4, rate=0.5)
    write_profile(root, "smoke", profile="smoke", n=1, rate=2, option=[1, 2], steps=7)
    return root


def test_runs_in_order_with_the_profile_in_this_environment(root, monkeypatch, tmp_path, capsys):
    write_notebook(root, "draft", "a = 1  # not numbered, so never run", "1 / 0")
    # a user's own kernel called python3 must not be taken
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/nowhere/python"], "display_name": "Foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)

    assert runner.main(["smoke"], root) == 0

    first, second = told(root)  # written to the working directory, so that is the root
    assert first["notebook"] == "01_first"
    assert second["notebook"] == "02_second"
    assert first["python"] == sys.executable
    assert (first["profile"], first["n"], first["option"]) == ("smoke", 1, [1, 2])
    assert isinstance(first["rate"], float)  # an int in the profile, a float in the notebook
    assert (second["n"], second["steps"]) == (1, 7)
    assert "rate" not in second  # it does not declare it
    assert first["label"] == "x"  # not in the profile, so the notebook's default

    folder = root / "figures" / "smoke"
    copies = sorted(path.name for path in (folder / "notebooks").iterdir())
    assert copies == ["01_first.ipynb", "02_second.ipynb"]
    rows = records(folder / "run.csv")
    assert [row["notebook"] for row in rows] == ["01_first", "02_second"]
    assert {row["status"] for row in rows} == {"done"}
    assert all(0 < float(row["minutes"]) < 2 for row in rows)
    assert not (folder / "logs" / "timing.csv").exists()
    (log,) = (folder / "logs").iterdir()
    assert "'profile': 'smoke'" in log.read_text()
    out, err = capsys.readouterr()
    assert "[2/2] 02_second" in out
    assert "02_second  cell 3/3" in err
    assert "notebook   minutes    GiB  status" in out
    assert all(0.01 < float(row["gib"]) < 4 for row in rows)  # a kernel with nothing loaded
    assert f"{float(rows[0]['minutes']):7.2f}  {float(rows[0]['gib']):5.2f}  done" in out
    assert f"report: {folder / 'report.html'}" in out


def test_overrides_only_and_another_output_dir(root):
    elsewhere = root.parent / "elsewhere"
    arguments = [
        "-p",
        "n",
        "9",
        "--only",
        "1",
        "smoke",
        "-p",
        "label",
        "---",
        "-p",
        "option",
        "-1e-3",
    ]
    assert runner.main([*arguments, "-p", "output_dir", str(elsewhere)], root) == 0
    (only,) = told(root)
    assert (only["n"], only["label"], only["option"]) == (9, "---", -0.001)
    assert only["profile"] == "smoke"
    assert (elsewhere / "notebooks" / "01_first.ipynb").exists()
    assert (elsewhere / "run.csv").exists()
    assert list((elsewhere / "logs").iterdir())
    assert not (root / "figures").exists()


def test_fresh_is_passed_where_declared_and_timed(root):
    assert runner.main(["--fresh"], root) == 0
    first, second = told(root)
    assert first["fresh"] is True
    assert "fresh" not in second
    rows = records(root / "figures" / "laptop" / "logs" / "timing.csv")
    assert list(rows[0]) == ["notebook", "minutes", "cores", "processor", "icprobe"]
    assert [row["notebook"] for row in rows] == ["01_first", "02_second"]
    assert all(float(row["minutes"]) > 0 and int(row["cores"]) > 0 for row in rows)
    assert {row["icprobe"] for row in rows} == {__version__}

    file = root / "figures" / "laptop" / "logs" / "timing.csv"
    file.unlink()
    assert runner.main(["--fresh", "--only", "01"], root) == 0
    assert [row["notebook"] for row in records(file)] == ["01_first"]
    file.unlink()
    for arguments in (["--fresh", "-p", "steps", "4"], []):  # not the profile as it stands, or old
        assert runner.main(arguments, root) == 0
        assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["lapdog"], ["unknown profile 'lapdog'", "Did you mean laptop?", "laptop, smoke"]),
        (["--only", "01,07"], ["no notebook '07'", "01_first, 02_second"]),
        (["--only", "first"], ["no notebook 'first'"]),
        (["-p", "label2", "y"], ["-p label2: no notebook declares", "Did you mean label?"]),
        (
            ["-p", "n", "many"],
            ["-p: n is 'many', expected int", "default is 4", "(01_first, 02_second)"],
        ),
        (["-p", "n", "1.5"], ["n is 1.5, expected int"]),
        (["-p", "fresh", "1"], ["fresh is 1, expected bool", "true or false"]),
        (["-p", "rate", "true"], ["rate is True, expected float"]),
        (["-p", "names", "a"], ["names is 'a', expected list"]),
        (["-p", "fresh", "None"], ["fresh is None, expected bool"]),
        (["-p", "n"], ["-p n: write -p NAME VALUE"]),
        (["-p"], ["-p: write -p NAME VALUE"]),
        (["--only", "01", "-p", "steps", "2"], ["-p steps", "--only", "02_second does"]),
    ],
)
def test_usage_errors_come_before_anything_runs(root, capsys, arguments, parts):
    assert runner.main(arguments, root) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not (root / "figures").exists()
    assert not (root / "told.jsonl").exists()


@pytest.mark.parametrize(
    ("profile", "parts"),
    [
        ("rtae: 1", ["laptop.yaml rtae: no notebook declares", "Did you mean rate?"]),
        ("n: '4'", ["laptop.yaml: n is '4', expected int", "write 4 without quotes"]),
        ("rate: 1e-4", ["rate is '1e-4', expected float", "write 1.0e-4"]),
        ("n: true", ["n is True, expected int"]),
        ("- n", ["laptop.yaml must be a mapping"]),
        ("n: [", ["laptop.yaml is not valid YAML"]),
    ],
)
def test_mistakes_in_a_profile(root, capsys, profile, parts):
    (root / "notebooks" / "profiles" / "laptop.yaml").write_text(profile)
    assert runner.main([], root) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert not (root / "figures").exists()


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ("n = len('four')", "03_third.ipynb, parameters cell: expected NAME = literal"),
        ("import os", "found 'import os'"),
        ("a = b = 1", "found 'a = b = 1'"),
        ("a = ", "parameters cell: invalid syntax"),
    ],
)
def test_parameters_must_be_literals(root, capsys, parameters, part):
    write_notebook(root, "03_third", parameters)
    assert runner.main(["--only", "01"], root) == 2
    assert part in capsys.readouterr().err


def test_a_notebook_without_parameters_cell(root, capsys):
    path = write_notebook(root, "03_third", "a = 1")
    notebook = nbformat.read(path, as_version=4)
    del notebook.cells[1]
    nbformat.write(notebook, path)
    assert runner.main([], root) == 2
    assert "03_third.ipynb has 0 cells tagged 'parameters'" in capsys.readouterr().err
    path.write_text("not a notebook")
    assert runner.main([], root) == 2
    assert "03_third.ipynb is not a notebook" in capsys.readouterr().err


def test_no_notebooks_is_an_error(root, capsys):
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    assert runner.main([], root) == 2
    assert "no notebooks in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "value"),
    [
        ("12", "str", "12"),
        ("True", "str", "True"),
        ("", "str", ""),
        ("none", "str", "none"),
        ("None", "str or None", None),
        ("1e-4", "str or None", "1e-4"),
        ("12", "int", 12),
        ("None", "int or None", None),
        ("1e-4", "float", 1e-4),
        ("-3", "float", -3),
        ("false", "bool", False),
        ("True", "bool", True),
        ("[a, 1]", "list", ["a", 1]),
        ("[[sgd, 1.0e-4]]", "list[list]", [["sgd", 1e-4]]),
        ("{a: 1}", "dict", {"a": 1}),
        ("null", "dict or None", None),
        ("{prompt: question}", "dict[str, str] or None", {"prompt": "question"}),
        ("[a", "list[str]", "[a"),  # for the check to judge, like the next ones
        ("plain", "list[str]", "plain"),
        ("many", "int", "many"),
    ],
)
def test_values_are_read_as_the_declared_type(root, text, words, value):
    path = write_notebook(root, "03_third", f'a: "{words}" = None  # anything')
    parsed = runner.parse(text, runner.read_parameters(path)["a"])
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "value"), [("None", None), ("1e-4", 1e-4), ("{a: b}", {"a": "b"}), ("plain", "plain")]
)
def test_without_a_declared_type_values_are_read_as_they_look(root, text, value):
    path = write_notebook(root, "03_third", "a = None  # anything")
    assert runner.parse(text, runner.read_parameters(path)["a"]) == value


def test_all_wrong_values_are_listed_before_anything_runs(root, capsys):
    arguments = ["-p", "n", "many", "-p", "rate", "fast", "-p", "names", "a", "-p", "steps", "1.5"]
    assert runner.main(arguments, root) == 2
    out, err = capsys.readouterr()
    assert out == "" and not (root / "figures").exists()
    for part in ("n is 'many'", "rate is 'fast'", "names is 'a'", "steps is 1.5, expected int"):
        assert f"-p: {part}" in err
    assert err.count("(01_first, 02_second)") == 1  # both have n, which is said once
    assert len(err.splitlines()) == 4


def test_a_notebook_may_have_a_section_of_its_own_in_a_profile(root):
    section = {"n": 7, "output_dir": "figures/own"}
    write_profile(root, "smoke", profile="smoke", n=1, rate=2, for_01_first=section)
    assert runner.main(["smoke"], root) == 0
    first, second = told(root)
    assert (first["n"], first["output_dir"], first["rate"]) == (7, "figures/own", 2.0)
    assert second["n"] == 1
    # where the run itself is recorded is the profile's
    assert (root / "figures" / "smoke" / "notebooks" / "01_first.ipynb").exists()
    assert [row["notebook"] for row in records(root / "figures" / "smoke" / "run.csv")]

    assert runner.main(["smoke", "-p", "n", "9"], root) == 0
    assert [line["n"] for line in told(root)[2:]] == [9, 9]  # -p wins over both


def test_results_of_one_place_have_their_record_and_page_there(root, capsys):
    write_profile(root, "smoke", profile="smoke", for_01_first={"output_dir": "figures/own"})
    assert runner.main(["smoke", "--only", "1"], root) == 0
    out = capsys.readouterr().out
    own = root / "figures" / "own"
    assert f"1 notebook(s), results in {own}" in out
    assert f"report: {own / 'report.html'}" in out
    assert (own / "notebooks" / "01_first.ipynb").exists() and (own / "run.json").exists()
    assert not (root / "figures" / "smoke").exists()


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"for_03_third": {"n": 2}}, ["laptop.yaml for_03_third: there is no", "02_second"]),
        ({"for_1": {"n": 2}}, ["laptop.yaml for_1: there is no such notebook", "01_first"]),
        ({"for_01_first": 3}, ["laptop.yaml for_01_first: expected a mapping"]),
        (
            {"for_01_first": {"steps": 3}},
            ["for_01_first: it does not declare steps", "names"],
        ),
        ({"for_01_first": {"n": "4"}}, ["laptop.yaml: n is '4', expected int", "(01_first)"]),
    ],
)
def test_mistakes_in_a_section(root, capsys, section, parts):
    (root / "notebooks" / "profiles" / "laptop.yaml").write_text(yaml.safe_dump(section))
    assert runner.main(["--only", "02"], root) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert not (root / "figures").exists()


def test_a_failing_notebook_stops_the_run(root, capsys):
    assert runner.main(["--only", "02"], root) == 0
    good = root / "figures" / "laptop" / "notebooks" / "02_second.ipynb"
    before = good.read_bytes()
    broken = "ready = True\nfor share in [0.5, 0]:\n    print('share', share)\n    1 / share"
    write_notebook(root, "02_second", "n = 4  # how many", "print('fine')", broken)
    write_notebook(root, "03_third", "n = 4  # how many", tell("03_third"))
    capsys.readouterr()

    assert runner.main([], root) == 1

    out = capsys.readouterr().out
    # cells: the parameters, papermill's own, print, and this one
    assert "FAILED: 02_second, cell In [4]" in out
    assert "for share in [0.5, 0]:" in out
    assert "ZeroDivisionError: division by zero" in out
    assert "\x1b" not in out
    failed = good.with_name("02_second.failed.ipynb")
    assert f"half-executed copy: {failed}" in out
    assert "An Exception was encountered" in failed.read_text()
    assert good.read_bytes() == before  # the last good copy is not touched
    assert not list(good.parent.glob("*.partial.ipynb"))
    rows = records(root / "figures" / "laptop" / "run.csv")
    assert [row["status"] for row in rows] == ["done", "failed", "not run"]
    assert rows[2]["minutes"] == ""
    assert [line["notebook"] for line in told(root)] == ["02_second", "01_first"]
    log = max((root / "figures" / "laptop" / "logs").iterdir()).read_text()
    assert "| share 0.5" in log
    assert "ZeroDivisionError" in log

    write_notebook(root, "02_second", "n = 4  # how many")
    assert runner.main(["--only", "02"], root) == 0
    assert not failed.exists()  # mended


def test_a_notebook_that_cannot_be_had_is_skipped(root, capsys):
    want = (
        "from icprobe.assets import Unavailable\nraise Unavailable('no network\\nget it by hand')"
    )
    write_notebook(root, "01_first", PARAMETERS, tell("01_first"), want)
    assert runner.main([], root) == 0
    out = capsys.readouterr().out
    assert "SKIPPED: 01_first\n\n    no network\n    get it by hand\n" in out
    assert "FAILED" not in out
    assert [line["notebook"] for line in told(root)] == ["01_first", "02_second"]
    folder = root / "figures" / "laptop"
    assert [path.name for path in (folder / "notebooks").iterdir()] == ["02_second.ipynb"]
    rows = records(folder / "run.csv")
    assert [row["status"] for row in rows] == ["skipped", "done"]
    assert rows[0]["minutes"] == "" and float(rows[1]["minutes"]) > 0
    assert re.search(r"01_first +- +- +skipped", out)

    assert runner.main(["--fresh"], root) == 0
    timed = records(folder / "logs" / "timing.csv")
    assert [row["notebook"] for row in timed] == ["02_second"]
    (folder / "logs" / "timing.csv").unlink()
    for name in ("02_second", "03_third"):
        write_notebook(root, name, "steps = 3  # how many", want)
    assert runner.main(["--fresh"], root) == 0
    assert not (folder / "logs" / "timing.csv").exists()

    write_notebook(root, "02_second", "steps = 3  # how many", "1 / 0")
    assert runner.main([], root) == 1
    rows = records(folder / "run.csv")
    assert [row["status"] for row in rows] == ["skipped", "failed", "not run"]


def test_a_dead_kernel_is_called_so(root, capsys):
    kill = "import os, signal\nprint('about to', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(root, "01_first", PARAMETERS, kill)
    assert runner.main(["smoke"], root) == 1
    out, err = capsys.readouterr()
    assert "FAILED: 01_first, cell In [3]" in out
    assert "The kernel died: most often the machine ran out of memory" in out
    assert "./run_all.sh smoke" in out
    assert "Traceback" not in out + err
    assert (root / "figures" / "smoke" / "notebooks" / "01_first.failed.ipynb").exists()


def test_peak_memory_counts_what_a_notebook_starts_and_what_it_gave_back(root):
    # touches every page of 300 MiB
    hold = "held = bytearray(300 * 2**20)\nheld[::4096] = bytes(300 * 2**8)"
    code = f"import time\n{hold}\ntime.sleep(2.5)"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}], check=True)"
    write_notebook(root, "01_first", PARAMETERS, start)
    write_notebook(root, "02_second", "n = 4  # how many", f"{hold}\ndel held", "1 + 1")
    write_notebook(root, "03_third", "n = 4  # how many", "1 + 1")
    write_profile(root, "laptop", n=4)
    assert runner.main([], root) == 0
    rows = records(root / "figures" / "laptop" / "run.csv")
    started, own, nothing = (float(row["gib"]) for row in rows)
    assert own - nothing == pytest.approx(300 / 1024, abs=0.05)
    assert started - nothing == pytest.approx(300 / 1024, abs=0.05)


def test_what_was_reused_is_noted(root):
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    counts = {"01_all": (4, 4), "02_some": (4, 0), "03_none": (0,), "04_silent": ()}
    for name, numbers in counts.items():
        write_notebook(root, name, PARAMETERS, *(f"print('icp: reused {n} of 4')" for n in numbers))
    write_notebook(root, "05_keeps_nothing", "n = 4  # how many", "print('n')")
    assert runner.main([], root) == 0
    rows = records(root / "figures" / "laptop" / "run.csv")
    expected = ["reused", "reused in part", "fresh", "fresh", ""]
    assert [row["scores"] for row in rows] == expected


@pytest.mark.parametrize("folder", [".", "notebooks", "figures/laptop"])
def test_results_never_overwrite_sources_or_other_results(capsys, folder):
    sources = [file for kind in ("notebooks/*.ipynb", "figures/laptop/0*")
               for file in runner.paths.ROOT.glob(kind)]  # fmt: skip
    before = {file: file.read_bytes() for file in sources}
    assert runner.main(["smoke", "--only", "05", "-p", "output_dir", folder]) == 2
    assert f"-p: output_dir is {folder!r}" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in sources} == before
    assert not (runner.paths.ROOT / "logs").exists()


def test_run_json_has_the_data_as_they_were_when_a_notebook_began(root, tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "completion": " b"}\n')
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    save = f'from pathlib import Path\nPath({str(file)!r}).write_text("saved in mid-run")'
    write_notebook(root, "01_first", f"{PARAMETERS}\ntrain = {str(file)!r}  # the pool", save)
    assert runner.main(["smoke", "--only", "01"], root) == 0
    kept = json.loads((root / "figures" / "smoke" / "run.json").read_text())
    pool = kept["notebooks"]["01_first"]["sources"]["training pool"]
    assert pool["sha256"] == before and pool["changed"] is True
    assert "training pool: changed while 01_first ran" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_a_table_and_no_kernel(root, number):
    wait = (
        "import os, pathlib, time\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(100)"
    )
    write_notebook(root, "02_second", "steps = 3  # how many", wait)
    code = (
        f"from icprobe import runner; from pathlib import Path; runner.command(Path({str(root)!r}))"
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
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    kernel = int(pid_file.read_text())
    os.kill(kernel, 0)  # it is there
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=15)

    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "Error" not in out + err
    assert "destroyed" not in err
    assert "half-executed copy: " in out
    rows = records(root / "figures" / "smoke" / "run.csv")
    assert [row["status"] for row in rows] == ["done", "interrupted"]
    assert "interrupted" in out
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_what_a_notebook_prints_is_shown_and_logged(caplog):
    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    caplog.set_level("INFO")
    with runner.Progress("01_first", 3, terminal) as progress:
        progress.start_cell(nbformat.v4.new_code_cell("score_all()"), 0)
        progress.write("half a li")
        progress.write("ne\n\r 10%|#   \r 20%|##  ")
        assert progress.printed == " 20%|##"
        progress.write("\r100%|####\n")
        time.sleep(1.2)  # redrawn once a second
    assert "01_first  cell 1/3  0:00  score_all()" in terminal.text
    assert "0:01  100%|####" in terminal.text
    assert "half a line" in caplog.text
    assert "100%|####" in caplog.text
    assert "20%" not in caplog.text  # only the last state of a bar is kept
