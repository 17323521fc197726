"""Where blocks of training examples are scored: in this process, or by workers of a Ray cluster.

Either engine is a `BlockScorer`: it takes the rows of blocks as they are wanted, and yields them,
in any order, with their scores. It is made from two functions. `start` is called once in each
process, with the model, and returns the function that scores; `arguments` says what that function
takes for some rows. So a worker is sent the method and the queries once, and training examples a
block at a time; only this process reads and writes the store.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm  # as text, which a terminal shows too when a notebook runs there

from icprobe.data.paths import shown
from icprobe.scores.store import ScoreStore, StoreError

if TYPE_CHECKING:
    from icprobe.models import LM
    from icprobe.scores.experiment import Experiment
    from icprobe.scores.method import Method

LOCAL, RAY = ENGINES = ("local", "ray")

# a matrix [n, M] for each store, None for one where these rows are finished
Matrices = Sequence[np.ndarray | None]
BlockScorer = Callable[[Iterator[range]], Iterator[tuple[range, Matrices]]]

log = logging.getLogger("icprobe.scores")


def check(engine: str) -> None:
    """Raise ValueError if an engine is unknown."""
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, expected {' or '.join(map(repr, ENGINES))}")


def scorer(
    engine: str,
    experiment: Experiment,
    lm: LM,
    start: Callable[[LM], Callable[..., Matrices]],
    arguments: Callable[[range], tuple],
    train_ids: Sequence[str],
    worker_gib: float = 0,
) -> BlockScorer:
    """Return how blocks are scored.

    Args:
        engine: One of `ENGINES`.
        experiment: What is scored; workers load its model.
        lm: The experiment's model, for this process.
        start: See this module; it can be pickled. Not called where nothing is wanted.
        arguments: The same; called in this process.
        train_ids: Names of the rows, for messages.
        worker_gib: What the method holds in each process, beside the model.
    """
    if engine == RAY:
        from icprobe.scores import ray_engine  # Ray is an extra

        run = functools.partial(ray_engine.score_blocks, experiment, lm, start, arguments)
        return lambda wanted: run(worker_gib, wanted, train_ids=train_ids)
    held = functools.cache(lambda: start(lm))
    return lambda wanted: ((rows, held()(*arguments(rows))) for rows in wanted)


def block_size(method: Method, lm: LM, N: int) -> int:
    """Return how many training examples a new part of a method's store has."""
    size = method.block_size
    if isinstance(size, Mapping):
        size = size.get(lm.device.type, size["cpu"])
    return N if size is None else size


def fill(stores: Sequence[ScoreStore], scorer: BlockScorer, progress: bool = True) -> None:
    """Compute the missing blocks of stores that come out of one computation.

    Each block is written as it comes. Several processes that fill the same stores share the blocks:
    each skips what others have finished.

    Args:
        stores: With the same rows, in blocks of the same size.
        scorer: See this module; it may read wanted blocks ahead.
        progress: Show a progress bar.

    Raises:
        StoreError: If a part is damaged, scores are not finite or have the wrong shape, the disk
            refuses a part, or the stores' blocks differ. Finished blocks stay.
    """
    first, label = stores[0], ", ".join(dict.fromkeys(kept.method for kept in stores))
    if any((s.train_ids, s.block_size) != (first.train_ids, first.block_size) for s in stores):
        raise StoreError(f"{label}: filled together, but their blocks are not the same")
    missing = sorted({block for kept in stores for block in kept.missing()})
    for kept in stores:
        report(kept)
        if missing:
            kept.check()
    M, left = first.shape[1], missing[::-1]
    size = {"total": first.shape[0] * M, "initial": first.n_finished(missing) * M}
    with tqdm(desc=label, unit=" pairs", disable=not (progress and missing), **size) as bar:

        def wanted() -> Iterator[range]:
            while left:
                rows = first.rows(left.pop())
                if all(kept.finished(rows) for kept in stores):  # another process was faster
                    bar.update(len(rows) * M)
                else:
                    yield rows

        for rows, found in scorer(wanted()) if missing else ():  # else no workers are started
            if all(kept.finished(rows) for kept in stores):
                # shuffle, so that two processes rarely compute the same block
                np.random.default_rng().shuffle(left)
            for kept, scores in zip(stores, found, strict=True):
                if scores is not None:
                    kept.write(rows.start // kept.block_size, scores)
            bar.update(len(rows) * M)
    for kept in stores:
        kept.tidy()


def report(kept: ScoreStore) -> None:
    """Log how much of a store is reused; the record's fields are method, reused, total, folder."""
    total = len(kept.train_ids)
    fields = {"method": kept.method, "reused": kept.n_finished(kept.missing()), "total": total}
    where = shown(kept.folder)
    log.info(
        "%s: reused %d of %d rows from %s", *fields.values(), where,
        extra={**fields, "folder": where},
    )  # fmt: skip
