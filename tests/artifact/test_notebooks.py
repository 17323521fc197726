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

PATHS = [paths.NOTEBOOKS / f"{one.NOTEBOOK}.ipynb" for one in settings.NOTEBOOKS]
PROFILES = sorted((paths.NOTEBOOKS / "profiles").glob("*.yaml"))
MAX_LINES, MAX_CODE_CELLS = 15, 20

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
each_settings = pytest.mark.parametrize("one", settings.NOTEBOOKS, ids=lambda one: one.__name__)
each_profile = pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)


def read(path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def without_magics(source: str) -> str:
    return re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE)


def test_there_are_notebooks_and_profiles():
    assert PATHS
    assert {path.stem for path in PROFILES} >= {"smoke", "laptop", "paper"}
    numbers = [re.match(r"(\d\d)_[a-z_]+$", path.stem) for path in PATHS]
    assert all(numbers), "names are two digits, an underscore and small letters"
    assert len({match.group(1) for match in numbers}) == len(PATHS), "a number is used twice"


@each_notebook
def test_valid_with_the_usual_kernel(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.name == "python"


@each_notebook
def test_committed_without_outputs(path):
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert "papermill" not in read(path).metadata


@each_settings
def test_the_parameters_cell_is_written_from_the_settings(one):
    first, second, *others = code_cells(paths.NOTEBOOKS / f"{one.NOTEBOOK}.ipynb")
    assert first.metadata.tags == ["parameters"]
    assert not any("tags" in cell.metadata for cell in (second, *others))
    assert first.source == page.cell(one), "run: ./run_all.sh python docs/parameters.py"
    assert all(len(line) <= 100 for line in first.source.splitlines())
    assert f"{one.__name__}.of(globals())" in second.source


def test_the_page_is_written_from_the_settings():
    text = page.FILE.read_text(encoding="utf-8")
    assert text == page.page(), "run: ./run_all.sh python docs/parameters.py"


@each_settings
def test_papermill_reads_name_type_default_and_meaning(one, caplog):
    # its parser is a regular expression, which an equals sign in a comment confuses
    found = papermill.inspect_notebook(paths.NOTEBOOKS / f"{one.NOTEBOOK}.ipynb")
    assert list(found) == list(one.model_fields)
    for name, schema in schemas(one).items():
        assert found[name]["inferred_type_name"] == type_in_words(schema)
        assert ast.literal_eval(found[name]["default"]) == one.model_fields[name].default
        assert found[name]["help"] == schema["description"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@each_notebook
def test_thin(path):
    cells = code_cells(path)
    assert len(cells) <= MAX_CODE_CELLS
    for cell in cells:
        if cell is not cells[0]:  # the parameters take the lines they need
            assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        for node in ast.walk(ast.parse(without_magics(cell.source))):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef), (
                f"belongs in lib/icprobe: {node.name}"
            )
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
                assert not isinstance(node.value, ast.Lambda), ast.unparse(node)


@each_notebook
def test_no_shell_commands(path):
    # a failed shell command does not stop a notebook
    for cell in code_cells(path):
        assert not re.search(r"^\s*(!|%%?(bash|sh|system|sx)\b)", cell.source, re.MULTILINE)


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
