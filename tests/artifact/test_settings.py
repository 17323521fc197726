"""Parameters are declared once, and wrong values are found before anything runs."""

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from icprobe import data, models, statistics
from icprobe.artifact import checks, settings
from icprobe.artifact.benchmark.methods import METHODS
from icprobe.artifact.parameters import ParameterError, described, options, schemas
from icprobe.data import paths
from icprobe.finetuning import recipe, selection
from icprobe.methods import registry, training_effect
from icprobe.methods.gradient import losses
from icprobe.scores import Experiment, run
from icprobe.statistics import recommendation

each_notebook = pytest.mark.parametrize("one", settings.NOTEBOOKS, ids=lambda one: one.__name__)
OF = {one.NOTEBOOK[:2]: one for one in settings.NOTEBOOKS}


def values(number, **changes):
    """Return a notebook's own values, some of them changed."""
    return {name: field.default for name, field in OF[number].model_fields.items()} | changes


def refused(number, **changes) -> str:
    """Return what is said of changed values, each of which must be named."""
    with pytest.raises(ParameterError) as error:
        OF[number].of(values(number, **changes))
    assert set(error.value.problems) == set(changes)
    for name, value in changes.items():
        assert error.value.problems[name].startswith(f"{name} is {value!r}, expected ")
    return str(error.value)


@each_notebook
def test_a_notebooks_own_values_are_right_and_left_as_they_are(one):
    given = {name: field.default for name, field in one.model_fields.items()} | {"other": object()}
    before = dict(given)
    one.of(given)
    assert list(map(repr, given.values())) == list(map(repr, before.values()))
    # given one by one, defaults are checked, too
    for name, field in one.model_fields.items():
        assert repr(getattr(one(**{name: field.default}), name)) == repr(field.default), name


@pytest.mark.parametrize(
    ("number", "name", "value", "said"),
    [
        # types
        ("01", "n_train", "many", "int from 1 or None (the default is 132)"),
        ("01", "n_train", 1.5, "int from 1 or None"),
        ("01", "n_train", True, "int from 1 or None"),
        ("01", "n_train", "12", "write 12 without quotes"),
        ("02", "memory", "1e-1", "write 1.0e-1"),
        ("02", "ekfac_blocks", None, "int from 1 (the default is 2)"),
        ("01", "fresh", 0, "bool (the default is False). Write true or false"),
        ("01", "preamble", 3, "str (the default is '')"),
        ("04", "rivals", "hidden states", 'A list of one is written ["hidden states"]'),
        ("04", "rivals", [1], "list[str]"),
        ("04", "budgets", 0.5, "A list of one is written [0.5]"),
        ("06", "m_timed", [1, "2"], "write 2 without quotes"),
        ("01", "train_columns", "prompt", "dict or None"),
        # ranges
        ("01", "n_train", 0, "int from 1 or None"),
        ("02", "memory", -1, "float from 0 or None"),
        ("02", "memory", float("nan"), "float from 0 or None"),
        ("03", "resamples", 1, "int from 2"),
        ("04", "budget", 0, "float above 0 up to 1"),
        ("04", "budget", True, "float above 0 up to 1"),
        ("04", "budgets", [0.5, 2], "list[float above 0 up to 1]"),
        ("04", "subset_share", 1.0, "float above 0 below 1"),
        ("04", "rate", float("inf"), "float above 0"),
        ("04", "subsets", 1, "0 for none, or at least 4"),
        ("06", "m_timed", [], "of at least 1"),
        ("05", "cosines", [1, 1.5], "float from -1 up to 1"),
        ("05", "angles", [0, 90], "float from 0 below 90"),
        ("05", "bases", [[1]], "[pairs from 0, contexts from 1]"),
        ("05", "prior_mean", float("inf"), "float"),
        ("05", "quick_width", 31, "divisible by 2"),
        # two of them
        ("05", "network_heads", 5, "network_width, 48"),
        ("05", "watched", [0, 5000], "quick_steps, 1000"),
        ("05", "bases", [[10, 1]], "network_pairs - 2, 9"),
        # what there is
        ("01", "dtype", "float23", "Did you mean float32"),
        ("04", "schedule", "lineal", "Did you mean linear?"),
        (
            "04",
            "rivals",
            ["size"],
            [repr(m.title) for m in registry.REGISTERED.values() if m.title],
        ),
        ("06", "methods", ["icprobe, probin"], [*METHODS, "Did you mean icprobe, prob"]),
        ("02", "steps", [["sgd", 1e-4], ["sgd", 1e-3], ["adam", 1e-5]], training_effect.OPTIMIZERS),
        ("02", "steps", [["sgd", "1e-4"]], "write 1.0e-4"),
        ("01", "condition_pools", {"crosed": [1, 1]}, data.suites()),
        ("01", "condition_pools", {"crossed": [0, 1]}, "[N, M]"),
        ("02", "layers", "(", "a regular expression"),
        ("01", "train", "gird", "grid"),
        ("03", "queries", "nowhere.jsonl", "no such file"),
        ("04", "evaluation", "nowhere.jsonl", "None, or"),
        ("01", "train_columns", {"promt": "a"}, data.COLUMNS),
        ("01", "query_columns", {"prompt": 1}, "name, template or None"),
        ("01", "train_columns", {"prompt": "{q"}, "a template for prompt"),
        ("01", "model", "./nowhere", "there is no folder"),
        ("01", "model", "", "str of at least 1"),
        ("01", "model", "docs", "docs has no config.json or adapter_config.json"),
        ("01", "output_dir", "", "str of at least 1"),
        *(
            ("01", "output_dir", folder, "figures/mine")
            for folder in (
                ".",
                "..",
                "/",
                "notebooks/out",
                "lib/icprobe",
                "docs",
                "tests",
                "data/suites",
                "data/scores/laptop",
                "figures",
                "figures/../lib",
                ".git",
                str(paths.NOTEBOOKS),
            )
        ),
        ("01", "output_dir", "README.md", "a folder, and there is a file"),
        ("01", "output_dir", "figures/smoke", "another folder for profile 'laptop'"),
        *(
            ("05", name, folder, "apart from the repository's own")
            for name in ("scores_dir", "networks_dir")
            for folder in (".", "notebooks", "data", "data/suites", "figures")
        ),
        ("06", "compared", "nowhere.csv", "None, or a file that is there"),
        ("05", "networks_dir", "data/networks", "apart from the repository's own"),
        ("01", "scores_dir", "data/scores/reference", "apart from the repository's own"),
        ("01", "output_dir", "figures/reference/laptop", "apart from the repository's own"),
        ("07", "published_dir", "nowhere", 'a folder that is there, or ""'),
        ("04", "judge_url", "localhost:8000", "https?://"),
        ("08", "step", ["adam", 0.1], ["[optimizer, rate]", *training_effect.OPTIMIZERS]),
    ],
)
def test_a_wrong_value_is_refused_and_told_what_is_right(number, name, value, said):
    text = refused(number, **{name: value})
    for part in [said] if isinstance(said, str) else said:
        assert part in text


