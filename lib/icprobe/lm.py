"""A causal language model, one tokenisation for everybody, and completion log-likelihoods.

Context, prompt and completion are each tokenised on their own, without special tokens, and their
ids are concatenated: no token spans a join, so a demonstration's prefix is the same for every query
and a completion's ids are the same whatever stands before them. One BOS leads where the tokenizer's
own default adds one. Probing, gradients and fine-tuning all take their ids from here.
"""

import itertools
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import datasets
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from icprobe import packing
from icprobe.data import assets, paths
from icprobe.model_identity import DTYPES as DTYPES
from icprobe.model_identity import adapter_base, default_device, identity, resolve_dtype

Result = TypeVar("Result")

# enough tokens for matrix products to run at full speed; more would only cost memory and cache
TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 65536}

# examples that are tokenised at once, so that a large pool's tokens are not all there twice
ENCODED_TOGETHER = 1000

# time of an operation of attention, in that of one of matrix products (measured on a CPU: short
# floats make the latter faster only)
ATTENTION = {2: 4, 4: 2}  # by bytes of a number


@dataclass(frozen=True)
class LM:
    """A loaded model.

    Attributes:
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        identity: What determines its numbers: name, hash of the weights or hub revision, dtype.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, str]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @property
    def summary(self) -> str:
        """What computes: identity, attention and device.

        Attention is transformers' choice: "sdpa" (PyTorch's) where the model has it, else "eager".
        """
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


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; `truncated` counts the prompt tokens cut off at the left."""

    id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    truncated: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and completion, without BOS."""
        return self.prompt + self.completion


# ---------------------------------------------------------------------------------------- loading


def by_device(table: Mapping[str, int], device: torch.device) -> int:
    """Return what a table has for a kind of device: the CPU's for one that is not in it."""
    return table.get(device.type, table["cpu"])


