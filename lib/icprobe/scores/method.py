"""The one protocol of attribution methods: options, what all blocks share, and a block's scores.

A method is a frozen dataclass. Its fields are its options: they, its name and its version belong to
the key of its scores, beside the experiment. `scores.score` runs any of them through the store:

    prepared = method.prepare(lm, queries, pool)    once in each process
    scores = method.score(prepared, block)          for each block of training examples

Nothing else of a method knows about stores, resuming, Ray or progress.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from icprobe.data import COLUMNS

if TYPE_CHECKING:
    from icprobe.models import LM, Encoded


@dataclass(frozen=True)
class Examples:
    """n training examples or queries, as text and as the model's tokens."""

    rows: list[dict]  # with id, prompt, completion, task, content and type
    tokens: list[Encoded]
    max_length: int | None = None  # most tokens of one, which longer prompts were cut to

    @classmethod
    def of(cls, lm: LM, rows: Iterable[Mapping], max_length: int | None = None) -> Examples:
        """Encode rows; see `models.encode` for the errors."""
        from icprobe import models

        rows = [{name: row[name] for name in COLUMNS if name in row} for row in rows]
        return cls(rows, models.encode(lm, rows, max_length), max_length)

    @property
    def ids(self) -> list[str]:
        """The n ids, in order."""
        return [row["id"] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Examples:
        return Examples(self.rows[part], self.tokens[part], self.max_length)


class Inputs(NamedTuple):
    """What methods work on."""

    lm: LM
    pool: Examples
    queries: Examples


@dataclass(frozen=True)
class Output:
    """One matrix of a method, which has a store of its own."""

    name: str  # the store's method
    options: dict  # all that determines the scores beside the experiment: JSON-able
    unit: str  # of a score, a semicolon, and what its sign means


def setting(default: Any = None) -> Any:
    """Return a field of a method that does not change its scores, and so is not in their key."""
    return dataclasses.field(default=default, compare=False, metadata={"setting": True})


class Method(ABC):
    """An attribution method; subclasses are frozen dataclasses, see the module.

    Attributes:
        name: Of its store; letters, digits, dots, dashes, underscores.
        title: What figures and notebook 04's `rivals` call it; None where it is not ranked.
        unit: The unit of a score, a semicolon, and what its sign means, such as "nats; positive =
            the training example helps".
        version: Raise it when the code gives other numbers for the same options.
        notebook: The number of the notebook that makes the scores.
        block_size: Training examples in one part of the store, or by kind of device; None for all
            in one part, so that they are of one run.
        needs_pool: Whether `prepare` gets all training examples; else None.
        single_row: Id of the only row, for scores that do not depend on the training examples.
        local_only: Score in this process whatever the engine, where a worker would have to repeat
            most of the work.
        in_explorer: Whether pages for looking at single pairs show it.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    title: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    notebook: ClassVar[str] = "01"
    block_size: ClassVar[int | Mapping[str, int] | None] = 1024
    needs_pool: ClassVar[bool] = False
    single_row: ClassVar[str | None] = None
    local_only: ClassVar[bool] = False
    in_explorer: ClassVar[bool] = False

    @property
    def options(self) -> dict:
        """What of the scores' key is the method's, beside the name."""
        fields = [f.name for f in dataclasses.fields(self) if not f.metadata.get("setting")]
        return {"version": self.version, **{name: getattr(self, name) for name in fields}}

    @property
    def outputs(self) -> dict[str, Output]:
        """The matrices that `score` returns, by the name that notebooks use; usually one."""
        return {self.name: Output(self.name, self.options, self.unit)}

    @property
    def worker_gib(self) -> float:
        """Memory that a worker holds beside the model, for Ray."""
        return 0.0

    def only(self, names: Sequence[str]) -> Method:
        """Return the method without outputs that are not wanted, if that saves work."""
        return self

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:  # noqa: B027 - optional
        """Raise ValueError where scoring would fail later; called before a store is made."""

    def prepare(self, lm: LM, queries: Examples, pool: Examples | None) -> Any:
        """Return what all blocks share; called once in each process."""
        return lm, queries

    @abstractmethod
    def score(self, prepared: Any, train: Examples) -> np.ndarray | dict[str, np.ndarray]:
        """Return the scores [n, M] of n training examples, or several matrices by output.

        Positive = the training example helps. `prepared` is what `prepare` returned; a method with
        a `single_row` gets no example at all.
        """


class Block(NamedTuple):
    """Training examples to score at once: the block's number, and which outputs are wanted."""

    number: int
    outputs: Sequence[str]
    train: Examples


Scored = Iterator[tuple[int, dict[str, np.ndarray]]]  # numbers of blocks, scores by output


def score_block(method: Method, prepared: Any, block: Block) -> dict[str, np.ndarray]:
    """Return the wanted scores [n, M] of a block, by output."""
    method = method.only(block.outputs)
    scores = method.score(prepared, block.train)
    if not isinstance(scores, dict):
        (name,) = method.outputs
        return {name: scores}
    return {name: scores[name] for name in block.outputs}
