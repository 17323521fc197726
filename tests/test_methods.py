"""The registry of scoring methods, by the example of docs/add_a_method.md."""

import ast
import re
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import experiment_on
from test_lm import examples

from icprobe import baselines, correlation, methods, paths, retraining
from icprobe.experiment import Experiment
from icprobe.finetuning import selection
from icprobe.methods import Method
from icprobe.store import ScoresNotFound, StoreError


def texts(n, seed):
    """Return n rows of words from a small vocabulary, so that some are shared."""
    rng = np.random.default_rng(seed)
    words = ["the", "old", "red", "cat", "fish", "sea", "sleeps", "swims"]
    return [
        {
            "id": f"{seed}-{i}",
            "prompt": " ".join(rng.choice(words, size=rng.integers(1, 9))) + ":",
            "completion": f" {rng.choice(words)}",
        }
        for i in range(n)
    ]


@pytest.fixture
def what(tmp_path):
    """Return an experiment of 6 training examples and 3 queries with a tiny model."""
    return experiment_on(tmp_path, texts(6, 0), texts(3, 1), max_length=100)


@pytest.fixture
def registry(monkeypatch):
    """Return the registered methods, which are as before when the test ends."""
    monkeypatch.setattr(methods, "REGISTERED", dict(methods.REGISTERED))
    return methods.REGISTERED


@pytest.fixture
def documented(registry):
    """Run the example of the page, and return its method."""
    page = (paths.ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    before = set(registry)
    exec(example, {})
    (name,) = set(registry) - before
    return registry[name]


def method(score, name="mine", title="my method", **more) -> Method:
    return Method(name, title, "nats; positive = helps", score, **more)


# ---------------------------------------------------------------------------- a method of one's own


def test_a_registered_method_is_scored_ranked_and_chosen_like_all_others(what, documented):
    lm = what.load_model()
    scores = methods.measure(what, lm)
    assert list(scores)[-1] == documented.name == "word_overlap"
    pool, asked = what.load_data()

    def words(row):
        return set((row["prompt"] + row["completion"]).lower().split())

    by_hand = [[len(words(a) & words(b)) / len(words(b)) for b in asked] for a in pool]
    np.testing.assert_allclose(scores["word_overlap"], by_hand, rtol=1e-6)

    # notebook 03: found without model and data, a row among those held against a training step
    rivals = methods.find(replace(what), "run notebook 01")
    effect = retraining.measure(what, lm, [retraining.Step("sgd", 0.01)])
    table = correlation.agreement_table(
        methods.by_title(rivals), effect, {"per query": "query"}, np.random.default_rng(0), (), 5
    )
    (truth,) = effect.values()
    rho = pd.DataFrame(by_hand).corrwith(pd.DataFrame(truth), method="spearman")
    row = table.set_index("first").loc["shared words"]
    assert row["estimate"] == pytest.approx(rho.mean(), rel=1e-5)
    assert {"words (TF-IDF)", "random"} < set(table["first"])

    # the explorer: a column, with its unit
    shown, units = methods.browsed(methods.by_title(rivals))
    assert list(shown) == ["words (TF-IDF)", "hidden states", "shared words"]
    assert list(units.values()) == ["cosine", "cosine", "share"]
    assert (shown["shared words"] == scores["word_overlap"]).all()

    # notebook 04: chooses by its title
    chosen = selection.named(methods.by_title(rivals), ["shared words"])
    assert (chosen["shared words"] == scores["word_overlap"]).all()


def test_finished_scores_are_found_until_the_version_is_raised(what, documented, capsys):
    lm = what.load_model()
    first = methods.measure(what, lm, [documented])["word_overlap"]
    changed = replace(documented, score=lambda pairs: np.ones(pairs.shape))
    capsys.readouterr()
    assert (methods.measure(what, lm, [changed])["word_overlap"] == first).all()
    assert "reused 6 of 6 rows" in capsys.readouterr().out
    announced = replace(changed, version=2)
    with pytest.raises(ScoresNotFound, match=r"identity\.options\.version.*\n.*run notebook 01"):
        methods.find(what, "run notebook 01", [announced])
    assert (methods.measure(what, lm, [announced])["word_overlap"] == 1).all()
    assert (methods.find(what, "", [documented])["word_overlap"] == first).all()


def test_a_slow_method_goes_on_where_it_stopped(what):
    lm, seen = what.load_model(), []

    def slow(pairs, power):
        if len(seen) == 2:
            seen.append("interrupted")
            raise KeyboardInterrupt
        shown, asked = pairs.encoded
        assert [one.id for one in shown] == list(pairs.train["id"])
        seen.append([one.id for one in shown])
        return np.array([[float(len(a.ids) * len(b.ids)) ** power for b in asked] for a in shown])

    mine = method(slow, at_once=2, options={"power": 2})
    with pytest.raises(KeyboardInterrupt):
        methods.measure(what, lm, [mine])
    found = methods.measure(what, lm, [mine])["mine"]
    assert seen == [["0-0", "0-1"], ["0-2", "0-3"], "interrupted", ["0-4", "0-5"]]
    lengths = [np.array([len(one.ids) for one in side]) for side in what.encode(lm)]
    assert (found == np.outer(*lengths) ** 2).all()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (np.zeros(3), r"returned shape \[3\], expected an array of floats \[6, 3\]"),
        (np.zeros((3, 6)), r"returned shape \[3, 6\]"),
        (np.full((6, 3), np.nan), "returned nan for training example '0-0' and query '1-0'"),
        (np.zeros((6, 3), dtype=int), "returned int64 numbers"),
        ([[0.0] * 3] * 6, "returned list"),
    ],
    ids=["no matrix", "transposed", "not finite", "whole numbers", "a list"],
)
def test_what_a_function_returns_is_checked(what, found, message):
    with pytest.raises(ValueError, match=f"method 'mine' {message}"):
        methods.measure(what, what.load_model(), [method(lambda pairs: found)])
    with pytest.raises(ScoresNotFound):
        methods.find(what, "", [method(len)])


