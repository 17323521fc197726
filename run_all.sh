#!/usr/bin/env bash
# Make or reuse the environment, then execute the notebooks. Works from any directory.
set -euo pipefail

usage() {
    cat <<'USAGE'
Reproduce everything:

  ./run_all.sh [smoke|laptop|paper] [-p NAME VALUE ...] [--only 01,03] [--fresh] [--help]
      execute the notebooks in order with the parameters in notebooks/profiles/
        -p NAME VALUE  set one parameter (may be repeated)
        --only 01,03   run these notebooks only
        --fresh        reuse nothing, compute everything anew
        --help         after a profile: print the notebooks' parameters (docs/parameters.md has all)
      The default profile is laptop. Results appear in figures/<profile>/.

  ./run_all.sh laptop --only 08 -p train pool.jsonl -p queries wanted.jsonl [-p model FOLDER]
      the same question for your own data and model; results in figures/your_data/

  ./run_all.sh test [--all] [ARGUMENTS]
                                   run the tests with two workers (arguments go to pytest; -n 0
                                   for one process, which --pdb and -s need); --all: slow ones too
  ./run_all.sh publish NAME        make the run in figures/NAME/ the reference, to be committed
                                   (--scores OTHER: its scores are in data/scores/OTHER/)
  ./run_all.sh lab                 open the notebooks in JupyterLab
  ./run_all.sh python [ARGUMENTS]  the environment's Python

The environment: the active conda or virtual environment if it has this package and what it needs;
else .venv in this folder if it is there; else conda or mamba if installed (environment named
icprobe); else a new .venv.
USAGE
}

fail() {
    echo "error: $*" >&2
    exit 1
}

# Which checkout and which requirements an environment was made for. It is written into the
# environment last, so that an interrupted installation is done again.
wanted_stamp() {
    echo "$root"
    cat requirements.txt requirements-no-deps.txt pyproject.toml environment.yml |
        if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi
}

is_current() { # PREFIX
    [ -x "$1/bin/python" ] && [ "$(cat "$1/.icprobe-stamp" 2>/dev/null)" = "$(wanted_stamp)" ]
}

