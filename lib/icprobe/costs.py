"""What attribution costs in floating-point operations and memory, from shapes and lengths alone.

One multiplication and one addition are two operations. A pass through the blocks takes 2 P
operations a token, for P weights of linear layers, and 4 h L for each key that a token attends to
(h: width of all heads, L: layers); a backward pass to the activations takes as many, and a weight's
gradient as many again. The head (vocabulary times hidden size) works at the positions that predict
completion tokens only. Norms, activation functions and softmax are left out: they take time, but
hardly any operations; so are separators and beginning-of-sequence tokens. Counts are of what a
method cannot do without, so they say how well an implementation does; bytes are what must be held
beside the model and one pass, in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd

from icprobe import gradients
from icprobe.lm import LM, Encoded

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Shape:
    """What of a model's shape matters.

    Attributes:
        layers: (d_in, d_out) of each linear layer of the blocks.
        head: Vocabulary times hidden size.
        attention: Width of all heads, summed over layers.
        cache: Numbers of keys and values that a token leaves, over all layers.
    """

    layers: tuple[tuple[int, int], ...]
    head: int
    attention: int
    cache: int

    @classmethod
    def of(cls, lm: LM) -> "Shape":
        """Return a model's."""
        config = lm.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        count = config.num_hidden_layers
        linear = gradients.linear_layers(lm).values()
        return cls(
            tuple((layer.weight.shape[1], layer.weight.shape[0]) for layer in linear),
            lm.model.get_output_embeddings().weight.numel(),
            config.num_attention_heads * size * count,
            2 * keys * size * count,
        )

    @property
    def weights(self) -> int:
        """P, weights of the blocks' linear layers."""
        return sum(d_in * d_out for d_in, d_out in self.layers)

    @property
    def factors(self) -> int:
        """Numbers that a token's gradient factors take."""
        return sum(d_in + d_out for d_in, d_out in self.layers)


@dataclass(frozen=True)
class Lengths:
    """Tokens that go into passes (the last one of a sequence predicts nothing), and are learnt.

    Attributes:
        train: [N] of training examples.
        learnt: [N] of their completions.
        queries: [M] of queries.
        asked: [M] of their completions.
        distinct: Of the queries where tokens after the same beginning count once.
        depths: Sum of these tokens' positions (from 1): the keys that they attend to.
    """

    train: np.ndarray
    learnt: np.ndarray
    queries: np.ndarray
    asked: np.ndarray
    distinct: int
    depths: int

    @classmethod
    def of(cls, train: Sequence[Encoded], queries: Sequence[Encoded]) -> "Lengths":
        """Return those of encoded examples."""
        inputs = [query.ids[:-1] for query in queries]
        beginnings = {ids[: k + 1] for ids in inputs for k in range(len(ids))}
        return cls(
            np.array([len(example.ids) - 1 for example in train]),
            np.array([len(example.completion) for example in train]),
            np.array([len(ids) for ids in inputs]),
            np.array([len(query.completion) for query in queries]),
            len(beginnings),
            sum(map(len, beginnings)),
        )


@dataclass(frozen=True)
class Cost:
    """What a method costs.

    Attributes:
        operations: Floating-point operations.
        bytes: To be held beside the model and one pass, see the module.
    """

    operations: float
    bytes: float


def probing(shape: Shape, lengths: Lengths, sharing: bool = True) -> Cost:
    """Return the cost of log-likelihoods of all queries after all demonstrations (and none).

    Args:
        shape: The model's.
        lengths: Of N demonstrations and M queries.
        sharing: Whether each demonstration, and each beginning that queries share, is read once;
            else every pair is a sequence of its own.
    """
    shown = np.append(lengths.train + 1, 0)  # of a demonstration, all tokens are read
    if sharing:
        tokens = shown + lengths.distinct
        keys = shown * (shown + 1) / 2 + shown * lengths.distinct + lengths.depths
    else:
        pairs = shown[:, None] + lengths.queries
        tokens, keys = pairs.sum(1), (pairs * (pairs + 1) / 2).sum(1)
    operations = 2 * shape.weights * tokens + 4 * shape.attention * keys
    heads = 2 * shape.head * lengths.asked.sum() * len(shown)
    held = FLOAT * shape.cache * shown.max() if sharing else 0
    return Cost(float(operations.sum() + heads), float(held))


