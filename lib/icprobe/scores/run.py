"""Scores of an experiment: `score` fills the stores of any methods, `load` reads finished ones.

Finished scores are looked for in the experiment's own folder, then among the committed reference
scores, which are never written to. Blocks of training examples are scored in this process or, with
Ray, by workers (see `ray_engine`); only this process reads and writes stores.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm  # as text, which a terminal shows too when a notebook runs there

from icprobe.data import paths
from icprobe.scores import store
from icprobe.scores.experiment import Experiment
from icprobe.scores.method import Block, Examples, Inputs, Method, Output, Scored, score_block
from icprobe.scores.store import ScoresNotFound, ScoreStore

if TYPE_CHECKING:
    from icprobe.models import LM

LOCAL, RAY = ENGINES = ("local", "ray")
Methods = Method | Iterable[Method]


def score(
    experiment: Experiment,
    methods: Methods,
    lm: LM | None = None,
    engine: str = LOCAL,
    fresh: bool = False,
) -> dict[str, np.ndarray]:
    """Score all pairs of an experiment: finished blocks are reused, and finished scores only read.

    The experiment's model is loaded where something is missing, unless it is given as `lm`. With
    `fresh`, everything is computed anew, in the experiment's own folder.

    Returns:
        float32 [N, M] by output, see `Method.outputs`; [1, M] of a method with a `single_row`.

    Raises:
        ValueError: If the engine is neither "local" nor "ray", the model is not the experiment's,
            or a method cannot score something, before anything is computed.
        FloatingPointError: If a gradient or a log-likelihood is not finite; names the example.
        StoreError: If scores are not finite or have a wrong shape, or a part is damaged.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, expected {' or '.join(map(repr, ENGINES))}")

    @functools.cache
    def inputs() -> Inputs:
        model = lm or experiment.load_model()
        return Inputs(model, *experiment.examples(model))

    stores, unfinished = {}, []
    for method in _listed(methods):
        kept = {} if fresh else _finished(experiment, method)
        missing = [name for name in method.outputs if name not in kept]
        if missing:
            method.check(*inputs())
            unfinished.append((method, missing))
        stores |= dict.fromkeys(method.outputs)  # their order; None is still to be made
        stores |= kept
    _print_reuse([kept for kept in stores.values() if kept])
    for method, missing in unfinished:
        opened = _open(experiment, method, missing, inputs(), fresh)
        _print_reuse(opened.values())
        stores |= opened
        score_blocks = _score_here
        if engine == RAY and not method.local_only:
            from icprobe.scores import ray_engine  # Ray is an extra

            score_blocks = functools.partial(ray_engine.score_blocks, experiment.model)
        _fill(method, opened, inputs(), score_blocks)
    return {name: kept.matrix() for name, kept in stores.items()}


def load(
    experiment: Experiment, methods: Methods, how_to_make: str | None = None
) -> dict[str, np.ndarray]:
    """Return finished scores as `score` does; needs neither the model nor the data.

    Raises:
        ScoresNotFound: If they are not there; says `how_to_make` them (by default, the method's
            notebook), and names the nearest there are.
        StoreError: If a part is damaged.
    """
    found = {}
    for method in _listed(methods):
        how = how_to_make or f"run notebook {method.notebook} with these parameters"
        for name, key in _keys(experiment, method).items():
            found[name] = store.find(_folders(experiment), *key, how).matrix()
    return found


