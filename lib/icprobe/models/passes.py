"""Forward and backward passes: a head that sees chosen positions only, memory, and threads."""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from transformers.modeling_utils import PreTrainedModel

from icprobe.models.model import LM

Result = TypeVar("Result")


def by_device(table: Mapping[str, int], device: torch.device) -> int:
    """Return what a table has for a kind of device: the CPU's for one that is not in it."""
    return table.get(device.type, table["cpu"])


# by model and kind of pass: as many tokens as have been found to fit where that is less than usual
_fitting: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, int]] = weakref.WeakKeyDictionary()


def fitting(lm: LM, kind: str, tokens: int) -> int:
    """Return how many tokens of one pass fit in memory, as far as known; see `within_memory`."""
    return min(tokens, _fitting.get(lm.model, {}).get(kind, tokens))


def within_memory(lm: LM, kind: str, tokens: int, work: Callable[[int], Result]) -> Result:
    """Return `work(tokens)`; where a GPU's memory is too small for that, of ever fewer tokens.

    What fits is remembered, so that the next call of this kind begins with it. `work` can be called
    again after it ran out of memory; its passes have so many tokens, or a single sequence where
    that is longer.

    Raises:
        torch.OutOfMemoryError: If even single sequences do not fit.
    """
    known = dict(_fitting.get(lm.model, {}))
    tokens = fitting(lm, kind, tokens)
    while True:
        try:
            return work(tokens)
        except torch.OutOfMemoryError:
            if tokens == 1:
                _fitting[lm.model] = known  # what fits later, with other memory, is not known
                raise
        # outside of the clause, whose traceback holds on to what did not fit
        torch.cuda.empty_cache()
        tokens //= 2
        _fitting.setdefault(lm.model, {})[kind] = tokens
        warnings.warn(f"{kind}: too little memory, now {tokens} tokens a pass", stacklevel=2)


def side_by_side(work: Callable, groups: list, device: torch.device) -> None:
    """Work on several groups at once on a CPU, each with its share of the threads.

    Only the matrix products inside a pass run well in parallel: one on two threads takes 1.2 times
    as long as two on one thread each.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(groups)) if device.type == "cpu" else 1
    while threads % workers:  # no thread should be idle
        workers -= 1
    if workers == 1:
        for group in groups:
            work(group)
        return
    executor = ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(threads // workers,)
    )
    try:
        list(executor.map(torch.inference_mode()(work), groups))
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


# the (rows, columns) of the hidden states that this thread's forward pass is to show to the head
_shown = threading.local()


def logits_at(lm: LM, rows: torch.Tensor, columns: torch.Tensor, **inputs) -> torch.Tensor:
    """Return the logits [S, V] of S positions of a batch, in float32 or better.

    To be called within `selective_head`, so that the head works on these positions only.
    """
    _shown.at = rows, columns
    try:
        logits = lm.model(**inputs).logits[0]
    finally:
        _shown.at = None
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def selective_head(lm: LM) -> Iterator[None]:
    """Show the output head the hidden states at `_shown.at` only, so logits are [1, S, V]."""

    def select(_, inputs):
        at = getattr(_shown, "at", None)
        return None if at is None else (inputs[0][at][None],)

    hook = lm.model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
