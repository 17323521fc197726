"""Parameters are declared once, and wrong values are found before anything runs."""

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from icprobe import data, models
from icprobe.artifact import settings
from icprobe.artifact.benchmark.methods import METHODS
from icprobe.artifact.parameters import ParameterError, schemas, type_in_words
from icprobe.data import paths
from icprobe.finetuning import recipe, selection
from icprobe.methods import registry, training_effect
from icprobe.methods.gradient import losses
from icprobe.scores import Experiment, run
from icprobe.statistics import recommendation

OF = {name[:2]: one for name, one in settings.NOTEBOOKS.items()}


def values(number, **changes):
    """Return a notebook's own values, some of them changed."""
    return {name: field.default for name, field in OF[number].model_fields.items()} | changes


def problems(number, **changes) -> dict[str, str]:
    with pytest.raises(ParameterError) as error:
        OF[number].of(values(number, **changes))
    return error.value.problems


@pytest.mark.parametrize("number", OF)
def test_a_notebooks_own_values_are_right_and_left_as_they_are(number):
    given = values(number) | {"other": object()}
    before = dict(given)
    OF[number].of(given)
    assert {name: repr(x) for name, x in given.items()} == {n: repr(x) for n, x in before.items()}


@pytest.mark.parametrize(
    ("number", "name", "value", "said"),
    [
        # types
        ("01", "n_train", "many", "integer"),
        ("01", "n_train", True, "integer"),
        ("01", "n_train", "12", "a number in quotes is text"),
        ("02", "memory", "1e-1", "write 1.0e-4"),
        ("02", "ekfac_blocks", None, "integer"),
        ("01", "fresh", 0, "boolean"),
        ("04", "rivals", "hidden states", "list"),
        ("01", "train_columns", "prompt", "dictionary"),
        ("01", "query_columns", {"prompt": 1}, "query_columns['prompt'] is 1"),
        # ranges
        ("01", "n_train", 0, "1"),
        ("02", "memory", float("nan"), "finite"),
        ("04", "budget", True, "number"),
        ("04", "budgets", [0.5, 2], "budgets[1] is 2: "),
        ("06", "m_timed", [], "at least 1"),
        ("05", "angles", [0, 90], "less than 90"),
        ("05", "bases", [[1]], "at least 2"),
        ("05", "dimension", 3, "4"),
        ("01", "seed", 2**32, "less than 4294967296"),
        ("05", "network_heads", 5, "divisor of network_width, 48"),
        ("04", "subsets", 3, "at least 4"),
        ("04", "evaluation_columns", {"prompt": "{text"}, "expected '}'"),
        ("05", "quick_width", 31, "multiple of 2"),
        ("01", "condition_pools", {"crossed": [0, 1]}, "condition_pools['crossed'][0] is 0"),
        # what there is
        ("01", "dtype", "float23", "'float32'"),
        ("01", "condition_pools", {"crosed": [1, 1]}, data.suites()),
        ("01", "train", "gird", "grid"),
        ("03", "queries", "nowhere.jsonl", "no such file"),
        ("01", "train_columns", {"promt": "a"}, data.COLUMNS),
        ("01", "model", "", "at least 1"),
        ("01", "model", "./nowhere", "there is no"),
        ("01", "model", "docs", "docs has no config.json"),
        ("02", "layers", "(", "a regular expression"),
        ("02", "steps", [["sgd", 1e-4], ["sgd", 1e-3], ["adam", 1]], training_effect.OPTIMIZERS),
        ("02", "steps", [["sgd", "1e-4"]], ["['sgd', '1e-4'] is no", "write 1.0e-4"]),
        ("08", "step", ["adam", 0.1], training_effect.OPTIMIZERS),
        ("04", "rivals", ["size"], [m.title for m in registry.REGISTERED.values() if m.title]),
        ("06", "methods", ["icprobe, probin"], METHODS),
        ("06", "compared", "nowhere.csv", "there is no"),
        ("07", "published_dir", "nowhere", "there is no"),
        ("04", "judge_url", "localhost:8000", "https?://"),
        # folders
        *(
            ("01", "output_dir", folder, "figures/mine")
            for folder in (
                ".", "..", "/", "notebooks/out", "docs", "data/suites", "data/scores/laptop",
                "figures", "figures/../lib", ".git", str(paths.NOTEBOOKS),
                "figures/reference/laptop",
            )
        ),
        ("01", "output_dir", "README.md", "there is a file"),
        ("01", "output_dir", "figures/smoke", "for profile 'laptop'"),
        ("01", "output_dir", "figures/smoke_long", "has results of 'smoke'"),
        *(
            ("05", name, folder, "apart from the repository's own")
            for name in ("scores_dir", "networks_dir")
            for folder in (".", "notebooks", "data", "data/scores/reference", "data/networks")
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_and_told_what_is_right(number, name, value, said):
    found = problems(number, **{name: value})
    assert set(found) == {name} and found[name].startswith(name)
    assert all(part in found[name] for part in ([said] if isinstance(said, str) else said))


@pytest.mark.parametrize(
    ("changes", "blamed"),
    [
        ({"quick_steps": 9}, "watched"),
        ({"bases": [[10, 1]]}, "bases"),
        ({"bases": [[1, 0]]}, "bases"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(blamed, changes):
    assert set(problems("05", **changes)) == {blamed}


@pytest.mark.parametrize(
    ("number", "name", "place"),
    [
        ("08", "train", "08_pool.jsonl"),  # what 08 deletes and writes
        ("04", "train", "selected/random.jsonl"),  # what 04 does
        ("04", "evaluation", "held_out.jsonl"),
    ],
)
def test_results_do_not_go_where_inputs_are(tmp_path, number, name, place):
    file = tmp_path / "out" / place
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "linked.jsonl").symlink_to(paths.ROOT / "data/demo.jsonl")
    for given in (file, tmp_path / "link" / place, tmp_path / "out" / "linked.jsonl"):
        for folder in ("out", "link", "."):
            own = {name: str(given), "output_dir": str(tmp_path / folder)}
            (problem,) = problems(number, **own).values()
            assert str(given) in problem and own["output_dir"] in problem
        beside = str(tmp_path / "out" / "finer")
        OF[number].of(values(number, **{name: str(given), "output_dir": beside}))


def test_all_wrong_values_are_listed_together():
    changes = {"n_train": 0, "dtype": "half", "rivals": "own loss", "budgets": [2], "train": "gird"}
    given = values("04", **changes)
    del given["resamples"]  # its line is gone
    with pytest.raises(ParameterError) as error:
        OF["04"].of(given)
    assert set(error.value.problems) == {*changes, "resamples"}
    assert len(str(error.value).splitlines()) == 7


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        ("01", {"n_train": None, "max_length": None, "condition_pools": {}, "model": "owner/name"}),
        ("01", {"train": "data/demo.jsonl", "queries": "owner/name@main"}),
        ("01", {"train_columns": {"prompt": "{question}?", "options": None}}),
        ("02", {"memory": 0.0, "layers": r"mlp|layers\.2\."}),
        ("02", {"steps": [["sgd", 1e-4], ["sgd", 1e-3], ["adamw", 1e-5, 1.0]]}),
        ("04", {"budgets": [], "rivals": ["hidden states"], "subsets": 4, "n_answered": 0}),
        ("05", {"cosines": [1, 0], "offsets": [0, 2], "networks_dir": "data/scores/mine"}),
        ("06", {"compared": None, "methods": ["icprobe, probing"], "m_timed": [1, 2]}),
        ("07", {"published_dir": "data"}),
        ("01", {"output_dir": "figures/laptop_long", "scores_dir": "data/scores"}),
        ("04", {"output_dir": "figures/smoke", "profile": "smoke"}),
    ],
)
def test_right_values_are_taken_as_they_are(number, changes):
    given = values(number, **changes)
    OF[number].of(given)
    assert {name: repr(given[name]) for name in changes} == {n: repr(v) for n, v in changes.items()}


def test_a_whole_number_for_a_float_becomes_one():
    given = values("05", noise=1, prior_mean=0, dimension=4)
    OF["05"].of(given)
    assert [type(given[n]) for n in ("noise", "prior_mean", "dimension")] == [float, float, int]


def test_the_experiment_has_what_the_notebook_says():
    chosen = OF["08"].of(values("08", n_train=5, dtype="bfloat16"))
    experiment = chosen.experiment()
    assert experiment.train == "data/demo.jsonl" and experiment.n_train == 5
    for name in Experiment.__dataclass_fields__:
        assert getattr(experiment, name) == getattr(chosen, name), name


def test_names_are_those_of_the_modules_that_know_them():
    known = {
        "dtype": models.DTYPES,
        "engine": run.ENGINES,
        "loss_on": losses.LOSSES,
        "schedule": recipe.SCHEDULES,
        "budget_unit": ("examples", "tokens"),
        "method": (recommendation.ICP, recommendation.GRADIENTS, recommendation.SIMILARITY),
        "choice": (selection.IN_TURN, selection.TOP),
    }
    found = {}
    for one in OF.values():
        for name, schema in schemas(one).items():
            for kind in schema.get("anyOf", [schema]):
                if "enum" in kind:
                    found[name] = set(kind["enum"])
    assert found == {name: set(names) for name, names in known.items()}
    assert set(settings.Column.__args__) == {*data.COLUMNS, "options"}


def test_a_parameter_is_of_one_type_in_all_notebooks_that_have_it():
    words = {}
    for one in OF.values():
        for name, schema in schemas(one).items():
            said = type_in_words(schema, ranges=True)
            assert words.setdefault(name, said) == said, name


def test_papermill_alone_stops_in_the_first_cell_after_the_parameters(tmp_path):
    with pytest.raises(PapermillExecutionError) as error:
        papermill.execute_notebook(
            paths.NOTEBOOKS / "07_published_scores.ipynb", tmp_path / "copy.ipynb",
            {"resamples": 1, "seed": "0"},
            kernel_name="python3", cwd=tmp_path, progress_bar=False,
        )  # fmt: skip
    assert error.value.ename == "ParameterError"
    assert "seed is '0'" in error.value.evalue and "resamples is 1" in error.value.evalue
    assert error.value.exec_count == 3  # the parameters, papermill's own, and this one
