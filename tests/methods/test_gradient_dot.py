"""Influence against brute-force autograd with whole per-example gradients, and its laws."""

import resource
import shutil
import tempfile

import numpy as np
import pytest
import torch
from helpers import FAMILIES, PRECISION, close, encoded, save_tiny

from icprobe import data, models
from icprobe.methods import gradient
from icprobe.methods.gradient import GradientDot, factors, last_blocks, linear_layers, losses
from icprobe.methods.gradient import dot as module
from icprobe.methods.gradient.factor_cache import FactorCache
from icprobe.methods.gradient.layers import parts as parts_of


def brute_force(lm, example, layers="", loss_on="completion"):
    """Return the whole gradient [P] of one example's loss, by autograd, in float64."""
    weights = [module.weight for module in linear_layers(lm, layers).values()]
    ids, mask = models.sequence(lm, example)
    logits = lm.model(torch.tensor([ids])).logits[0, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    learnt = torch.tensor([bool(m) or loss_on == "text" for m in mask[1:]])
    parts = torch.autograd.grad(nats[learnt].sum(), weights)
    return torch.cat([part.flatten() for part in parts]).double().numpy()


def brute_force_dot(lm, train, queries, cosine=False, **options):
    one = np.stack([brute_force(lm, z, **options) for z in train])
    other = np.stack([brute_force(lm, q, options.get("layers", "")) for q in queries])
    if cosine:
        one, other = (g / np.linalg.norm(g, axis=1, keepdims=True) for g in (one, other))
    return one @ other.T


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_dot_equals_autograd(tiny, family, dtype):
    lm = tiny(family, bos=family == "gpt2", dtype=dtype)
    train, queries = encoded(lm, 5, seed=1), encoded(lm, 4, seed=2)
    actual = gradient.gradient_dot(lm, train, queries)
    assert actual.dtype == np.float32 and actual.shape == (5, 4)
    close(actual, brute_force_dot(lm, train, queries), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_in_float64_equal_autograd(tiny, family):
    lm = tiny(family, dtype="float64")
    train, queries = encoded(lm, 3, seed=1), encoded(lm, 3, seed=2)
    one, other = factors.factors(lm, train), factors.factors(lm, queries)
    expected = brute_force_dot(lm, train, queries)
    groups = zip(one, other, strict=True)
    actual = sum(part for a, b in groups for part in factors.products([a], [b]).values())
    assert abs(actual.numpy() - expected).max() < 1e-10 * abs(expected).max()
    norms = np.diag(brute_force_dot(lm, train, train))
    np.testing.assert_allclose(factors.norms(one) ** 2, norms, rtol=1e-10)


@pytest.mark.parametrize("family", ["opt", "olmo"])
def test_layers_on_rows_of_tokens_and_outputs_changed_in_place(tiny, family):
    """OPT's MLP sees [n T, d]; OLMo clips queries, keys and values in place."""
    lm = tiny(family)
    train, queries = encoded(lm, 5, seed=1), encoded(lm, 4, seed=2)
    expected = brute_force_dot(lm, train, queries)
    close(gradient.gradient_dot(lm, train, queries), expected)
    close(gradient.mean_influence(lm, train, queries), expected.mean(axis=1))


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LAYERS = {
    "llama": ("model.layers", LLAMA),
    "qwen": ("model.layers", LLAMA),
    "gpt_neox": (
        "gpt_neox.layers",
        [
            "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ],
    ),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers(tiny, family):
    """The linear layers of the blocks, by name; no embedding, no norm, no head."""
    lm = tiny(family)
    blocks, inner = LAYERS[family]
    expected = {f"{blocks}.{block}.{name}" for block in range(3) for name in inner}
    assert set(linear_layers(lm)) == expected
    last = linear_layers(lm, last_blocks(lm, 2))
    assert set(last) == {name for name in expected if f"{blocks}.0." not in name}
    last = linear_layers(lm, last_blocks(lm, 1, layers="mlp"))
    assert set(last) == {f"{blocks}.2.{name}" for name in inner if "mlp" in name}
    shares = factors.norm_shares(lm, encoded(lm, 3, seed=1))
    assert set(shares) == expected and sum(shares.values()) == pytest.approx(1)
    for count in (0, 4):
        with pytest.raises(ValueError, match=rf"last {count} blocks: the model has 3"):
            last_blocks(lm, count)


def test_weights_in_no_linear_layer_are_warned_about(tiny):
    lm = tiny("mixtral")
    train = encoded(lm, 3, seed=1)
    with pytest.warns(UserWarning, match=r"\d\d% of the blocks' weights are in no linear layer"):
        actual = gradient.gradient_dot(lm, train, train)
    close(actual, brute_force_dot(lm, train, train, layers="attn"))
    with pytest.raises(NotImplementedError, match=r"gradient_dot\(...\).mean\(axis=1\) gives"):
        gradient.mean_influence(lm, train, train, layers="attn")


def test_layers_that_run_twice_or_never_or_share_a_weight_are_errors(tmp_path):
    folder = str(save_tiny(tmp_path, "llama"))
    train = encoded(models.load(folder, device="cpu"), 2, seed=1)

    lm = models.load(folder, device="cpu")
    layers = lm.model.model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj ran 2 times in a forward pass"):
        gradient.gradient_dot(lm, train, train)
    close(
        gradient.gradient_dot(lm, train, train, layers="attn"),
        brute_force_dot(lm, train, train, layers="attn"),
    )

    lm = models.load(folder, device="cpu")
    layers = lm.model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"0.mlp.up_proj and model.layers.1.mlp.up_proj share"):
        gradient.gradient_dot(lm, train, train)

    lm = models.load(folder, device="cpu")
    lm.model.model.layers[2].idle = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"layers.2.idle ran 0 times in a forward pass"):
        gradient.gradient_dot(lm, train, train)


def test_additive_over_examples(tiny):
    """The gradient of two examples' summed loss has the sum of their products."""
    lm = tiny(dtype="float64")
    train, queries = encoded(lm, 2, seed=1), encoded(lm, 3, seed=2)
    weights = [layer.weight for layer in linear_layers(lm).values()]
    loss = 0
    for z in train:
        ids, mask = models.sequence(lm, z)
        logits = lm.model(torch.tensor([ids])).logits[0, :-1]
        learnt = torch.tensor(mask[1:], dtype=torch.bool)
        nats = -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        loss = loss + nats[learnt].sum()
    summed = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).numpy()
    expected = [summed @ brute_force(lm, q) for q in queries]
    close(gradient.gradient_dot(lm, train, queries).sum(0), np.array(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_on": "text"},
        {"cosine": True},
        {"layers": "mlp"},
        {"layers": "layers.1", "loss_on": "text", "cosine": True},
    ],
)
def test_options_equal_autograd(tiny, options):
    lm = tiny(bos=True)
    train, queries = encoded(lm, 4, seed=1), encoded(lm, 3, seed=2)
    actual = gradient.gradient_dot(lm, train, queries, **options)
    close(actual, brute_force_dot(lm, train, queries, **options))


def test_batches_padding_and_order_do_not_matter(tiny, monkeypatch):
    lm = tiny()
    train, queries = encoded(lm, 9, seed=1, words=20), encoded(lm, 6, seed=2, words=20)
    whole = gradient.gradient_dot(lm, train, queries)
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 1)
    close(gradient.gradient_dot(lm, train, queries), whole)
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 10_000)
    close(gradient.gradient_dot(lm, train[::-1], queries[::-1])[::-1, ::-1], whole)
    held = GradientDot(lm, queries)
    blocks = [held.products(train[:4])[0], held.products(train[4:])[0]]
    close(np.concatenate(blocks), whole)


