"""What every notebook must keep to: thin, parameterised, committed without outputs."""

import ast
import importlib.util
import re

import nbformat
import papermill
import pytest
import yaml

from icprobe.artifact import plan, settings
from icprobe.artifact.parameters import schemas, type_in_words
from icprobe.data import paths

spec = importlib.util.spec_from_file_location("parameters", paths.ROOT / "docs/parameters.py")
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)

PATHS = [paths.NOTEBOOKS / f"{name}.ipynb" for name in settings.NOTEBOOKS]
PROFILES = sorted((paths.NOTEBOOKS / "profiles").glob("*.yaml"))
MAX_LINES, MAX_CODE_CELLS = 15, 20

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
each_profile = pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)


def read(path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def test_every_notebook_has_settings():
    assert sorted(paths.NOTEBOOKS.glob("*.ipynb")) == PATHS
    assert all(re.match(rf"0{k}_[a-z_]+$", path.stem) for k, path in enumerate(PATHS, 1))


@each_notebook
def test_committed_without_outputs_for_the_usual_kernel(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.name == "python"
    assert "papermill" not in notebook.metadata
    assert not any(cell.outputs or cell.execution_count for cell in code_cells(path))


@each_notebook
def test_papermill_reads_the_parameters_cell_that_is_written_from_the_settings(path, caplog):
    one = settings.NOTEBOOKS[path.stem]
    first, second, *others = code_cells(path)
    assert first.metadata.tags == ["parameters"]
    assert not any("tags" in cell.metadata for cell in (second, *others))
    assert first.source == page.cell(one), "run: ./run_all.sh python docs/parameters.py"
    assert all(len(line) <= 100 for line in first.source.splitlines())
    assert f"{one.__name__}.of(globals())" in second.source
    # papermill's parser is a regular expression, which an equals sign in a comment confuses
    found = papermill.inspect_notebook(path)
    assert list(found) == list(one.model_fields)
    for name, schema in schemas(one).items():
        assert found[name]["inferred_type_name"] == type_in_words(schema)
        assert ast.literal_eval(found[name]["default"]) == one.model_fields[name].default
        assert found[name]["help"] == schema["description"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_page_is_written_from_the_settings():
    text = page.FILE.read_text(encoding="utf-8")
    assert text == page.page(), "run: ./run_all.sh python docs/parameters.py"


@each_notebook
def test_thin(path):
    cells = code_cells(path)
    assert len(cells) <= MAX_CODE_CELLS
    for cell in cells:
        if cell is not cells[0]:  # the parameters take the lines they need
            assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        # neither magics, nor shell commands, whose failure does not stop a notebook
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef), (
                f"belongs in lib/icprobe: {node.name}"
            )
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
                assert not isinstance(node.value, ast.Lambda), ast.unparse(node)


@each_profile
def test_a_profile_says_what_differs_from_the_defaults(profile):
    values = yaml.safe_load(profile.read_text())
    assert all(key.isidentifier() for key in values)  # papermill's -f makes a variable of each
    assert values["profile"] == profile.stem
    notebooks = plan.find_notebooks(paths.ROOT)
    planned = plan.plan(notebooks, notebooks, values, profile.name, {})  # all are right
    differing = {"profile"}
    for notebook, given in zip(notebooks, planned, strict=True):
        defaults = notebook.defaults
        differing |= {name for name, value in given.items() if value != defaults[name]}
        for name in ("output_dir", "scores_dir"):
            if profile.stem != "laptop":
                assert given[name].endswith(f"/{profile.stem}")
    assert {key for key in values if not key.startswith(plan.SECTION)} <= differing
