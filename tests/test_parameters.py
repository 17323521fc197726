"""Parameters cells are read in one place, and wrong values are found before anything runs."""

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from icprobe import advice, benchmark, data, gradients, lm, methods, parameters, paths, retraining
from icprobe.finetuning import recipe, selection
from icprobe.parameters import ParameterError

NUMBERS = sorted(path.name[:2] for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb"))


def write(folder, source, tags=("parameters",)):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})
    path = folder / "01_some.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


def values(number, **changes):
    """Return a notebook's own values, some of them changed."""
    return {name: one.default for name, one in parameters.of_notebook(number).items()} | changes


def refused(number, **changes) -> str:
    """Return what is said of changed values, a line for each."""
    with pytest.raises(ParameterError) as error:
        parameters.check(number, values(number, **changes))
    head, *lines = str(error.value).splitlines()
    assert head == f"wrong parameters of notebook {number}:"
    assert len(lines) == len(changes)
    for name, value in changes.items():
        assert any(line.startswith(f"  {name} is {value!r}, expected ") for line in lines), lines
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- reading a cell


def test_a_line_gives_name_type_default_and_comment(tmp_path):
    path = write(
        tmp_path,
        'n: "int or None" = 3  # N, how many; None: all\n'
        'names: "list[str]" = ["a", "b#c"]  # which ones\n'
        'columns: "dict[str, str or None] or None" = None  # by column\n'
        "rate = 0.5  # says no type\n"
        "other = None",
    )
    found = parameters.read(path)
    assert list(found) == ["n", "names", "columns", "rate", "other"]
    n, names, columns, rate, other = found.values()
    assert (n.words, n.kind, n.default, n.comment) == (
        "int or None", int | None, 3, "N, how many; None: all",
    )  # fmt: skip
    assert (names.default, names.comment, names.typed) == (["a", "b#c"], "which ones", True)
    assert columns.kind == dict[str, str | None] | None
    assert (rate.words, rate.kind, rate.typed) == ("float", float, False)
    assert (other.words, other.comment) == ("anything", "")


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ('n: "number" = 3', "n: 'number' is no type. Types are str, int"),
        ('n: "list[strings]" = []', "'list[strings]' is no type"),
        ('n: "int |" = 3', "'int |' is no type"),
        ('n: "int"', "expected NAME = literal, or NAME: \"type\" = literal, found 'n: 'int''"),
        ("n: int = 3", "expected NAME = literal"),
        ("n = len('four')", "expected NAME = literal"),
        ("a = b = 1", "found 'a = b = 1'"),
        ("import os", "found 'import os'"),
        ("n = ", "parameters cell: invalid syntax"),
    ],
)
def test_a_cell_that_declares_anything_else_is_an_error(tmp_path, source, part):
    with pytest.raises(ParameterError, match=r"01_some\.ipynb, parameters cell") as error:
        parameters.read(write(tmp_path, source))
    assert part in str(error.value)


def test_there_is_one_cell_and_one_notebook(tmp_path):
    with pytest.raises(ParameterError, match=r"01_some\.ipynb has 0 cells tagged 'parameters'"):
        parameters.read(write(tmp_path, "n = 3", tags=()))
    (tmp_path / "02_none.ipynb").write_text("none")
    with pytest.raises(ParameterError, match=r"02_none\.ipynb is not a notebook"):
        parameters.read(tmp_path / "02_none.ipynb")
    with pytest.raises(ParameterError, match="0 notebooks begin with 77_"):
        parameters.of_notebook("77")


@pytest.mark.parametrize(
    ("value", "kind", "right"),
    [
        (True, int, False),
        (1, bool, False),
        (1, float, True),
        (1.0, int, False),
        (True, float, False),
        (None, int | None, True),
        (None, int, False),
        ([1, 2.5], list[float], True),
        ((1, 2), list[int], True),  # as somebody may write in Jupyter
        ([1, "2"], list[int], False),
        ("ab", list[str], False),
        ([["sgd", 1], []], list[list], True),
        ({"a": None}, dict[str, str | None], True),
        ({"a": 1}, dict[str, str | None], False),
        ({1: "a"}, dict[str, str], False),
        ([], dict, False),
    ],
)
def test_fits(value, kind, right):
    assert parameters.fits(value, kind) is right


# --------------------------------------------------------------------------------- checking values


