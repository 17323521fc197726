"""A model is what its files say, known by their content, or an error."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import ATOL, RTOL, byte_tokenizer, examples, save_tiny
from safetensors.torch import load_file, save_file

from icprobe import models
from icprobe.data import assets
from icprobe.models import identities


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
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    assert identities.resolve_dtype("auto", "cpu") == ("bfloat16" if native else "float32")
    with pytest.raises(ValueError, match="'half', expected one of float32"):
        identities.resolve_dtype("half", "cpu")


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
    assert dict(lm.model.named_modules()).keys() == dict(plain.model.named_modules()).keys()
    assert lm.identity["base"] == plain.identity
    assert all(p.requires_grad for p in lm.model.parameters())
    assert lm.identity == models.identity(str(tmp_path / "adapter"))

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def load_with(**changes):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | changes))
        return models.load(str(tmp_path / "adapter"), device="cpu")

    beside = load_with(base_model_name_or_path="../base", revision="main")
    np.testing.assert_array_equal(models.token_log_likelihoods(beside, query), actual)
    for changes, named in (
        ({"target_modules": ["q_proj"]}, "up_proj.lora_A"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "v_proj.lora_A"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
    ):
        with pytest.raises(ValueError, match=f"adapter.*{named}"):
            load_with(**changes)


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
