"""Real (tiny) runs of fine-tuning against TRL's own loss and a plain loop, and their laws."""

import copy
import dataclasses
import json
import math
import tempfile
import warnings

import numpy as np
import pytest
import torch
from helpers import ATOL, FAMILIES, RTOL, encoded, examples

from icprobe import models
from icprobe.finetuning import sft
from icprobe.finetuning.recipe import SCHEDULES, Recipe
from icprobe.finetuning.tracin import over_checkpoints
from icprobe.methods import gradient

RECIPE = Recipe(batch_size=4, rate=1e-3)
pytestmark = pytest.mark.usefixtures("frozen")


def load(folder):
    return models.load(folder, device="cpu")


def weights(lm):
    return lm.model.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def losses(lm, rows):
    return -models.log_likelihoods(lm, rows)[0]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Return a folder of its own for temporary files, of which nothing may be left."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path / "tmp"
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("family", "rank", "loss_on"),
    [
        *((family, 0, "completion") for family in [*FAMILIES, "olmo"]),
        ("mixtral", 0, "completion"),
        ("llama", 0, "text"),
        ("llama", 2, "completion"),
        ("gpt2", 2, "text"),
    ],
)
def test_the_loss_is_trls(tiny, monkeypatch, family, rank, loss_on):
    """TRL's own compute_loss, which runs on GPUs, gives the same curve and the same weights.

    By plain gradient descent: AdamW takes whole steps on keys' biases, whose gradients are zero but
    for rounding.
    """
    lm = tiny(family, bos=True)
    monkeypatch.setattr(sft, "OPTIMIZER", "sgd")
    recipe = Recipe(epochs=2, batch_size=4, rate=0.5 if rank else 0.02, lora_rank=rank)
    ours = sft.train(lm, examples(7, 1), recipe, loss_on=loss_on)
    moved = [abs(weights(ours.lm)[name] - weight).max() for name, weight in weights(lm).items()]
    assert max(moved) > 100 * ATOL
    made, make = [], sft._trainer

    def with_trls_loss(*args):
        made.append(make(*args))
        made[0].compute_loss = super(type(made[0]), made[0]).compute_loss
        return made[0]

    monkeypatch.setattr(sft, "_trainer", with_trls_loss)
    monkeypatch.setattr(sft, "_mean_loss", None)
    theirs = sft.train(lm, examples(7, 1), recipe, loss_on=loss_on)
    np.testing.assert_allclose(ours.curve, theirs.curve, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(weights(ours.lm), weights(theirs.lm), rtol=RTOL, atol=ATOL)
    assert made[0]._metrics, "TRL's loss also counts, and it has been here"


def share(recipe, step, steps):
    """Return the share of the highest rate in a step (counted from 0), by the book."""
    rising = int(recipe.warmup * steps)
    if step < rising:
        return step / rising
    done = (step - rising) / (steps - rising)
    falling = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1}
    return falling[recipe.schedule]


