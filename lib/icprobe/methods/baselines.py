"""Baselines that any attribution method has to beat: length, similarity, own loss, chance.

A baseline assumes, and does not measure, that long, similar or surprising examples help more: where
a method's scores follow one, the baseline explains them until shown otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from icprobe import models
from icprobe.scores.method import Examples, Method

if TYPE_CHECKING:
    from icprobe.models import LM


# scikit-learn's defaults, but for words of one letter or digit, which it would drop
TFIDF = {"token_pattern": r"(?u)\w+", "lowercase": True, "sublinear_tf": False, "smooth_idf": True}

TOGETHER = 256  # examples in one call of OwnLoss: packing makes a mask for all of them


class Baseline(Method):
    """A baseline; all are quick, so each is scored in one process."""

    local_only = True


@dataclass(frozen=True)
class Length(Baseline):
    """Tokens of each training example, prompt and completion without BOS: the same along a row."""

    name = "length"
    title = "length"
    unit = "tokens of the training example; positive = presumed to help"

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the lengths [n, M]."""
        return _along_rows([len(one.ids) for one in train.tokens], len(prepared[1]))


@dataclass(frozen=True)
class CompletionLength(Baseline):
    """Tokens of each training example's completion: the same along a row."""

    name = "completion_length"
    title = "completion length"
    unit = "tokens of its completion; positive = presumed to help"

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the lengths [n, M]."""
        return _along_rows([len(one.completion) for one in train.tokens], len(prepared[1]))


@dataclass(frozen=True)
class QueryLength(Baseline):
    """Tokens of each query's completion: the same along a column.

    No baseline, since it ranks no training example above another for any query; a control for what
    is said of all pairs.
    """

    name = "query_length"
    unit = "tokens of the query's completion; a control, no baseline: the same for all rows"

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the lengths [n, M]."""
        return _along_rows([len(one.completion) for one in prepared[1].tokens], len(train)).T


@dataclass(frozen=True)
class TextTokens(Baseline):
    """Tokens that a loss on each training example's text is over: the same along a row.

    A control, which products of such losses are divided by to be one per token; not registered,
    since elsewhere nobody needs it.
    """

    name = "text_tokens"
    unit = "tokens that a loss on the training example's text is over; a control, no baseline"

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the numbers of tokens [n, M]."""
        lm, queries = prepared
        return _along_rows(trained_tokens(lm, train.tokens, "text"), len(queries))


def trained_tokens(lm: LM, examples: Iterable, loss_on: str = "completion") -> np.ndarray:
    """Return how many tokens of each training example its loss is over: whole numbers [N].

    A loss on the text leaves out the first token where no BOS stands before it: nothing predicts
    it.

    Args:
        lm: The model, for its tokenizer.
        examples: N rows with id, prompt, completion (or encoded already).
        loss_on: "completion" or "text".
    """
    shown = models.encode(lm, examples)
    if loss_on == "completion":
        return np.array([len(example.completion) for example in shown])
    return np.array([len(models.sequence(lm, example)[0]) - 1 for example in shown])


@dataclass(frozen=True)
class Lexical(Baseline):
    """Cosine of the texts' TF-IDF vectors, in [0, 1].

    A text is prompt and completion, whole (`max_length` does not cut it), as words in lower case.
    With n texts in pool and queries together, d_w of which have the word w, a text's entry for w is
    how often it has it times 1 + log((1 + n) / (1 + d_w)). So the words of an instruction that many
    texts share count for little. A text without words is similar to none: 0.
    """

    name = "lexical"
    title = "words (TF-IDF)"
    unit = "cosine; of TF-IDF vectors, 0 to 1, positive = presumed to help"
    needs_pool = True
    in_explorer = True

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> tuple:
        """Count the words of all texts."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = _texts(pool), _texts(queries)
        vectorizer = TfidfVectorizer(**TFIDF, dtype=np.float64).fit(texts[0] + texts[1])
        return vectorizer, vectorizer.transform(texts[1])

    def score(self, prepared: tuple, train: Examples) -> np.ndarray:
        """Return the cosines [n, M]."""
        vectorizer, queries = prepared
        return np.minimum((vectorizer.transform(_texts(train)) @ queries.T).toarray(), 1)


