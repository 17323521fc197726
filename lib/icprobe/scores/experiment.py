"""What is scored, said once: a model, a training pool and a query set, and where the scores lie.

Every notebook builds the same `Experiment` from its parameters. Its identity is declared (hashes,
revisions, suite texts), so finished scores are found without the model and without the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from icprobe import data
from icprobe.models.identities import TEMPLATE_VERSION
from icprobe.models.identities import identity as model_identity
from icprobe.scores.method import Examples

if TYPE_CHECKING:
    import datasets

    from icprobe.models import LM

_CHANGED = "was changed since it was first read: start again (in Jupyter, restart the kernel)"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model (see `models.load`), N training examples and M queries (see `data.load`).

    Attributes:
        scores_dir: Folder of the score stores.
        n_train: N, None for all of the pool; n_query: M, None for all.
        max_length: Most tokens of one example, see `models.encode`.
    """

    scores_dir: str
    model: str
    train: str
    queries: str
    train_split: str = "train"
    query_split: str = "query"
    n_train: int | None = None
    n_query: int | None = None
    seed: int = 0
    dtype: str = "float32"
    max_length: int | None = None
    train_columns: Mapping[str, str | None] | None = None
    query_columns: Mapping[str, str | None] | None = None

    @property
    def _sources(self) -> dict[str, data.Source]:
        pool = self.train, self.train_split, self.n_train, self.seed, self.train_columns
        queries = self.queries, self.query_split, self.n_query, self.seed, self.query_columns
        return {"train": data.Source(*pool), "queries": data.Source(*queries)}

    def load_data(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Return the training pool (N rows) and the queries (M rows); loaded once.

        Raises data.DataError if they are bad. A query that is also a training example is an error
        in a suite and a warning in one's own data.
        """
        return tuple(rows for rows, _ in self._loaded.values())

    @cached_property
    def _loaded(self) -> dict[str, tuple[datasets.Dataset, dict]]:
        """The rows and the identity of the pool and of the queries."""
        found = {name: source.load() for name, source in self._sources.items()}
        for name, (_, who) in found.items():
            if "identity" in vars(self) and self.identity[name] != who:
                raise data.DataError(f"{getattr(self, name)} {_CHANGED}")
        suites = data.is_suite(self.train) and data.is_suite(self.queries)
        data.check_disjoint(*(rows for rows, _ in found.values()), warn=not suites)
        return found

    @cached_property
    def identity(self) -> dict:
        """Everything that determines the scores but the method's own options."""
        if "_loaded" in vars(self):  # of the bytes that were read, whatever the file is by now
            sources = {name: who for name, (_, who) in self._loaded.items()}
        else:
            sources = {name: source.identity() for name, source in self._sources.items()}
        return {
            "template": TEMPLATE_VERSION,
            "model": model_identity(self.model, self.dtype),
            "max_length": self.max_length,
            **sources,
        }

    def load_model(self) -> LM:
        """Load the experiment's model in its dtype."""
        from icprobe import models

        return models.load(self.model, self.dtype)

    def examples(self, lm: LM) -> tuple[Examples, Examples]:
        """Return pool and queries as text and tokens; ValueError if the model is another one."""
        if lm.identity != self.identity["model"]:
            raise ValueError(f"model {lm.identity} is not {self.identity['model']}")
        return tuple(Examples.of(lm, rows, self.max_length) for rows in self.load_data())

    def held_out(
        self,
        evaluation: str | None = None,
        split: str = "evaluation",
        n: int | None = None,
        columns: Mapping[str, str | None] | None = None,
    ) -> tuple[np.ndarray, datasets.Dataset]:
        """Return column numbers of the queries that may select data, and Q others to evaluate on.

        Those are of the source `evaluation`, see `data.load`; by default, of a suite its evaluation
        split, of other queries a random half (at most n of it), which then does not select. Of own
        queries, those with equal prompts are on one side.

        Raises:
            data.DataError: If the text of an evaluation query is also in the pool or selects, there
                are too few queries to halve, or as `data.load`.
        """
        pool, queries = self.load_data()
        selecting = np.arange(len(queries))
        if evaluation is None and not data.is_suite(self.queries):
            evaluating, selecting = _halves(queries["prompt"], self.seed)
            if not len(evaluating):
                raise data.DataError(f"{self.queries}: one query cannot both select and evaluate")
            found = queries.select(np.sort(evaluating[:n]))
        else:
            found = data.load(evaluation or self.queries, split, n, self.seed, columns)
        for rows, name in ((pool, "training example"), (queries.select(selecting), "query")):
            data.check_disjoint(rows, found, names=(name, "evaluation query"))
        return selecting, found

    def pools(self, condition_pools: Mapping[str, Sequence[int]]) -> dict[str, Experiment]:
        """Return the same on [N, M] training examples and queries of suites, by the suite's name.

        Raises ValueError if a name is no suite, or a size no whole number from 1 or more than there
        is: before anything is scored.
        """
        names = "scores_dir", "model", "seed", "dtype", "max_length"
        found, same = {}, {name: getattr(self, name) for name in names}
        for suite, sizes in condition_pools.items():
            try:
                N, M = sizes
                if not data.is_suite(suite):
                    raise ValueError("it is not a suite")
                one = Experiment(**same, train=suite, queries=suite, n_train=N, n_query=M)
                one.load_data()
            except (TypeError, ValueError) as error:
                where = f"condition_pools: {suite!r}: {sizes!r}"
                raise ValueError(f"{where}, expected a suite and [N, M]: {error}") from error
            found[suite] = one
        return found

    def part(self, n_train: int | None, n_query: int | None) -> Experiment:
        """Return the same on at most so many of its examples, None for all; for slow methods.

        A side that keeps all its examples keeps its name, too: their scores are the same ones.
        """
        own = self.n_train, self.n_query
        N, M = (
            n if most is None or most >= len(rows) else most
            for rows, most, n in zip(self.load_data(), (n_train, n_query), own, strict=True)
        )
        return replace(self, n_train=N, n_query=M)

    def indices_in(self, whole: Experiment) -> tuple[np.ndarray, np.ndarray]:
        """Return where this experiment's examples are in a larger one: row and column numbers.

        Raises ValueError if some are not among the larger one's, or have other texts there.
        """
        found = []
        for mine, theirs in zip(self.load_data(), whole.load_data(), strict=True):
            found.append(pd.Index(theirs["id"]).get_indexer(mine["id"]))
            if (found[-1] < 0).any():
                raise ValueError(f"{mine['id'][int(found[-1].argmin())]!r} is not in {whole.train}")
            for own, other in zip(mine, theirs.select(found[-1]), strict=True):
                if data.plain_text(own) != data.plain_text(other):
                    raise ValueError(f"{own['id']!r}: its file {_CHANGED}")
        return tuple(found)

    def expand_to(self, whole: Experiment, scores: np.ndarray) -> np.ndarray:
        """Return this experiment's scores [n, m] in NaN for all pairs of a larger one: [N, M]."""
        among = np.full([len(rows) for rows in whole.load_data()], np.nan)
        among[np.ix_(*self.indices_in(whole))] = scores
        return among


def _halves(prompts: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two random halves of row numbers, the second in order; equal prompts are in one."""
    codes, different = pd.factorize(np.asarray(prompts))
    place = np.random.default_rng(seed).permutation(len(different)).argsort()[codes]
    order = np.argsort(place, kind="stable")
    half = np.searchsorted(place[order], len(different) // 2)
    return order[:half], np.sort(order[half:])
