"""In-context probing: put one training example into the prompt, see what the right answers gain.

The context is the preamble (if any) and the separator, the demonstration's prompt and completion,
and the separator; then come the query's prompt and completion. With l_ij the log-likelihood of
completion j after demonstration i and l0_j the one without any context, the gain is

    G_ij = l_ij - l0_j        [N, M], nats, positive = the training example helps

and the published ICP score of example i is the share of queries that it helps, mean_j 1[G_ij > 0]
(Jiao et al. 2025, after the "golden score" of Li et al. 2023).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
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


def context(
    lm: LM, demonstration: Encoded | None, preamble: str = "", separator: str = SEPARATOR
) -> tuple[int, ...]:
    """Return the token ids that stand before a query's prompt.

    Each part is followed by the separator; parts without tokens are left out, so an empty
    demonstration without preamble is no context at all.
    """
    end = models.text_ids(lm, separator)
    parts = [models.text_ids(lm, preamble), demonstration.ids if demonstration else ()]
    return tuple(token for part in parts if part for token in (*part, *end))


def log_likelihoods(
    lm: LM,
    queries: Iterable,
    demonstrations: Iterable | None = None,
    preamble: str = "",
    separator: str = SEPARATOR,
    max_length: int | None = None,
) -> np.ndarray:
    """Return log p(completion_j | demonstration_i, prompt_j): sums over completion tokens, nats.

    Args:
        lm: The model.
        queries: M rows with id, prompt, completion (or encoded already).
        demonstrations: N such rows; None for zero-shot, where no preamble stands either.
        preamble: Text before the demonstration; the paper's is `PUBLISHED_PREAMBLE`.
        separator: Text after the preamble and after the demonstration.
        max_length: Most tokens of one example, see `models.encode`.

    Returns:
        float32 [N, M], one row per demonstration in the order given; [M] when zero-shot.

    Raises:
        ValueError: If a completion would lose tokens, or a sequence is too long for the model.
    """
    encoded = models.encode(lm, queries, max_length)
    if demonstrations is None:
        return models.log_likelihoods(lm, encoded)[0]
    shown = models.encode(lm, demonstrations, max_length)
    contexts = [context(lm, demonstration, preamble, separator) for demonstration in shown]
    return models.log_likelihoods(lm, encoded, contexts)


def neutral_demonstrations(
    lm: LM, demonstrations: Iterable[dict], max_length: int | None = None
) -> list[Encoded]:
    """Return an uninformative demonstration of the same form and about the same length.

    The frame stays: first and last lines of prompts that several demonstrations share (instruction
    and answer label), or else the label of such a line ("Question:"). All other text, and the
    answer, becomes text about nothing. What a query gains from it comes from form and length; what
    it gains beyond, from the content.

    Args:
        lm: The model, for its tokenizer.
        demonstrations: N rows with prompt and completion.
        max_length: Most tokens of one example, see `models.encode`.

    Returns:
        N encoded texts. Replaced parts have the tokens of the original to the nearest multiple of
        `NEUTRAL_STEPS`, so that few different texts serve all; equal texts have equal ids.
    """
    filler = np.array(models.text_ids(lm, NEUTRAL_TEXT))

    def filled(text: str, step: int) -> str:
        length = step * max(1, round(len(models.text_ids(lm, text)) / step))
        return " " + lm.tokenizer.decode(np.resize(filler, length)).strip()

    demonstrations = list(demonstrations)
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
        name = hashlib.sha256(f"{prompt}\0{completion}".encode()).hexdigest()[:12]
        rows.append({"id": f"neutral-{name}", "prompt": prompt, "completion": completion})
    return models.encode(lm, rows, max_length)


def _frame_of(line: str, occurrences: Counter) -> str:
    """Return what of a prompt's first or last line is form: all of it, its label, or nothing."""
    if occurrences[line] > 1:
        return line
    label = re.match(r"[\w ]{1,30}:", line)
    return label[0] if label else ""


def gain(log_likelihoods: np.ndarray, zero_shot: np.ndarray) -> np.ndarray:
    """Return G = l - l0: [N, M] nats from [N, M] and [M]; positive = the demonstration helps."""
    return log_likelihoods - zero_shot


def icp_score(gain: np.ndarray) -> np.ndarray:
    """Return the published score, the share of queries helped: [N] in [0, 1] from gains [N, M].

    A tie (a gain of exactly zero) does not count as help.
    """
    return (gain > 0).mean(axis=1)


def gain_per_token(gain: np.ndarray, completion_tokens: np.ndarray) -> np.ndarray:
    """Return gains in nats per completion token: [N, M] from [N, M] and token counts [M]."""
    return gain / np.asarray(completion_tokens)