def gradient_products(shape: Shape, lengths: Lengths) -> Cost:
    """Return the cost of exact gradient dot products of all pairs.

    Each layer's products go over pairs of tokens, or over weights whose gradients are made first,
    whichever takes less; the queries' factors are held.
    """
    passes = _passes(shape, lengths.train, lengths.learnt)
    passes += _passes(shape, lengths.queries, lengths.asked)
    one, other = lengths.train.sum(), lengths.queries.sum()
    pairs = len(lengths.train) * len(lengths.queries)
    products = sum(
        2 * min(one * other * (d_in + d_out), (one + other + pairs) * d_in * d_out)
        for d_in, d_out in shape.layers
    )
    return Cost(passes + products, float(FLOAT * shape.factors * other))


def whole_gradients(shape: Shape, lengths: Lengths) -> Cost:
    """Return the cost of the same by gradients of the model's size, those of the queries held."""
    passes = _passes(shape, lengths.train, lengths.learnt)
    passes += _passes(shape, lengths.queries, lengths.asked)
    tokens = lengths.train.sum() + lengths.queries.sum()
    pairs = len(lengths.train) * len(lengths.queries)
    operations = passes + 2 * shape.weights * (tokens + pairs)
    return Cost(float(operations), float(FLOAT * shape.weights * len(lengths.queries)))


def query_set(shape: Shape, lengths: Lengths) -> Cost:
    """Return the cost of the influence on all queries together, by forward-mode autograd.

    The queries' mean gradient is a pass each and a product; a pass with tangents takes three times
    the operations of a plain one.
    """
    direction = _passes(shape, lengths.queries, lengths.asked)
    direction += 2 * shape.weights * lengths.queries.sum()
    forward = _forward(shape, lengths.train, lengths.learnt)
    return Cost(float(direction + 3 * forward), float(FLOAT * shape.weights))


def projected(shape: Shape, lengths: Lengths, size: int) -> Cost:
    """Return the cost of products of gradients that are projected to `size` by `size` a layer."""
    passes = _passes(shape, lengths.train, lengths.learnt)
    passes += _passes(shape, lengths.queries, lengths.asked)
    tokens = lengths.train.sum() + lengths.queries.sum()
    n, m = len(lengths.train), len(lengths.queries)
    width = sum(min(size, d_in) * min(size, d_out) for d_in, d_out in shape.layers)
    sides = 2 * size * shape.factors * tokens + 2 * width * tokens
    return Cost(float(passes + sides + 2 * width * n * m), float(FLOAT * width * (n + m)))


def reading(shape: Shape, lengths: Lengths) -> Cost:
    """Return the cost of one forward pass over each text, without the head; nothing is held."""
    nothing = np.zeros(0)
    passes = _forward(shape, lengths.train, nothing) + _forward(shape, lengths.queries, nothing)
    return Cost(passes, 0.0)