# Prints what an environment lacks that this script did not make; nothing if it will do.
lacks() { # PYTHON
    "$1" - "$root" <<'PYTHON'
import importlib.util, pathlib, re, sys
from importlib import metadata

def plain(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()

root = pathlib.Path(sys.argv[1]).resolve()
package = importlib.util.find_spec("icprobe")
if sys.version_info < (3, 11):
    print("its Python is older than 3.11")
elif package is None or package.origin is None:
    print("it does not have the package icprobe")
elif pathlib.Path(package.origin).resolve().parents[2] != root:
    print("its icprobe is that of", pathlib.Path(package.origin).parents[2])
else:
    import tomllib

    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    there = {plain(one.name) for one in metadata.distributions()}
    missing = [one for one in [*needed, "kronfluence", "pytest-xdist"] if plain(one) not in there]
    if missing:
        print("it lacks", ", ".join(map(plain, missing)))
PYTHON
}

use_active() {
    local prefix reason
    prefix=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    [ -n "$prefix" ] && [ -x "$prefix/bin/python" ] || return 1
    if [ -e "$prefix/.icprobe-stamp" ]; then
        is_current "$prefix" || return 1
    else
        reason=$(lacks "$prefix/bin/python" || echo "its Python does not run")
        if [ -n "$reason" ]; then
            echo "environment: not the active one ($prefix), $reason" >&2
            return 1
        fi
    fi
    python=$prefix/bin/python
    echo "environment: $prefix (active)" >&2
}

use_conda() {
    local conda prefix
    conda=$(find_conda)
    prefix=$(conda_prefix "$conda")
    if ! is_current "$prefix"; then
        echo "environment: making conda environment icprobe (once, some minutes)" >&2
        if [ -n "$prefix" ]; then
            rm -f "$prefix/.icprobe-stamp"
            "$conda" env update -n icprobe -f environment.yml >&2
        else
            "$conda" env create -n icprobe -f environment.yml >&2
        fi
        prefix=$(conda_prefix "$conda")
        [ -n "$prefix" ] || fail "$conda made no environment named icprobe"
        "$prefix/bin/python" -m pip install --no-deps -r requirements-no-deps.txt >&2
        wanted_stamp >"$prefix/.icprobe-stamp"
    fi
    python=$prefix/bin/python
    echo "environment: $prefix (conda environment icprobe)" >&2
}

find_conda() {
    command -v conda || command -v mamba
}

conda_prefix() { # CONDA; prints nothing where there is no environment icprobe
    "$1" run -n icprobe python -c 'import sys; print(sys.prefix)' 2>/dev/null || true
}

use_venv() {
    local base
    if ! is_current .venv; then
        base=$(find_python)
        # one installation at a time; the kernel frees the lock however this process ends
        exec 9>.venv-lock
        "$base" - <<'PYTHON'
import fcntl, sys

try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("environment: waiting for another run that is installing it", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
PYTHON
        is_current .venv || install_venv "$base"
        exec 9>&-
    fi
    python=$root/.venv/bin/python
    echo "environment: $root/.venv" >&2
}

install_venv() { # PYTHON
    # without its pyvenv.cfg, an environment's python would install into the one it was made with
    if [ ! -x .venv/bin/python ] || [ ! -f .venv/pyvenv.cfg ] ||
        grep -qs '^unfinished$' .venv/.icprobe-stamp; then
        echo "environment: making .venv with $1 (once, some minutes)" >&2
        rm -f .venv/pyvenv.cfg
        "$1" -m venv --clear .venv
    else
        echo "environment: bringing .venv up to date" >&2
    fi
    echo unfinished >.venv/.icprobe-stamp
    echo "environment: installing packages (log: $root/.venv/install.log)" >&2
    venv_pip -r requirements.txt
    venv_pip --no-deps -r requirements-no-deps.txt
    # the lock has setuptools, so nothing more is downloaded to build the package
    venv_pip --no-deps --no-build-isolation -e .
    wanted_stamp >.venv/.icprobe-stamp
}

venv_pip() { # ARGUMENTS
    .venv/bin/python -m pip install --disable-pip-version-check "$@" >>.venv/install.log 2>&1 || {
        tail -n 20 .venv/install.log >&2
        fail "pip could not install the packages; the whole log is $root/.venv/install.log"
    }
}

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.14 python3; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$name" -c 'import ensurepip, venv' 2>/dev/null || fail \
            "$name cannot make virtual environments. On Debian or Ubuntu: apt install $name-venv"
        echo "$name"
        return
    done
    fail "Python 3.11 or newer is needed; found $(python3 --version 2>/dev/null || echo none)." \
        "Install it (python.org, or conda from conda-forge.org) and start again."
}

command=${1:-}
case $command in -h | --help | help)
    usage
    exit
    ;;
esac

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd -- "$root" # relative paths in parameters mean "from here", whatever the caller's directory
case $command in
test | publish | lab | python | "" | -*) ;;
*)
    # before minutes are spent on an environment
    if [ ! -f "notebooks/profiles/$command.yaml" ]; then
        profiles=$(cd notebooks/profiles && echo *.yaml)
        echo "error: unknown profile '$command'. There are: ${profiles//.yaml/}" >&2
        exit 2
    fi
    ;;
esac
if use_active; then
    :
elif [ ! -d .venv ] && find_conda >/dev/null; then
    use_conda
else
    use_venv
fi

case $command in
test)
    shift
    if [ "${1:-}" = --all ]; then
        shift
    else
        set -- -m "not slow" "$@"
    fi
    exec "$python" -m pytest -n 2 --dist worksteal "$@" # no more workers: each may load the model
    ;;
lab)
    shift
    # the kernel named python3 must be this environment's, not one registered by the user
    JUPYTER_PREFER_ENV_PATH=1 exec "$python" -m jupyterlab notebooks "$@"
    ;;
publish)
    shift
    exec "$python" -m icprobe.artifact.publish "$@"
    ;;
python)
    shift
    exec "$python" "$@"
    ;;
*)
    exec "$python" -m icprobe.artifact.runner "$@"
    ;;
esac
