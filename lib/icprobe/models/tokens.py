"""One tokenisation for everybody: probing, gradients and fine-tuning take their ids from here.

Context, prompt and completion are each tokenised on their own, without special tokens, and their
ids are concatenated: no token spans a join, so a demonstration's prefix is the same for every query
and a completion's ids are the same whatever stands before them. One BOS leads where the tokenizer's
own default adds one.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import datasets

from icprobe.models.model import LM

# examples that are tokenised at once, so that a large pool's tokens are not all there twice
ENCODED_TOGETHER = 1000


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; `truncated` counts the prompt tokens cut off at the left."""

    id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    truncated: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and completion, without BOS."""
        return self.prompt + self.completion


def encode(lm: LM, examples: Iterable, max_length: int | None = None) -> list[Encoded]:
    """Tokenise examples: prompt and completion apart, without special tokens.

    Args:
        lm: The model, for its tokenizer.
        examples: Rows with id, prompt, completion; or encoded already, then they are returned as
            they are, whatever their length.
        max_length: Most tokens of one example, BOS included. Longer prompts lose tokens at their
            left, which is counted in `truncated` and warned about.

    Raises:
        ValueError: If a completion has no tokens or would lose some; names the example.
    """
    rows = list(examples)
    if rows and isinstance(rows[0], Encoded):
        return rows
    room = float("inf") if max_length is None else max_length - len(lm.bos)
    prompts, completions = _tokenise(lm, rows, "prompt"), _tokenise(lm, rows, "completion")
    encoded = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        if not completion:
            raise ValueError(f"example {row['id']!r}: the completion has no tokens")
        if len(completion) > room:
            raise ValueError(
                f"example {row['id']!r}: the completion has {len(completion)} tokens, which "
                f"max_length={max_length} would cut; raise max_length or shorten the example"
            )
        cut = int(max(0, len(prompt) + len(completion) - room))
        encoded.append(Encoded(row["id"], prompt[cut:], completion, cut))
    truncated = [e for e in encoded if e.truncated]
    if truncated:
        warnings.warn(
            f"{len(truncated)} of {len(encoded)} prompts lost tokens at the left to fit "
            f"max_length={max_length}, for instance {truncated[0].id!r} lost "
            f"{truncated[0].truncated}",
            stacklevel=2,
        )
    return encoded


def _tokenise(lm: LM, rows: list, column: str) -> list[tuple[int, ...]]:
    """Return the ids of each text; each token is one object, since a pool has it many times."""
    known: dict[int, int] = {}
    found = []
    for start in range(0, len(rows), ENCODED_TOGETHER):
        texts = [row[column] for row in rows[start : start + ENCODED_TOGETHER]]
        ids = lm.tokenizer(texts, add_special_tokens=False).input_ids
        found += [tuple(known.setdefault(i, i) for i in one) for one in ids]
    return found


def text_ids(lm: LM, text: str) -> tuple[int, ...]:
    """Return the ids of one text on its own, without special tokens."""
    return tuple(lm.tokenizer(text, add_special_tokens=False).input_ids) if text else ()


def sequence(lm: LM, example: Encoded, context: Sequence[int] = ()) -> tuple[list, list]:
    """Return input_ids [T] and completion_mask [T] (1 on completion tokens) of one sequence."""
    before = [*lm.bos, *context, *example.prompt]
    return [*before, *example.completion], [0] * len(before) + [1] * len(example.completion)


def training_rows(lm: LM, examples: Iterable) -> datasets.Dataset:
    """Return `input_ids` and `completion_mask`, as TRL takes them."""
    rows = []
    for example in encode(lm, examples):
        ids, mask = sequence(lm, example)
        rows.append({"id": example.id, "input_ids": ids, "completion_mask": mask})
    return datasets.Dataset.from_list(rows)
