"""What attribution costs in floating-point operations and memory, from shapes and lengths alone.

One multiplication and one addition are two operations. A pass through the blocks takes 2 P
operations a token, for P weights of linear layers, and 4 h L for each key that a token attends to
(h: width of all heads, L: layers); a backward pass to the activations takes as many, and a weight's
gradient as many again. The head (vocabulary times hidden size) works at the positions that predict
tokens of the loss only. Norms, activation functions and softmax are left out: they take time, but
hardly any operations; so are separators and BOS. The layers that read embeddings count like any
other, though nothing need go back through them. Counts are of what a method cannot do without;
bytes are what must be held beside the model and one pass, in float32.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from icprobe.methods.gradient import factors
from icprobe.models import LM, Encoded

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Shape:
    """What of a model's shape matters."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]  # of layers that read one input: d_in, d_outs
    head: int  # vocabulary times hidden size
    attention: int  # width of all heads, summed over layers
    cache: int  # numbers of keys and values that a token leaves, over all layers

    @classmethod
    def of(cls, lm: LM) -> "Shape":
        """Return a model's."""
        config = lm.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        count = config.num_hidden_layers
        groups = factors.factors(lm, [Encoded("any", (0,), (0,))])  # tells what reads one input
        return cls(
            tuple(
                (group.inputs.shape[-1], tuple(part.shape[-1] for part in group.outputs.values()))
                for group in groups
            ),
            lm.model.get_output_embeddings().weight.numel(),
            config.num_attention_heads * size * count,
            2 * keys * size * count,
        )

    @property
    def weights(self) -> int:
        """P, weights of the blocks' linear layers."""
        return sum(d_in * sum(d_outs) for d_in, d_outs in self.groups)

    @property
    def factors(self) -> int:
        """Numbers that a token's gradient factors take."""
        return sum(d_in + sum(d_outs) for d_in, d_outs in self.groups)


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens that go into passes, and of those that are targets of a loss."""

    train: np.ndarray  # [N], without the last token, which predicts nothing
    train_targets: np.ndarray  # [N]
    queries: np.ndarray  # [M], without the last token
    query_targets: np.ndarray  # [M], of completions
    distinct: int  # of the queries, where tokens after the same beginning count once
    attended_keys: int  # that these attend to in all, themselves included

    @classmethod
    def of(
        cls, train: Sequence[Encoded], queries: Sequence[Encoded], loss_on: str = "completion"
    ) -> "Lengths":
        """Return the lengths of N training examples and M queries."""
        # the queries' prefix tree: number and depth of a token, by its parent's number and it
        tree: dict[tuple[int, int], tuple[int, int]] = {}
        for query in queries:
            number = 0
            for depth, token in enumerate(query.ids[:-1], 1):
                number, _ = tree.setdefault((number, token), (len(tree) + 1, depth))
        passed = np.array([len(example.ids) - 1 for example in train])
        completions = np.array([len(example.completion) for example in train])
        return cls(
            passed,
            passed if loss_on == "text" else completions,
            np.array([len(query.ids) - 1 for query in queries]),
            np.array([len(query.completion) for query in queries]),
            len(tree),
            sum(depth for _, depth in tree.values()),
        )


class Cost(NamedTuple):
    """What a method costs."""

    operations: float
    bytes: float


def probing(shape: Shape, lengths: Lengths, sharing: bool = True) -> Cost:
    """Return the cost of log-likelihoods of all queries after all demonstrations.

    With `sharing`, each demonstration, and each beginning that queries share, is read once; else
    every pair is a sequence of its own.
    """
    shown = lengths.train + 1  # of a demonstration, all tokens are read
    if sharing:
        tokens = shown + lengths.distinct
        keys = _keys(shown) + shown * lengths.distinct + lengths.attended_keys
    else:
        pairs = shown[:, None] + lengths.queries
        tokens, keys = pairs.sum(1), _keys(pairs).sum(1)
    blocks = 2 * shape.weights * tokens.sum() + 4 * shape.attention * keys.sum()
    heads = 2 * shape.head * lengths.query_targets.sum() * len(shown)
    return Cost(blocks + heads, FLOAT * shape.cache * shown.max() if sharing else 0)


def gradient_products(shape: Shape, lengths: Lengths) -> Cost:
    """Return the cost of exact gradient dot products of all pairs.

    Products go over pairs of tokens, or over weights whose gradients are made first, whichever
    takes less; the queries' factors are held.
    """
    one, other = lengths.train.sum(), lengths.queries.sum()
    pairs = len(lengths.train) * len(lengths.queries)
    products = sum(
        2 * min(one * other * (d_in + sum(d_outs)), (one + other + pairs) * d_in * sum(d_outs))
        for d_in, d_outs in shape.groups
    )
    return Cost(_passes(shape, lengths) + products, FLOAT * shape.factors * other)


def whole_gradients(shape: Shape, lengths: Lengths) -> Cost:
    """Return the cost of the same by gradients of the model's size, those of the queries held."""
    tokens = lengths.train.sum() + lengths.queries.sum()
    pairs = len(lengths.train) * len(lengths.queries)
    operations = _passes(shape, lengths) + 2 * shape.weights * (tokens + pairs)
    return Cost(operations, FLOAT * shape.weights * len(lengths.queries))


