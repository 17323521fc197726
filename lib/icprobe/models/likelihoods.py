"""Log-likelihoods of completions, in nats: packed passes over many contexts and queries."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from icprobe.models import packing
from icprobe.models.model import LM
from icprobe.models.passes import by_device, logits_at, selective_head, side_by_side, within_memory
from icprobe.models.tokens import Encoded, sequence

# enough tokens for matrix products to run at full speed; more would only cost memory and cache
TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 65536}
# cost of an operation of attention relative to one of a matrix product (measured on a CPU: short
# floats make the latter faster only)
ATTENTION = {2: 4, 4: 2}  # by bytes of a number


@torch.inference_mode()
def token_log_likelihoods(lm: LM, example: Encoded, context: Sequence[int] = ()) -> np.ndarray:
    """Return the log-likelihood of each completion token, in nats: float64 [T].

    One plain forward pass over one sequence: the slow, obvious reference.
    """
    ids, mask = sequence(lm, example, context)
    logits = lm.model(torch.tensor([ids], device=lm.device)).logits[0, :-1]
    nats = (
        logits.double().log_softmax(-1).gather(1, torch.tensor(ids[1:], device=lm.device)[:, None])
    )
    return nats[torch.tensor(mask[1:], dtype=torch.bool), 0].cpu().numpy()


@torch.inference_mode()
def log_likelihoods(
    lm: LM,
    queries: Sequence[Encoded],
    contexts: Sequence[Sequence[int]] = ((),),
    dtype: type = np.float32,
) -> np.ndarray:
    """Return the log-likelihood of every query's completion after every context.

    Each context is read once and its keys and values serve all queries; queries are packed so that
    shared prefixes are read once too (see `packing`). Sums over completion tokens in float64.

    Args:
        lm: The model.
        queries: M encoded queries.
        contexts: C token sequences to stand before the query's prompt (BOS is added here).
        dtype: Of the result [C, M]; float64 where small differences of log-likelihoods matter.

    Raises:
        ValueError: If a query has no prompt, or a sequence is longer than the model allows.
        FloatingPointError: If a log-likelihood is not finite; names context and query.
    """
    check_lengths(lm, queries, contexts)
    contexts = [(*lm.bos, *context) for context in contexts]
    packs = packing.pack(
        queries,
        context=int(np.mean([len(context) for context in contexts])),
        hidden=lm.model.config.get_text_config().hidden_size,
        attention=ATTENTION.get(lm.model.dtype.itemsize, 2),
    )
    # contexts of like length are read together, so that little is padded
    order = sorted(range(len(contexts)), key=lambda c: len(contexts[c]))
    # each row of a pack needs its own copy of the context's keys and values
    tokens = packs.ids.numel() + len(packs.ids) * max(len(context) for context in contexts)
    nats = np.zeros((len(contexts), len(queries)))

    def score_all(budget: int) -> None:
        together = max(1, budget // tokens)
        groups = [order[start : start + together] for start in range(0, len(order), together)]

        def score(group: list[int]) -> None:
            nats[group] = _score(lm, packs, [contexts[c] for c in group], len(queries), budget)

        side_by_side(score, groups, lm.device)

    with selective_head(lm):
        budget = by_device(TOKENS_PER_FORWARD, lm.device)
        within_memory(lm, "log-likelihoods", budget, score_all)
    if not np.isfinite(nats).all():
        c, q = np.argwhere(~np.isfinite(nats))[0]
        raise FloatingPointError(
            f"log-likelihood of {queries[q].id!r} after context {c} is not finite"
        )
    return nats.astype(dtype)


def check_lengths(lm: LM, queries: Sequence[Encoded], contexts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where an example has no prompt, or does not fit the model with a context."""
    for query in queries:
        if not query.prompt:
            raise ValueError(f"example {query.id!r}: the prompt has no tokens")
    longest = max(queries, key=lambda q: len(q.ids))
    length = len(lm.bos) + max(len(context) for context in contexts) + len(longest.ids)
    config = lm.model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "window_size"))
    limit = min((value for value in (lm.max_positions, *windows) if value), default=length)
    if length > limit:
        raise ValueError(
            f"example {longest.id!r} with its longest context has {length} tokens, the model's "
            f"attention reaches {limit}: lower max_length"
        )