@pytest.mark.parametrize(
    ("number", "name", "place"),
    [
        ("08", "train", "08_pool.jsonl"),  # what 08 deletes and writes
        ("08", "queries", "08_pool.jsonl"),
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
            with pytest.raises(ParameterError) as error:
                OF[number].of(values(number, **own))
            (problem,) = error.value.problems.values()
            assert str(given) in problem and own["output_dir"] in problem
        beside = str(tmp_path / "out" / "finetuned")
        OF[number].of(values(number, **{name: str(given), "output_dir": beside}))


def test_results_of_another_profile_are_not_overwritten():
    for folder in ("figures/laptop", "figures/laptop_long"):
        with pytest.raises(ParameterError) as error:
            OF["04"].of(values("04", profile="smoke", output_dir=folder))
        assert f"{folder} has results of 'laptop'" in error.value.problems["output_dir"]


def test_all_wrong_values_are_listed_together():
    changes = {"n_train": 0, "dtype": "half", "rivals": "own loss", "budgets": [2], "train": "gird"}
    given = values("04", **changes)
    del given["resamples"]  # its line is gone
    with pytest.raises(ParameterError) as error:
        OF["04"].of(given)
    assert set(error.value.problems) == {*changes, "resamples"}
    assert len(str(error.value).splitlines()) == 7


def test_a_rule_about_two_of_them_holds_whichever_is_given():
    for given, blamed in (({"dimension": 3}, "angles"), ({"quick_steps": 9}, "watched")):
        with pytest.raises(ParameterError) as error:
            OF["05"].checked(given)
        assert set(error.value.problems) == {blamed}


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
        ("05", {"cosines": [1, 0], "offsets": [0, 2]}),
        ("06", {"compared": None, "methods": ["icprobe, probing"], "m_timed": [1, 2]}),
        ("07", {"published_dir": "data"}),
        ("01", {"output_dir": "figures/mine", "scores_dir": "data/scores/mine"}),
        ("01", {"output_dir": "figures/laptop_long", "scores_dir": "data/scores"}),
        ("04", {"output_dir": "figures/smoke", "profile": "smoke"}),
        ("05", {"networks_dir": "data/scores/mine"}),
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
    assert (experiment.train, experiment.n_train, experiment.n_query) == (
        "data/demo.jsonl",
        5,
        None,
    )
    for name in Experiment.__dataclass_fields__:
        assert getattr(experiment, name) == getattr(chosen, name), name


def test_names_are_those_of_the_modules_that_know_them():
    known = {
        "dtype": models.DTYPES,
        "engine": run.ENGINES,
        "loss_on": losses.LOSSES,
        "schedule": recipe.SCHEDULES,
        "budget_unit": selection.UNITS,
        "method": (recommendation.ICP, recommendation.GRADIENTS, recommendation.SIMILARITY),
        "choice": (selection.IN_TURN, selection.TOP),
    }
    found = {}
    for one in settings.NOTEBOOKS:
        for name, schema in schemas(one).items():
            for kind in options(schema):
                if "enum" in kind:
                    found[name] = set(kind["enum"])
    assert found == {name: set(names) for name, names in known.items()}
    assert checks.RANKED == statistics.MIN_OBSERVATIONS


def test_a_parameter_is_of_one_type_in_all_notebooks_that_have_it():
    words = {}
    for one in settings.NOTEBOOKS:
        for name, schema in schemas(one).items():
            assert words.setdefault(name, described(schema)) == described(schema), name


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