@dataclass(frozen=True)
class Embedding(Baseline):
    """Cosine of the model's mean hidden states, in [-1, 1], see `hidden_states`.

    By default the middle layer is taken: on the suite `grid`, SmolLM2-135M's puts an example of the
    query's own task above one of another task in 95 % of the cases, the last layer in 86 %.

    Attributes:
        layer: See `hidden_states.mean_states`.
        centre: Subtract the mean vector of all N + M examples first. Without this all cosines are
            close to 1, since hidden states have a large part in common.
    """

    name = "embedding"
    title = "hidden states"
    unit = "cosine; of mean hidden states, positive = presumed to help"
    needs_pool = True
    in_explorer = True

    layer: int | None = None
    centre: bool = True

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError where an example is too short or too long."""
        from icprobe.methods.hidden_states import check_readable

        check_readable(lm, [*pool.tokens, *queries.tokens])

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> dict[str, Any]:
        """Read all texts; return unit vectors of the queries, and of the pool by id."""
        from icprobe.methods.hidden_states import mean_states

        vectors = mean_states(lm, [*pool.tokens, *queries.tokens], self.layer)
        if self.centre:
            vectors = vectors - vectors.mean(axis=0)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        own, queries = unit[: len(pool)], unit[len(pool) :]
        return {"queries": queries, "pool": own, "rows": {k: i for i, k in enumerate(pool.ids)}}

    def score(self, prepared: dict[str, Any], train: Examples) -> np.ndarray:
        """Return the cosines [n, M]."""
        own = prepared["pool"][[prepared["rows"][name] for name in train.ids]]
        return (own @ prepared["queries"].T).clip(-1, 1)


@dataclass(frozen=True)
class SameCompletion(Baseline):
    """Whether completions are equal but for case and white space: 1 or 0.

    Where tasks have few answers, showing the query's own answer may be all that helps.
    """

    name = "same_completion"
    title = "same completion"
    unit = "1 where the completions are equal, else 0; positive = presumed to help"

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return 1 or 0 for each pair [n, M]."""
        texts = (
            [" ".join(row["completion"].casefold().split()) for row in rows]
            for rows in (train.rows, prepared[1].rows)
        )
        return np.equal.outer(*map(np.array, texts))


@dataclass(frozen=True)
class OwnLoss(Baseline):
    """Each training example's own loss, the same along a row.

    The mean negative log-likelihood of its completion tokens after its prompt, in nats per token:
    what the model does not know yet, it could learn.
    """

    name = "own_loss"
    title = "own loss"
    unit = "the training example's own loss, nats per token; positive = presumed to help"

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError if an example has no prompt, or is too long for the model."""
        models.check_packing(lm)
        models.check_lengths(lm, pool.tokens, [()])

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the losses [n, M]."""
        lm, queries = prepared
        nats = [
            models.log_likelihoods(lm, train.tokens[start : start + TOGETHER])[0]
            for start in range(0, len(train), TOGETHER)
        ]
        lengths = [len(one.completion) for one in train.tokens]
        return _along_rows(-np.concatenate(nats) / lengths, len(queries))


@dataclass(frozen=True)
class Random(Baseline):
    """Independent standard normal scores.

    Attributes:
        seed: Of the random numbers.
    """

    name = "random"
    title = "random"
    unit = "standard normal, without unit; no reason to help"
    needs_pool = True

    seed: int = 0

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> dict[str, np.ndarray]:
        """Draw the scores [M] of each training example, by id."""
        shape = len(pool), len(queries)
        drawn = np.random.default_rng(self.seed).standard_normal(shape, dtype=np.float32)
        return dict(zip(pool.ids, drawn, strict=True))

    def score(self, prepared: dict[str, np.ndarray], train: Examples) -> np.ndarray:
        """Return the scores [n, M]."""
        return np.stack([prepared[name] for name in train.ids])


def _texts(examples: Examples) -> list[str]:
    return [row["prompt"] + row["completion"] for row in examples.rows]


def _along_rows(values, count: int) -> np.ndarray:
    """Return one value per training example for every query: float32 [n, count]."""
    return np.repeat(np.asarray(values, dtype=np.float32)[:, None], count, axis=1)
