"""The one protocol: any method through the store, by any engine, and what finished scores need."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from helpers import examples, experiment_on
from stores import files

from icprobe.data import paths
from icprobe.scores import (
    Experiment,
    Method,
    Output,
    ScoresNotFound,
    StoreError,
    compute,
    load,
    score,
    setting,
    store,
    variants,
)

CALLS = []


@dataclass(frozen=True)
class Overlap(Method):
    """Products of lengths, plus what the pool's number of rows adds; notes what is computed."""

    name = "overlap"
    unit = "tokens squared; positive = helps"
    needs_pool = True
    block_size = 2

    power: int = 1
    stop_after: int = setting(99)

    def prepare(self, lm, queries, pool):
        CALLS.append("prepared")
        return len(pool), [len(one.ids) for one in queries.tokens]

    def score(self, prepared, train):
        if len(CALLS) > self.stop_after:
            raise KeyboardInterrupt
        CALLS.append(train.ids)
        count, lengths = prepared
        mine = [len(one.ids) for one in train.tokens]
        return count + np.outer(mine, lengths) ** self.power


@dataclass(frozen=True)
class Several(Method):
    """Two matrices from one pass, and more where they are asked for."""

    name = "first"
    unit = "none; positive = helps"
    block_size = 2

    powers: tuple = setting((1, 2))

    @property
    def outputs(self):
        return {f"p{k}": Output("power", {**self.options, "k": k}, self.unit) for k in self.powers}

    def only(self, names):
        return replace(self, powers=tuple(k for k in self.powers if f"p{k}" in names))

    def prepare(self, lm, queries, pool):
        assert pool is None
        return len(queries)

    def score(self, prepared, train):
        CALLS.append((self.powers, train.ids))
        column = np.array([len(one.ids) for one in train.tokens])[:, None]
        return {f"p{k}": np.repeat(column**k, prepared, axis=1) for k in self.powers}


@dataclass(frozen=True)
class Single(Method):
    """One row for all training examples."""

    name = "single"
    unit = "none"
    single_row = "nothing"

    def score(self, prepared, train):
        assert len(train) == 0
        return np.array([[float(len(one.ids)) for one in prepared[1].tokens]])


@pytest.fixture
def what(tmp_path):
    """Return an experiment of 5 training examples and 3 queries with a tiny model."""
    CALLS.clear()
    return experiment_on(tmp_path, examples(5, 1), examples(3, 2), max_length=100)


def lengths(experiment, lm):
    return [np.array([len(one.ids) for one in side.tokens]) for side in experiment.examples(lm)]


def test_scores_are_stored_reused_and_found_without_model_and_data(what, capsys, monkeypatch):
    lm = what.load_model()
    expected = 5 + np.outer(*lengths(what, lm))
    with pytest.raises(ScoresNotFound, match="run notebook 01"):
        load(what, Overlap())
    with pytest.raises(KeyboardInterrupt):
        score(what, Overlap(stop_after=1), lm)
    with pytest.raises(ScoresNotFound, match=r"2 of 5 rows(.|\n)*run this"):
        load(what, Overlap(), "run this")
    found = score(what, Overlap(), lm)["overlap"]
    assert found.dtype == np.float32 and (found == expected).all()
    assert CALLS == ["prepared", ["1-0", "1-1"], "prepared", ["1-2", "1-3"], ["1-4"]]
    said = [f"overlap: {n} of 5 rows were there ({what.scores_dir})" for n in (0, 2, 5)]
    assert capsys.readouterr().out.splitlines() == said[:2]
    assert (compute(Overlap(), lm, *what.load_data(), 100)["overlap"] == expected).all()

    CALLS.clear()
    monkeypatch.setattr(Experiment, "_loaded", property(lambda _: pytest.fail("data were loaded")))
    monkeypatch.setattr(Experiment, "load_model", lambda _: pytest.fail("the model was loaded"))
    copy = replace(what)
    for again in (load(copy, [Overlap()]), score(copy, Overlap())):
        assert (again["overlap"] == expected).all()
    assert not CALLS and capsys.readouterr().out.splitlines() == said[2:]


