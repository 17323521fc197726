"""Trainings on selected examples and what became of the queries, kept one by one.

    <scores_dir>/finetuned/<key>.json   what made it, learning curve, measures of each query
    <scores_dir>/finetuned/<key>/       its checkpoints, if the recipe saves some
    <scores_dir>/finetuned/<key>.jsonl  its answers, if they are to be kept

The key is a hash of all that determines the result, the texts trained on and evaluated included, so
a selection that several methods make is trained on once, and a run that stops goes on with the next
training. Records hold ids and numbers, no text: answers may repeat the data set's.
"""

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
from pydantic import Field, InstanceOf
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from icprobe import models
from icprobe.data import paths
from icprobe.finetuning import evaluation, sft
from icprobe.finetuning.recipe import Recipe
from icprobe.finetuning.sft import Trained
from icprobe.models import LM
from icprobe.scores import StoreError, store

FOLDER = "finetuned"
VERSION = 1  # raise it when the same recipe begins to train in another way


@dataclass(frozen=True, config={"strict": True})
class TrainingRun:
    """One training to make.

    Attributes:
        name: Of the selection, for people.
        rows: Which examples of the pool; none for the untouched model.
        seed: Of the training.
    """

    name: str
    rows: tuple[int, ...]
    seed: int = Field(0, ge=0)


UNTOUCHED = TrainingRun("untouched", ())  # the model as it is


class RunResult(NamedTuple):
    """What a training gave.

    Attributes:
        curve: See `sft.Trained`; no rows for the untouched model.
        measures: See `evaluation.evaluate`; Q rows.
        answers: Of open queries by id, if they were to be kept.
        checkpoints: See `sft.Trained`.
    """

    curve: pd.DataFrame
    measures: pd.DataFrame
    answers: dict[str, str]
    checkpoints: list[tuple[str, float]]


