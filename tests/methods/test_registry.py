"""The registry of baselines, by the example of docs/add_a_method.md."""

import ast
import re
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import experiment_on, texts

from icprobe.data import paths
from icprobe.methods import registry as registry_module
from icprobe.methods.baselines import Random
from icprobe.methods.registry import baselines, by_title, in_explorer, register
from icprobe.methods.training_effect import Step, TrainingEffect
from icprobe.scores import compute, load, score
from icprobe.statistics import correlation


@pytest.fixture
def what(tmp_path):
    """Return an experiment of 6 training examples and 3 queries with a tiny model."""
    train, queries = (texts(n, kind).to_dict("records") for n, kind in ((6, "t"), (3, "q")))
    return experiment_on(tmp_path, train, queries, max_length=100)


@pytest.fixture
def registry(monkeypatch):
    """Return the registered methods, which are as before when the test ends."""
    monkeypatch.setattr(registry_module, "REGISTERED", dict(registry_module.REGISTERED))
    return registry_module.REGISTERED


@pytest.fixture
def documented(registry):
    """Run the example of the page, and return its method."""
    page = (paths.ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    before = set(registry)
    exec(example, {})
    (name,) = set(registry) - before
    return registry[name]


def test_a_registered_method_is_scored_ranked_and_chosen_like_all_others(what, documented):
    lm = what.load_model()
    scores = score(what, baselines(), lm)
    assert list(scores)[-1] == documented.name == "word_overlap"
    pool, asked = what.load_data()

    def words(row):
        return set((row["prompt"] + row["completion"]).lower().split())

    by_hand = [[len(words(a) & words(b)) / len(words(b)) for b in asked] for a in pool]
    np.testing.assert_allclose(scores["word_overlap"], by_hand, rtol=1e-6)

    # notebook 03: found without model and data, a row among those held against a training step
    found = by_title(load(replace(what), baselines()))
    effect = score(what, TrainingEffect([Step("sgd", 0.01)]), lm)
    rng = np.random.default_rng(0)
    table = correlation.agreement_table(found, effect, {"per query": "query"}, rng, (), 5)
    (truth,) = effect.values()
    rho = pd.DataFrame(by_hand).corrwith(pd.DataFrame(truth), method="spearman")
    row = table.set_index("first").loc["shared words"]
    assert row["estimate"] == pytest.approx(rho.mean(), rel=1e-5)
    assert {"words (TF-IDF)", "random"} < set(table["first"])

    # the explorer: a column, with its unit
    shown, units = in_explorer(found)
    assert list(shown) == ["words (TF-IDF)", "hidden states", "shared words"]
    assert list(units.values()) == ["cosine", "cosine", "fraction"]

    # notebook 04: chooses by its title
    assert (found["shared words"] == scores["word_overlap"]).all()


@pytest.mark.parametrize(
    ("name", "title", "taken"),
    [
        ("word_overlap", "another title", "name 'word_overlap'"),
        ("another", "shared words", "title 'shared words'"),
        ("icp", "a title", "name 'icp'"),
        ("another", "gain", "title 'gain'"),
    ],
)
def test_names_and_titles_are_taken_once(registry, documented, name, title, taken):
    with pytest.raises(ValueError, match=f"{taken} is taken"):
        register(type("Other", (Random,), {"name": name, "title": title})())
    for control in ("control", "another control"):  # controls have no title to share
        register(type("Other", (Random,), {"name": control, "title": None})())
    registry.pop("word_overlap")
    register(documented)


def test_titles_that_notebooks_give_themselves_cannot_be_taken():
    cells = [
        cell.source
        for name in ("03_correlation", "04_finetuning", "08_your_data")
        for cell in nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", 4).cells
        if cell.cell_type == "code"
    ]
    # dictionaries of methods by title
    own = {"probing", "probed", "gradient", "gradients", "methods", "explored", "of_sample"}
    given = {
        key.value
        for line in (line for cell in cells for line in ast.parse(cell).body)
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Dict)
        if line.targets[0].id in own
        for key in line.value.keys
        if isinstance(key, ast.Constant)
    }
    assert "gain" in given and given < set(registry_module.TAKEN)


def test_baselines_through_the_store_in_any_parts(what, tmp_path, monkeypatch):
    pool, asked = what.load_data()
    lm = what.load_model()
    whole = score(what, baselines(), lm)
    assert list(whole) == list(registry_module.REGISTERED)
    for method in baselines():
        direct = compute(method, lm, pool, asked, what.max_length)[method.name]
        assert (whole[method.name] == direct).all(), method.name
        monkeypatch.setattr(type(method), "block_size", 2)
    parts = score(what, baselines(), lm, fresh=True)
    for name, matrix in whole.items():
        np.testing.assert_allclose(parts[name], matrix, rtol=1e-6, atol=1e-7, err_msg=name)
    assert len(list((tmp_path / "scores").glob("*/part-00002.parquet"))) == len(whole)