@pytest.mark.parametrize("loss_on", ["completion", "text"])
def test_padding_to_round_lengths_as_on_a_gpu_changes_nothing(tiny, monkeypatch, loss_on):
    lm = tiny(bos=True)
    train, queries = encoded(lm, 9, seed=1, words=20), encoded(lm, 6, seed=2, words=20)
    held = GradientDot(lm, queries)
    expected = held.products(train, loss_on)
    monkeypatch.setitem(losses.MULTIPLE, "cpu", 8)
    held = GradientDot(lm, queries)
    for actual, plain in zip(held.products(train, loss_on), expected, strict=True):
        close(actual, plain)
    lengths = {part.inputs.shape[1] for part in factors.factors(lm, train)}
    assert all(length % 8 == 0 for length in lengths)
    # but never beyond the positions that the model has
    monkeypatch.setitem(losses.MULTIPLE, "cpu", 10_000)
    assert factors.factors(lm, train)[0].inputs.shape[1] == lm.max_positions


@pytest.mark.parametrize("memory", [module.MEMORY, 1e-9])
def test_no_example_is_passed_twice_whatever_the_memory(tiny, monkeypatch, memory):
    lm = tiny()
    train, queries = encoded(lm, 12, seed=1, words=20), encoded(lm, 30, seed=2, words=20)
    whole = gradient.gradient_dot(lm, train, queries)
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 60)
    monkeypatch.setattr(module, "TOKENS_TOGETHER", 130)
    monkeypatch.setattr(module, "TOKENS_READ", 200)
    seen = []
    make = factors.factors

    def counted(lm, batch, *rest):
        seen.extend(example.id for example in batch)
        return make(lm, batch, *rest)

    monkeypatch.setattr(factors, "factors", counted)
    held = GradientDot(lm, queries, memory=memory)
    dot, cosine = held.products(train)
    close(dot, whole)
    assert [seen.count(z.id) for z in train] == [1] * 12
    assert [seen.count(q.id) for q in queries] == [1] * 30
    close(cosine, brute_force_dot(lm, train, queries, cosine=True))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_factors_are_held_in_the_model_s_dtype_and_summed_in_a_wider_one(tiny, dtype):
    lm = tiny(dtype=dtype)
    one, other = (factors.factors(lm, encoded(lm, n, seed=n)) for n in (3, 2))
    for mine, theirs in zip(one, other, strict=True):
        assert mine.inputs.dtype == lm.model.dtype
        wide = [part.widened() for part in (mine, theirs)]
        assert wide[0].inputs.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        for way in (factors.products, factors._over_tokens, factors._over_weights):
            pair = [mine, theirs] if way is factors.products else wide
            found = way(*([part] for part in pair))
            for name, g in wide[0].outputs.items():
                weights = (g.mT @ wide[0].inputs, wide[1].outputs[name].mT @ wide[1].inputs)
                close(found[name], torch.tensordot(*weights, dims=([1, 2], [1, 2])))
        squares = factors.squared_norms([mine])
        for name, part in factors.squared_norms(wide[:1]).items():
            assert torch.equal(squares[name], part)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_lie_in_memory_or_in_a_file_without_a_name(tiny, monkeypatch, tmp_path, dtype):
    lm = tiny(dtype=dtype)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    batches = [factors.factors(lm, encoded(lm, n, seed=n)) for n in (3, 1, 2)]
    sizes = [sum(group.nbytes for group in batch) for batch in batches]
    for held in (0, 1, 3):
        shelf = FactorCache(sum(sizes[:held]))
        for _ in range(2):  # a cleared shelf is like a new one
            shelf.clear()
            for groups in batches:
                shelf.put(groups)
            assert shelf.free == 0
            for number in range(len(batches[0])):
                for kept, groups in zip(shelf.read(number), batches, strict=True):
                    assert kept.inputs.dtype == lm.model.dtype  # no more memory than that
                    assert torch.equal(kept.inputs, groups[number].inputs)
                    assert list(kept.outputs) == list(groups[number].outputs)
                    for name, part in groups[number].outputs.items():
                        assert torch.equal(kept.outputs[name], part)
        assert len(shelf.read(0, slice(1, 2))) == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_says_what_to_do(tiny, monkeypatch):
    lm = tiny()
    queries = encoded(lm, 6, seed=2)
    usage = shutil.disk_usage(tempfile.gettempdir())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
        with pytest.raises(OSError, match=r"has 0.0 free: set TMPDIR"):
            GradientDot(lm, queries, memory=1e-9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=r"do not fit in .* \(File too large\): set TMPDIR"):
            GradientDot(lm, queries, memory=1e-9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_routes_to_a_product_agree(tiny, family, monkeypatch):
    """Over pairs of tokens and over weights, whole or some output rows at a time."""
    lm = tiny(family, dtype="float64")
    one = [factors.factors(lm, encoded(lm, n, seed=n)) for n in (1, 3)]
    other = [factors.factors(lm, encoded(lm, n, seed=n)) for n in (2, 4, 1)]
    for group in range(len(one[0])):
        ours, theirs = ([batch[group] for batch in side] for side in (one, other))
        expected = factors._over_tokens(ours, theirs)
        for entries in (2**26, 1000, 1):
            monkeypatch.setitem(factors.WEIGHT_ENTRIES, "cpu", entries)
            actual = factors._over_weights(ours, theirs)
            assert list(actual) == list(expected)
            for name, product in expected.items():
                assert product.shape == (4, 7)
                error = abs(actual[name] - product).max()
                assert error < 1e-10 * abs(product).max(), name


def test_parts_of_layers_equal_autograd_and_add_up(tiny):
    lm = tiny(bos=True)
    train, queries = encoded(lm, 4, seed=1), encoded(lm, 3, seed=2)
    name = "model.layers.1.mlp.down_proj"
    held = GradientDot(lm, queries)
    dot, _, *parts = held.products(train, parts=[name, r"layers\.[02]\.", r"layers\.1\."])
    close(parts[0], brute_force_dot(lm, train, queries, layers=name))
    close(parts[1] + parts[2], dot)
    held = GradientDot(lm, queries, layers="mlp")
    dot, _, first, up = held.products(train, parts=[r"layers\.0", "up_proj"])
    close(dot, brute_force_dot(lm, train, queries, layers="mlp"))
    close(first, brute_force_dot(lm, train, queries, layers=r"layers\.0\.mlp"))
    close(up, brute_force_dot(lm, train, queries, layers="up_proj"))


def test_positive_helps_a_step_lowers_the_loss(tiny):
    """One step of gradient descent changes the queries' log-likelihoods by rate x product."""
    lm = tiny("gpt2", dtype="float64")  # Llama's norms compute in float32 whatever the dtype
    train, queries = encoded(lm, 2, seed=1), encoded(lm, 4, seed=2)
    before = [p.clone() for p in lm.model.parameters()]
    expected = gradient.gradient_dot(lm, train, queries, loss_on="text")
    measured = gradient.finite_difference(lm, train, queries, step=1e-4, loss_on="text")
    close(measured, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


def test_cosine_is_bounded_and_one_with_itself(tiny):
    lm = tiny()
    train = encoded(lm, 5, seed=1)
    cosine = gradient.gradient_dot(lm, train, train, cosine=True)
    assert abs(cosine).max() <= 1 + 1e-5
    np.testing.assert_allclose(np.diag(cosine), 1, atol=1e-5)


def test_cosines_that_nobody_asks_for_are_no_numbers(tiny):
    lm = tiny()
    train, queries = encoded(lm, 2, seed=1), encoded(lm, 3, seed=2)
    both = GradientDot(lm, queries).products(train)
    dot, cosine = GradientDot(lm, queries, cosines=False).products(train)
    np.testing.assert_array_equal(dot, both[0])
    assert np.isnan(cosine).all() and np.isfinite(both[1]).all()


def test_the_model_is_left_as_it_was(tiny):
    lm = tiny()
    gradient.gradient_dot(lm, encoded(lm, 2, seed=1), encoded(lm, 2, seed=2))
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert not lm.model.get_input_embeddings()._forward_hooks
    assert not any(m._forward_hooks for m in linear_layers(lm).values())


def test_errors_say_what_is_wrong(tiny):
    lm = tiny()
    train = encoded(lm, 2, seed=1)
    with pytest.raises(
        ValueError, match=r"no linear layer matches 'nonsense'; module types: .*Linear"
    ):
        gradient.gradient_dot(lm, train, train, layers="nonsense")
    with pytest.raises(ValueError, match="loss_on is 'prompt'"):
        gradient.gradient_dot(lm, train, train, loss_on="prompt")
    with pytest.raises(ValueError, match="memory is -1, expected GiB from 0"):
        gradient.gradient_dot(lm, train, train, memory=-1)
    cut = models.Encoded("cut", train[0].prompt, ())
    with pytest.raises(ValueError, match="'cut': no completion token is left"):
        gradient.gradient_dot(lm, train, [cut])
    bare = models.Encoded("bare", (), train[0].completion)
    with pytest.raises(ValueError, match="'bare': the prompt has no tokens"):
        gradient.gradient_dot(lm, [bare], train)
    long = models.Encoded("long", train[0].prompt * 100, train[0].completion)
    with pytest.raises(ValueError, match=r"'long' has \d+ tokens, the model reads 512"):
        gradient.gradient_dot(lm, [long], train)
    for method in (gradient.gradient_dot, gradient.mean_influence):
        for one, other in ((train, []), ([], train)):
            with pytest.raises(ValueError, match="there are no examples"):
                method(lm, one, other)
    try:
        lm.model.train()
        with pytest.raises(ValueError, match="is in training mode"):
            gradient.gradient_dot(lm, train, train)
    finally:
        lm.model.eval()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch.inference_mode"):
        gradient.gradient_dot(lm, train, train)


def test_gradients_that_are_not_finite_are_named(tiny, tmp_path):
    lm = models.load(str(save_tiny(tmp_path, "llama")), device="cpu")
    train = encoded(lm, 3, seed=1)
    bad = models.Encoded("bad", (*train[0].prompt, 200), train[0].completion)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[200] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite: examples 'bad'$"):
        gradient.gradient_dot(lm, [*train, bad], train)


def test_kinds_and_bands_of_layers_add_up(tiny):
    for family in ("llama", "gpt_neox", "gpt2"):
        lm = tiny(family)
        parts = parts_of(lm, bands=2)
        bands = [name for name in parts if name.startswith("blocks")]
        assert bands == ["blocks 00-01", "blocks 02-02"]
        for names in (bands, [name for name in parts if name not in bands]):
            chosen = [set(linear_layers(lm, parts[name])) for name in names]
            assert set().union(*chosen) == set(linear_layers(lm))
            assert sum(map(len, chosen)) == len(linear_layers(lm))


@pytest.mark.real
def test_the_real_model_equals_autograd():
    lm = models.load("smollm2-135m-instruct")
    train, queries = (
        models.encode(lm, data.load("grid", split, 2, seed=0)) for split in ("train", "query")
    )
    options = {"layers": last_blocks(lm, 8)}
    actual = gradient.gradient_dot(lm, train, queries, **options)
    close(actual, brute_force_dot(lm, train, queries, **options))
    direct = gradient.mean_influence(lm, train, queries, **options)
    close(direct, actual.mean(axis=1))
