"""Packs: many sequences in one row, every shared prefix once.

Queries of one task begin with the same instruction, so scoring them one by one computes the same
tokens again and again. A pack holds the prefix tree of a few queries, flattened into one row: each
token attends to its own ancestors only (a mask [L, L]) and stands at its own depth (its position),
so every query sees exactly what it would see alone. Rows of nearly equal length make batches with
hardly any padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from icprobe.models.tokens import Encoded

Row = tuple[int, list[int]]  # tokens, and the numbers of the sequences that share them


@dataclass(frozen=True)
class Packs:
    """R rows of up to L tokens, and the S completion tokens that they predict."""

    ids: torch.Tensor  # [R, L], zero where padded
    length: torch.Tensor  # [R] tokens without padding, longest first
    depth: torch.Tensor  # [R, L] position of each token in its own sequence, counted from 0
    attends: torch.Tensor  # [R, L, L] bool: [r, a, b] is true where token a sees token b
    row: torch.Tensor  # [S] with `column`: the token that predicts the s-th completion token
    column: torch.Tensor  # [S]
    target: torch.Tensor  # [S] the id of that completion token
    item: torch.Tensor  # [S] the number of the sequence that it belongs to

    def rows(self, start: int, stop: int) -> "Packs":
        """Return rows start to stop, cut to the longest of them."""
        kept = (self.row >= start) & (self.row < stop)
        length = int(self.length[start])
        return Packs(
            ids=self.ids[start:stop, :length],
            length=self.length[start:stop],
            depth=self.depth[start:stop, :length],
            attends=self.attends[start:stop, :length, :length],
            row=self.row[kept] - start,
            column=self.column[kept],
            target=self.target[kept],
            item=self.item[kept],
        )


def pack(
    items: Sequence[Encoded], context: int = 0, hidden: int = 512, attention: float = 2
) -> Packs:
    """Pack sequences with non-empty prompts into rows, of the length that costs least.

    Longer rows share more prefixes, but attention costs grow with their length, and with the tokens
    of `context` that each row attends to. `hidden` is the model's hidden size, `attention` the cost
    of an operation of attention relative to one of a matrix product.
    """
    # all that the model must read; the last token is only predicted
    inputs = [item.ids[:-1] for item in items]
    longest, total = max(map(len, inputs)), sum(map(len, inputs))
    step = max(16, longest // 8)
    limits = range(longest, max(longest, min(total, 4 * longest, 2048)) + step, step)

    def cost(rows: list[Row]) -> float:
        """Relative time, padding included.

        Per token a block's linear layers do about 24 hidden^2 operations and attention 4 hidden for
        each key.
        """
        length = max(tokens for tokens, _ in rows)
        return len(rows) * length * (24 * hidden + attention * 4 * (length + context))

    rows = min((_fill(inputs, limit) for limit in limits), key=cost)
    return _flatten(items, sorted(rows, key=lambda row: -row[0]))


def _fill(inputs, limit) -> list[Row]:
    """Cut the sequences, sorted by their ids so that neighbours share, into rows up to a limit."""
    rows, previous = [], ()
    for i in sorted(range(len(inputs)), key=inputs.__getitem__):
        new = len(inputs[i]) - _common(previous, inputs[i])
        if rows and rows[-1][0] + new <= limit:
            rows[-1] = (rows[-1][0] + new, [*rows[-1][1], i])
        else:
            rows.append((len(inputs[i]), [i]))
        previous = inputs[i]
    return rows


def _common(a, b) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(a), len(b))
    return next((k for k in range(length) if a[k] != b[k]), length)


def _flatten(items, rows) -> Packs:
    """Build the prefix tree of each row and lay it out token by token, parents first."""
    lengths = np.array([tokens for tokens, _ in rows])
    shape = (len(rows), lengths.max())
    ids, depth = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    # every token sees itself, padding too: a softmax over nothing is not a number
    attends = np.tile(np.eye(shape[1], dtype=bool), (shape[0], 1, 1))
    scored = []
    for r, (_, indices) in enumerate(rows):
        tree: dict[tuple[int, int], int] = {}
        for i in indices:
            node, path = -1, []
            for level, token in enumerate(items[i].ids[:-1]):
                child = tree.setdefault((node, token), len(tree))
                ids[r, child], depth[r, child] = token, level
                if node >= 0:
                    attends[r, child] |= attends[r, node]
                path.append(child)
                node = child
            first = len(items[i].prompt) - 1
            scored += [(r, path[first + k], t, i) for k, t in enumerate(items[i].completion)]
    arrays = (ids, lengths, depth, attends, *np.array(scored).T)
    return Packs(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
