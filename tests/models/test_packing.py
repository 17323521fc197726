"""Packed sequences share their beginnings, and every token sees its own sequence only."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icprobe.models import Encoded, packing

sequences = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple),
        st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


@given(sequences)
@settings(deadline=None)
def test_every_packed_token_sees_its_own_sequence_and_nothing_else(pairs):
    items = [Encoded("any", *pair) for pair in pairs]
    packs = packing.pack(items)
    scored = {i: [] for i in range(len(items))}
    for s in range(len(packs.target)):
        row, column = int(packs.row[s]), int(packs.column[s])
        seen = packs.attends[row, column].nonzero()[:, 0]
        assert packs.depth[row, seen].tolist() == list(range(len(seen)))
        read = tuple(packs.ids[row, seen].tolist())
        scored[int(packs.item[s])].append((read, int(packs.target[s])))
    for item, found in zip(items, scored.values(), strict=True):
        targets = range(len(item.prompt), len(item.ids))
        assert found == [(item.ids[:k], item.ids[k]) for k in targets]
    assert sum(packs.length) <= sum(len(item.ids) - 1 for item in items)
    assert list(packs.length) == sorted(packs.length, reverse=True)


def test_packing_shares_prefixes_and_wastes_little():
    rng = np.random.default_rng(0)
    head = [tuple(rng.integers(0, 99, 12)) for _ in range(4)]
    tails = [tuple(rng.integers(0, 99, rng.integers(5, 40))) for _ in range(48)]
    items = [Encoded("any", head[i % 4] + tail, (1, 2, 3)) for i, tail in enumerate(tails)]
    packs = packing.pack(items, context=50, hidden=576)
    alone = sum(len(item.ids) - 1 for item in items)
    assert packs.ids.numel() < alone, "padding costs less than sharing saves"
    assert packs.length.sum() / packs.ids.numel() > 0.9