def by_queries(
    shape: Shape, train: Sequence[Encoded], queries: Sequence[Encoded], sizes: Sequence[int],
    projection: int = 16,
) -> pd.DataFrame:  # fmt: skip
    """Return what each method costs for the first M of the queries, for several M.

    Args:
        shape: The model's.
        train: N training examples.
        queries: At least as many as the largest size.
        sizes: Numbers of queries.
        projection: Size of projected gradients, see `projected`.

    Returns:
        Columns method, m, operations, bytes; a row for each method and size.
    """
    methods: dict[str, Callable[[Lengths], Cost]] = {
        "probing": lambda lengths: probing(shape, lengths),
        "probing, nothing shared": lambda lengths: probing(shape, lengths, sharing=False),
        "gradient products": lambda lengths: gradient_products(shape, lengths),
        "gradients of the model's size": lambda lengths: whole_gradients(shape, lengths),
        "projected gradients": lambda lengths: projected(shape, lengths, projection),
        "query set, forward mode": lambda lengths: query_set(shape, lengths),
        "hidden states": lambda lengths: reading(shape, lengths),
    }
    found = {m: Lengths.of(train, queries[:m]) for m in sizes}
    rows = [
        (name, m, *astuple(cost(lengths)))
        for name, cost in methods.items()
        for m, lengths in found.items()
    ]
    return pd.DataFrame(rows, columns=["method", "m", "operations", "bytes"])


def crossing(sizes: Sequence[int], one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return where the first cost, cheaper at first, becomes the larger: M, between two sizes.

    Args:
        sizes: Numbers of queries, ascending.
        one: [len(sizes)] cost of the method that is cheaper at the least size.
        other: [len(sizes)] cost of the method that is compared with.

    Returns:
        M on the line between the last size where the first is cheaper and the next; 0 if it is
        never cheaper at the least size, None if it is cheaper at all sizes.
    """
    excess = np.asarray(one) - np.asarray(other)
    if excess[0] > 0:
        return 0.0
    above = np.flatnonzero(excess > 0)
    if not len(above):
        return None
    k = above[0]
    share = -excess[k - 1] / (excess[k] - excess[k - 1])
    return float(sizes[k - 1] + share * (sizes[k] - sizes[k - 1]))


def crossings(table: pd.DataFrame, counts: Mapping[str, pd.DataFrame], dtype: str) -> pd.DataFrame:
    """Return from how many queries on probing costs more than each other method.

    Args:
        table: Timings with columns method ("icprobe, ..."), lengths, dtype, n, m, seconds; those of
            the largest n are taken.
        counts: By lengths, see `by_queries`.
        dtype: Of the timings.

    Returns:
        Columns lengths, against, seconds, operations and operations of probing that shares nothing;
        0 where probing costs more from the first query on, not a number where it never does.
    """
    others = {
        "gradient products": "gradient products",
        "projected": "projected gradients",
        "query set": "query set, forward mode",
    }
    rows = []
    for lengths, counted in counts.items():
        timed = table[(table["lengths"] == lengths) & (table["dtype"] == dtype)]
        timed = timed[timed["n"] == timed["n"].max()].sort_values("m")
        seconds = {
            name.removeprefix("icprobe, "): mine.set_index("m")["seconds"]
            for name, mine in timed.groupby("method")
        }
        needed = {
            name: mine.set_index("m")["operations"] for name, mine in counted.groupby("method")
        }
        for name, other in others.items():
            pairs = [
                (seconds["probing"], seconds[name]),
                (needed["probing"], needed[other]),
                (needed["probing, nothing shared"], needed[other]),
            ]
            found = []
            for one, two in pairs:
                sizes = sorted(set(one.index) & set(two.index))
                found.append(crossing(sizes, one[sizes], two[sizes]))
            rows.append((lengths, name, *found))
    columns = ["lengths", "against", "seconds", "operations", "operations, nothing shared"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[2:], float))


def _forward(shape: Shape, tokens: np.ndarray, predicted: np.ndarray) -> float:
    """Return the operations of one forward pass over each sequence."""
    keys = (tokens * (tokens + 1) / 2).sum()
    inner = 2 * shape.weights * tokens.sum() + 4 * shape.attention * keys
    return float(inner + 2 * shape.head * predicted.sum())


def _passes(shape: Shape, tokens: np.ndarray, predicted: np.ndarray) -> float:
    """Return the operations of a forward pass and a backward pass to the activations."""
    attention = 4 * shape.attention * (tokens * (tokens + 1) / 2).sum()  # backward, it takes twice
    return float(2 * _forward(shape, tokens, predicted) + attention)
