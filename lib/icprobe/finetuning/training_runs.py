"""Trainings on selected examples and what became of the queries, kept one by one.

    <scores_dir>/finetuned/<key>.json   what made it, learning curve, measures of each query
    <scores_dir>/finetuned/<key>.jsonl  its answers, if they are to be kept

The key is a hash of all that determines the result, the texts trained on and evaluated included, so
a selection that several methods make is trained on once, and a run that stops goes on with the next
training. Records hold ids and numbers, no text: answers may repeat the data set's.
"""

import copy
import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from icprobe import models
from icprobe.data import paths
from icprobe.finetuning import evaluation, sft
from icprobe.finetuning.recipe import Recipe
from icprobe.models import LM
from icprobe.scores import StoreError, store

FOLDER = "finetuned"
VERSION = 1  # raise it when the same recipe begins to train in another way


class RunResult(NamedTuple):
    """What a training gave.

    The learning curve (see `sft.Trained`; no rows for the untouched model), the measures of Q
    queries (see `evaluation.evaluate`) and answers of open queries by id, if they were to be kept.
    """

    curve: pd.DataFrame
    measures: pd.DataFrame
    answers: dict[str, str]


class _Training(NamedTuple):
    name: str  # of the selection, for people
    rows: tuple[int, ...]  # of the pool; none for the untouched model
    seed: int


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What all trainings that are compared have in common.

    A model is trained anew each time on rows of the pool; the recipe's seed is each training's own.
    The first seed's models give n_answered open queries an answer (all by default), those of other
    seeds none, which takes as long as a small training.
    """

    scores_dir: str | Path
    lm: LM
    pool: datasets.Dataset
    queries: datasets.Dataset
    recipe: Recipe
    loss_on: str = "completion"
    max_length: int | None = None
    n_answered: int | None = None
    answer_tokens: int = evaluation.ANSWER_TOKENS
    keep_answers: bool = False

    def untouched(self, fresh: bool = False) -> RunResult:
        """Return the result of the model as it is; see `run`."""
        return self._results([_Training("untouched", (), 0)], fresh)[0]

    def run(
        self, chosen: Sequence[Mapping[str, Sequence[int]]], fresh: bool = False
    ) -> dict[str, list[RunResult]]:
        """Make the trainings that are not finished, or all if fresh; return all results.

        The selections are, for each seed from 0 on, row numbers of the pool by name; results are
        by name, one for each seed.

        Raises:
            FloatingPointError: If a loss or a log-likelihood is not finite; names the selection.
            StoreError: If a record is damaged, or cannot be written. Finished ones stay.
        """
        asked = [
            _Training(name, tuple(map(int, rows)), seed)
            for seed, selections in enumerate(chosen)
            for name, rows in selections.items()
        ]
        found: dict[str, list[RunResult]] = {}
        for training, result in zip(asked, self._results(asked, fresh), strict=True):
            found.setdefault(training.name, []).append(result)
        return found

    def _results(self, asked: Sequence[_Training], fresh: bool) -> list[RunResult]:
        by_key = {self._key(training): training for training in asked}
        missing = [key for key, one in by_key.items() if fresh or not self._record(key, one)]
        own = self._file("").parent
        if missing and paths.is_reference(own):
            raise StoreError(f"{paths.shown(own)}: reference records are only read")
        if fresh:
            for key in by_key:
                for kind in (".json", ".jsonl"):
                    self._file(key).with_suffix(kind).unlink(missing_ok=True)
        reused = len(by_key) - len(missing)
        print(f"trainings: reused {reused} of {len(by_key)} from {paths.shown(own)}")
        for key in tqdm(missing, desc="trainings", unit=" trainings"):
            name, _, seed = by_key[key]
            try:
                self._make(key, by_key[key])
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{name}, seed {seed}: {error}. Finished trainings are kept."
                ) from error
        return [self._read(self._record(self._key(one), one)) for one in asked]

    def _n_answered(self, training: _Training) -> int:
        """Return how many open queries the model answers."""
        if training.seed:
            return 0
        n_open = sum(not options for options in self.queries["options"])
        return n_open if self.n_answered is None else min(self.n_answered, n_open)

    def _identity(self, training: _Training) -> dict:
        """Return everything that determines the result."""
        n = self._n_answered(training)
        recipe = asdict(replace(self.recipe, seed=training.seed)) if training.rows else None
        return {
            "versions": {"training": VERSION, "evaluation": evaluation.VERSION},
            "model": self.lm.identity,
            "max_length": self.max_length,
            "recipe": recipe,
            "loss_on": self.loss_on if training.rows else None,
            "examples": _fingerprint(self._examples(training), ("prompt", "completion")),
            "queries": _fingerprint(self.queries, ("id", "prompt", "completion", "options")),
            "answers": {"n": n, "tokens": self.answer_tokens} if n else None,
        }

    def _examples(self, training: _Training) -> datasets.Dataset:
        return self.pool.select(list(training.rows))

    def _key(self, training: _Training) -> str:
        return store.key("training", self._identity(training))

    def _file(self, key: str) -> Path:
        return paths.resolve(self.scores_dir) / FOLDER / f"{key}.json"

    def _record(self, key: str, training: _Training) -> Path | None:
        """Return the record, with its answers if they are wanted, of this run or the reference."""
        answers = self.keep_answers and self._n_answered(training)
        for folder in (paths.resolve(self.scores_dir), paths.REFERENCE_SCORES):
            file = folder / FOLDER / f"{key}.json"
            if file.exists() and (not answers or file.with_suffix(".jsonl").exists()):
                return file
        return None

    def _make(self, key: str, training: _Training) -> None:
        """Train, evaluate, and write the record."""
        lm, curve = self.lm, pd.DataFrame()
        if training.rows:
            recipe = replace(self.recipe, seed=training.seed)
            examples = models.encode(lm, self._examples(training), self.max_length)
            lm, curve, _ = sft.train(lm, examples, recipe, loss_on=self.loss_on)
        elif lm.model.dtype != torch.float32:  # as trained ones are
            lm = replace(lm, model=copy.deepcopy(lm.model).float())
        n = self._n_answered(training)
        measures = evaluation.evaluate(lm, self.queries, self.max_length, n, self.answer_tokens)
        del lm  # in a kernel it refers to itself: many models would fill the memory
        gc.collect()
        record = {
            "identity": self._identity(training),
            "examples": list(self._examples(training)["id"]),
            "curve": curve.to_dict("list"),
            "queries": list(measures.index),
            "measures": {
                name: [None if np.isnan(value) else round(value, 7) for value in measures[name]]
                for name in evaluation.MEASURES
            },
            "made_with": store.made_with(),
        }
        file = self._file(key)
        if self.keep_answers and n:
            for old in (file, file.with_suffix(".jsonl")):  # one of the two, or damaged
                old.unlink(missing_ok=True)
            answers = measures["answer"].dropna().items()
            lines = [json.dumps({"id": query, "answer": text}) for query, text in answers]
            store.publish(file.with_suffix(".jsonl"), "\n".join(lines).encode())
        store.publish(file, (json.dumps(record) + "\n").encode())

    def _read(self, file: Path) -> RunResult:
        """Read a record, or raise StoreError if it is damaged."""
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            measures = pd.DataFrame(record["measures"], index=record["queries"], dtype=float)
            if store.key("training", record["identity"]) != file.stem:
                raise ValueError("it is of another training")
            answers, beside = {}, file.with_suffix(".jsonl")
            if self.keep_answers and beside.exists():
                lines = map(json.loads, beside.read_text(encoding="utf-8").splitlines())
                answers = {line["id"]: line["answer"] for line in lines}
            return RunResult(pd.DataFrame(record["curve"]), measures, answers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{paths.shown(file)} is damaged or foreign: {error}. Delete this file and run "
                "again; only its training will be made."
            ) from error


def _fingerprint(rows: datasets.Dataset, columns: Sequence[str]) -> dict:
    """Return number and hash of the rows that are trained on or evaluated."""
    digest = hashlib.sha256()
    for row in rows.select_columns(list(columns)):
        digest.update(json.dumps([row[name] for name in columns]).encode() + b"\n")
    return {"n": len(rows), "sha256": digest.hexdigest()}
