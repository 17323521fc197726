"""In-context probing: put one training example into the prompt, see what the right answers gain.

The context is the preamble (if any) and the separator, the demonstration's prompt and completion,
and the separator; then come the query's prompt and completion. With l_ij the log-likelihood of
completion j after demonstration i and l0_j the one without any context, the gain is

    G_ij = l_ij - l0_j        [N, M], nats, positive = the training example helps

and the published ICP score of example i is the share of queries that it helps, mean_j 1[G_ij > 0]
(Jiao et al. 2025, after the "golden score" of Li et al. 2023).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from icprobe import models
from icprobe.scores.method import Examples, Method

if TYPE_CHECKING:
    from icprobe.models import LM, Encoded


PUBLISHED_PREAMBLE = "These examples may be helpful to answer the question"

SEPARATOR = "\n\n"

NEUTRAL_STEPS = (16, 4)  # tokens: lengths of replaced inputs and answers are rounded to these

TEXTS_TOGETHER = 4  # neutral texts scored in one call, so that several CPU threads have work

# uninformative inputs and answers are cut from this text: fluent, but about nothing in particular
NEUTRAL_TEXT = (
    "This is a piece of text that was put here to fill some space. It goes on for a while and then "
    "it ends, and nothing in it matters for what comes next. There is no need to remember any of "
    "it. The words follow one another as words do, one line after the other, until there are "
    "enough of them. "
)


def context(lm: LM, demonstration: Encoded, preamble: str = "") -> tuple[int, ...]:
    """Return the token ids that stand before a query's prompt; nothing if both parts are empty."""
    end = models.text_ids(lm, SEPARATOR)
    parts = models.text_ids(lm, preamble), demonstration.ids
    return tuple(token for part in parts if part for token in (*part, *end))


def log_likelihoods(
    lm: LM,
    queries: Iterable,
    demonstrations: Iterable | None = None,
    preamble: str = "",
    max_length: int | None = None,
) -> np.ndarray:
    """Return log p(completion_j | demonstration_i, prompt_j): sums over completion tokens, nats.

    Queries and demonstrations are rows with id, prompt, completion (or encoded already), of at most
    `max_length` tokens, see `models.encode`; without demonstrations, no preamble stands either.

    Returns:
        float32 [N, M], one row per demonstration in the order given; [M] when zero-shot.

    Raises:
        ValueError: If a completion would lose tokens, or a sequence is too long for the model.
    """
    encoded = models.encode(lm, queries, max_length)
    if demonstrations is None:
        return models.log_likelihoods(lm, encoded)[0]
    shown = models.encode(lm, demonstrations, max_length)
    return models.log_likelihoods(lm, encoded, [context(lm, one, preamble) for one in shown])


def neutral_demonstrations(
    lm: LM, demonstrations: Sequence[dict], max_length: int | None = None
) -> list[Encoded]:
    """Return an uninformative demonstration of the same form and about the same length.

    The frame stays: first and last lines of prompts that several demonstrations share (instruction
    and answer label), or else the label of such a line ("Question:"). All other text, and the
    answer, becomes text about nothing. What a query gains from it comes from form and length; what
    it gains beyond, from the content. Replaced parts have the tokens of the original to the nearest
    multiple of `NEUTRAL_STEPS`, so that few different texts serve all.
    """
    filler = np.array(models.text_ids(lm, NEUTRAL_TEXT))

    def filled(text: str, step: int) -> str:
        length = step * max(1, round(len(models.text_ids(lm, text)) / step))
        return " " + lm.tokenizer.decode(np.resize(filler, length)).strip()

    lines = [row["prompt"].split("\n") for row in demonstrations]
    firsts, lasts = (Counter(prompt[end] for prompt in lines) for end in (0, -1))
    rows = []
    for row, (first, *middle) in zip(demonstrations, lines, strict=True):
        last = middle.pop() if middle else ""
        head, tail = _frame_of(first, firsts), _frame_of(last, lasts)
        body = "\n".join([first[len(head) :], *middle, last[len(tail) :]]).strip()
        neutral = filled(body, NEUTRAL_STEPS[0]).strip() if body else ""
        between = "\n" if head == first else " "
        opening = between.join(part for part in (head, neutral) if part)
        prompt = "\n".join([opening, tail]) if tail else opening
        completion = filled(row["completion"], NEUTRAL_STEPS[1])
        rows.append({"id": row["id"], "prompt": prompt, "completion": completion})
    return models.encode(lm, rows, max_length)