@pytest.mark.parametrize(
    ("schedule", "warmup", "loss_on"),
    [
        *((schedule, 0.0, "completion") for schedule in SCHEDULES),
        ("linear", 0.3, "completion"),
        ("cosine", 0.5, "text"),
        ("constant", 0.5, "text"),
    ],
)
def test_equals_a_plain_loop_over_the_same_batches(tiny, schedule, warmup, loss_on):
    lm, rows = tiny(bos=True), examples(21, 1)
    recipe = dataclasses.replace(RECIPE, schedule=schedule, warmup=warmup)
    trained = sft.train(lm, rows, recipe, loss_on=loss_on)
    batches = sft.batches(lm, rows, recipe, loss_on)
    rates = [recipe.rate * share(recipe, step, len(batches)) for step in range(len(batches))]
    np.testing.assert_allclose(trained.curve["rate"], rates)

    model, curve = copy.deepcopy(lm.model).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    for batch, rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = model(**batch).loss  # transformers' own mean over tokens
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    np.testing.assert_allclose(trained.curve["loss"], curve, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(weights(trained.lm), model.state_dict(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("loss_on", ["completion", "text"])
def test_batches_are_of_the_ids_that_all_methods_share(tiny, loss_on):
    """Each example once, in the order of the seed, without loss where there is no completion."""
    lm, rows = tiny(bos=True), examples(10, 1)
    expected = {}
    for row in encoded(lm, 10, 1):
        ids, mask = models.sequence(lm, row)
        learnt = [True] * len(ids) if loss_on == "text" else mask
        expected[tuple(ids)] = [
            t if wanted else -100 for t, wanted in zip(ids, learnt, strict=True)
        ]
    found, orders = {}, set()
    for seed in (0, 0, 1):
        recipe = dataclasses.replace(RECIPE, seed=seed, epochs=3)
        batches = sft.batches(lm, rows, recipe, loss_on)
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
        for batch in batches:
            assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
            columns = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
            for ids, real, labels in zip(*columns, strict=True):
                found[tuple(ids[real == 1].tolist())] = labels[real == 1].tolist()
        orders.add(tuple(tuple(ids.tolist()) for batch in batches for ids in batch["input_ids"]))
        assert found == expected
    assert len(orders) == 2


def test_rates_of_checkpoints_are_means_over_the_steps_that_led_there(tiny, tmp_path):
    """Six steps at 6/6, 5/6, ..., 1/6 of the rate, two a checkpoint; the start has the first."""
    recipe = Recipe(epochs=2, batch_size=4, rate=0.012, saves=3)
    found = dict(sft.train(tiny(), examples(10, 1), recipe, tmp_path).checkpoints)
    rates = {"0": 0.012, "2": 0.011, "4": 0.007, "6": 0.003}
    expected = {str(tmp_path / f"checkpoint-{step}"): rate for step, rate in rates.items()}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "loss_on"), [("linear", "completion"), ("cosine", "text"), ("constant", "text")]
)
def test_what_tracin_means(tiny, tmp_path, monkeypatch, loss_on, schedule):
    """In plain gradient descent, queries' losses fall by what the steps' products add up to.

    Each step is on the whole pool, and starts from the checkpoint before: products there, the rate
    of the step. Holds if ids, mask, loss, rates and weights of run and scores are one and the same.
    """
    lm = tiny(bos=True)
    pool, queries = encoded(lm, 6, seed=1), encoded(lm, 4, seed=2)
    scored = {layer.weight for layer in gradient.linear_layers(lm).values()}
    for weight in lm.model.parameters():
        weight.requires_grad_(weight in scored)
    monkeypatch.setattr(sft, "OPTIMIZER", "sgd")
    recipe = Recipe(epochs=4, batch_size=6, rate=1e-4, schedule=schedule, saves=4)
    found = sft.train(lm, pool, recipe, tmp_path, loss_on).checkpoints
    folders, rates = zip(*found, strict=True)
    steps = list(zip(folders[:-1], rates[1:], strict=True))
    products = over_checkpoints(lm, steps, pool, queries, loss_on=loss_on)
    tokens = sum(len(z.completion if loss_on == "completion" else z.ids) for z in pool)
    fallen = losses(lm, queries) - losses(load(folders[-1]), queries)
    predicted = products.sum(axis=0) / tokens
    np.testing.assert_allclose(fallen, predicted, rtol=0, atol=0.02 * abs(predicted).max())


@pytest.mark.parametrize("saves", [0, 4])
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(tiny, tmp_path, saves):
    lm = tiny(bos=True)
    pool, before = encoded(lm, 22, seed=1), copy.deepcopy(weights(lm))
    lm.tokenizer.pad_token = None  # as for many models; the trainer sets one
    config = copy.deepcopy(lm.model.config.to_dict())
    rank = 0 if saves else 4
    recipe = Recipe(batch_size=4, rate=3e-3 * (1 + rank), lora_rank=rank, saves=saves)
    trained = sft.train(lm, pool, recipe, tmp_path)
    assert same(before, weights(lm)) and not lm.model.training
    assert lm.tokenizer.pad_token is None and lm.model.config.to_dict() == config
    kept = [load(folder) for folder, _ in trained.checkpoints] or [lm, trained.lm]
    assert same(before, weights(kept[0])) and same(weights(trained.lm), weights(kept[-1]))
    assert kept[-1].bos == lm.bos
    falling = [losses(one, pool).mean() for one in kept]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.95 * falling[0]


@pytest.mark.parametrize(
    ("family", "dtype", "rank"),
    [("llama", "float32", 2), ("llama", "bfloat16", 0), ("mixtral", "float64", 0)],
)  # fmt: skip
def test_nothing_of_the_trainer_is_left_on_the_trained_model(tiny, family, dtype, rank):
    """It is trained again like a model of the same weights that was never trained."""
    lm = tiny(family, dtype=dtype)
    recipe = dataclasses.replace(RECIPE, lora_rank=rank)
    trained, curve, checkpoints = sft.train(lm, examples(5, 1), recipe)
    assert checkpoints == [] and curve.shape == (2, 3)
    assert not any(module.training for module in trained.model.modules())
    for weight in trained.model.parameters():
        assert weight.grad is None and weight.requires_grad and weight.dtype == torch.float32
    assert type(trained.model) is type(lm.model) and trained.identity["dtype"] == "float32"
    assert trained.identity["name"] != lm.identity["name"] and lm.identity["dtype"] == dtype
    own = type(trained.model)(lm.model.config).float().eval()
    own.load_state_dict(weights(trained))
    own = models.LM(own, lm.tokenizer, lm.identity)
    queries = encoded(lm, 3, seed=2)
    np.testing.assert_array_equal(losses(trained, queries), losses(own, queries))
    again = [sft.train(start, examples(5, 3), recipe).lm for start in (trained, own)]
    assert same(*map(weights, again))


@pytest.mark.parametrize("rank", [0, 2])
def test_runs_of_one_seed_are_the_same_to_the_last_bit(tiny, tmp_path, monkeypatch, rank):
    lm, rows = tiny("gpt2"), examples(9, 1)  # with dropout
    assert lm.model.config.resid_pdrop > 0
    recipe = dataclasses.replace(RECIPE, lora_rank=rank)
    first, again = (sft.train(lm, rows, recipe) for _ in range(2))
    other = sft.train(lm, rows, dataclasses.replace(recipe, seed=1))
    monkeypatch.setattr(sft, "TOKENS_KEPT", 0)
    recomputed = sft.train(lm, rows, recipe)
    saves = 0 if rank else 2
    saved = sft.train(lm, rows, dataclasses.replace(recipe, saves=saves), tmp_path)
    for equal in (again, recomputed, saved):
        assert first.curve.equals(equal.curve) and same(weights(first.lm), weights(equal.lm))
    assert not same(weights(first.lm), weights(other.lm))


@pytest.mark.parametrize(("family", "rank"), [("llama", 0), ("gpt2", 2)])
def test_no_telemetry_and_no_messages(tiny, tmp_path, monkeypatch, capfd, family, rank):
    """TRL would report it to its makers, and transformers print what it logs."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", None)
    lm, recipe = tiny(family), Recipe(saves=0 if rank else 1, lora_rank=rank)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sft.train(lm, examples(4, 1), recipe, tmp_path / "run")
    out, err = capfd.readouterr()
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip()]
    assert not out and all(line.startswith("fine-tuning") for line in lines)


def test_padding_needs_no_token_of_its_own(tiny):
    one, other = (tiny(bos=True) for _ in range(2))
    other.tokenizer.pad_token = other.tokenizer.eos_token = None
    runs = [sft.train(lm, examples(9, 1), RECIPE) for lm in (one, other)]
    assert runs[0].curve.equals(runs[1].curve)
    assert same(*(weights(run.lm) for run in runs))
    assert other.tokenizer.pad_token is None


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_the_linear_layers_of_the_blocks_alone(tiny, family):
    lm = tiny(family, bos=True)
    merged = sft.train(lm, examples(9, 1), dataclasses.replace(RECIPE, lora_rank=3)).lm
    start, end = weights(lm), weights(merged)
    layers = {f"{name}.weight" for name in gradient.linear_layers(lm)}
    assert {name for name in start if not torch.equal(start[name], end[name])} == layers
    for name in layers:
        values = torch.linalg.svdvals((end[name] - start[name]).double())
        assert values[3] < 1e-4 * values[0], "the difference has the adapters' rank"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_loss_that_is_not_finite_stops_the_run_at_that_step(tiny, monkeypatch, rank):
    steps, step = [], sft._Watching.on_step_end

    def counted(self, *args, **more):
        steps.append(1)
        step(self, *args, **more)

    monkeypatch.setattr(sft._Watching, "on_step_end", counted)
    lm = tiny()
    before = copy.deepcopy(weights(lm))
    recipe = Recipe(epochs=5, batch_size=4, rate=1e30, lora_rank=rank)
    with pytest.raises(FloatingPointError, match="loss at step 2"):
        sft.train(lm, examples(9, 1), recipe)
    assert len(steps) == 2 and same(before, weights(lm))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epochs", 0), ("batch_size", 2.0), ("saves", -1), ("seed", 2**32), ("lora_rank", 1.0)),
        *(("schedule", "square"), ("rate", 0), ("rate", math.inf), ("rate", "high"), ("warmup", 1)),
    ],
)
def test_a_recipe_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"(?s){field}.*{value}"):
        Recipe(**{field: value})


def test_equal_recipes_are_written_alike():
    assert Recipe(rate=1, warmup=0) == Recipe(rate=1.0)
    written = json.dumps(dataclasses.asdict(Recipe(rate=1, warmup=0)))
    # the order and the numbers' form are in the keys of committed records
    assert written == (
        '{"epochs": 1, "batch_size": 8, "rate": 1.0, "schedule": "linear", "warmup": 0.0, '
        '"lora_rank": 0, "saves": 0, "seed": 0}'
    )


def test_wrong_arguments(tiny, tmp_path):
    lm, rows = tiny(), examples(11, 1)
    for changes, folder in (({}, None), ({"lora_rank": 2}, tmp_path)):
        with pytest.raises(ValueError, match=r"saves is 1.* folder .*lora_rank 0"):
            sft.train(lm, rows, dataclasses.replace(RECIPE, saves=1, **changes), folder)
    with pytest.raises(ValueError, match=r"saves is 4 .* 11 examples make 3 steps"):
        sft.train(lm, rows, dataclasses.replace(RECIPE, saves=4), tmp_path)
    for use in (sft.train, sft.batches):
        with pytest.raises(ValueError, match="no examples"):
            use(lm, [], RECIPE)
        with pytest.raises(ValueError, match="loss_on is 'all'"):
            use(lm, rows, RECIPE, loss_on="all")
        with pytest.raises(ValueError, match=r"'1-0'.* no tokens"):
            use(lm, [rows[0] | {"completion": ""}], RECIPE)
