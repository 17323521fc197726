"""Rivals that any attribution method has to beat: length, similarity, the example's loss, chance.

Each is a float32 matrix [N, M] for N training examples and M queries. Positive = presumed to help:
a rival presumes that long, similar or surprising examples help more, and has not tried. Where a
method's scores follow a rival, the rival explains them until shown otherwise. `methods` has them by
name, with titles, units and score stores.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from icprobe import gradients
from icprobe import lm as language_model
from icprobe.lm import LM, Encoded

# scikit-learn's defaults, but for words of one letter or digit, which it would drop
TFIDF = {"token_pattern": r"(?u)\w+", "lowercase": True, "sublinear_tf": False, "smooth_idf": True}

TOGETHER = 256  # examples in one call of own_loss: packing makes a mask for all of them


def length(
    lm: LM, train: Iterable, queries: Iterable, max_length: int | None = None, part: str = "text"
) -> np.ndarray:
    """Return the tokens of each training example: float32 [N, M], the same along a row.

    Args:
        lm: The model, for its tokenizer.
        train: N rows with id, prompt, completion (or encoded already).
        queries: M rows like them; only their number matters.
        max_length: Most tokens of one example, see `lm.encode`.
        part: "text" counts prompt and completion (without BOS), "completion" that alone.

    Raises:
        ValueError: If `part` is unknown, or a completion has no tokens or would lose some.
    """
    if part not in ("text", "completion"):
        raise ValueError(f"part is {part!r}, expected 'text' or 'completion'")
    shown = language_model.encode(lm, train, max_length)
    counts = [len(example.ids if part == "text" else example.completion) for example in shown]
    return _along_rows(counts, queries)


def trained_tokens(lm: LM, examples: Iterable, loss_on: str = "completion") -> np.ndarray:
    """Return how many tokens of each training example its loss is over: whole numbers [N].

    A loss on the text leaves out the first token where no BOS stands before it: nothing predicts
    it.

    Args:
        lm: The model, for its tokenizer.
        examples: N rows with id, prompt, completion (or encoded already).
        loss_on: "completion" or "text".

    Raises:
        ValueError: If `loss_on` is unknown.
    """
    if loss_on not in gradients.LOSSES:
        raise ValueError(f"loss_on is {loss_on!r}, expected 'completion' or 'text'")
    shown = language_model.encode(lm, examples)
    if loss_on == "completion":
        return np.array([len(example.completion) for example in shown])
    return np.array([len(language_model.sequence(lm, example)[0]) - 1 for example in shown])


def query_length(
    lm: LM, train: Iterable, queries: Iterable, max_length: int | None = None
) -> np.ndarray:
    """Return the tokens of each query's completion: float32 [N, M], the same along a column.

    No rival, since it ranks no training example above another for any query; a control for what is
    said of all pairs. Arguments and errors are those of `length`.
    """
    return length(lm, queries, train, max_length, part="completion").T


def lexical(train: Iterable[dict], queries: Iterable[dict], **settings) -> np.ndarray:
    """Return the cosine of the texts' TF-IDF vectors: float32 [N, M] in [0, 1].

    A text is prompt and completion, whole (`max_length` does not cut it), as words in lower case.
    With n texts in train and queries together, d_w of which have the word w, a text's entry for w
    is how often it has it times 1 + log((1 + n) / (1 + d_w)). So the words of an instruction that
    many texts share count for little. A text without words is similar to none: 0.

    Args:
        train: N rows with prompt and completion.
        queries: M rows like them.
        **settings: Of scikit-learn's TfidfVectorizer, where not as in `TFIDF`.

    Raises:
        ValueError: If there is no word in any text.
    """
    texts = [[row["prompt"] + row["completion"] for row in rows] for rows in (train, queries)]
    vectorizer = TfidfVectorizer(**TFIDF | settings, dtype=np.float64).fit(texts[0] + texts[1])
    one, other = (vectorizer.transform(part) for part in texts)
    return np.minimum((one @ other.T).toarray(), 1).astype(np.float32)


def embedding(
    lm: LM,
    train: Iterable,
    queries: Iterable,
    max_length: int | None = None,
    layer: int | None = None,
    centre: bool = True,
) -> np.ndarray:
    """Return the cosine of the model's mean hidden states: float32 [N, M] in [-1, 1].

    An example's vector is the mean over its sequence but for the first token, at which many models
    park attention: its state is a hundred times as long as others in the middle of SmolLM2-135M, so
    with it the mean would tell the text's length.

    By default the middle layer is taken: on the suite `grid`, SmolLM2-135M's puts an example of the
    query's own task above one of another task in 95 % of the cases, the last layer in 86 %.

    Args:
        lm: The model.
        train: N rows with id, prompt, completion (or encoded already).
        queries: M rows like them.
        max_length: Most tokens of one example, see `lm.encode`.
        layer: Which hidden states, as transformers counts them: 0 for the input embeddings, k for
            the output of block k, -1 for the last, which has passed the final norm. By default
            half the number of blocks.
        centre: Subtract the mean vector of all N + M examples first. Without this all cosines are
            close to 1, since hidden states have a large part in common.

    Raises:
        ValueError: If there is no such layer, or an example has fewer than two tokens or more than
            the model allows.
        FloatingPointError: If a hidden state is not finite; names the example.
    """
    pool, asked = (language_model.encode(lm, rows, max_length) for rows in (train, queries))
    vectors = mean_states(lm, [*pool, *asked], layer)
    if centre:
        vectors = vectors - vectors.mean(axis=0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    cosine = unit[: len(pool)] @ unit[len(pool) :].T
    return cosine.clip(-1, 1).astype(np.float32)


@torch.inference_mode()
def mean_states(lm: LM, examples: Sequence[Encoded], layer: int | None = None) -> np.ndarray:
    """Return each example's mean hidden state without the first token's: float64 [N, H].

    Examples of like length are read together, through the blocks that are needed. Arguments and
    errors are those of `embedding`.
    """
    layer = _checked_layer(lm, layer)
    check_readable(lm, examples)
    means = np.zeros((len(examples), lm.model.config.get_text_config().hidden_size))

    def read(batch: list[int]) -> None:
        sequences = [language_model.sequence(lm, examples[i])[0] for i in batch]
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
        language_model.side_by_side(read, list(gradients.batches(lm, examples)), lm.device)
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


def same_completion(train: Iterable[dict], queries: Iterable[dict]) -> np.ndarray:
    """Return whether completions are equal but for case and white space: float32 [N, M], 1 or 0.

    Where tasks have few answers, showing the query's own answer may be all that helps.

    Args:
        train: N rows with completion.
        queries: M rows like them.
    """
    texts = (
        [" ".join(row["completion"].casefold().split()) for row in rows]
        for rows in (train, queries)
    )
    return np.equal.outer(*map(np.array, texts)).astype(np.float32)


def own_loss(
    lm: LM, train: Iterable, queries: Iterable, max_length: int | None = None
) -> np.ndarray:
    """Return each training example's own loss: float32 [N, M], the same along a row.

    The mean negative log-likelihood of its completion tokens after its prompt, in nats per token:
    what the model does not know yet, it could learn.

    Args:
        lm: The model.
        train: N rows with id, prompt, completion (or encoded already).
        queries: M rows like them; only their number matters.
        max_length: Most tokens of one example, see `lm.encode`.

    Raises:
        ValueError: If an example has no prompt or no completion, or is too long for the model.
        FloatingPointError: If a loss is not finite; names the example.
    """
    shown = language_model.encode(lm, train, max_length)
    nats = [
        language_model.log_likelihoods(lm, shown[start : start + TOGETHER])[0]
        for start in range(0, len(shown), TOGETHER)
    ]
    tokens = [len(example.completion) for example in shown]
    return _along_rows(-np.concatenate(nats) / tokens, queries)


def random(N: int, M: int, rng: np.random.Generator) -> np.ndarray:
    """Return independent standard normal scores: float32 [N, M]."""
    return rng.standard_normal((N, M), dtype=np.float32)


def _along_rows(values: Sequence[float], queries: Iterable) -> np.ndarray:
    """Return one value per training example for every query: float32 [N, M]."""
    column = np.asarray(values, dtype=np.float32)[:, None]
    return np.repeat(column, len(list(queries)), axis=1)
