"""What every notebook must keep to: thin, parameterised, committed without outputs."""

import ast
import re

import nbformat
import pytest
import yaml
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command

from icprobe import parameters, paths, runner

PATHS = sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
PROFILES = sorted((paths.NOTEBOOKS / "profiles").glob("*.yaml"))
REQUIRED = {"profile", "seed", "output_dir", "scores_dir"}
MAX_LINES, MAX_CODE_CELLS = 15, 20

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
each_profile = pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)


def read(path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def defaults(path) -> dict[str, object]:
    """Return the parameters that the parameters cell declares."""
    return {name: one.default for name, one in parameters.read(path).items()}


def merged(profile, path) -> dict[str, object]:
    """Return what a profile gives to a notebook: its own section wins over what all share."""
    return runner.merged(
        yaml.safe_load(profile.read_text()), runner.Notebook(path, parameters.read(path))
    )


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


@each_notebook
def test_parameters_are_one_literal_a_line_with_type_and_comment(path):
    cells = code_cells(path)
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == cells[:1]
    declared = parameters.read(path)
    lines = tagged[0].source.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(declared)
    for line, one in zip(lines, declared.values(), strict=True):
        assert line.startswith(f'{one.name}: "{one.words}" = ') and one.typed, line
        assert line.endswith(f"  # {one.comment}") and one.comment, line
        assert len(line) <= 100, line
    assert set(declared) >= REQUIRED


@each_notebook
def test_papermills_help_tells_name_type_default_and_meaning(path, caplog):
    # its parser is a regular expression, which an equals sign in a comment confuses
    shown = CliRunner().invoke(papermill_command, ["--help-notebook", str(path)])
    assert shown.exit_code == 0 and not caplog.text
    assert "Unknown type" not in shown.output
    text = " ".join(shown.output.split())
    lines = code_cells(path)[0].source.splitlines()
    for one, line in zip(parameters.read(path).values(), lines, strict=True):
        default = line.partition(" = ")[2].removesuffix(f"  # {one.comment}")
        assert f" {one.name}: {one.words} (default {default}) {one.comment}" in text


def test_a_parameter_has_one_type_in_all_notebooks_that_have_it():
    words = {}
    for path in PATHS:
        for name, one in parameters.read(path).items():
            assert words.setdefault(name, one.words) == one.words, (path.stem, name)


@each_notebook
def test_the_first_cell_after_the_parameters_checks_them(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    calls = [ast.unparse(node) for node in ast.parse(cells[1].source).body]
    assert f"check('{path.stem[:2]}', globals())" in calls


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


@each_notebook
def test_defaults_are_the_laptop_profile(path):
    laptop = merged(paths.NOTEBOOKS / "profiles" / "laptop.yaml", path)
    assert laptop == {name: defaults(path)[name] for name in laptop}
    assert set(laptop) >= REQUIRED


@each_profile
def test_profiles_name_themselves_and_their_folders(profile):
    values = yaml.safe_load(profile.read_text())
    assert set(values) >= REQUIRED
    assert values["profile"] == profile.stem
    assert values["output_dir"] == f"figures/{profile.stem}"
    assert values["scores_dir"] == f"data/scores/{profile.stem}"


@each_profile
def test_all_values_of_a_profile_are_right_for_all_notebooks(profile):
    notebooks = runner.find_notebooks(paths.ROOT)
    planned = runner.plan(
        notebooks, notebooks, yaml.safe_load(profile.read_text()), profile.name, {}, fresh=False
    )
    for notebook, given in zip(notebooks, planned, strict=True):
        values = notebook.defaults | given
        parameters.check(f"{notebook.number:02}", values)
        assert values == notebook.defaults | given  # nothing is left to convert


@each_profile
def test_papermill_can_take_every_profile(profile):
    # it makes a Python variable of each key
    assert all(key.isidentifier() for key in yaml.safe_load(profile.read_text()))