@pytest.mark.parametrize("number", NUMBERS)
def test_the_notebooks_own_values_are_right_and_left_as_they_are(number):
    given = values(number) | {"another": object()}
    before = dict(given)
    parameters.check(number, given)
    assert list(map(repr, given.values())) == list(map(repr, before.values()))


@pytest.mark.parametrize(
    ("number", "name", "value", "said"),
    [
        # types
        ("01", "n_train", "many", "int or None (the default is 132)"),
        ("01", "n_train", 1.5, "int or None"),
        ("01", "n_train", True, "int or None"),
        ("01", "n_train", "12", "write 12 without quotes"),
        ("02", "memory", "1e-1", "write 1.0e-1"),
        ("02", "ekfac_blocks", None, "int (the default is 2)"),
        ("01", "fresh", 0, "bool (the default is False). Write true or false"),
        ("01", "preamble", 3, "str (the default is '')"),
        ("04", "rivals", "hidden states", 'A list of one is written ["hidden states"]'),
        ("04", "rivals", [1], "list[str]"),
        ("04", "budgets", 0.5, "A list of one is written [0.5]"),
        ("06", "m_timed", [1, "2"], "write 2 without quotes"),
        ("01", "train_columns", "prompt", "dict or None"),
        # ranges
        ("01", "n_train", 0, "None, or a number from 1"),
        ("03", "n_query", -1, "None, or a number from 1"),
        ("04", "max_length", 0, "None, or a number from 1"),
        ("02", "memory", -1, "a number from 0"),
        ("02", "memory", float("nan"), "a number from 0"),
        ("03", "resamples", 1, "a number from 2"),
        ("07", "resamples", 0, "a number from 2"),
        ("04", "seeds", 0, "a number from 1"),
        ("04", "budget", 0, "a number above 0, up to 1"),
        ("04", "budget", 1.5, "a number above 0, up to 1"),
        ("04", "budgets", [0.5, 2], "in place of 2 a number above 0, up to 1"),
        ("04", "subset_share", 1.0, "a number above 0, below 1"),
        ("04", "warmup", 1, "a number from 0, below 1"),
        ("04", "rate", float("inf"), "a number above 0"),
        ("04", "subsets", 1, "0 for none, or at least 4"),
        ("06", "m_timed", [], "a list of at least 1"),
        ("05", "cosines", [1, 1.5], "in place of 1.5 a number from -1, up to 1"),
        ("05", "angles", [0, 90], "a number from 0, below 90"),
        ("05", "bases", [[1]], "[pairs from 0, contexts from 1]"),
        ("05", "prior_mean", float("inf"), "a number that is finite"),
        ("05", "quick_width", 31, "an even number"),
        # two of them
        ("05", "network_width", 50, "a multiple of network_heads, 4"),
        ("05", "watched", [0, 5000], "none above quick_steps, 1000"),
        ("05", "bases", [[10, 1]], "up to network_pairs - 2, 9, pairs"),
        # what there is
        ("01", "dtype", "float23", (*map(repr, lm.DTYPES), "Did you mean float32")),
        ("02", "loss_on", "prompt", map(repr, gradients.LOSSES)),
        ("04", "schedule", "lineal", (*map(repr, recipe.SCHEDULES), "Did you mean linear?")),
        ("04", "budget_unit", "words", map(repr, selection.UNITS)),
        ("04", "rivals", ["size"], [repr(m.title) for m in methods.REGISTERED.values() if m.title]),
        (
            "06",
            "methods",
            ["icprobe, probin"],
            (*benchmark.METHODS, "Did you mean icprobe, prob"),
        ),
        ("02", "steps", [["sgd", 1e-4], ["sgd", 1e-3], ["adam", 1e-5]], retraining.OPTIMIZERS),
        ("02", "steps", [["sgd", "1e-4"]], ("positive number", "write 1.0e-4")),
        ("02", "steps", [["sgd", 1e-4]], "expected two of sgd first"),
        ("01", "condition_pools", {"crosed": [1, 1]}, data.suites()),
        ("01", "condition_pools", {"crossed": [0, 1]}, "[N, M], two whole numbers from 1"),
        ("02", "layers", "(", "a regular expression"),
        ("01", "train", "gird", ("a suite, a file or a hub name", "grid")),
        ("03", "queries", "nowhere.jsonl", "no such file"),
        ("04", "evaluation", "nowhere.jsonl", "None, or a suite, a file or a hub name"),
        ("01", "train_columns", {"promt": "a"}, data.COLUMNS),
        ("01", "query_columns", {"prompt": 1}, "name, template or None"),
        ("01", "model", "./nowhere", "there is no folder"),
        ("01", "model", "", "some text"),
        ("01", "model", "docs", "docs has no config.json or adapter_config.json"),
        ("01", "train_columns", {"prompt": "{q"}, "a template for prompt, with column names"),
        ("01", "output_dir", " ", "some text"),
        ("06", "compared", "nowhere.csv", "None, or a file that is there"),
        ("07", "published_dir", "nowhere", 'a folder that is there, or ""'),
        ("04", "judge_url", "localhost:8000", "http://... or https://..."),
        ("08", "step", ["adam", 0.1], ("[optimizer, rate]", *retraining.OPTIMIZERS)),
        ("08", "method", "probing", ("None, or", advice.ICP, advice.GRADIENTS, advice.SIMILARITY)),
        ("08", "choice", "best", (selection.IN_TURN, selection.TOP)),
    ],
)
def test_a_wrong_value_is_refused_and_told_what_is_right(number, name, value, said):
    line = refused(number, **{name: value})
    for part in [said] if isinstance(said, str) else said:
        assert part in line