def check_packing(lm: LM) -> None:
    """Raise ValueError if this model takes no packed rows, so that scores would be wrong.

    It must follow an explicit mask and explicit positions; a few tokens are scored both ways.
    """
    ids = torch.arange(24).add(5).remainder(lm.model.config.get_text_config().vocab_size).tolist()
    queries = [
        Encoded("long", tuple(ids[:9]), tuple(ids[9:12])),
        Encoded("short", (*ids[:4], ids[12]), (ids[13],)),
    ]
    contexts = [(), tuple(ids[14:16]), tuple(ids[16:])]
    plain = [[token_log_likelihoods(lm, q, c).sum() for q in queries] for c in contexts]
    relative = 1e-3 if lm.precise else 0.05
    refused = ValueError(
        f"{lm.identity['name']}: this model takes no packed rows, as those with biases by distance "
        "(ALiBi: BLOOM, MPT) or without keys and values in every layer (Mamba, LFM2); take one "
        "with attention in every layer and rotary or absolute positions"
    )
    try:
        packed = log_likelihoods(lm, queries, contexts)
    except ValueError as error:  # some take masks of one shape only, or have no keys and values
        raise refused from error
    if not np.allclose(packed, plain, rtol=relative, atol=relative):
        raise refused


def _score(lm, packs, contexts, n_queries, budget) -> np.ndarray:
    """Log-likelihoods [D, M] of all packed queries after D contexts."""
    cache, visible = _read(lm, contexts)
    nats = np.zeros((len(contexts), n_queries))
    # as many equal forward passes as the budget asks for
    passes = min(len(packs.ids), math.ceil(len(contexts) * packs.ids.numel() / budget))
    edges = np.linspace(0, len(packs.ids), passes + 1).astype(int).tolist()
    for start, stop in itertools.pairwise(edges):
        part = packs.rows(start, stop)
        scores = _forward(lm, part, cache, visible)
        np.add.at(nats.T, part.item.numpy(), scores.T)
    return nats


def _read(lm, contexts):
    """Read D contexts, padded to K tokens: (keys and values, which are real [D, K])."""
    lengths = torch.tensor([len(context) for context in contexts])
    visible = torch.arange(int(lengths.max())) < lengths[:, None]
    if not visible.numel():
        return None, visible
    ids = torch.zeros(visible.shape, dtype=torch.long)
    ids[visible] = torch.tensor([token for context in contexts for token in context])
    # padding stands at the right, where no real token can see it
    output = lm.model(
        ids.to(lm.device),
        attention_mask=torch.ones_like(ids).to(lm.device),
        use_cache=True,
        logits_to_keep=1,
    )
    layers = getattr(output.get("past_key_values"), "layers", [None])
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError(f"{lm.identity['name']}: not every layer has keys and values of its own")
    return Cache([_Shared(layer) for layer in layers]), visible


class _Shared(DynamicLayer):
    """One layer's keys and values of D contexts, for passes over R rows for each of them.

    Passes leave it as it is. A cache that grows would hold all layers' copies for all rows until
    the end of a pass, and would copy them twice.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def update(self, key_states, value_states, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of contexts and rows, [D * R, heads, K + T, size]."""
        return self._before(self.keys, key_states), self._before(self.values, value_states)

    @staticmethod
    def _before(contexts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.unflatten(0, (len(contexts), -1))
        contexts = contexts[:, None].expand(-1, rows.shape[1], -1, -1, -1)
        return torch.cat([contexts, rows], dim=-2).flatten(0, 1)


def _forward(lm, packs, cache, visible) -> np.ndarray:
    """Log-likelihoods [D, S] of the packs' completion tokens after D contexts."""
    n_contexts, n_rows, length = len(visible), *packs.ids.shape
    shape = (n_contexts, n_rows, length)
    both = visible[:, None, None], packs.attends
    attends = torch.cat([part.to(lm.device).expand(*shape, -1) for part in both], dim=-1)
    depth = packs.depth + visible.sum(1)[:, None, None]
    rows = (packs.row + n_rows * torch.arange(n_contexts)[:, None]).flatten()
    inputs = {
        "input_ids": packs.ids.repeat(n_contexts, 1).to(lm.device),
        "attention_mask": _additive(attends.flatten(0, 1)[:, None], lm),
        "position_ids": depth.flatten(0, 1).to(lm.device),
    }
    inputs |= {"past_key_values": cache, "use_cache": cache is not None}
    logits = logits_at(lm, rows, packs.column.repeat(n_contexts), **inputs)
    target = packs.target.repeat(n_contexts).to(lm.device)
    nats = -torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return nats.double().view(n_contexts, -1).cpu().numpy()


def _additive(attends, lm) -> torch.Tensor:
    """Turn a boolean mask into the additive one that every attention implementation takes."""
    mask = torch.zeros(attends.shape, dtype=lm.model.dtype, device=lm.device)
    return mask.masked_fill_(~attends, torch.finfo(lm.model.dtype).min)
