"""Mean hidden states of examples, read through as many blocks of the model as are needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from icprobe import models
from icprobe.methods.gradient import losses
from icprobe.models import LM, Encoded


@torch.inference_mode()
def mean_states(lm: LM, examples: Sequence[Encoded], layer: int | None = None) -> np.ndarray:
    """Return each example's mean hidden state without the first token's: float64 [N, H].

    Examples of like length are read together. The first token is left out, since many models park
    attention at it: in the middle of SmolLM2-135M its state is a hundred times as long as others,
    so with it the mean would tell the text's length.

    Args:
        lm: The model.
        examples: N encoded examples.
        layer: Which hidden states, as transformers counts them: 0 for the input embeddings, k for
            the output of block k, -1 for the last, which has passed the final norm. By default
            half the number of blocks.

    Raises:
        ValueError: If there is no such layer, or an example has fewer than two tokens or more than
            the model allows.
        FloatingPointError: If a hidden state is not finite; names the example.
    """
    layer = _checked_layer(lm, layer)
    check_readable(lm, examples)
    means = np.zeros((len(examples), lm.model.config.get_text_config().hidden_size))

    def read(batch: list[int]) -> None:
        sequences = [models.sequence(lm, examples[i])[0] for i in batch]
        lengths = torch.tensor([len(ids) for ids in sequences])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(real.shape, dtype=torch.long)
        ids[real] = torch.tensor([token for ids in sequences for token in ids])
        inputs = {"input_ids": ids.to(lm.device), "attention_mask": real.long().to(lm.device)}
        try:
            output = lm.model.base_model(**inputs, output_hidden_states=not stops, use_cache=False)
            states = output.hidden_states[layer]
        except _Reached as reached:
            states = reached.args[0]
        states = states.cpu().double()[:, 1:]
        # not a product with the mask: at padding there may be anything, even NaN
        total = states.masked_fill(~real[:, 1:, None], 0).sum(1)
        means[batch] = (total / (lengths[:, None] - 1)).numpy()

    with _stopping(lm, layer) as stops:
        models.side_by_side(read, list(losses.batches(lm, examples)), lm.device)
    for example, mean in zip(examples, means, strict=True):
        if not np.isfinite(mean).all():
            raise FloatingPointError(f"a hidden state of {example.id!r} is not finite")
    return means


class _Reached(Exception):  # noqa: N818, it is none
    """Ends a forward pass, with the hidden states that it was made for."""


@contextmanager
def _stopping(lm: LM, layer: int) -> Iterator[bool]:
    """End forward passes by `_Reached` before the first block that hidden states do not need.

    Yields whether they do; not where this is unknown, or all blocks are needed.
    """
    count = lm.model.config.get_text_config().num_hidden_layers
    lists = (part for part in lm.model.modules() if isinstance(part, torch.nn.ModuleList))
    blocks = next((part for part in lists if len(part) == count), None)
    if blocks is None or not 0 <= layer < count:
        yield False
        return

    def stop(_, given):
        raise _Reached(given[0])

    hook = blocks[layer].register_forward_pre_hook(stop)
    try:
        yield True
    finally:
        hook.remove()


def _checked_layer(lm: LM, layer: int | None) -> int:
    """Return which hidden state is meant.

    Raises:
        ValueError: If there is no such layer.
    """
    blocks = lm.model.config.get_text_config().num_hidden_layers
    if layer is None:
        return blocks // 2
    if not -blocks - 1 <= layer <= blocks:
        raise ValueError(f"layer is {layer}, the model has 0 (input embeddings) to {blocks}")
    return layer


def check_readable(lm: LM, examples: Sequence[Encoded]) -> None:
    """Raise ValueError where an example is too short or too long for `mean_states`."""
    for example in examples:
        size = len(lm.bos) + len(example.ids)
        if size < 2:
            raise ValueError(f"example {example.id!r} has one token, the mean is over later ones")
        if lm.max_positions and size > lm.max_positions:
            raise ValueError(
                f"example {example.id!r} has {size} tokens, the model reads {lm.max_positions}: "
                "lower max_length"
            )