def variants(experiment: Experiment, output: Output) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield options and scores of all finished stores of an output, whatever its options."""
    wanted = {**store.plain(experiment.identity), "options": None}
    seen = set()
    for folder in _folders(experiment):
        for kept in store.find_all(folder, output.name):
            if kept.folder.name not in seen and {**kept.identity, "options": None} == wanted:
                seen.add(kept.folder.name)
                yield kept.identity["options"], kept.matrix()


def compute(
    method: Method,
    lm: LM,
    train: Iterable[Mapping],
    queries: Iterable[Mapping],
    max_length: int | None = None,
) -> dict[str, np.ndarray]:
    """Return a method's scores without any store: float32 [N, M] by output; for errors: `score`.

    Training examples and queries are rows with id, prompt, completion (and what else the method
    reads), of at most `max_length` tokens, see `models.encode`.
    """
    pool, asked = (Examples.of(lm, rows, max_length) for rows in (train, queries))
    inputs = Inputs(lm, pool, asked)
    method.check(*inputs)
    rows, size = _rows(method, pool), _block_size(method, inputs)
    starts = range(0, 1 if method.single_row else len(pool), size)
    blocks = [Block(k, list(method.outputs), rows[k : k + size]) for k in starts]
    blocks = tqdm(blocks, desc=method.name, unit=" blocks", leave=False)
    parts = [found for _, found in _score_here(method, inputs, blocks)]
    scores = {}
    for name in method.outputs:
        scores[name] = np.concatenate([part[name] for part in parts]).astype(np.float32)
        for i, j in np.argwhere(~np.isfinite(scores[name])):
            pair = f"{pool.ids[i]!r} on {asked.ids[j]!r}"
            raise FloatingPointError(f"{name}: the score of {pair} is not finite")
    return scores


def fill(
    stores: Mapping[str, ScoreStore],
    train: Sequence,
    score_blocks: Callable[[Iterator[Block]], Scored],
) -> None:
    """Compute the missing blocks of stores with the same rows and block size, by output.

    Each block is written as it comes. Several processes that fill the same stores share the blocks:
    each skips what others have finished.

    Args:
        stores: By output.
        train: What has a slice for each block.
        score_blocks: Takes blocks as they are wanted (it may read ahead), and yields their numbers
            and scores, in any order.
    """
    kept = list(stores.values())
    first, (N, M) = kept[0], kept[0].shape
    left = sorted({block for one in kept for block in one.missing()}, reverse=True)
    there = N - sum(len(first.rows(block)) for block in left)

    def wanted() -> Iterator[Block]:
        while left:
            block = left.pop()
            rows = first.rows(block)
            names = [name for name, one in stores.items() if not one.finished(block)]
            if names:
                yield Block(block, names, train[rows.start : rows.stop])
            else:  # another process was faster
                bar.update(len(rows) * M)

    size = {"total": N * M, "initial": there * M, "unit": " pairs"}
    with tqdm(desc=_names(kept), disable=not left, **size) as bar:
        for block, found in score_blocks(wanted()) if left else ():
            if all(one.finished(block) for one in kept):
                # shuffle, so that two processes rarely compute the same block
                np.random.default_rng().shuffle(left)
            for name, scores in found.items():
                stores[name].write(block, scores)
            bar.update(len(first.rows(block)) * M)
    for one in kept:
        one.tidy()


def _listed(methods: Methods) -> list[Method]:
    return [methods] if isinstance(methods, Method) else list(methods)


def _folders(experiment: Experiment) -> list[Path]:
    return [paths.resolve(experiment.scores_dir), paths.REFERENCE_SCORES]


def _keys(experiment: Experiment, method: Method) -> dict[str, tuple[str, dict]]:
    """Return by output all that determines its scores: the store's method and identity."""
    same = dict(experiment.identity)
    if method.single_row:
        del same["train"]
    return {
        name: (output.name, {**same, "options": output.options})
        for name, output in method.outputs.items()
    }


def _finished(experiment: Experiment, method: Method) -> dict[str, ScoreStore]:
    found = {}
    for name, key in _keys(experiment, method).items():
        with suppress(ScoresNotFound):
            found[name] = store.find(_folders(experiment), *key)
    return found


def _open(
    experiment: Experiment, method: Method, names: Sequence[str], inputs: Inputs, fresh: bool
) -> dict[str, ScoreStore]:
    """Return the unfinished stores of some outputs, whose finished parts are as they should be."""
    keys, size = _keys(experiment, method), _block_size(method, inputs)
    ids = [method.single_row] if method.single_row else inputs.pool.ids, inputs.queries.ids
    opened = {}
    for name in names:
        where = experiment.scores_dir, *keys[name], *ids
        opened[name] = store.open(*where, size, fresh, method.outputs[name].unit)
        opened[name].check()
    return opened


def _block_size(method: Method, inputs: Inputs) -> int:
    size = method.block_size
    if isinstance(size, Mapping):
        size = size.get(inputs.lm.device.type, size["cpu"])
    return len(inputs.pool) if size is None else size


def _rows(method: Method, pool: Examples) -> Examples:
    """Return what `method.score` gets the blocks of."""
    return pool[:0] if method.single_row else pool


def _fill(
    method: Method, opened: Mapping[str, ScoreStore], inputs: Inputs, score_blocks: Callable
) -> None:
    """Fill stores by output; those that were begun may have other block sizes."""
    by_size = defaultdict(dict)
    for name, kept in opened.items():
        by_size[kept.block_size][name] = kept
    for stores in by_size.values():
        score = functools.partial(score_blocks, method.only(list(stores)), inputs)
        fill(stores, _rows(method, inputs.pool), score)


def _score_here(method: Method, inputs: Inputs, blocks: Iterable[Block]) -> Scored:
    """Yield numbers and scores of blocks, made in this process."""
    lm, pool, queries = inputs
    prepared = method.prepare(lm, queries, pool if method.needs_pool else None)
    for block in blocks:
        yield block.number, score_block(method, prepared, block)


def _names(stores: Iterable[ScoreStore]) -> str:
    names = list(dict.fromkeys(kept.method for kept in stores))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _print_reuse(stores: Collection[ScoreStore]) -> None:
    if not stores:
        return
    there = sum(kept.n_finished() for kept in stores)
    total = sum(len(kept.train_ids) for kept in stores)
    where = ", ".join(dict.fromkeys(paths.shown(kept.folder.parent) for kept in stores))
    print(f"{_names(stores)}: {there} of {total} rows were there ({where})")
