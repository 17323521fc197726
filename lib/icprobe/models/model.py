"""A loaded causal language model."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from icprobe.data import assets, paths
from icprobe.models.identities import adapter_base, default_device, identity, resolve_dtype


@dataclass(frozen=True)
class LM:
    """A loaded model, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, str]  # what determines its numbers, see `models.identity`

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @property
    def summary(self) -> str:
        """What computes: identity, attention (transformers' choice) and device."""
        attention = self.model.config._attn_implementation
        return f"{self.identity}, attention: {attention}, on {self.device}"

    @property
    def precise(self) -> bool:
        """Whether the weights are exact enough for small steps and differences."""
        return self.model.dtype in (torch.float32, torch.float64)

    @cached_property
    def bos(self) -> tuple[int, ...]:
        """The BOS id as a tuple of one, or nothing where the tokenizer adds none by default."""
        with_special = self.tokenizer("a").input_ids
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        leads = len(with_special) > len(bare) and with_special[0] == self.tokenizer.bos_token_id
        return (with_special[0],) if leads else ()

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model was made for, if it says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load(name_or_path: str, dtype: str = "float32", device: str | None = None) -> LM:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: "smollm2-135m-instruct" (fetched and cached at first use), a local folder, or
            a hub name, optionally `name@revision`. A folder may hold an adapter, which is merged
            into its base's weights.
        dtype: One of `identities.DTYPES`; see `resolve_dtype` for "auto".
        device: "cpu", "cuda", ...; by default a GPU if there is one.

    Raises:
        ValueError: If the dtype is unknown, the folder's files are changed meanwhile, or weights
            are missing, left over or of another shape; names them.
        assets.AssetError: If the default model is not cached and cannot be fetched.
        OSError: If transformers cannot find the model.
    """
    device = device or default_device()
    dtype = resolve_dtype(dtype, device)
    who = identity(name_or_path, dtype)
    lm = _loaded(name_or_path, who, dtype, device)
    if identity(name_or_path, dtype) != who:
        raise ValueError(f"model {name_or_path}: its files were changed while they were read")
    return lm


def _loaded(name_or_path: str, who: dict, dtype: str, device: str) -> LM:
    if "revision" in who:
        options = {"pretrained_model_name_or_path": who["name"], "revision": who["revision"]}
    else:
        folder = paths.resolve(assets.model_path(name_or_path))
        base = adapter_base(folder)
        if base:
            from peft import PeftModel  # slow to import, and rarely needed

            whole = load(base, dtype, device)
            adapted = PeftModel.from_pretrained(whole.model, str(folder))
            # once more, as only this says what was loaded
            found = adapted.load_adapter(str(folder), "default", torch_device=str(device))
            _check_weights(str(folder), missing=found.missing_keys, left_over=found.unexpected_keys)
            merged = adapted.merge_and_unload().eval().requires_grad_(True)
            return LM(merged, whole.tokenizer, who)
        options = {"pretrained_model_name_or_path": str(folder)}
    tokenizer = AutoTokenizer.from_pretrained(**options)
    model, found = AutoModelForCausalLM.from_pretrained(
        **options,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
    )
    _check_weights(
        name_or_path,
        missing=found["missing_keys"],
        left_over=found["unexpected_keys"],
        of_another_shape=[name for name, *_ in found["mismatched_keys"]],
    )
    return LM(model.to(device).eval(), tokenizer, who)


def _check_weights(model: str, **wrong: Iterable[str]) -> None:
    """Raise ValueError if names of weights are wrong: transformers would draw them at random."""
    said = []
    for what, names in wrong.items():
        if names := sorted(names):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            said.append(f"{what.replace('_', ' ')}: {', '.join(names[:5])}{more}")
    if said:
        raise ValueError(
            f"model {model}: its weights are not those that its configuration asks for; "
            + "; ".join(said)
        )