def test_all_wrong_values_are_listed_together():
    text = refused("04", n_train=0, dtype="half", rivals="own loss", budgets=[2], train="gird")
    assert len(text.splitlines()) == 5


def test_angles_need_four_dimensions():
    with pytest.raises(ParameterError, match="four dimensions, and dimension is 3"):
        parameters.check("05", values("05", dimension=3))


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        ("01", {"n_train": None, "max_length": None, "condition_pools": {}}),
        ("01", {"train": "data/demo.jsonl", "queries": "owner/name@main"}),
        ("01", {"train_columns": {"prompt": "{question}?", "options": None}}),
        ("01", {"model": "owner/name", "preamble": " "}),
        ("02", {"memory": 0.0, "layers": r"mlp|layers\.2\."}),
        ("02", {"steps": [["sgd", 1e-4], ["sgd", 1e-3], ["adamw", 1e-5, 1.0]]}),
        ("04", {"budgets": [], "rivals": ["hidden states"], "subsets": 4, "n_answered": 0}),
        ("06", {"compared": None, "methods": ["icprobe, probing"], "m_timed": (1, 2)}),
        ("07", {"published_dir": "data"}),
    ],
)
def test_right_values_are_taken(number, changes):
    parameters.check(number, values(number, **changes))


def test_a_whole_number_for_a_float_becomes_one():
    given = values("05", noise=1, prior_mean=0, dimension=4)
    parameters.check("05", given)
    assert [type(given[n]) for n in ("noise", "prior_mean", "dimension")] == [float, float, int]


def test_a_parameter_whose_line_is_gone_is_named():
    given = values("07")
    del given["resamples"]
    with pytest.raises(ParameterError, match="resamples has no value"):
        parameters.check("07", given)


def test_every_rule_is_of_a_parameter_that_there_is():
    declared = set().union(*map(parameters.of_notebook, NUMBERS))
    assert set(parameters.RULES) <= declared
    assert {name for one in parameters.TOGETHER for name in one[:2]} <= declared


def test_a_type_decides_where_a_line_of_ones_own_has_a_known_name(tmp_path):
    # rules are for lines that say their type, as those of the repository's notebooks do
    declared = parameters.read(write(tmp_path, "steps = 3  # of mine\nrate = 'slow'"))
    assert not parameters.problems(declared, {"steps": 7, "rate": "fast"}, declared)


def test_a_run_stops_in_the_first_cell_after_the_parameters(tmp_path):
    notebook = next(paths.NOTEBOOKS.glob("07_*.ipynb"))
    with pytest.raises(PapermillExecutionError) as error:
        papermill.execute_notebook(
            notebook, tmp_path / "copy.ipynb", {"resamples": 1, "seed": "0"},
            kernel_name="python3", cwd=tmp_path, progress_bar=False,
        )  # fmt: skip
    assert error.value.ename == "ParameterError"
    assert "seed is '0', expected int" in error.value.evalue
    assert "resamples is 1, expected a number from 2" in error.value.evalue
    assert error.value.exec_count == 3  # the parameters, papermill's own, and this one