@dataclass(frozen=True, kw_only=True, config={"strict": True})
class Runs:
    """What all trainings that are compared have in common.

    Attributes:
        scores_dir: Folder of the records' folder.
        lm: The model that is trained anew each time.
        pool: The N examples that rows are numbers of.
        queries: The Q held-out queries, with options.
        recipe: See `Recipe`; the seed is each training's own.
        loss_on: See `sft.train`.
        max_length: See `models.encode`.
        n_answered: See `evaluation.evaluate`; of the first seed's models. Those of other seeds do
            not answer, which takes as long as a small training.
        answer_tokens: See `evaluation.evaluate`.
        keep_answers: Whether the texts of answers are wanted, too.
    """

    scores_dir: str | Path
    lm: InstanceOf[LM]
    pool: InstanceOf[datasets.Dataset]
    queries: InstanceOf[datasets.Dataset]
    recipe: Recipe
    loss_on: str = "completion"
    max_length: int | None = None
    n_answered: int | None = Field(None, ge=0)
    answer_tokens: int = Field(evaluation.ANSWER_TOKENS, ge=1)
    keep_answers: bool = False

    def run(self, runs: Sequence[TrainingRun], fresh: bool = False) -> list[RunResult]:
        """Make the trainings that are not finished, and return all results in the order asked for.

        Args:
            runs: The trainings; equal ones are made once.
            fresh: Make all of them anew.

        Raises:
            ValueError: As `sft.train` and `evaluation.evaluate`.
            FloatingPointError: If a loss or a log-likelihood is not finite; names the selection.
            StoreError: If a record is damaged, or cannot be written. Finished ones stay.
        """
        by_key = {self._key(run): run for run in runs}
        missing = [key for key, run in by_key.items() if fresh or not self._record(key, run)]
        folder = paths.shown(self._file("").parent)
        if missing and paths.is_reference(self._file("")):
            raise StoreError(f"{folder}: reference records are only read, take another folder")
        if fresh:
            for key in by_key:
                for kind in (".json", ".jsonl"):
                    self._file(key).with_suffix(kind).unlink(missing_ok=True)
        print(f"trainings: reused {len(by_key) - len(missing)} of {len(by_key)} from {folder}")
        for key in tqdm(missing, desc="trainings", unit=" trainings"):
            run = by_key[key]
            try:
                self._make(key, run)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{run.name}, seed {run.seed}: {error}. Finished trainings are kept."
                ) from error
        return [self._read(self._record(self._key(run), run)) for run in runs]

    def run_selections(
        self, chosen: Sequence[Mapping[str, np.ndarray]], fresh: bool = False
    ) -> dict[str, list[RunResult]]:
        """Train on the same selections with several seeds; see `run`.

        Args:
            chosen: For each seed, from 0 on, row numbers by the selection's name.
            fresh: Make all trainings anew.

        Returns:
            By selection, one result for each seed.
        """
        asked = [
            TrainingRun(name, tuple(map(int, rows)), seed)
            for seed, found in enumerate(chosen)
            for name, rows in found.items()
        ]
        by_name: dict[str, list[RunResult]] = {}
        for run, result in zip(asked, self.run(asked, fresh), strict=True):
            by_name.setdefault(run.name, []).append(result)
        return by_name

    def _n_answered(self, run: TrainingRun) -> int:
        """Return of how many open queries a run's model gives answers."""
        if run.seed:
            return 0
        n_open = sum(not options for options in self.queries["options"])
        return n_open if self.n_answered is None else min(self.n_answered, n_open)

    def identity(self, run: TrainingRun) -> dict:
        """Return everything that determines a training's result."""
        n = self._n_answered(run)
        recipe = asdict(replace(self.recipe, seed=run.seed)) if run.rows else None
        return {
            "versions": {"training": VERSION, "evaluation": evaluation.VERSION},
            "model": self.lm.identity,
            "max_length": self.max_length,
            "recipe": recipe,
            "loss_on": self.loss_on if run.rows else None,
            "examples": _fingerprint(self._examples(run), ("prompt", "completion")),
            "queries": _fingerprint(self.queries, ("id", "prompt", "completion", "options")),
            "answers": {"n": n, "tokens": self.answer_tokens} if n else None,
        }

    def _examples(self, run: TrainingRun) -> datasets.Dataset:
        return self.pool.select(list(run.rows))

    def _key(self, run: TrainingRun) -> str:
        return store.key("training", self.identity(run))

    def _file(self, key: str) -> Path:
        return paths.resolve(self.scores_dir) / FOLDER / f"{key}.json"

    def _record(self, key: str, run: TrainingRun) -> Path | None:
        """Return the record of a finished training, with all its checkpoints and answers.

        It is looked for in the records' folder, then among the reference records.
        """
        for folder in (paths.resolve(self.scores_dir), paths.REFERENCE_SCORES):
            file = folder / FOLDER / f"{key}.json"
            needed = [file]
            if self.keep_answers and self._n_answered(run):
                needed.append(file.with_suffix(".jsonl"))
            if all(path.exists() for path in needed):
                checkpoints = self._read(file).checkpoints
                if all(Path(name).is_dir() for name, _ in checkpoints):
                    return file
        return None

    def _make(self, key: str, run: TrainingRun) -> None:
        """Train, evaluate, and write the record."""
        file = self._file(key)
        trained = self._trained(run, file.with_suffix(""))
        n = self._n_answered(run)
        measures = evaluation.evaluate(
            trained.lm, self.queries, self.max_length, n, self.answer_tokens
        )
        checkpoints = [(Path(name).name, rate) for name, rate in trained.checkpoints]
        curve = trained.curve.to_dict("list")
        del trained  # in a kernel it refers to itself: many models would fill the memory
        gc.collect()
        record = {
            "identity": self.identity(run),
            "examples": list(self._examples(run)["id"]),
            "curve": curve,
            "checkpoints": checkpoints,
            "queries": list(measures.index),
            "measures": {
                name: [None if np.isnan(value) else round(value, 7) for value in measures[name]]
                for name in evaluation.MEASURES
            },
            "made_with": store.made_with(),
        }
        if self.keep_answers and n:
            answers = measures["answer"].dropna().items()
            lines = [json.dumps({"id": query, "answer": text}) for query, text in answers]
            _write(file.with_suffix(".jsonl"), "\n".join(lines))
        _write(file, json.dumps(record) + "\n")

    def _trained(self, run: TrainingRun, folder: Path) -> Trained:
        """Return the model after training, all in float32; checkpoints go to the folder."""
        if not run.rows:
            return Trained(sft.as_float32(self.lm), pd.DataFrame(), [])
        recipe = replace(self.recipe, seed=run.seed)
        examples = models.encode(self.lm, self._examples(run), self.max_length)
        where = folder if recipe.saves else None
        return sft.train(self.lm, examples, recipe, where, self.loss_on)

    def _read(self, file: Path) -> RunResult:
        """Read a record, or raise StoreError if it is damaged."""
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            measures = pd.DataFrame(record["measures"], index=record["queries"], dtype=float)
            checkpoints = [
                (str(file.with_suffix("") / name), rate) for name, rate in record["checkpoints"]
            ]
            if store.key("training", record["identity"]) != file.stem:
                raise ValueError("it is of another training")
            answers, beside = {}, file.with_suffix(".jsonl")
            if self.keep_answers and beside.exists():
                lines = map(json.loads, beside.read_text(encoding="utf-8").splitlines())
                answers = {line["id"]: line["answer"] for line in lines}
            return RunResult(pd.DataFrame(record["curve"]), measures, answers, checkpoints)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{paths.shown(file)} is damaged or foreign: {error}. Delete this file and run "
                "again; only its training will be made."
            ) from error


def _write(file: Path, text: str) -> None:
    """Let a file appear whole, in the place of one that may be there without what belongs to it."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {paths.shown(file)}: {error.strerror}") from error
    store.publish(file, text.encode())


def _fingerprint(rows: datasets.Dataset, columns: Sequence[str]) -> dict:
    """Return number and hash of the rows that are trained on or evaluated."""
    digest = hashlib.sha256()
    for row in rows.select_columns(list(columns)):
        digest.update(json.dumps([row[name] for name in columns]).encode() + b"\n")
    return {"n": len(rows), "sha256": digest.hexdigest()}