def test_a_fresh_run_that_stops_keeps_the_scores_that_it_has_not_reached(what):
    lm = what.load_model()
    later = score(what, Overlap(2), lm)["overlap"]
    with pytest.raises(KeyboardInterrupt):
        score(what, [Overlap(stop_after=0), Overlap(2)], lm, fresh=True)
    assert (load(what, Overlap(2))["overlap"] == later).all()


def test_a_damaged_part_shows_before_anything_is_computed(what):
    with pytest.raises(KeyboardInterrupt):
        score(what, Overlap(stop_after=1))
    (part,) = paths.resolve(what.scores_dir).glob("*/part-*")
    part.write_bytes(part.read_bytes()[:-9])
    CALLS.clear()
    with pytest.raises(StoreError, match=f"{part.name} is damaged"):
        score(what, Overlap())
    assert not CALLS


def test_scores_that_are_not_finite_are_refused_without_a_store_too(what, monkeypatch):
    monkeypatch.setattr(Overlap, "score", lambda _, __, train: np.full((len(train), 3), np.nan))
    with pytest.raises(FloatingPointError, match="overlap: the score of '1-0' on '2-0'"):
        compute(Overlap(), what.load_model(), *what.load_data())


def test_all_that_determines_scores_is_in_the_key_and_named_where_it_differs(what, monkeypatch):
    def check_named(other, field, method=None):
        with pytest.raises(ScoresNotFound, match=field):
            load(other, method or Overlap())

    score(what, Overlap())
    load(what, Overlap(stop_after=1))  # a setting
    check_named(what, r"identity\.options\.power: stored 1, asked 2", Overlap(2))
    for field, value, name in (
        ("dtype", "float64", "model.dtype"), ("n_train", 4, "train.limit"),
        ("n_query", 2, "queries.limit"), ("max_length", 99, "max_length"),
    ):  # fmt: skip
        check_named(replace(what, **{field: value}), f"identity.{name}: stored .*, asked {value!r}")
    monkeypatch.setattr(Overlap, "version", 2)
    check_named(what, r"identity\.options\.version: stored 1, asked 2")
    monkeypatch.undo()
    monkeypatch.setattr("icprobe.scores.experiment.TEMPLATE_VERSION", 7)
    check_named(replace(what), r"identity\.template: stored 1, asked 7")


def test_several_matrices_from_one_pass_each_in_its_store(what):
    first = score(what, Several((1,)))
    assert [((1,), [f"1-{i}" for i in rows]) for rows in ((0, 1), (2, 3), (4,))] == CALLS
    CALLS.clear()
    both = score(what, Several((1, 2, 3)))
    assert {powers for powers, _ in CALLS} == {(2, 3)}, "what is finished is not computed again"
    assert (both["p1"] == first["p1"]).all() and (both["p3"] == both["p1"] ** 3).all()
    found = {o["k"]: scores for o, scores in variants(what, Several().outputs["p1"])}
    assert found.keys() == {1, 2, 3} and (found[2] == both["p2"]).all()

    # a store left half done costs its missing blocks alone
    one, two, _ = sorted(store.find_all(what.scores_dir, "power"),
                         key=lambda kept: kept.identity["options"]["k"])  # fmt: skip
    two.part(1).unlink()
    CALLS.clear()
    assert (score(what, Several())["p2"] == both["p2"]).all()
    assert CALLS == [((2,), ["1-2", "1-3"])]

    # each store that was begun is finished in its own blocks
    two.part(2).unlink()
    same = what.scores_dir, one.method, one.identity, one.train_ids, one.query_ids
    store.open(*same, block_size=3, fresh=True)
    CALLS.clear()
    again = score(what, Several())
    assert all((again[name] == both[name]).all() for name in again)
    assert [len(rows) for powers, rows in CALLS if powers == (1,)] == [3, 2]
    assert [rows for powers, rows in CALLS if powers == (2,)] == [["1-4"]]


def test_a_single_row_does_not_depend_on_the_training_examples(what):
    found = score(what, Single())["single"]
    assert found.shape == (1, 3)
    assert (load(replace(what, n_train=2), Single())["single"] == found).all()