def load(name_or_path: str, dtype: str = "float32", device: str | None = None) -> LM:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: "smollm2-135m-instruct" (fetched and cached at first use), a local folder, or
            a hub name, optionally `name@revision`. A folder may hold an adapter, which is merged
            into its base's weights.
        dtype: One of `model_identity.DTYPES`; see `resolve_dtype` for "auto".
        device: "cpu", "cuda", ...; by default a GPU if there is one.

    Raises:
        ValueError: If the dtype is unknown, the folder's files are changed meanwhile, or weights
            are missing, left over or of another shape; names them.
        assets.AssetError: If the default model is not cached and cannot be fetched.
        OSError: If transformers cannot find the model.
    """
    device = device or default_device()
    dtype = resolve_dtype(dtype, device)
    who = identity(name_or_path, dtype, device)
    lm = _loaded(name_or_path, who, dtype, device)
    if identity(name_or_path, dtype, device) != who:
        raise ValueError(f"model {name_or_path}: its files were changed while they were read")
    return lm


def _loaded(name_or_path: str, who: dict, dtype: str, device: str) -> LM:
    """Return the model of an identity; for errors see `load`."""
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


# --------------------------------------------------------------------------------------- encoding


def encode(lm: LM, examples: Iterable, max_length: int | None = None) -> list[Encoded]:
    """Tokenise examples: prompt and completion apart, without special tokens.

    Args:
        lm: The model, for its tokenizer.
        examples: Rows with `id`, `prompt` and `completion`; if the first is encoded already, all
            have to be and are returned as they are, whatever their length.
        max_length: Most tokens of one example, BOS included. Longer prompts lose tokens at their
            left, which is counted in `truncated` and warned about.

    Returns:
        One `Encoded` per example, in order.

    Raises:
        ValueError: If a completion has no tokens or would lose some; names the example.
    """
    room = float("inf") if max_length is None else max_length - len(lm.bos)
    encoded, known = [], {}
    rows = iter(examples)
    while part := list(itertools.islice(rows, ENCODED_TOGETHER)):
        if isinstance(part[0], Encoded):
            return [*part, *rows]
        prompts, completions = (
            _tokenise(lm, [row[name] for row in part], known) for name in ("prompt", "completion")
        )
        for row, prompt, completion in zip(part, prompts, completions, strict=True):
            if not completion:
                raise ValueError(f"example {row['id']!r}: the completion has no tokens")
            if len(completion) > room:
                raise ValueError(
                    f"example {row['id']!r}: the completion has {len(completion)} tokens, which "
                    f"max_length={max_length} would cut; raise max_length or shorten the example"
                )
            cut = int(max(0, len(prompt) + len(completion) - room))
            encoded.append(Encoded(row["id"], prompt[cut:], completion, cut))
    truncated = [e for e in encoded if e.truncated]
    if truncated:
        warnings.warn(
            f"{len(truncated)} of {len(encoded)} prompts lost tokens at the left to fit "
            f"max_length={max_length}, for instance {truncated[0].id!r} lost "
            f"{truncated[0].truncated}",
            stacklevel=2,
        )
    return encoded


def _tokenise(lm: LM, texts: list[str], known: dict[int, int]) -> list[tuple[int, ...]]:
    """Return the ids of each text, one object for each token: a pool has it many times."""
    ids = lm.tokenizer(texts, add_special_tokens=False).input_ids
    return [tuple(known.setdefault(i, i) for i in row) for row in ids]


def text_ids(lm: LM, text: str) -> tuple[int, ...]:
    """Return the ids of one text on its own, without special tokens."""
    return tuple(lm.tokenizer(text, add_special_tokens=False).input_ids) if text else ()


def sequence(lm: LM, example: Encoded, context: Sequence[int] = ()) -> tuple[list, list]:
    """Return input_ids [T] and completion_mask [T] (1 on completion tokens) of one sequence."""
    before = [*lm.bos, *context, *example.prompt]
    return [*before, *example.completion], [0] * len(before) + [1] * len(example.completion)


def training_rows(lm: LM, examples: Iterable, max_length: int | None = None) -> datasets.Dataset:
    """Return `input_ids` and `completion_mask`, as TRL and the gradient code take them."""
    encoded = encode(lm, examples, max_length)
    rows = [sequence(lm, example) for example in encoded]
    return datasets.Dataset.from_dict(
        {
            "id": [example.id for example in encoded],
            "input_ids": [ids for ids, _ in rows],
            "completion_mask": [mask for _, mask in rows],
        }
    )


# -------------------------------------------------------------------------------- log-likelihoods


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
    tokens_per_forward: int | None = None,
    dtype: type = np.float32,
) -> np.ndarray:
    """Return the log-likelihood of every query's completion after every context.

    Each context is read once and its keys and values serve all queries; queries are packed so that
    shared prefixes are read once too (see `packing`); the head sees only the positions that predict
    completion tokens. Sums over completion tokens in float64.

    Args:
        lm: The model.
        queries: M encoded queries.
        contexts: C token sequences to stand before the query's prompt (BOS is added here).
        tokens_per_forward: Tokens in one forward pass, which bounds memory (on a CPU a pass may run
            on each thread at once).
        dtype: Of the result; float64 where small differences of log-likelihoods matter.

    Returns:
        [C, M] in nats.

    Raises:
        ValueError: If a query has no prompt, or a sequence is longer than the model allows.
        FloatingPointError: If a log-likelihood is not finite; names context and query.
    """
    check_lengths(lm, queries, contexts)
    contexts = [(*lm.bos, *context) for context in contexts]
    budget = tokens_per_forward or by_device(TOKENS_PER_FORWARD, lm.device)
    packs = packing.pack(
        [packing.Item(q.prompt, q.completion) for q in queries],
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
        within_memory(lm, "log-likelihoods", budget, score_all)
    if not np.isfinite(nats).all():
        c, q = np.argwhere(~np.isfinite(nats))[0]
        raise FloatingPointError(
            f"log-likelihood of {queries[q].id!r} after context {c} is not finite"
        )
    return nats.astype(dtype)


def check_lengths(lm: LM, queries: Sequence[Encoded], contexts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where a query has no prompt, or does not fit the model with a context."""
    for query in queries:
        if not query.prompt:
            raise ValueError(f"query {query.id!r}: the prompt has no tokens")
    longest = max(queries, key=lambda q: len(q.ids))
    length = len(lm.bos) + max(len(context) for context in contexts) + len(longest.ids)
    config = lm.model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "window_size"))
    limit = min((value for value in (lm.max_positions, *windows) if value), default=length)
    if length > limit:
        raise ValueError(
            f"query {longest.id!r} with its longest context has {length} tokens, the model's "
            f"attention reaches {limit}: lower max_length"
        )


# by model and kind of pass: as many tokens as have been found to fit where that is less than usual
_fitting: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, int]] = weakref.WeakKeyDictionary()


def fitting(lm: LM, kind: str, tokens: int) -> int:
    """Return how many tokens of one pass fit in memory, as far as known; see `within_memory`."""
    return min(tokens, _fitting.get(lm.model, {}).get(kind, tokens))


def within_memory(lm: LM, kind: str, tokens: int, work: Callable[[int], Result]) -> Result:
    """Return `work(tokens)`; where a GPU's memory is too small for that, of ever fewer tokens.

    What fits is remembered, so that the next call of this kind begins with it.

    Args:
        lm: The model.
        kind: Of work, such as "log-likelihoods".
        tokens: In one pass, at first.
        work: Can be called again after it ran out of memory; its passes have so many tokens, or a
            single sequence where that is longer.

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


def check_packing(lm: LM) -> None:
    """Raise ValueError if this model takes no packed rows, so that scores would be wrong.

    Packing needs a model that follows an explicit mask and explicit positions; those with attention
    biases by distance in the row, or with recurrent layers, do not. A few tokens are scored both
    ways.
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


def side_by_side(work: Callable, groups: list, device: torch.device) -> None:
    """Work on several groups at once on a CPU, each with its share of the threads.

    One forward pass on two threads is slower than two passes on one thread each (measured: 1.2
    times), because only the matrix products inside it run well in parallel.
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
        """Take the keys and values of a layer that has read the contexts."""
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
    """Show the output head the hidden states at `_shown.at` only, so logits are [1, S, V].

    The model's own forward stays in charge, with whatever it does to logits afterwards.
    """

    def select(_, inputs):
        at = getattr(_shown, "at", None)
        return None if at is None else (inputs[0][at][None],)

    hook = lm.model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