def query_set(shape: Shape, lengths: Lengths) -> Cost:
    """Return the cost of the influence on all queries together, by forward-mode autograd.

    The queries' mean gradient is a pass each and a product. A pass with tangents takes three times
    the operations of a plain one in the blocks, and twice in the head, whose weights stay.
    """
    direction = _both_ways(shape, lengths.queries, lengths.query_targets)
    direction += 2 * shape.weights * lengths.queries.sum()
    tangents = 3 * _forward(shape, lengths.train) + 4 * shape.head * lengths.train_targets.sum()
    return Cost(direction + tangents, FLOAT * shape.weights)


def projected(shape: Shape, lengths: Lengths, size: int = 16) -> Cost:
    """Return the cost of products of gradients that are projected to `size` by `size` a layer."""
    tokens = lengths.train.sum() + lengths.queries.sum()
    n, m = len(lengths.train), len(lengths.queries)
    width = sum(
        min(size, d_in) * min(size, d_out) for d_in, d_outs in shape.groups for d_out in d_outs
    )
    projections = 2 * (size * shape.factors + width) * tokens
    operations = _passes(shape, lengths) + projections + 2 * width * n * m
    return Cost(operations, FLOAT * width * (n + m))


def reading(shape: Shape, lengths: Lengths) -> Cost:
    """Return the cost of a forward pass over each text, through half of the blocks."""
    blocks = _forward(shape, lengths.train + 1) + _forward(shape, lengths.queries + 1)
    return Cost(blocks / 2, 0)


METHODS = {
    "probing": probing,
    "probing, nothing shared": functools.partial(probing, sharing=False),
    "gradient products": gradient_products,
    "gradients of the model's size": whole_gradients,
    "projected gradients": projected,
    "query set, forward mode": query_set,
    "hidden states": reading,
}


def by_queries(
    shape: Shape,
    train: Sequence[Encoded],
    queries: Sequence[Encoded],
    sizes: Sequence[int],
    loss_on: str = "completion",
) -> pd.DataFrame:
    """Return what each method costs for the first m queries: method, m, operations, bytes."""
    lengths = {m: Lengths.of(train, queries[:m], loss_on) for m in sizes}
    rows = [
        (name, m, *map(float, cost(shape, lengths[m])))
        for name, cost in METHODS.items()
        for m in sizes
    ]
    return pd.DataFrame(rows, columns=["method", "m", "operations", "bytes"])


def _keys(tokens: np.ndarray) -> np.ndarray:
    """Return how many keys the tokens of each sequence attend to, their own included."""
    return tokens * (tokens + 1) / 2


def _forward(shape: Shape, tokens: np.ndarray) -> float:
    """Return the operations of one forward pass over each sequence, without the head."""
    return 2 * shape.weights * tokens.sum() + 4 * shape.attention * _keys(tokens).sum()


def _both_ways(shape: Shape, tokens: np.ndarray, targets: np.ndarray) -> float:
    """Return the operations of a forward pass and a backward pass to the activations."""
    attention = 4 * shape.attention * _keys(tokens).sum()  # backward, it takes twice
    return 2 * (_forward(shape, tokens) + 2 * shape.head * targets.sum()) + attention


def _passes(shape: Shape, lengths: Lengths) -> float:
    """Return the same for all training examples and all queries."""
    train = _both_ways(shape, lengths.train, lengths.train_targets)
    return train + _both_ways(shape, lengths.queries, lengths.query_targets)
