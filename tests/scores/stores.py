"""Score stores that several tests fill and read."""

from pathlib import Path

import numpy as np

from icprobe.scores import engines, store

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
    scores = opened(folder, **changed)
    fill(scores, from_matrix(some_scores(*scores.shape)))
    return scores


def fill(scores: store.ScoreStore, score_block, progress: bool = False) -> np.ndarray:
    """Compute the missing blocks in this process, and return all scores."""

    def scorer(wanted):
        return ((rows, [score_block(rows)]) for rows in wanted)

    engines.fill([scores], scorer, progress)
    return scores.matrix()


def reused(caplog) -> dict[str, int]:
    """Return how many rows each store had, as logged since this was last asked."""
    found = {record.method: record.reused for record in caplog.records}
    caplog.clear()
    return found


def from_matrix(matrix: np.ndarray, computed: list | None = None, stop_after: int | None = None):
    """Return a score_block that notes what it computes and can be interrupted by the user."""
    computed = [] if computed is None else computed

    def score_block(rows):
        if stop_after is not None and len(computed) >= stop_after:
            raise KeyboardInterrupt
        computed.append(list(rows))
        return matrix[list(rows)]

    return score_block


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bits(matrix: np.ndarray) -> list[int]:
    assert matrix.dtype == np.float32
    return matrix.view(np.uint32).ravel().tolist()
