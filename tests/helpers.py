"""Shared by all tests: tiny randomly initialised models, made-up rows and scores, tolerances."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from icprobe import models
from icprobe.data import cache, paths
from icprobe.scores import Experiment

# one tolerance pair for the suite: log-likelihoods of float32 models, in nats
RTOL, ATOL = 1e-5, 1e-4

TASKS = ("colours", "animals", "sums")
UNITS = {"gain": "nats", "cosine": "cosine", "step": "nats"}  # of `three_methods`

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {**SIZES, "num_key_value_heads": 2}),
    "qwen": (transformers.Qwen2Config, {**SIZES, "num_key_value_heads": 1}),
    "gpt_neox": (transformers.GPTNeoXConfig, SIZES),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64}),
}
# what not every method can do, or must do differently
UNUSUAL = {
    "mistral": (
        transformers.MistralConfig,
        {**SIZES, "num_key_value_heads": 2, "sliding_window": 100},
    ),
    "opt": (transformers.OPTConfig, {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "olmo": (transformers.OlmoConfig, {**SIZES, "clip_qkv": 0.5}),
    "mixtral": (transformers.MixtralConfig, {**SIZES, "num_key_value_heads": 2}),
    "bloom": (transformers.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (transformers.MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    "mamba": (transformers.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2}),
    "lfm2": (
        transformers.Lfm2Config,
        {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
    ),
}


def byte_tokenizer(bos: bool) -> transformers.PreTrainedTokenizerFast:
    """One token per byte; ids 256 and 257 are BOS and EOS, BOS leads by default if asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        start = ("<s>", vocabulary["<s>"])
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[start])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_tiny(
    folder: Path, family: str, bos: bool = False, positions: int = 512, seed: int = 0
) -> Path:
    """Save a tiny model of a family with random weights, large enough to tell tokens apart."""
    make, sizes = (FAMILIES | UNUSUAL)[family]
    config = make(vocab_size=258, max_position_embeddings=positions, **sizes)
    if "n_inner" not in sizes:
        config.intermediate_size = 64
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    byte_tokenizer(bos).save_pretrained(folder)
    return folder


def experiment_on(folder: Path, train: list[dict], queries: list[dict], bos: bool = False, **more):
    """Return an experiment with a tiny model on rows that are written to files in a folder."""
    for name, rows in (("train", train), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return Experiment(
        scores_dir=str(folder / "scores"),
        model=str(save_tiny(folder / "model", "llama", bos)),
        train=str(folder / "train.jsonl"),
        queries=str(folder / "queries.jsonl"),
        **more,
    )


def keep_tasks(folder: Path, tasks: dict[str, list[dict]]) -> None:
    """Put made-up BIG-bench tasks into the cache; they are written to a folder first."""
    for name, examples in tasks.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "task.json").write_text(json.dumps({"examples": examples}))
    (folder / "tasks.txt").write_text("\n".join(tasks))
    cache.keep(folder, cache.root() / "bigbench-1.0.0")


def keep_suite(monkeypatch, folder: Path, suite: dict, tasks: dict[str, list[dict]]) -> str:
    """Put made-up tasks into a cache and a suite into a suites folder; return the suite's name."""
    monkeypatch.setenv("ICPROBE_CACHE", str(folder / "cache"))
    keep_tasks(folder / "tasks", tasks)
    monkeypatch.setattr(paths, "SUITES", folder / "suites")
    paths.SUITES.mkdir()
    (paths.SUITES / "made.yaml").write_text(yaml.safe_dump(suite))
    return "made"


def save_after_reading(monkeypatch, file: Path, content: bytes) -> None:
    """Save `file` anew as soon as its bytes were read."""
    real = Path.read_bytes

    def read_and_save(path):
        found = real(path)
        if path == file:
            file.write_bytes(content)
        return found

    monkeypatch.setattr(Path, "read_bytes", read_and_save)


def texts(count: int, kind: str, tasks: Sequence[str] = TASKS, before: str = "") -> pd.DataFrame:
    """Return examples as `views.Scores` has them, of the tasks in turn."""
    return pd.DataFrame({
        "id": [f"{kind}-{i}" for i in range(count)],
        "task": [tasks[i % len(tasks)] for i in range(count)],
        "type": "naming",
        "content": "things",
        "prompt": [f"{before}Question {i} of the {kind}:" for i in range(count)],
        "completion": [f" answer {i}" for i in range(count)],
    })  # fmt: skip


def three_methods(N: int, M: int) -> dict[str, np.ndarray]:
    """Return scores [N, M], of which a step was measured for 12 examples and 6 queries only."""
    rng = np.random.default_rng(1)
    gain = rng.normal(size=(N, 1)) + rng.normal(size=(N, M))
    step = np.full((N, M), np.nan)
    step[:12, 2:8] = 1e-4 * (gain + rng.normal(size=(N, M)))[:12, 2:8]
    return {"gain": gain, "cosine": np.tanh(gain + rng.normal(size=(N, M))), "step": step}


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


# relative to the largest entry
PRECISION = {"float64": 1e-6, "float32": 2e-4}  # scores are returned in float32


def encoded(lm, n, seed, words=8):
    return models.encode(lm, examples(n, seed, words))


def close(actual, expected, dtype="float32"):
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=PRECISION[dtype] * abs(expected).max()
    )


def questions(n_options, seed=0):
    """Rows with so many options each, the completion among them, or none."""
    rows, others = examples(len(n_options), seed), iter(examples(sum(n_options), seed + 1))
    for k, (row, n) in enumerate(zip(rows, n_options, strict=True)):
        wrong = [next(others)["completion"] for _ in range(n - 1)]
        row["options"] = [*wrong[: k % n], row["completion"], *wrong[k % n :]] if n else None
    return rows
