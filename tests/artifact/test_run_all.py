"""run_all.sh: choosing an environment, and handing over. Nothing is installed."""

import fcntl
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from icprobe.data import paths

SCRIPT = paths.ROOT / "run_all.sh"
FILES = (
    "run_all.sh", "requirements.txt", "requirements-no-deps.txt", "pyproject.toml",
    "environment.yml",
)  # fmt: skip


def run(*arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess:
    """Run the script from another directory, with only these environment variables added."""
    inherited = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [str(script), *arguments],
        env=inherited | environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def active(tmp_path) -> dict[str, str]:
    """Make an active virtual environment: this Python, with this checkout's package."""
    python = f'PYTHONPATH="{paths.ROOT / "lib"}" exec "{sys.executable}" "$@"'
    program(tmp_path / "env" / "bin" / "python", python)
    return {"VIRTUAL_ENV": str(tmp_path / "env")}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Copy the files that decide about the environment to a folder with a space in its name."""
    copy = tmp_path / "a copy"
    copy.mkdir()
    for name in FILES:
        shutil.copy(paths.ROOT / name, copy)
    shutil.copytree(paths.NOTEBOOKS / "profiles", copy / "notebooks" / "profiles")
    return copy


@pytest.mark.parametrize("script", [SCRIPT, paths.ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_help_and_mistakes_need_no_environment(checkout):
    result = run("--help", script=checkout / "run_all.sh")
    assert result.returncode == 0 and result.stderr == ""
    assert "./run_all.sh [smoke|laptop|paper] [-p NAME VALUE ...]" in result.stdout
    result = run("lapdog", script=checkout / "run_all.sh")
    assert result.returncode == 2
    assert result.stderr == "error: unknown profile 'lapdog'. There are: laptop paper smoke\n"
    assert not (checkout / ".venv").exists()


def test_the_active_environment_is_used_and_usage_errors_come_through(active):
    result = run("smoke", "-p", "n_trian", "3", **active)
    assert result.returncode == 2
    assert f"environment: {active['VIRTUAL_ENV']} (active)\n" in result.stderr
    assert "-p n_trian: " in result.stderr and "n_train" in result.stderr
    assert "Traceback" not in result.stderr


def test_arguments_reach_python_unchanged_in_the_root(active):
    code = "import os, sys; print(os.getcwd(), sys.argv[1:])"
    result = run("python", "-c", code, "two words", "", **active)
    assert result.stdout == f"{paths.ROOT} ['two words', '']\n"


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["-k", "two words"], ["-m", "not slow", "-k", "two words"]),
        (["--all", "-x"], ["-x"]),
        (["--all"], []),
    ],
)
def test_test_runs_pytest_from_the_root_and_slow_ones_with_all(active, arguments, asked):
    python = Path(active["VIRTUAL_ENV"]) / "bin" / "python"
    tell = """[ "$2" = pytest ] && printf '%s\\n' "$PWD" "${@:3}" && exit"""
    program(python, f"{tell}\n{python.read_text()}")
    told = run("test", *arguments, **active).stdout.splitlines()
    assert told == [str(paths.ROOT), "-n", "2", "--dist", "worksteal", *asked]


@pytest.mark.parametrize("lacking", ["its icprobe is that of", "it lacks no-such-package"])
def test_an_environment_that_will_not_do_is_not_used(active, checkout, lacking):
    # no Python on the PATH is new enough, so the script stops before it makes anything
    program(checkout / "bin" / "python3", "exit 1")
    for name in ["python3.11", "python3.12", "python3.13", "python3.14"]:
        program(checkout / "bin" / name, "exit 127")
    if "lacks" in lacking:
        (checkout / "lib" / "icprobe").mkdir(parents=True)
        (checkout / "lib" / "icprobe" / "__init__.py").touch()
        python = f'PYTHONPATH="{checkout / "lib"}" exec "{sys.executable}" "$@"'
        program(Path(active["VIRTUAL_ENV"]) / "bin" / "python", python)
        project = (checkout / "pyproject.toml").read_text()
        assert '"pandas",' in project
        asked = project.replace('"pandas",', '"pandas", "No_Such.package>=2",')
        (checkout / "pyproject.toml").write_text(asked)
    path = f"{checkout / 'bin'}:/usr/bin:/bin"
    result = run(script=checkout / "run_all.sh", PATH=path, **active)
    assert result.returncode == 1
    assert f"not the active one ({active['VIRTUAL_ENV']}), {lacking}" in result.stderr
    assert "error: Python 3.11 or newer is needed" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_finished_venv_is_reused_and_an_unfinished_one_made_again(checkout):
    venv = checkout / ".venv"
    # stands in for Python: makes a venv whose pip fails once, and can be "python" in it too
    fake = program(
        checkout / "bin" / "python3.11",
        f"""
        if [ "$1 $2 $3" = "-m venv --clear" ]; then
            rm -rf "$4"; mkdir -p "$4/bin"; touch "$4/pyvenv.cfg"
            cp "{checkout}/bin/python3.11" "$4/bin/python"
        elif [ "$1" = "-" ]; then
            exec "{sys.executable}" -
        elif [ "$1 $2" = "-m pip" ]; then
            echo "$@" >>"{checkout}/pip.log"
            [ ! -e "{checkout}/no-network" ]
        elif [ "$1 $2" = "-m icprobe.artifact.runner" ]; then
            echo "ran $3"
        fi
        """,
    )
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "script": checkout / "run_all.sh"}
    making = "making .venv with python3.11"
    (checkout / "no-network").touch()
    first = run("smoke", **environment)
    assert first.returncode != 0 and "ran" not in first.stdout
    assert (venv / ".icprobe-stamp").read_text() == "unfinished\n"

    (checkout / "no-network").unlink()
    second = run("smoke", **environment)
    assert making in second.stderr and second.stdout == "ran smoke\n"
    calls = (checkout / "pip.log").read_text().splitlines()[-3:]
    options = ["-r requirements.txt", "--no-deps -r requirements-no-deps.txt"]
    options.append("--no-deps --no-build-isolation -e .")
    assert [call.endswith(end) for call, end in zip(calls, options, strict=True)] == [True] * 3
    assert run("smoke", **environment).stderr == f"environment: {venv}\n"

    with (checkout / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert "bringing .venv up to date" in run("smoke", **environment).stderr

    # half removed: its python would be the base's own, and pip would install there
    (venv / "pyvenv.cfg").unlink()
    (venv / ".icprobe-stamp").unlink()
    assert making in run("smoke", **environment).stderr

    # two runs that start together install once
    (venv / ".icprobe-stamp").unlink()
    installed = len((checkout / "pip.log").read_text().splitlines())
    with (checkout / ".venv-lock").open("w") as lock, ThreadPoolExecutor() as executor:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [executor.submit(run, "smoke", **environment) for _ in range(2)]
        assert not wait(runs, timeout=2).done
        fcntl.flock(lock, fcntl.LOCK_UN)
    assert [started.result().stdout for started in runs] == ["ran smoke\n"] * 2
    assert len((checkout / "pip.log").read_text().splitlines()) == installed + 3


def test_conda_makes_an_environment_once(checkout):
    prefix = checkout / "envs" / "icprobe"
    # the real commands are not here: this shows only which of them are called, and when
    fake = program(
        checkout / "bin" / "conda",
        f"""
        echo "$@" >>"{checkout}/conda.log"
        case "$1 $2" in
        "env create")
            [ ! -e "{checkout}/no-network" ] || exit 1
            mkdir -p "{prefix}/bin"
            printf '#!/bin/bash\\necho "ran $2 $3"\\n' >"{prefix}/bin/python"
            chmod +x "{prefix}/bin/python"
            ;;
        "run -n") [ -d "{prefix}" ] && echo "{prefix}" ;;
        esac
        """,
    )
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "script": checkout / "run_all.sh"}
    (checkout / "no-network").touch()
    assert run("smoke", **environment).returncode != 0
    (checkout / "no-network").unlink()
    made = run("smoke", **environment)
    assert made.stdout == "ran icprobe.artifact.runner smoke\n"
    assert "making conda environment icprobe" in made.stderr
    reused = run("smoke", **environment)
    assert reused.stderr == f"environment: {prefix} (conda environment icprobe)\n"
    calls = (checkout / "conda.log").read_text()
    assert calls.count("env create -n icprobe -f environment.yml") == 2
    assert "env update" not in calls
    assert not (checkout / ".venv").exists()
