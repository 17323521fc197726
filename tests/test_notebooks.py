"""What every notebook must keep to: thin, parameterised, committed without outputs."""

import ast
import io
import re
import tokenize

import nbformat
import papermill
import pytest
import yaml

from icprobe import paths

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
    """Return the parameters that the first code cell declares."""
    body = ast.parse(code_cells(path)[0].source).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in body}


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
def test_parameters_are_commented_literals_in_the_first_code_cell(path):
    cells = code_cells(path)
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == cells[:1]
    source = tagged[0].source
    body = ast.parse(source).body
    assert [line.lineno for line in body] == list(range(1, len(source.splitlines()) + 1))
    for line in body:
        assert isinstance(line, ast.Assign), ast.unparse(line)
        assert isinstance(
            ast.literal_eval(line.value), str | int | float | bool | list | dict | None
        )
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = [token.start[0] for token in tokens if token.type == tokenize.COMMENT]
    assert commented == [line.lineno for line in body], "each line needs one comment"
    assert set(defaults(path)) >= REQUIRED


@each_notebook
def test_papermill_sees_the_same_parameters(path, caplog):
    # its parser is a regular expression, which an equals sign in a comment confuses
    assert set(papermill.inspect_notebook(path)) == set(defaults(path)), caplog.text


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
    laptop = yaml.safe_load((paths.NOTEBOOKS / "profiles" / "laptop.yaml").read_text())
    shared = {name: value for name, value in defaults(path).items() if name in laptop}
    assert shared == {name: laptop[name] for name in shared}
    assert set(shared) >= REQUIRED


@each_profile
def test_profiles_name_declared_parameters_and_themselves(profile):
    values = yaml.safe_load(profile.read_text())
    declared = set().union(*(defaults(path) for path in PATHS))
    assert set(values) <= declared
    assert set(values) >= REQUIRED
    assert values["profile"] == profile.stem
    assert values["output_dir"] == f"figures/{profile.stem}"
    assert values["scores_dir"] == f"data/scores/{profile.stem}"