def test_numbers_beyond_float32_are_refused(what):
    with pytest.raises(StoreError, match="not finite"):
        methods.measure(what, what.load_model(), [method(lambda p: np.full(p.shape, 1e300))])


def test_names_and_titles_are_taken_once(registry):
    methods.register(method(len))
    methods.register(method(len, "control", None))  # controls have no title to share
    methods.register(method(len, "another_control", None))
    for name, title, what in (
        ("mine", "another title", "name 'mine'"),
        ("another", "my method", "title 'my method'"),
        ("lexical", "a title", "name 'lexical'"),
        ("icp", "a title", "name 'icp'"),
        ("another", "gain", "title 'gain'"),
    ):
        with pytest.raises(ValueError, match=f"{what} is taken"):
            methods.register(method(len, name, title))
    registry.pop("mine")
    methods.register(method(len))
    assert methods.titled("my method") is registry["mine"]
    with pytest.raises(ValueError, match=r"'gain', there are: length.*my method"):
        methods.titled("gain")


def test_titles_that_notebooks_give_themselves_cannot_be_taken():
    cells = [
        cell.source
        for name in ("03_correlation", "04_finetuning", "08_your_data")
        for cell in nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", 4).cells
        if cell.cell_type == "code"
    ]
    # dictionaries of methods by title
    own = {"probing", "gradient", "gradients", "methods", "explored", "of_sample"}
    given = {
        key.value
        for line in (line for cell in cells for line in ast.parse(cell).body)
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Dict)
        if line.targets[0].id in own
        for key in line.value.keys
        if isinstance(key, ast.Constant)
    }
    assert given == set(methods.TITLES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "my method"}, "no method name"),
        ({"title": ""}, "title is ''"),
        ({"unit": None}, "unit is None"),
        ({"score": np.ones((6, 3))}, "score is"),
        ({"version": 0}, "version is 0"),
        ({"at_once": 0}, "at_once is 0"),
        ({"options": {"version": 2}}, "version is a field"),
        ({"options": {"by": len}}, "not JSON serializable"),
    ],
)
def test_fields_are_checked(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(method(len), **changed)


# ------------------------------------------------------------------------------------- the built-in


def test_rivals_through_the_store(what, monkeypatch, capsys):
    pool, asked = what.load_data()
    lm = what.load_model()
    scores = methods.measure(what, lm)
    assert list(scores) == list(methods.REGISTERED)
    direct = {
        "length": baselines.length(lm, pool, asked),
        "completion_length": baselines.length(lm, pool, asked, part="completion"),
        "query_length": baselines.length(lm, asked, pool, part="completion").T,
        "lexical": baselines.lexical(pool, asked),
        "embedding": baselines.embedding(lm, pool, asked),
        "same_completion": baselines.same_completion(pool, asked),
        "own_loss": baselines.own_loss(lm, pool, asked),
        "random": baselines.random(6, 3, np.random.default_rng(0)),
    }
    assert list(scores) == list(direct)
    for name, matrix in scores.items():
        assert (matrix == direct[name]).all(), name

    # finished scores are found without model and data, and are not computed again
    monkeypatch.setattr(Method, "scores", lambda *_: pytest.fail("scores were computed"))
    monkeypatch.setattr(Experiment, "_data", property(lambda _: pytest.fail("data were loaded")))
    found = methods.find(replace(what), "run notebook 03")  # a copy without data
    assert all((found[name] == matrix).all() for name, matrix in scores.items())
    monkeypatch.undo()
    monkeypatch.setattr(Method, "scores", lambda *_: pytest.fail("scores were computed"))
    capsys.readouterr()
    again = methods.measure(what, lm)
    assert all((again[name] == matrix).all() for name, matrix in scores.items())
    assert capsys.readouterr().out.count("reused 6 of 6 rows") == len(scores)


def test_parts_of_a_store_make_the_same_whole(what, tmp_path, monkeypatch):
    lm = what.load_model()
    whole = methods.measure(what, lm)
    monkeypatch.setattr(methods, "ALL_AT_ONCE", 2)
    parts = methods.measure(what, lm, fresh=True)
    for name, matrix in whole.items():
        assert (parts[name] == matrix).all(), name
    assert len(list((tmp_path / "scores").glob("*/part-00002.parquet"))) == len(whole)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("embedding", {"layer": -1, "centre": True}),
        ("embedding", {"layer": None, "centre": False}),
        ("lexical", {**baselines.TFIDF, "lowercase": False}),
        ("random", {"seed": 1}),
    ],
)
def test_another_option_is_another_store(what, name, options):
    lm = what.load_model()
    usual = methods.REGISTERED[name]
    first = methods.measure(what, lm, [usual])[name]
    other = replace(usual, options=options)
    (differs,) = (key for key, value in options.items() if usual.options[key] != value)
    with pytest.raises(ScoresNotFound, match=rf"identity\.options\.{differs}"):
        methods.find(what, "run notebook 03", [other])
    if name != "lexical":  # the texts are in lower case anyway
        assert (methods.measure(what, lm, [other])[name] != first).any()


def test_nothing_is_begun_that_cannot_be_finished(what, tiny, tmp_path):
    with pytest.raises(ValueError, match="is not"):
        methods.measure(what, tiny("gpt2"))
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"id": "plain", "prompt": "", "completion": "a text"}')
    lm = what.load_model()
    with pytest.raises(ValueError, match="'plain': the prompt has no tokens"):
        methods.measure(replace(what, train=str(plain)), lm)
    long = experiment_on(tmp_path, texts(6, 0), examples(1, words=2000))
    with pytest.raises(ValueError, match="lower max_length"):
        methods.measure(long, lm)
    assert not (tmp_path / "scores").exists()
