"""Scores of an experiment: `score` fills the stores of any methods, `load` reads finished ones.

Finished scores are looked for in the experiment's own folder, then among the committed reference
scores, which are never written to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from icprobe.data import paths
from icprobe.scores import engines, store
from icprobe.scores.experiment import Experiment
from icprobe.scores.method import Examples, Method, Output, matrices
from icprobe.scores.store import ScoresNotFound, ScoreStore

if TYPE_CHECKING:
    from icprobe.models import LM

Methods = Method | Iterable[Method]


def score(
    experiment: Experiment,
    methods: Methods,
    lm: LM | None = None,
    engine: str = engines.LOCAL,
    fresh: bool = False,
) -> dict[str, np.ndarray]:
    """Score all pairs of an experiment: finished blocks are reused, and finished scores only read.

    Args:
        experiment: What is scored (its pool of N, its M queries) and where the scores lie.
        methods: One method or several.
        lm: The experiment's model; loaded where something is missing, by default.
        engine: "local" or "ray", see `engines`.
        fresh: Compute everything anew, in the experiment's own folder.

    Returns:
        float32 [N, M] by output, see `Method.outputs`; [1, M] of a method with a `single_row`.

    Raises:
        ValueError: If the engine is unknown, the model is not the experiment's, or a method cannot
            score something, before anything is computed.
        FloatingPointError: If a gradient or a log-likelihood is not finite; names the example.
        StoreError: If scores are not finite or have a wrong shape, or a part is damaged.
    """
    engines.check(engine)

    @functools.cache
    def inputs() -> tuple[LM, Examples, Examples]:
        model = lm or experiment.load_model()
        return model, *experiment.examples(model)

    found = {}
    for method in _listed(methods):
        kept = {} if fresh else _finished(experiment, method)
        missing = [name for name in method.outputs if name not in kept]
        if missing:
            kept |= _fill(experiment, method.only(missing), missing, inputs, engine, fresh)
        found |= {name: kept[name].matrix() for name in method.outputs}
    return found


def load(
    experiment: Experiment, methods: Methods, how_to_make: str | None = None
) -> dict[str, np.ndarray]:
    """Return finished scores as `score` does; needs neither the model nor the data.

    Args:
        experiment: What was scored.
        methods: One method or several.
        how_to_make: What to run if scores are not there, for the message; by default the method's
            notebook.

    Raises:
        ScoresNotFound: If they are not there; says what to run, and names the nearest there are.
        StoreError: If a part is damaged.
    """
    return {
        name: _found(experiment, method, output, how_to_make).matrix()
        for method in _listed(methods)
        for name, output in method.outputs.items()
    }


def variants(experiment: Experiment, output: Output) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield options and scores of all finished stores of an output, whatever its options."""
    wanted = {**store.plain(experiment.identity), "options": None}
    seen = set()
    for folder in _folders(experiment):
        for kept in store.find_all(folder, output.name):
            if kept.name not in seen and {**kept.identity, "options": None} == wanted:
                seen.add(kept.name)
                yield kept.identity["options"], kept.matrix()


def _listed(methods: Methods) -> list[Method]:
    return [methods] if isinstance(methods, Method) else list(methods)


def _identity(experiment: Experiment, method: Method, output: Output) -> dict:
    """Return everything that determines an output's scores."""
    unused = "train" if method.single_row else None
    parts = {name: part for name, part in experiment.identity.items() if name != unused}
    return {**parts, "options": output.options}


def _folders(experiment: Experiment) -> list[Path]:
    return [paths.resolve(experiment.scores_dir), paths.REFERENCE_SCORES]


def _found(
    experiment: Experiment, method: Method, output: Output, how_to_make: str | None
) -> ScoreStore:
    """Return the finished store of an output.

    Raises:
        ScoresNotFound: If there is none.
    """
    identity = _identity(experiment, method, output)
    if how_to_make is None:
        how_to_make = f"run notebook {method.notebook} with these parameters"
    return store.find(_folders(experiment), output.name, identity, how_to_make)


def _finished(experiment: Experiment, method: Method) -> dict[str, ScoreStore]:
    """Return the finished stores by output."""
    found = {}
    for name, output in method.outputs.items():
        with suppress(ScoresNotFound):
            found[name] = _found(experiment, method, output, "")
            engines.report(found[name])
    return found


def _fill(
    experiment: Experiment,
    method: Method,
    names: Sequence[str],
    inputs: Callable[[], tuple[LM, Examples, Examples]],
    engine: str,
    fresh: bool,
) -> dict[str, ScoreStore]:
    """Fill the stores of some outputs, and return them by output."""
    lm, pool, queries = inputs()
    method.check(lm, pool, queries)
    train_ids = [method.single_row] if method.single_row else pool.ids
    block_size = engines.block_size(method, lm, len(pool))
    stores = {}
    for name in names:
        output = method.outputs[name]
        stores[name] = store.open(
            experiment.scores_dir,
            output.name,
            _identity(experiment, method, output),
            train_ids,
            queries.ids,
            block_size=block_size,
            fresh=fresh,
            description=output.unit,
        )
        block_size = stores[name].block_size  # one that was there keeps its own

    def arguments(rows: range) -> tuple[Examples, list[str]]:
        wanted = [name for name, kept in stores.items() if not kept.finished(rows)]
        return pool[rows.start : rows.stop][: 0 if method.single_row else None], wanted

    started = functools.partial(start, method, queries, pool if method.needs_pool else None, names)
    scorer = engines.scorer(
        engines.LOCAL if method.local_only else engine,
        experiment,
        lm,
        started,
        arguments,
        train_ids,
        method.worker_gib,
    )
    engines.fill(list(stores.values()), scorer)
    return stores


def start(
    method: Method, queries: Examples, pool: Examples | None, names: Sequence[str], lm: LM
) -> Callable[[Examples, list[str]], list[np.ndarray | None]]:
    """Prepare a method in this process; return the function that scores blocks."""
    prepared = method.prepare(lm, queries, pool)

    def score_block(train: Examples, wanted: list[str]) -> list[np.ndarray | None]:
        if not wanted:  # another process was faster
            return [None] * len(names)
        asked = method.only(wanted)
        found = matrices(asked, asked.score(prepared, train))
        return [found[name] if name in wanted else None for name in names]

    return score_block
