"""The layout that docs/architecture.md shows: few names, small pieces, light imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from icprobe.data import paths

LIBRARY = paths.ROOT / "lib" / "icprobe"
FILES = sorted(LIBRARY.rglob("*.py"))
LIMITS = {ast.FunctionDef: 60, ast.AsyncFunctionDef: 60, ast.ClassDef: 200}
HEAVY = ("torch", "transformers", "trl", "datasets")


def test_ten_names_at_the_top():
    names = {path.name for path in LIBRARY.iterdir() if path.name != "__pycache__"}
    folders = {"data", "models", "scores", "methods", "statistics"}
    folders |= {"finetuning", "regression", "figures", "artifact"}
    assert names == {"__init__.py"} | folders


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(LIBRARY)))
def test_modules_functions_and_classes_are_small(file: Path):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if type(node) in LIMITS and node.end_lineno - node.lineno + 1 > LIMITS[type(node)]
    }
    assert not long


@pytest.mark.parametrize(
    "module",
    [
        "icprobe",
        "icprobe.data",
        "icprobe.statistics",
        "icprobe.figures",
        "icprobe.artifact.settings",
        "icprobe.scores.run",
    ],
)
def test_imports_are_light(module: str):
    code = f"import sys, {module}; print([n for n in {HEAVY} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_tests_mirror_the_library():
    folders = {path.name for path in (paths.ROOT / "tests").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} <= {path.name for path in LIBRARY.iterdir()}
