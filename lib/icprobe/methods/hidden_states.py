"""Mean hidden states of examples in the middle of the model, read through half of its blocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from icprobe import models
from icprobe.methods.gradient import losses
from icprobe.models import LM, Encoded


@torch.inference_mode()
def mean_states(lm: LM, examples: Sequence[Encoded]) -> np.ndarray:
    """Return each example's mean hidden state without the first token's: float64 [N, H].

    Many models park attention at the first token: in the middle of SmolLM2-135M its state is a
    hundred times as long as others, so with it the mean would tell the text's length.
    FloatingPointError names an example with a hidden state that is not finite.
    """
    means = np.zeros((len(examples), lm.model.config.get_text_config().hidden_size))

    def read(batch: list[int]) -> None:
        sequences = [models.sequence(lm, examples[i])[0] for i in batch]
        lengths = torch.tensor([len(ids) for ids in sequences])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(real.shape, dtype=torch.long)
        ids[real] = torch.tensor([token for ids in sequences for token in ids])
        inputs = {"input_ids": ids.to(lm.device), "attention_mask": real.long().to(lm.device)}
        try:
            lm.model.base_model(**inputs, use_cache=False)
        except _Reached as reached:
            states = reached.args[0].cpu().double()[:, 1:]
        # not a product with the mask: at padding there may be anything, even NaN
        total = states.masked_fill(~real[:, 1:, None], 0).sum(1)
        means[batch] = (total / (lengths[:, None] - 1)).numpy()

    with _stopping_halfway(lm):
        models.side_by_side(read, list(losses.batches(lm, examples)), lm.device)
    for example, mean in zip(examples, means, strict=True):
        if not np.isfinite(mean).all():
            raise FloatingPointError(f"a hidden state of {example.id!r} is not finite")
    return means


class _Reached(Exception):  # noqa: N818, it is none
    """Ends a forward pass, with the hidden states that it was made for."""


@contextmanager
def _stopping_halfway(lm: LM) -> Iterator[None]:
    """End forward passes by `_Reached` before the second half of the blocks."""
    count = lm.model.config.get_text_config().num_hidden_layers
    lists = (part for part in lm.model.modules() if isinstance(part, torch.nn.ModuleList))
    blocks = next((part for part in lists if len(part) == count), None)
    if blocks is None:
        raise ValueError(f"{lm.identity['name']}: its {count} blocks are in no list of modules")

    def stop(_, given):
        raise _Reached(given[0])

    hook = blocks[count // 2].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()
