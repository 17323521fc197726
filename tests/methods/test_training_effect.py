"""Effects of training against a slow loop over copies of the model, and their laws."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import FAMILIES, close, encoded, examples, experiment_on, save_tiny

from icprobe import models
from icprobe.methods import training_effect
from icprobe.methods.gradient import gradient_dot, linear_layers
from icprobe.methods.training_effect import Step, TrainingEffect
from icprobe.methods.training_steps import TrainingSteps
from icprobe.scores import compute, load, score

# clipped by far: the gradients of tiny models have norms of tens
STEPS = (Step("sgd", 1e-3), Step("adamw", 1e-3), Step("sgd", 0.05, clip=0.5))


def effects_of(lm, train, queries, steps=STEPS, layers="", loss_on="completion"):
    """Return what each step on each example alone does to each query."""
    return TrainingSteps(lm, queries, layers).effects(train, steps, loss_on)


def slow(lm, train, queries, step, layers="", loss_on="completion"):
    """Train a copy of the model on one example after another, as one would by hand."""

    def log_likelihoods(model):
        trained = dataclasses.replace(lm, model=model)
        return [models.token_log_likelihoods(trained, query).sum() for query in queries]

    found = np.zeros((len(train), len(queries)))
    for i, example in enumerate(train):
        model = copy.deepcopy(lm.model).requires_grad_(False)
        modules = dict(model.named_modules())
        weights = [modules[name].weight for name in linear_layers(lm, layers)]
        for weight in weights:
            weight.requires_grad_(True)
        ids, mask = models.sequence(lm, example)
        learnt = [loss_on == "text" or bool(m) for m in mask]
        labels = torch.tensor([t if learn else -100 for t, learn in zip(ids, learnt, strict=True)])
        logits = model(torch.tensor([ids])).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels[1:]).backward()
        if step.clip is not None:
            torch.nn.utils.clip_grad_norm_(weights, step.clip)
        if step.optimizer == "sgd":
            optimizer = torch.optim.SGD(weights, lr=step.rate)
        else:
            optimizer = torch.optim.AdamW(weights, lr=step.rate, weight_decay=0)
        optimizer.step()
        found[i] = np.subtract(log_likelihoods(model), log_likelihoods(lm.model))
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        *((family, dtype, {}) for family in FAMILIES for dtype in ("float64", "float32")),
        *(("llama", "float64", options) for options in ({"layers": "mlp"}, {"loss_on": "text"})),
    ],
)
def test_equals_training_a_copy_of_the_model(tiny, family, dtype, options):
    lm = tiny(family, bos=family == "gpt2" or bool(options), dtype=dtype)
    train, queries = encoded(lm, 3, seed=1), encoded(lm, 4, seed=2)
    for effect, step in zip(effects_of(lm, train, queries, **options), STEPS, strict=True):
        assert effect.dtype == np.float32 and effect.shape == (3, 4)
        close(effect, slow(lm, train, queries, step, **options), dtype)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_small_step_gives_the_gradient_product(tiny, family):
    """Effect over rate goes to the product, and the error with the rate: first order."""
    lm = tiny(family, dtype="float64")
    train, queries = encoded(lm, 4, seed=1), encoded(lm, 3, seed=2)
    rates = (1e-4, 5e-5, 1e-6)
    tokens = np.array([len(example.completion) for example in train])  # the loss is their mean
    expected = gradient_dot(lm, train, queries) / tokens[:, None]
    found = effects_of(lm, train, queries, [Step("sgd", rate) for rate in rates])
    scaled = [effect / rate for effect, rate in zip(found, rates, strict=True)]
    # the third rate's own error is 1 and 2 percent of the others'
    one, half = (abs(effect - scaled[2]).max() for effect in scaled[:2])
    assert half / one == pytest.approx(0.5, rel=0.05)
    assert abs(scaled[2] - expected).max() < 2 * 1e-2 * one
    close(scaled[2], expected, "float32")


def snapshot(lm):
    return [(p.detach().clone(), p.requires_grad, p.grad) for p in lm.model.parameters()]


def unchanged(lm, before):
    return not lm.model.training and all(
        torch.equal(p, bits) and p.requires_grad == trained and p.grad is gradient
        for p, (bits, trained, gradient) in zip(lm.model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize(
    ("owner", "name", "fine"),
    [
        (models, "log_likelihoods", 4),  # the second example's first step
        (torch.optim.AdamW, "step", 3),
        (torch.autograd, "grad", 1),
    ],
)
def test_the_model_is_left_as_it_was(tiny, monkeypatch, owner, name, fine):
    """By a run that ends, and by one that is interrupted when some calls went fine."""
    lm = tiny("gpt2")
    train, queries = encoded(lm, 2, seed=1), encoded(lm, 3, seed=2)
    first = next(iter(linear_layers(lm).values())).weight
    lm.model.get_input_embeddings().weight.requires_grad_(False)
    first.requires_grad_(False)
    first.grad = torch.ones_like(first)
    held, before = TrainingSteps(lm, queries), snapshot(lm)
    held.effects(train, STEPS)
    assert unchanged(lm, before) and first.grad.eq(1).all()
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) > fine:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(KeyboardInterrupt):
        held.effects(train, STEPS)
    assert unchanged(lm, before) and first.grad.eq(1).all()


def test_rows_depend_on_their_own_example_and_step_alone(tiny):
    """To the bit: nothing of an optimiser's state, a gradient or a step is left behind."""
    lm = tiny()
    train, queries = encoded(lm, 5, seed=1), encoded(lm, 4, seed=2)
    whole = effects_of(lm, train, queries, STEPS)
    backwards = effects_of(lm, train[::-1], queries, STEPS[::-1])
    for effect, other in zip(whole, backwards[::-1], strict=True):
        np.testing.assert_array_equal(effect, other[::-1])
    held = TrainingSteps(lm, queries)
    for k, step in enumerate(STEPS):
        np.testing.assert_array_equal(held.effects(train[3:4], [step])[0], whole[k][3:4])


