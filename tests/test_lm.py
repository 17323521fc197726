"""One tokenisation for everybody, and log-likelihoods against one forward pass per pair."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ATOL, FAMILIES, RTOL, byte_tokenizer, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from icprobe import models
from icprobe.data import assets
from icprobe.models import packing


def examples(n, seed=0, words=8):
    """Rows whose prompts partly begin alike, like those of one task."""
    rng = np.random.default_rng(seed)
    starts = ["Question: ", "Quest", "Say it: ", "Ünïcode ✓ "]
    rows = []
    for i in range(n):
        length = rng.integers(1, words, size=2)
        text = ["".join(rng.choice(list("abc de"), size=2 * k)) for k in length]
        prompt = f"{starts[rng.integers(len(starts))]}{text[0]}:"
        rows.append({"id": f"{seed}-{i}", "prompt": prompt, "completion": f" {text[1]}."})
    return rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bos", [False, True])
def test_all_pairs_equal_one_forward_pass_per_pair(tiny, family, bos):
    lm = tiny(family, bos)
    assert len(lm.bos) == bos
    queries = models.encode(lm, examples(7))
    contexts = [(), *(e.ids for e in models.encode(lm, examples(4, seed=1, words=20)))]
    expected = [[models.token_log_likelihoods(lm, q, c).sum() for q in queries] for c in contexts]
    actual = models.log_likelihoods(lm, queries, contexts)
    assert actual.dtype == np.float32 and actual.shape == (5, 7)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)
    assert np.std(expected) > 1, "the reference must tell pairs apart"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("tokens_per_forward", [1, 40, 100, 100_000])
def test_batching_and_order_do_not_matter(tiny, tokens_per_forward):
    lm = tiny()
    queries = models.encode(lm, examples(9))
    contexts = [e.ids for e in models.encode(lm, examples(5, seed=1, words=20))]
    whole = models.log_likelihoods(lm, queries, contexts)
    part = models.log_likelihoods(lm, queries, contexts, tokens_per_forward)
    np.testing.assert_allclose(part, whole, rtol=RTOL, atol=ATOL)
    backwards = models.log_likelihoods(lm, queries[::-1], contexts[::-1])
    np.testing.assert_allclose(backwards[::-1, ::-1], whole, rtol=RTOL, atol=ATOL)
    alone = models.log_likelihoods(lm, queries[3:4], contexts[2:3])
    np.testing.assert_allclose(alone, whole[2:3, 3:4], rtol=RTOL, atol=ATOL)


def test_float64_agrees_much_closer(tiny):
    lm = tiny(dtype="float64")
    queries = models.encode(lm, examples(6))
    contexts = [e.ids for e in models.encode(lm, examples(3, seed=1))]
    expected = [[models.token_log_likelihoods(lm, q, c).sum() for q in queries] for c in contexts]
    actual = models.log_likelihoods(lm, queries, contexts)
    # float32 is how results are kept; half a unit in its last place is all that may be lost
    np.testing.assert_allclose(actual, np.float32(expected), rtol=1.2e-7)


def test_the_reference_is_the_model_loss(tiny):
    lm = tiny()
    query = models.encode(lm, examples(1))[0]
    ids, mask = models.sequence(lm, query, (1, 2, 3))
    labels = torch.where(torch.tensor([mask]) == 1, torch.tensor([ids]), -100)
    loss = lm.model(torch.tensor([ids]), labels=labels).loss.item()
    nats = models.token_log_likelihoods(lm, query, (1, 2, 3))
    assert len(nats) == len(query.completion)
    assert -nats.mean() == pytest.approx(loss, rel=RTOL)


sequences = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple),
        st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


@given(sequences)
@settings(deadline=None)
def test_every_packed_token_sees_its_own_sequence_and_nothing_else(pairs):
    items = [packing.Item(*pair) for pair in pairs]
    packs = packing.pack(items)
    scored = {i: [] for i in range(len(items))}
    for s in range(len(packs.target)):
        row, column = int(packs.row[s]), int(packs.column[s])
        seen = packs.attends[row, column].nonzero()[:, 0]
        assert packs.depth[row, seen].tolist() == list(range(len(seen)))
        read = tuple(packs.ids[row, seen].tolist())
        scored[int(packs.item[s])].append((read, int(packs.target[s])))
    for item, found in zip(items, scored.values(), strict=True):
        full = item.prompt + item.completion
        starts = range(len(item.prompt), len(full))
        assert found == [(full[:k], full[k]) for k in starts]
    assert sum(packs.length) <= sum(len(item.inputs) for item in items)
    assert list(packs.length) == sorted(packs.length, reverse=True)


def test_packing_shares_prefixes_and_wastes_little():
    rng = np.random.default_rng(0)
    head = [tuple(rng.integers(0, 99, 12)) for _ in range(4)]
    items = [
        packing.Item(head[i % 4] + tuple(rng.integers(0, 99, rng.integers(5, 40))), (1, 2, 3))
        for i in range(48)
    ]
    packs = packing.pack(items, context=50, hidden=576)
    alone = sum(len(item.inputs) for item in items)
    assert packs.ids.numel() < alone, "padding costs less than sharing saves"
    assert packs.length.sum() / packs.ids.numel() > 0.9


def test_the_same_ids_reach_every_consumer(tiny, tmp_path):
    """Probing, gradients and TRL's trainer read the same tokens and the same completion mask."""
    from trl import SFTConfig, SFTTrainer

    lm = tiny(bos=True)
    rows = examples(5)
    encoded = models.encode(lm, rows)
    table = models.training_rows(lm, rows)
    settings = SFTConfig(
        str(tmp_path), completion_only_loss=True, packing=False, max_length=512, use_cpu=True,
        bf16=False, report_to="none", per_device_train_batch_size=5, data_seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(lm.model, settings, train_dataset=table, processing_class=lm.tokenizer)
    (batch,) = trainer.get_train_dataloader()
    trained = {}
    for ids, labels, real in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        trained[tuple(ids[real == 1].tolist())] = labels[labels != -100].tolist()
    for example in encoded:
        assert trained.pop((*lm.bos, *example.ids)) == list(example.completion)
        packs = packing.pack([packing.Item(example.prompt, example.completion)])
        assert packs.target.tolist() == list(example.completion)
        assert packs.ids[0].tolist() == list(example.ids[:-1])
    assert not trained


def test_tokens_never_span_a_join(tiny):
    lm = tiny()
    row = {"id": "a", "prompt": "one", "completion": "two"}
    encoded = models.encode(lm, [row])[0]
    assert lm.tokenizer.decode(encoded.prompt) == "one"
    assert lm.tokenizer.decode(encoded.completion) == "two"
    ids, mask = models.sequence(lm, encoded, models.text_ids(lm, "before"))
    assert lm.tokenizer.decode(ids) == "beforeonetwo"
    assert sum(mask) == len(encoded.completion)


def test_long_prompts_lose_their_beginning_and_it_is_said(tiny):
    lm = tiny(bos=True)
    row = {"id": "long one", "prompt": "abcdefgh", "completion": " xyz"}
    with pytest.warns(UserWarning, match=r"1 of 1 prompts.*max_length=8.*'long one' lost 5"):
        encoded = models.encode(lm, [row], max_length=8)[0]
    assert lm.tokenizer.decode(encoded.prompt) == "fgh"
    assert encoded.truncated == 5
    assert len(models.sequence(lm, encoded)[0]) == 8


def test_losing_completion_tokens_is_an_error(tiny):
    row = {"id": "long one", "prompt": "a", "completion": " xyz"}
    with pytest.raises(ValueError, match="'long one': the completion has 4 tokens"):
        models.encode(tiny(), [row], max_length=3)
    with pytest.raises(ValueError, match="'empty': the completion has no tokens"):
        models.encode(tiny(), [{"id": "empty", "prompt": "a", "completion": ""}])


def test_what_the_model_cannot_read_is_an_error(tiny, tmp_path):
    lm = tiny()
    empty = models.Encoded("no prompt", (), (1,))
    with pytest.raises(ValueError, match="'no prompt': the prompt has no tokens"):
        models.log_likelihoods(lm, [empty])
    long = models.Encoded("long", (1,) * 300, (1,))
    with pytest.raises(ValueError, match=r"'long' with its longest context has 601 tokens.*512"):
        models.log_likelihoods(lm, [long], [(1,) * 300])


def test_scores_that_are_not_finite_are_an_error(tiny):
    lm = tiny()
    torch.nn.init.constant_(lm.model.get_output_embeddings().weight, float("nan"))
    queries = models.encode(lm, examples(2))
    with pytest.raises(FloatingPointError, match="'0-0'"):
        models.log_likelihoods(lm, queries)


def test_identity_follows_the_files_not_the_place(tmp_path):
    first = save_tiny(tmp_path / "a" / "model", "llama")
    second = save_tiny(tmp_path / "b" / "model", "llama")
    who = models.identity(str(first))
    assert who == models.identity(str(second))
    assert who == models.load(str(first), device="cpu").identity
    assert who["dtype"] == "float32"
    assert who != models.identity(str(first), "bfloat16")
    with (second / "config.json").open("a") as file:
        file.write(" ")
    assert who != models.identity(str(second))


def test_the_default_model_is_known_without_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ICPROBE_CACHE", str(tmp_path))
    who = models.identity("smollm2-135m-instruct")
    assert who["sha256"] == assets.DEFAULT_MODEL_SHA256
    assert not list(tmp_path.iterdir())


def test_dtypes():
    assert models.resolve_dtype("float32", "cpu") == "float32"
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    assert models.resolve_dtype("auto", "cpu") == ("bfloat16" if native else "float32")
    with pytest.raises(ValueError, match="'half', expected one of float32"):
        models.resolve_dtype("half", "cpu")


def test_an_adapter_is_merged_into_its_base(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    plain = models.load(str(base), device="cpu")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(models.load(str(base), device="cpu").model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    lm = models.load(str(tmp_path / "adapter"), device="cpu")
    query = models.encode(lm, examples(1))[0]
    expected = models.token_log_likelihoods(replace(plain, model=adapted.eval()), query)
    actual = models.token_log_likelihoods(lm, query)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL)
    assert abs(actual - models.token_log_likelihoods(plain, query)).max() > 0.01
    assert [name for name, _ in lm.model.named_modules()] == [
        name for name, _ in plain.model.named_modules()
    ]
    assert lm.identity["base"] == plain.identity
    assert all(p.requires_grad for p in lm.model.parameters())
    assert lm.identity == models.identity(str(tmp_path / "adapter"), device="cpu")

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    beside = settings | {"base_model_name_or_path": "../base", "revision": "main"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(beside))
    again = models.load(str(tmp_path / "adapter"), device="cpu")
    np.testing.assert_array_equal(models.token_log_likelihoods(again, query), actual)
    for change, key in (
        ({"target_modules": ["q_proj"]}, "up_proj.lora_A"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "v_proj.lora_A"),
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=rf"adapter: .*{key}"):
            models.load(str(tmp_path / "adapter"), device="cpu")
    settings["base_model_name_or_path"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="base_model_name_or_path is missing"):
        models.load(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("one missing", "missing: model.layers.1.mlp.up_proj.weight"),
        ("one more", "left over: model.layers.0.extra"),
        ("prefix", "missing: lm_head.weight.*left over: other.lm_head.weight"),
        ("layer more", "missing: model.layers.3."),
        ("layer fewer", "left over: model.layers.2."),
        ("other shape", "of another shape: model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_a_model_is_what_its_files_say_or_an_error(tmp_path, damage, named):
    folder = save_tiny(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    match damage:
        case "one missing":
            del weights["model.layers.1.mlp.up_proj.weight"]
        case "one more":
            weights["model.layers.0.extra"] = torch.zeros(2)
        case "prefix":
            weights = {f"other.{name}": weight for name, weight in weights.items()}
        case "layer more":
            config["num_hidden_layers"] += 1
        case "layer fewer":
            config["num_hidden_layers"] -= 1
        case "other shape":
            weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(2, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{folder}: .*{named}"):
        models.load(str(folder), device="cpu")


def test_tied_weights_are_not_missing(tmp_path):
    config = transformers.GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    byte_tokenizer(bos=False).save_pretrained(tmp_path)
    model = models.load(str(tmp_path), device="cpu").model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_model_changed_while_it_is_read_is_refused(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "m", "llama")
    real = transformers.AutoTokenizer.from_pretrained

    def read_and_change(*arguments, **options):
        save_tiny(folder, "llama", seed=1)
        return real(*arguments, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", read_and_change)
    with pytest.raises(ValueError, match=f"{folder}.* changed"):
        models.load(str(folder), device="cpu")


@pytest.mark.real
def test_the_real_model_answers():
    lm = models.load("smollm2-135m-instruct", device="cpu")
    rows = [
        {"id": name, "prompt": "The capital of France is", "completion": f" {name}"}
        for name in ("Paris", "Berlin", "banana")
    ]
    queries = models.encode(lm, rows)
    context = models.text_ids(lm, "The capital of Italy is Rome.\n\n")
    nats = models.log_likelihoods(lm, queries, [(), context])
    assert (nats[:, 0] > nats[:, 1]).all() and (nats[:, 1] > nats[:, 2]).all()
    slow = [[models.token_log_likelihoods(lm, q, c).sum() for q in queries] for c in ((), context)]
    np.testing.assert_allclose(nats, slow, rtol=RTOL, atol=ATOL)