def _frame_of(line: str, occurrences: Counter) -> str:
    """Return what of a first or last line is form: all of it, its label, or nothing."""
    if occurrences[line] > 1:
        return line
    label = re.match(r"[\w ]{1,30}:", line)
    return label[0] if label else ""


def icp_score(gain: np.ndarray) -> np.ndarray:
    """Return the share of queries helped, a tie being no help: [N] in [0, 1] from gains [N, M]."""
    return (gain > 0).mean(axis=1)


# ------------------------------------------------------------------------- scored through the store


@dataclass(frozen=True)
class ZeroShot(Method):
    """Log-likelihoods of the queries without any context, l0: [1, M]."""

    name = "zero_shot"
    unit = "log-likelihood of the query's completion in nats, summed over its tokens"
    block_size: ClassVar = {"cpu": 8, "cuda": 64}  # on a GPU, enough for packing not to count
    single_row = "zero-shot"

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError for a model without packed rows, or what is too long for it."""
        models.check_packing(lm)
        models.check_lengths(lm, queries.tokens, self._contexts(lm, pool))

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the log-likelihoods [1, M] in nats."""
        lm, queries = prepared
        return models.log_likelihoods(lm, queries.tokens, self._contexts(lm, train))

    def _contexts(self, lm: LM, train: Examples) -> list[tuple[int, ...]]:
        return [()]


@dataclass(frozen=True)
class ICP(ZeroShot):
    """Log-likelihoods of the queries after each training example as demonstration, l: [N, M]."""

    name = "icp"
    single_row = None

    preamble: str = ""

    def _contexts(self, lm: LM, train: Examples) -> list[tuple[int, ...]]:
        return [context(lm, one, self.preamble) for one in train.tokens]


@dataclass(frozen=True)
class NeutralControl(ICP):
    """The same after the neutral demonstration in each one's place, see `neutral_demonstrations`.

    Each distinct text is scored once, and always with the same others: the last bits depend on it.
    """

    name = "icp_neutral"
    version = 3
    needs_pool = True  # which part of a prompt is its frame depends on all of it

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> Callable[[str], np.ndarray]:
        """Return a function from a training id to its control's log-likelihoods [M]."""
        contexts = dict(zip(pool.ids, self._contexts(lm, pool), strict=True))
        distinct = list(dict.fromkeys(contexts.values()))
        place = {one: divmod(k, TEXTS_TOGETHER) for k, one in enumerate(distinct)}

        @functools.cache
        def scored(group: int) -> np.ndarray:
            start = group * TEXTS_TOGETHER
            together = distinct[start : start + TEXTS_TOGETHER]
            return models.log_likelihoods(lm, queries.tokens, together)

        def row(train_id: str) -> np.ndarray:
            group, position = place[contexts[train_id]]
            return scored(group)[position]

        return row

    def score(self, prepared: Callable[[str], np.ndarray], train: Examples) -> np.ndarray:
        """Return the log-likelihoods [n, M] after the controls, in nats."""
        return np.stack([prepared(name) for name in train.ids])

    def _contexts(self, lm: LM, train: Examples) -> list[tuple[int, ...]]:
        neutral = neutral_demonstrations(lm, train.rows, train.max_length)
        return [context(lm, one, self.preamble) for one in neutral]


def probing(preamble: str = "", neutral: bool = False) -> list[Method]:
    """Return the methods that gains are made of, for `scores.score` and `scores.load`."""
    methods = [ZeroShot(), ICP(preamble)]
    return [*methods, NeutralControl(preamble)] if neutral else methods


def gains(scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return gains, and neutral gains if these were scored, [N, M] in nats; see `probing`."""
    zero_shot, neutral = scores["zero_shot"][0], scores.get("icp_neutral")
    return scores["icp"] - zero_shot, None if neutral is None else neutral - zero_shot