def test_reference_scores_are_read_and_never_written(what, tmp_path, monkeypatch):
    score(what, Overlap())
    reference = tmp_path / "reference"
    (tmp_path / "scores").rename(reference)
    monkeypatch.setattr(paths, "REFERENCE_SCORES", reference)
    (folder,) = reference.iterdir()
    leftover = folder / f"part-00001.parquet.{'0' * 32}.tmp"
    leftover.write_bytes(b"half")
    before = files(folder)
    CALLS.clear()
    found = score(what, Overlap())["overlap"]
    assert not CALLS and not (tmp_path / "scores").exists()
    assert (load(what, Overlap())["overlap"] == found).all()

    for _ in range(2):
        CALLS.clear()
        assert (score(what, Overlap(), fresh=True)["overlap"] == found).all()
        assert len(CALLS) == 4 and files(folder) == before
    (tmp_path / "link").symlink_to(reference)
    for named in (reference, tmp_path / "link"):
        with pytest.raises(StoreError, match="only read"):
            score(replace(what, scores_dir=str(named)), Overlap(), fresh=True)
    assert files(folder) == before
    # an unfinished reference is no reference: the run makes its own
    (folder / "part-00001.parquet").unlink()
    (tmp_path / "scores").rename(tmp_path / "away")
    CALLS.clear()
    assert (score(what, Overlap())["overlap"] == found).all() and len(CALLS) == 4


def test_nothing_is_begun_that_cannot_be_finished(what, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"model .* is not"):
        score(what, Overlap(), tiny("gpt2"))
    with pytest.raises(ValueError, match="engine is 'mars'"):
        score(what, Overlap(), engine="mars")
    assert not (tmp_path / "scores").exists()


def test_parts_of_an_experiment(what):
    part = replace(what, n_train=4, n_query=2)
    rows, columns = part.indices_in(what)
    for whole, some, at in zip(what.load_data(), part.load_data(), (rows, columns), strict=True):
        assert [whole[int(i)]["id"] for i in at] == list(some["id"])
    with pytest.raises(ValueError, match="is not in"):
        what.indices_in(part)
    scores = np.arange(8.0).reshape(4, 2)
    among = part.expand_to(what, scores)
    assert (among[np.ix_(rows, columns)] == scores).all()
    assert np.isnan(among).sum() == among.size - 8
    # a side that keeps all keeps its name, so that finished scores of the whole are found
    assert what.part(6, None).identity == what.part(None, None).identity == what.identity
    assert what.part(4, None).n_train == 4


@pytest.mark.parametrize(
    "pools", [{"crosed": [8, 4]}, {"data/demo.jsonl": [8, 4]},
              *({"crossed": sizes} for sizes in ([8], [8, 4, 2], [8, 0], [8.0, 4], 8, "84", None))]
)  # fmt: skip
def test_condition_pools_that_make_no_sense(what, pools):
    assert what.pools({}) == {}
    ((name, sizes),) = pools.items()
    said = re.escape(f"condition_pools: {name!r}: {sizes!r}, expected a suite and [N, M]: ")
    with pytest.raises(ValueError, match=said):
        what.pools(pools)


LIGHT = """
import json, sys
from icprobe.finetuning.tracin import TracIn
from icprobe.methods import icp, registry, training_effect
from icprobe.methods.gradient import ClampedLog, EKFACInfluence, GradientProducts
from icprobe.scores import Experiment, load
from icprobe.finetuning.recipe import Recipe

experiment = Experiment(**json.loads(sys.argv[1]))
methods = [*icp.probing("", True), GradientProducts(), EKFACInfluence(2), *registry.baselines()]
found = load(experiment, [*methods, TracIn(Recipe(saves=2))])
assert found["icp"].shape == (132, 48)
heavy = ("torch", "transformers", "datasets", "trl", "sklearn")
print([name for name in heavy if name in sys.modules])
"""


def test_finished_scores_need_neither_torch_nor_transformers():
    size = {"n_train": 132, "n_query": 48, "max_length": 512}
    names = {"scores_dir": "data/scores/laptop", "train": "grid", "queries": "grid"}
    fields = json.dumps({**size, **names, "model": "smollm2-135m-instruct"})
    ran = subprocess.run([sys.executable, "-c", LIGHT, fields], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "[]\n"