def reference(
    lm: LM, query: Encoded, demonstration: Encoded, preamble: str = "", separator: str = SEPARATOR
) -> float:
    """Return one pair's log-likelihood in nats from one plain forward pass: slow, for checks."""
    before = context(lm, demonstration, preamble, separator)
    return float(models.token_log_likelihoods(lm, query, before).sum())


# ------------------------------------------------------------------------- scored through the store


@dataclass(frozen=True)
class ZeroShot(Method):
    """Log-likelihoods of the queries without any context, l0: [1, M]."""

    name = "zero_shot"
    unit = "log-likelihood of the query's completion in nats, summed over its tokens"
    block_size: ClassVar = {"cpu": 8, "cuda": 64}  # on a GPU, enough for packing not to count
    single_row = "zero-shot"

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError if the model takes no packed rows, or something is too long for it."""
        models.check_packing(lm)
        models.check_lengths(lm, queries.tokens, self._contexts(lm, pool))

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the log-likelihoods [1, M]."""
        lm, queries = prepared
        return models.log_likelihoods(lm, queries.tokens, [()])

    def _contexts(self, lm: LM, pool: Examples) -> list[tuple[int, ...]]:
        return [()]


@dataclass(frozen=True)
class ICP(ZeroShot):
    """Log-likelihoods of the queries after each training example as demonstration, l: [N, M].

    `gain` makes scores of them and of `ZeroShot`.

    Attributes:
        preamble: See `log_likelihoods`.
    """

    name = "icp"
    single_row = None

    preamble: str = ""

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the log-likelihoods [n, M]."""
        lm, queries = prepared
        contexts = self._contexts(lm, train)
        return models.log_likelihoods(lm, queries.tokens, contexts)

    def _contexts(self, lm: LM, pool: Examples) -> list[tuple[int, ...]]:
        return [context(lm, one, self.preamble) for one in pool.tokens]


@dataclass(frozen=True)
class NeutralControl(ICP):
    """The same after the neutral demonstration in each one's place, see `neutral_demonstrations`.

    Which part of a prompt is its frame depends on the whole pool.
    """

    name = "icp_neutral"
    version = 3
    needs_pool = True

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> _Neutral:
        """Make the neutral demonstrations of the pool."""
        controls = neutral_demonstrations(lm, pool.rows, pool.max_length)
        contexts = {one.id: context(lm, one, self.preamble) for one in controls}
        names = dict(zip(pool.ids, (one.id for one in controls), strict=True))
        return _Neutral(lm, queries.tokens, names, contexts, {})

    def score(self, prepared: _Neutral, train: Examples) -> np.ndarray:
        """Return the log-likelihoods [n, M]."""
        return np.stack([prepared.row(name) for name in train.ids])

    def _contexts(self, lm: LM, pool: Examples) -> list[tuple[int, ...]]:
        controls = neutral_demonstrations(lm, pool.rows, pool.max_length)
        return [context(lm, one, self.preamble) for one in controls]


@dataclass(frozen=True)
class _Neutral:
    """Neutral demonstrations, each distinct one of which is scored once.

    Attributes:
        lm: The model.
        queries: M queries.
        names: The id of each training example's neutral demonstration.
        contexts: Tokens of the distinct ones, by id.
        known: Log-likelihoods [M], by id.
    """

    lm: LM
    queries: list[Encoded]
    names: dict[str, str]
    contexts: dict[str, tuple[int, ...]]
    known: dict[str, np.ndarray]

    @cached_property
    def together(self) -> dict[str, list[str]]:
        """With which others each is scored: always the same, as the last bits depend on that."""
        names = list(self.contexts)
        starts = range(0, len(names), TEXTS_TOGETHER)
        groups = [names[start : start + TEXTS_TOGETHER] for start in starts]
        return {name: group for group in groups for name in group}

    def row(self, train_id: str) -> np.ndarray:
        """Return the log-likelihoods [M] after one training example's neutral demonstration."""
        name = self.names[train_id]
        if name not in self.known:
            group = self.together[name]
            contexts = [self.contexts[other] for other in group]
            found = models.log_likelihoods(self.lm, self.queries, contexts)
            self.known.update(zip(group, found, strict=True))
        return self.known[name]


def probing(preamble: str = "", neutral: bool = False) -> list[Method]:
    """Return the methods that gains are made of, for `scores.score` and `load`; see `gains`."""
    methods = [ZeroShot(), ICP(preamble)]
    return [*methods, NeutralControl(preamble)] if neutral else methods


def gains(scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return gains and neutral gains [N, M] in nats from the scores of `probing`.

    The latter are None where the control was not scored.
    """
    zero_shot, neutral = scores["zero_shot"][0], scores.get("icp_neutral")
    both = (gain(part, zero_shot) for part in (scores["icp"], neutral) if part is not None)
    return next(both), next(both, None)
