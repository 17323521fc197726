"""Influence against brute-force autograd with whole per-example gradients, and its laws."""

import re
import resource
import shutil
import tempfile

import numpy as np
import pytest
import torch
from helpers import FAMILIES, PRECISION, close, encoded, save_tiny

from icprobe import data, models
from icprobe.methods import gradient
from icprobe.methods.gradient import GradientDot, dot, factors, last_blocks, linear_layers, losses
from icprobe.methods.gradient.factor_cache import FactorCache
from icprobe.methods.gradient.layers import parts as parts_of


def brute_force(lm, examples, layers="", loss_on="completion"):
    """Return the whole gradients [n, P] of the examples' losses, by autograd, in float64."""
    weights = [module.weight for module in linear_layers(lm, layers).values()]
    whole = []
    for example in examples:
        ids, mask = models.sequence(lm, example)
        logits = lm.model(torch.tensor([ids])).logits[0, :-1].double()
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        learnt = torch.tensor([bool(m) or loss_on == "text" for m in mask[1:]])
        parts = torch.autograd.grad(nats[learnt].sum(), weights)
        whole.append(torch.cat([part.flatten() for part in parts]).double().numpy())
    return np.stack(whole)


def brute_force_dot(lm, train, queries, cosine=False, layers="", loss_on="completion"):
    one, other = brute_force(lm, train, layers, loss_on), brute_force(lm, queries, layers)
    if cosine:
        one, other = (g / np.linalg.norm(g, axis=1, keepdims=True) for g in (one, other))
    return one @ other.T


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        *((family, dtype, {}) for family in FAMILIES for dtype in PRECISION),
        ("opt", "float32", {}),  # its MLP sees [n T, d]
        ("olmo", "float32", {}),  # clips queries, keys and values in place
        ("llama", "float32", {"loss_on": "text"}),
        ("llama", "float32", {"cosine": True}),
        ("llama", "float32", {"layers": "layers.1", "loss_on": "text", "cosine": True}),
    ],
)
def test_gradient_dot_equals_autograd(tiny, family, dtype, options):
    lm = tiny(family, bos=family in ("gpt2", "llama"), dtype=dtype)
    train, queries = encoded(lm, 5, seed=1), encoded(lm, 4, seed=2)
    actual = gradient.gradient_dot(lm, train, queries, **options)
    assert actual.dtype == np.float32 and actual.shape == (5, 4)
    close(actual, brute_force_dot(lm, train, queries, **options), dtype)
    # the model is left as it was
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert not any(module._forward_hooks for module in lm.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_routes_to_a_product_equal_autograd_in_float64(tiny, family, monkeypatch):
    """Over pairs of tokens and over weights, whole or some output rows at a time."""
    lm = tiny(family, dtype="float64")
    sides = [[encoded(lm, n, seed=n) for n in sizes] for sizes in ((1, 3), (2, 4, 1))]
    one, other = ([factors.factors(lm, batch) for batch in side] for side in sides)
    train, queries = ([example for batch in side for example in batch] for side in sides)
    expected = brute_force_dot(lm, train, queries)
    for way, entries in (
        (factors.products, 2**23),
        (factors._over_tokens, 2**23),
        *((factors._over_weights, entries) for entries in (2**26, 1000, 1)),
    ):
        monkeypatch.setitem(factors.WEIGHT_ENTRIES, "cpu", entries)
        groups = zip(zip(*one, strict=True), zip(*other, strict=True), strict=True)
        actual = sum(part for ours, theirs in groups for part in way(ours, theirs).values())
        assert abs(actual.numpy() - expected).max() < 1e-10 * abs(expected).max()
    norms = np.concatenate([factors.norms(groups) for groups in one])
    np.testing.assert_allclose(norms, np.linalg.norm(brute_force(lm, train), axis=1), rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers(tiny, family):
    """Those of the matrices in the blocks, by name; no embedding, no norm, no head."""
    lm = tiny(family)
    matrices = [name for name, weight in lm.model.named_parameters() if weight.ndim == 2]
    expected = {name.removesuffix(".weight") for name in matrices if re.search(r"\.\d\.", name)}
    assert set(linear_layers(lm)) == expected and len(expected) >= 12
    last = linear_layers(lm, last_blocks(lm, 2))
    assert set(last) == {name for name in expected if ".0." not in name}
    last = linear_layers(lm, last_blocks(lm, 1, layers="mlp"))
    assert set(last) == {name for name in expected if ".2.mlp" in name}
    for count in (0, 4):
        with pytest.raises(ValueError, match=rf"last {count} blocks: the model has 3"):
            last_blocks(lm, count)
    # kinds and bands of layers add up
    parts = parts_of(lm)
    bands = [name for name in parts if name.startswith("blocks")]
    assert bands == ["blocks 00-00", "blocks 01-01", "blocks 02-02"]
    for names in (bands, parts.keys() - bands):
        chosen = [name for part in names for name in linear_layers(lm, parts[part])]
        assert sorted(chosen) == sorted(expected)


def test_shares_of_the_squared_norm(tiny):
    lm = tiny()
    train, name = encoded(lm, 3, seed=1), "model.layers.1.mlp.up_proj"
    own, whole = (np.sum(brute_force(lm, train, layers) ** 2, axis=1) for layers in (name, ""))
    shares = gradient.norm_shares(lm, train)
    assert list(shares) == list(linear_layers(lm)) and sum(shares.values()) == pytest.approx(1)
    assert shares[name] == pytest.approx(np.mean(own / whole), rel=1e-3)


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

    def refused(change, message):
        lm = models.load(folder, device="cpu")
        change(lm.model.model.layers)
        train = encoded(lm, 2, seed=1)
        with pytest.raises(ValueError, match=message):
            gradient.gradient_dot(lm, train, train)
        actual = gradient.gradient_dot(lm, train, train, layers="attn")
        close(actual, brute_force_dot(lm, train, train, layers="attn"))

    def share(layers):
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight

    refused(
        lambda layers: setattr(layers[1], "mlp", layers[0].mlp),
        r"layers.0.mlp.gate_proj ran 2 times in a forward pass",
    )
    refused(share, r"0.mlp.up_proj and model.layers.1.mlp.up_proj share")
    refused(
        lambda layers: setattr(layers[2], "idle", torch.nn.Linear(3, 3)),
        r"layers.2.idle ran 0 times in a forward pass",
    )


SMALL = {"TOKENS_TOGETHER": 130, "TOKENS_READ": 200}


@pytest.mark.parametrize("loss_on", losses.LOSSES)
@pytest.mark.parametrize(
    ("budget", "multiple", "memory", "limits"),
    [(1, 1, None, {}), (10_000, 8, None, {}), (60, 1, None, SMALL), (60, 8, 1e-9, SMALL)],
)
def test_batches_padding_order_blocks_and_files_do_not_matter(
    tiny, monkeypatch, loss_on, budget, multiple, memory, limits
):
    """Products, cosines and parts; and no example is passed twice, whatever the memory."""
    lm = tiny(bos=True)
    train, queries = encoded(lm, 12, seed=1, words=20), encoded(lm, 30, seed=2, words=20)
    name = "model.layers.1.mlp.down_proj"
    parts = [name, r"layers\.[02]\.", r"layers\.1\."]
    plain = brute_force_dot(lm, train, queries, loss_on=loss_on)
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", budget)
    monkeypatch.setitem(losses.MULTIPLE, "cpu", multiple)
    for limit, tokens in limits.items():
        monkeypatch.setattr(dot, limit, tokens)
    seen, make = [], factors.factors

    def counted(lm, batch, *rest):
        seen.extend(example.id for example in batch)
        found = make(lm, batch, *rest)
        assert all(part.inputs.shape[1] % multiple == 0 for part in found)
        return found

    monkeypatch.setattr(factors, "factors", counted)
    held = GradientDot(lm, queries[::-1], memory=memory)
    blocks = [held.products(block, loss_on, parts) for block in (train[4:], train[:4])]
    assert sorted(seen) == sorted(example.id for example in (*train, *queries))
    dots, cosines, one, rest, block = (
        np.concatenate([second, first])[:, ::-1] for first, second in zip(*blocks, strict=True)
    )
    close(dots, plain)
    close(cosines, brute_force_dot(lm, train, queries, cosine=True, loss_on=loss_on))
    close(one, brute_force_dot(lm, train, queries, layers=name, loss_on=loss_on))
    close(rest + block, plain)
    without = GradientDot(lm, queries, memory=memory, cosines=False).products(train, loss_on)
    close(without[0], plain)
    assert np.isnan(without[1]).all()


def test_padding_never_goes_beyond_the_positions_that_the_model_has(tiny, monkeypatch):
    lm = tiny()
    monkeypatch.setitem(losses.MULTIPLE, "cpu", 10_000)
    assert factors.factors(lm, encoded(lm, 3, seed=1))[0].inputs.shape[1] == lm.max_positions


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
        cache = FactorCache(sum(sizes[:held]))
        for groups in batches:
            cache.put(groups)
        assert cache.free == 0
        for number, wanted in enumerate(zip(*batches, strict=True)):
            for kept, group in zip(cache.read(number), wanted, strict=True):
                assert kept.inputs.dtype == lm.model.dtype  # no more memory than that
                assert list(kept.outputs) == list(group.outputs)
                assert all(map(torch.equal, kept.tensors, group.tensors))
        assert len(cache.read(0, slice(1, 2))) == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_says_what_to_do(tiny, monkeypatch):
    lm = tiny()
    queries = encoded(lm, 6, seed=2)
    monkeypatch.setitem(losses.TOKENS_PER_PASS, "cpu", 60)
    usage = shutil.disk_usage(tempfile.gettempdir())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
        with pytest.raises(OSError, match=r"has 0.0 free\): set TMPDIR"):
            GradientDot(lm, queries, memory=1e-9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=r"do not fit in .* \(File too large\): set TMPDIR"):
            GradientDot(lm, queries, memory=1e-9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_positive_helps_a_step_lowers_the_loss(tiny):
    """One step of gradient descent changes the queries' log-likelihoods by rate x product."""
    lm = tiny("gpt2", dtype="float64")  # Llama's norms compute in float32 whatever the dtype
    train, queries = encoded(lm, 2, seed=1), encoded(lm, 4, seed=2)
    before = [p.clone() for p in lm.model.parameters()]
    expected = gradient.gradient_dot(lm, train, queries, loss_on="text")
    measured = gradient.finite_difference(lm, train, queries, step=1e-4, loss_on="text")
    close(measured, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


def test_errors_say_what_is_wrong(tiny):
    lm = tiny()
    train = encoded(lm, 2, seed=1)
    prompt, completion = train[0].prompt, train[0].completion
    cut, bare = models.Encoded("cut", prompt, ()), models.Encoded("bare", (), completion)
    long = models.Encoded("long", prompt * 100, completion)
    for shown, asked, options, message in (
        (train, train, {"layers": "none"}, r"no linear layer matches 'none'; .*: .*Linear"),
        (train, train, {"loss_on": "prompt"}, "loss_on is 'prompt'"),
        ([cut], train, {}, "'cut': no completion token is left"),
        (train, [bare], {}, "'bare': the prompt has no tokens"),
        ([long], train, {}, r"'long' has \d+ tokens, the model reads 512"),
        (train, [], {}, "there are no examples"),
        ([], train, {}, "there are no examples"),
    ):
        for method in (gradient.gradient_dot, gradient.mean_influence):
            with pytest.raises(ValueError, match=message):
                method(lm, shown, asked, **options)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch.inference_mode"):
        gradient.gradient_dot(lm, train, train)
    lm.model.train()
    with pytest.raises(ValueError, match="is in training mode"):
        gradient.gradient_dot(lm, train, train)


@pytest.mark.parametrize("method", [gradient.gradient_dot, gradient.mean_influence])
def test_gradients_that_are_not_finite_are_named(tiny, method):
    lm = tiny()
    train = encoded(lm, 3, seed=1)
    bad = models.Encoded("bad", (*train[0].prompt, 200), train[0].completion)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[200] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite: examples 'bad'$"):
        method(lm, [*train, bad], train)


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
