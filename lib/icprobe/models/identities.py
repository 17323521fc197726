"""What determines a model's numbers: name, hash or revision, dtype. Needs no torch, loads nothing.

Finished scores are found by it, so that whoever reads them need not wait for torch.
"""

import hashlib
import json
from pathlib import Path

from icprobe.data import assets, paths

# raise it when the same text begins to give other token ids, alone or after a demonstration
TEMPLATE_VERSION = 1

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

# the files of a saved model that determine its numbers: weights, configuration, tokenizer
DETERMINING = (
    "*.safetensors", "*.index.json", "config.json", "adapter_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*.tiktoken",
)  # fmt: skip


def default_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str | None = None) -> str:
    """Return the dtype that "auto" stands for; other names are checked and returned.

    "auto" is bfloat16 where the device multiplies it natively (CPUs with AVX512-BF16 or AMX, GPUs
    from Ampere on) and float32 everywhere else, where emulated bfloat16 would be slower.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    import torch

    if torch.device(device or default_device()).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if native else "float32"


def identity(name_or_path: str, dtype: str = "float32") -> dict:
    """Return what determines a model's numbers, without loading or downloading it.

    Its name and dtype, sha256 (default model, local folder) or revision (hub), and for an adapter
    its base's identity; arguments as for `models.load`, on the default device.
    """
    dtype = resolve_dtype(dtype)
    if name_or_path == assets.DEFAULT_MODEL:
        return {"name": name_or_path, "sha256": assets.DEFAULT_MODEL_SHA256, "dtype": dtype}
    folder = paths.resolve(name_or_path)
    if folder.is_dir():
        own = {"name": folder.name, "sha256": _folder_hash(folder), "dtype": dtype}
        base = adapter_base(folder)
        return own | ({"base": identity(base, dtype)} if base else {})
    name, revision = assets.hub_revision(name_or_path, "model")
    return {"name": name, "revision": revision, "dtype": dtype}


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in DETERMINING for file in folder.glob(pattern)}):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def adapter_base(folder: Path) -> str | None:
    """Return the model that a saved adapter of peft (such as LoRA) changes; None if no adapter."""
    config = folder / "adapter_config.json"
    if not config.exists():
        return None
    fields = json.loads(config.read_text())
    base, revision = (fields.get(name) for name in ("base_model_name_or_path", "revision"))
    if not base:
        raise ValueError(f"{config}: base_model_name_or_path is missing")
    for place in (folder / base, paths.resolve(base)):  # beside the adapter, such as "../base"
        if place.is_dir():
            return str(place.resolve())  # of which there is no other revision
    return f"{base}@{revision}" if revision else base
