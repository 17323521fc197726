"""What attribution costs in floating-point operations and memory, from shapes and lengths alone.

One multiplication and one addition are two operations. A pass through the blocks takes 2 P
operations a token, for P weights of linear layers, and 4 h L for each key that a token attends to
(h: width of all heads, L: layers); a backward pass to the activations takes as many, and a weight's
gradient as many again. The head (vocabulary times hidden size) works at the positions that predict
completion tokens only. Norms, activation functions and softmax are left out: they take time, but
hardly any operations; so are separators and beginning-of-sequence tokens. The layers that read
embeddings count like any other, though nothing need go back through them. Counts are of what a
method cannot do without, so they say how well an implementation does; bytes are what must be held
beside the model and one pass, in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd

from icprobe.lm import LM, Encoded
from icprobe.methods.gradient import factors

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Shape:
    """What of a model's shape matters.

    Attributes:
        groups: Linear layers of the blocks that read one input: d_in, and each one's d_out.
        head: Vocabulary times hidden size.
        attention: Width of all heads, summed over layers.
        cache: Numbers of keys and values that a token leaves, over all layers.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
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
        # numbers of beginnings, by the number of the one without the last token (0: none) and it
        tree: dict[tuple[int, int], int] = {}
        depths = 0
        for ids in inputs:
            number = 0
            for depth, token in enumerate(ids, 1):
                depths += depth * ((number, token) not in tree)
                number = tree.setdefault((number, token), len(tree) + 1)
        return cls(
            np.array([len(example.ids) - 1 for example in train]),
            np.array([len(example.completion) for example in train]),
            np.array([len(ids) for ids in inputs]),
            np.array([len(query.completion) for query in queries]),
            len(tree),
            depths,
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
    """Return the cost of log-likelihoods of all queries after all demonstrations.

    Those of no demonstration, which gains need too, take as much as one that is empty.

    Args:
        shape: The model's.
        lengths: Of N demonstrations and M queries.
        sharing: Whether each demonstration, and each beginning that queries share, is read once;
            else every pair is a sequence of its own.
    """
    shown = lengths.train + 1  # of a demonstration, all tokens are read
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

    The products of layers that read one input go over pairs of tokens, or over weights whose
    gradients are made first, whichever takes less; the queries' factors are held.
    """
    passes = _passes(shape, lengths.train, lengths.learnt)
    passes += _passes(shape, lengths.queries, lengths.asked)
    one, other = lengths.train.sum(), lengths.queries.sum()
    pairs = len(lengths.train) * len(lengths.queries)
    products = sum(
        2 * min(one * other * (d_in + sum(d_outs)), (one + other + pairs) * d_in * sum(d_outs))
        for d_in, d_outs in shape.groups
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

    The queries' mean gradient is a pass each and a product. A pass with tangents takes three times
    the operations of a plain one in the blocks, and twice in the head, whose weights stay.
    """
    direction = _passes(shape, lengths.queries, lengths.asked)
    direction += 2 * shape.weights * lengths.queries.sum()
    tangents = 3 * _blocks(shape, lengths.train) + 2 * _head(shape, lengths.learnt)
    return Cost(float(direction + tangents), float(FLOAT * shape.weights))


def projected(shape: Shape, lengths: Lengths, size: int) -> Cost:
    """Return the cost of products of gradients that are projected to `size` by `size` a layer."""
    passes = _passes(shape, lengths.train, lengths.learnt)
    passes += _passes(shape, lengths.queries, lengths.asked)
    tokens = lengths.train.sum() + lengths.queries.sum()
    n, m = len(lengths.train), len(lengths.queries)
    width = sum(
        min(size, d_in) * min(size, d_out) for d_in, d_outs in shape.groups for d_out in d_outs
    )
    sides = 2 * size * shape.factors * tokens + 2 * width * tokens
    return Cost(float(passes + sides + 2 * width * n * m), float(FLOAT * width * (n + m)))


def reading(shape: Shape, lengths: Lengths, share: float = 0.5) -> Cost:
    """Return the cost of a forward pass over each text, through a share of the blocks.

    Nothing is held.
    """
    blocks = _blocks(shape, lengths.train + 1) + _blocks(shape, lengths.queries + 1)
    return Cost(share * blocks, 0.0)


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


def crossing(
    sizes: Sequence[int], one: Sequence[float], other: Sequence[float]
) -> tuple[float, float]:
    """Return between which sizes the first cost, the lesser one at first, becomes the larger.

    Args:
        sizes: Numbers of queries, ascending.
        one: [len(sizes)] the cost that is in question.
        other: [len(sizes)] the cost that it is compared with.

    Returns:
        The last size at which the first is the lesser, and the next one; not a number for the
        former if it is larger at the least size, for the latter if it is nowhere larger.
    """
    larger = np.flatnonzero(np.asarray(one) > np.asarray(other))
    first = larger[0] if len(larger) else len(sizes)
    ends = np.array([np.nan, *sizes, np.nan], dtype=float)
    return float(ends[first]), float(ends[first + 1])


def crossings(table: pd.DataFrame, counts: Mapping[str, pd.DataFrame], dtype: str) -> pd.DataFrame:
    """Return from how many queries on probing costs more than each other method.

    Args:
        table: Timings with columns method ("icprobe, ..."), lengths, dtype, n, m, seconds; those of
            the largest n are taken.
        counts: By lengths, see `by_queries`.
        dtype: Of the timings.

    Returns:
        Columns lengths, against, cheaper and dearer: the sizes timed between which the seconds
        cross; operations and nothing_shared: the least size counted at which probing, or probing
        that shares nothing, takes more operations. Not a number where there is no such size. A row
        for each method that was timed beside probing.
    """
    others = {
        "gradient products": "gradient products",
        "projected": "projected gradients",
        "query set": "query set, forward mode",
    }
    table = table[(table["dtype"] == dtype) & (table["n"] == table["n"].max())]
    rows = []
    for lengths, counted in counts.items():
        timed = table[table["lengths"] == lengths].sort_values("m")
        seconds = {
            name.removeprefix("icprobe, "): mine.set_index("m")["seconds"]
            for name, mine in timed.groupby("method")
        }
        needed = {
            name: mine.set_index("m")["operations"] for name, mine in counted.groupby("method")
        }
        for name, other in others.items():
            if not {name, "probing"} <= seconds.keys():
                continue
            both = pd.concat([seconds["probing"], seconds[name]], axis=1).dropna()
            cheaper, dearer = crossing(both.index, *both.to_numpy().T)
            by_count = [
                crossing(needed[other].index, needed[probing], needed[other])[1]
                for probing in ("probing", "probing, nothing shared")
            ]
            rows.append((lengths, name, cheaper, dearer, *by_count))
    columns = ["lengths", "against", "cheaper", "dearer", "operations", "nothing_shared"]
    return pd.DataFrame(rows, columns=columns)


def _blocks(shape: Shape, tokens: np.ndarray) -> float:
    """Return the operations of one forward pass over each sequence, without the head."""
    keys = (tokens * (tokens + 1) / 2).sum()
    return float(2 * shape.weights * tokens.sum() + 4 * shape.attention * keys)


def _head(shape: Shape, predicted: np.ndarray) -> float:
    """Return the operations of the head at so many positions of each sequence."""
    return float(2 * shape.head * predicted.sum())


def _passes(shape: Shape, tokens: np.ndarray, predicted: np.ndarray) -> float:
    """Return the operations of a forward pass and a backward pass to the activations."""
    attention = 4 * shape.attention * (tokens * (tokens + 1) / 2).sum()  # backward, it takes twice
    return float(2 * (_blocks(shape, tokens) + _head(shape, predicted)) + attention)
