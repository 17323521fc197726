"""Score stores that several tests fill and read."""

from pathlib import Path

import numpy as np

from icprobe.scores import run, store

IDENTITY = {
    "model": {"name": "tiny", "weights": "ab" * 32, "dtype": "float32"},
    "data": {"train": "t" * 64, "query": "q" * 64},
    "options": {"preamble": "", "separator": "\n\n"},
}


def ids(kind: str, n: int) -> list[str]:
    return [f"{kind}-{i}" for i in range(n)]


def some_scores(N: int, M: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)


def opened(
    folder: Path, N: int = 7, M: int = 5, block_size: int = 3, **changed
) -> store.ScoreStore:
    arguments = {"method": "icp", "identity": IDENTITY, "block_size": block_size, **changed}
    return store.open(folder, train_ids=ids("train", N), query_ids=ids("query", M), **arguments)


def filled(folder: Path, **changed) -> store.ScoreStore:
    kept = opened(folder, **changed)
    fill(kept, from_matrix(some_scores(*kept.shape)))
    return kept


def fill(kept: store.ScoreStore, score_rows) -> np.ndarray:
    """Compute the missing blocks, and return all scores."""

    def score_blocks(blocks):
        return ((block.number, {"one": score_rows(block.train)}) for block in blocks)

    run.fill({"one": kept}, range(len(kept.train_ids)), score_blocks)
    return kept.matrix()


def from_matrix(matrix: np.ndarray, computed: list | None = None, stop_after: int | None = None):
    """Return a `score_rows` that notes what it computes and can be interrupted by the user."""
    computed = [] if computed is None else computed

    def score_rows(rows):
        if stop_after is not None and len(computed) >= stop_after:
            raise KeyboardInterrupt
        computed.append(list(rows))
        return matrix[list(rows)]

    return score_rows


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bits(matrix: np.ndarray) -> list[int]:
    assert matrix.dtype == np.float32
    return matrix.view(np.uint32).ravel().tolist()
