"""What scoring will take, from counted operations and measured rates."""

import numpy as np
import pandas as pd
import pytest
from test_lm import examples

from icprobe import assets, benchmark, forecast
from icprobe import lm as language_model
from icprobe.forecast import PROBING, PRODUCTS, Machine
from icprobe.methods import costs
from icprobe.methods.costs import Lengths, Shape
from icprobe.methods.gradient import dot as influence


def known(**efficiency) -> pd.DataFrame:
    """Return timings on a CPU with these efficiencies, by method."""
    rows = [
        {"method": name, "kind": "cpu", "dtype": "float32", "efficiency": one, "beyond": 1.0}
        for name, several in efficiency.items()
        for one in several
    ]
    return pd.DataFrame(rows).replace({"method": {"products": PRODUCTS}})


@pytest.fixture
def work(tiny):
    lm = tiny()
    train, queries = (language_model.encode(lm, examples(n, seed)) for n, seed in ((7, 1), (4, 2)))
    return Shape.of(lm), Lengths.of(train, queries)


def test_seconds_are_operations_over_rate_and_efficiency(work):
    shape, lengths = work
    timings = known(probing=[0.2, 0.5, 0.4], products=[1.0])
    machine = Machine("here", "cpu", "float32", 1e9)
    found = forecast.predict(machine, shape, 1000, lengths, timings).set_index("method")
    operations = costs.probing(shape, lengths).operations
    minutes = found.loc[PROBING, ["minutes", "low", "high"]].astype(float)
    np.testing.assert_allclose(minutes * 60, operations / 1e9 / np.array([0.4, 0.5, 0.2]))
    operations = costs.gradient_products(shape, lengths).operations
    assert found.loc[PRODUCTS, "minutes"] * 60 == pytest.approx(operations / 1e9)
    assert found.loc[PRODUCTS, ["low", "high"]].isna().all(), "of one timing there is no range"
    assert (found["n"] == 7).all() and (found["m"] == 4).all()


def test_a_kind_of_machine_that_was_not_timed_is_left_out(work):
    timings = known(probing=[0.5])
    for machine in (Machine("gpu", "cuda", "float32", 1), Machine("cpu", "cpu", "bfloat16", 1)):
        assert forecast.predict(machine, work[0], 1000, work[1], timings).empty


def test_pools_grow_in_proportion_but_for_the_queries_own_gradients(work):
    shape, lengths = work

    def operations(method, N, block=8):
        return forecast.cost(method, shape, forecast.of_pool(lengths, N), block).operations

    assert operations(PROBING, 70) == pytest.approx(10 * operations(PROBING, 7))
    fixed = operations(PRODUCTS, 0)
    assert fixed > 0
    grown = operations(PRODUCTS, 56 * 10) - fixed
    assert grown == pytest.approx(10 * (operations(PRODUCTS, 56) - fixed))
    whole = costs.gradient_products(shape, forecast.of_pool(lengths, 56)).operations
    assert operations(PRODUCTS, 56, block=56) == pytest.approx(whole)
    assert operations(PRODUCTS, 56) >= whole  # a block at a time, less is shared


def test_what_does_not_fit_in_memory_goes_to_a_file(work):
    shape, lengths = work
    machine, timings = Machine("here", "cpu", "float32", 1e9), known(products=[1.0])
    tokens = lengths.queries.sum() + lengths.train.sum()  # they are few, and held together
    factors = tokens * shape.factors * 4 / 2**30
    rows = [
        forecast.predict(machine, shape, 0, lengths, timings, memory).iloc[0]
        for memory in (1.0, factors / 4)
    ]
    np.testing.assert_allclose([row["GiB"] for row in rows], [1 + factors, 1 + factors / 4])
    np.testing.assert_allclose([row["file"] for row in rows], [0, 0.75 * factors])


def test_of_a_large_pool_no_more_is_held_than_is_multiplied_together(work):
    shape, lengths = work
    machine = Machine("here", "cpu", "bfloat16", 1e9)
    large = [forecast.of_pool(lengths, N) for N in (10_000, 20_000)]
    expected = (influence.TOKENS_TOGETHER + lengths.queries.sum()) * shape.factors * 2 / 2**30
    for one in large:
        assert forecast.held(PRODUCTS, machine, shape, one) == pytest.approx(expected)
    assert forecast.held(PROBING, machine, shape, large[0]) == forecast.held(
        PROBING, machine, shape, large[1]
    )


def test_a_gpu_multiplies_as_many_together_as_it_has_room_for(work):
    shape, lengths = work
    timings = known(products=[1.0]).assign(kind="cuda", beyond=0.0)
    large, token = forecast.of_pool(lengths, 10_000), shape.factors * 4 / 2**30
    for tokens, together in ((1e6, influence.TOKENS_ON_GPU), (8000, 8000 - lengths.queries.sum())):
        machine = Machine("gpu", "cuda", "float32", 1e9, memory=tokens * token)
        row = forecast.predict(machine, shape, 0, large, timings).iloc[0]
        assert row["GiB"] == pytest.approx((lengths.queries.sum() + together) * token)
        assert row["file"] == 0
    machine = Machine("gpu", "cuda", "float32", 1e9, memory=100 * token)
    row = forecast.predict(machine, shape, 0, large, timings).iloc[0]
    assert row["GiB"] == pytest.approx(100 * token)
    rest = influence.TOKENS_TOGETHER + lengths.queries.sum() - 100
    assert row["file"] == pytest.approx(rest * token)


def test_the_committed_timings_cover_both_methods_on_both_kinds():
    table = forecast.experience()
    for kind in ("cpu", "cuda"):
        assert set(table[table["kind"] == kind]["method"]) == {PROBING, PRODUCTS}
    assert table["efficiency"].between(0.02, 1.5).all()
    assert (table["beyond"] >= 0).all()
    assert [machine.kind for machine in forecast.machines(table)] == ["cuda", "cuda"]


@pytest.mark.real
def test_timings_are_foretold_by_those_at_other_lengths():
    lm = language_model.load(assets.DEFAULT_MODEL)
    found = forecast.checked(lm, forecast.experience())
    assert len(found) >= 12
    assert found["times"].between(1 / 3, 3).all()
    assert np.median(np.abs(np.log(found["times"]))) < np.log(1.5)
    assert (found["GiB"] / found["peak"]).between(0.5, 2).all()


@pytest.mark.real
def test_what_is_said_of_the_timed_model_is_true():
    lm = language_model.load(assets.DEFAULT_MODEL)
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    assert weights == forecast.TIMED_WEIGHTS["cpu"]
    assert Shape.of(lm).factors == forecast.TIMED_FACTORS["cpu"]
    for lengths, tokens in forecast.TIMED_TOKENS.items():
        of = Lengths.of(*benchmark.examples(lm, lengths, 32, 48))
        assert np.mean([*of.train, *of.queries]) == pytest.approx(tokens, abs=1)