def test_names_and_options_tell_steps_apart():
    assert Step("sgd", 1e-4).name == "SGD 1e-4"
    assert Step("adamw", 2, clip=1).name == "AdamW 2e+0, clip 1"
    assert json.loads(json.dumps(Step("adamw", 1e-5, 1).options)) == {
        "optimizer": "adamw", "rate": 1e-5, "clip": 1.0, "betas": [0.9, 0.999], "eps": 1e-8,
        "weight_decay": 0.0,
    }  # fmt: skip
    assert Step("sgd", 1e-4, 1e-9).name != Step("sgd", 1e-4, 1.00001e-9).name


SGD = [["sgd", 1e-4], ["sgd", 3e-3]]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "two of sgd first"),
        ([SGD[0], ["adamw", 1e-5]], "two of sgd first"),
        (SGD[::-1], "the smaller rate first"),
        ([["sgd", 1e-4, 1.0], SGD[1]], "without clipping"),
        ([*SGD, SGD[1]], "expected each once"),
        ([*SGD, ["adam", 1]], r"\['adam', 1\] .*'sgd' or 'adamw'"),
        ([["sgd", math.nan]], r"\['sgd', nan\] .*finite"),
        ([["sgd", 1, 0]], r"\['sgd', 1, 0\] .*than 0"),
    ],
)
def test_steps_that_make_no_sense(steps, message):
    assert training_effect.planned(SGD) == [Step("sgd", 1e-4), Step("sgd", 3e-3)]
    with pytest.raises(ValueError, match=message):
        training_effect.planned(steps)


def test_errors_say_what_is_wrong(tiny):
    rows = examples(2)
    for dtype, options, message in (
        ("float32", {"layers": "nonsense"}, "no linear layer matches 'nonsense'"),
        ("float32", {"loss_on": "prompt"}, "loss_on is 'prompt'"),
        ("bfloat16", {}, "is in bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            compute(TrainingEffect(STEPS, **options), tiny(dtype=dtype), rows, rows)


def test_what_is_not_finite_is_named(tmp_path):
    lm = models.load(str(save_tiny(tmp_path, "llama")), device="cpu")
    train = encoded(lm, 3, seed=1)
    before = snapshot(lm)
    with pytest.raises(FloatingPointError, match=r"SGD 1e\+38 on '1-0' diverged: log-lik"):
        effects_of(lm, train, train, [Step("sgd", 1e-4), Step("sgd", 1e38)])
    assert unchanged(lm, before)
    far = effects_of(lm, train, train, [Step("sgd", 10.0)])[0]
    assert far.min() < -20, "far off is not an error"
    bad = models.Encoded("bad", (*train[0].prompt, 200), train[0].completion)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[200] = float("nan")
    with pytest.raises(FloatingPointError, match="gradient is not finite: example 'bad'"):
        effects_of(lm, [*train, bad], train)


@pytest.fixture
def experiment(tmp_path):
    return experiment_on(tmp_path, examples(6, 1), examples(3, 2))


@pytest.fixture
def calls(monkeypatch):
    """Examples and steps of each call that computes."""
    made, original = [], TrainingSteps.effects

    def counted(self, train, steps, *options):
        made.append((len(train), list(steps)))
        return original(self, train, steps, *options)

    monkeypatch.setattr(TrainingSteps, "effects", counted)
    return made


def test_another_step_costs_that_step_alone(experiment, calls):
    lm, (one, _, new) = experiment.load_model(), STEPS
    first = score(experiment, TrainingEffect([one]), lm)
    assert calls == [(4, [one]), (2, [one])]
    both = TrainingEffect([one, new])
    scores = score(experiment, both, lm)
    assert calls[2:] == [(4, [new]), (2, [new])]
    assert list(scores) == [one.name, new.name]
    np.testing.assert_array_equal(scores[one.name], first[one.name])
    found = load(experiment, both)
    assert len(calls) == 4, "finished scores cost nothing"
    direct = compute(both, lm, *experiment.load_data())
    for name, effect in direct.items():
        np.testing.assert_array_equal(scores[name], effect)
        np.testing.assert_array_equal(found[name], effect)


@pytest.mark.parametrize("most, size", [((4, 2), (4, 2)), ((99, None), (6, 3))])
def test_the_part_trained_on_is_of_the_experiment_and_precise(experiment, most, size):
    coarse = dataclasses.replace(experiment, dtype="bfloat16")
    for whole, dtype in ((experiment, experiment.dtype), (coarse, "float32")):
        part = training_effect.part(whole, *most)
        assert part.dtype == dtype
        assert tuple(map(len, part.load_data())) == tuple(map(len, part.indices_in(whole))) == size
