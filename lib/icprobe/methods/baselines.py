"""Baselines that any attribution method has to beat: length, similarity, own loss, chance.

A baseline assumes, and does not measure, that long, similar or surprising examples help more: where
a method's scores follow one, the baseline explains them until shown otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from icprobe import models
from icprobe.scores.method import Examples, Method

if TYPE_CHECKING:
    from icprobe.models import LM, Encoded


# scikit-learn's defaults, but for words of one letter or digit, which it would drop
TFIDF = {"token_pattern": r"(?u)\w+", "lowercase": True, "sublinear_tf": False, "smooth_idf": True}


class Baseline(Method):
    """A baseline; all are quick, so each is scored in one process."""

    local_only = True


class TokenCount(Baseline):
    """Tokens of each training example, of its completion unless said: the same along a row."""

    def count(self, lm: LM, example: Encoded) -> int:
        """Return the tokens that are counted of one example."""
        return len(example.completion)

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the counts [n, M], equal along a row."""
        lm, queries = prepared
        return _along_rows([self.count(lm, one) for one in train.tokens], len(queries))


@dataclass(frozen=True)
class Length(TokenCount):
    """Tokens of the prompt and the completion, without BOS."""

    name = "length"
    title = "length"
    unit = "tokens of the training example; positive = presumed to help"

    def count(self, lm: LM, example: Encoded) -> int:
        """Return the tokens of prompt and completion."""
        return len(example.ids)


@dataclass(frozen=True)
class CompletionLength(TokenCount):
    """Tokens of the completion."""

    name = "completion_length"
    title = "completion length"
    unit = "tokens of its completion; positive = presumed to help"


@dataclass(frozen=True)
class QueryLength(TokenCount):
    """Tokens of each query's completion: the same along a column, a control for claims on pairs."""

    name = "query_length"
    unit = "tokens of the query's completion; a control, no baseline: the same for all rows"

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the number of tokens of each query's completion [n, M]."""
        lm, queries = prepared
        counts = [self.count(lm, query) for query in queries.tokens]
        return np.tile(np.float32(counts), (len(train), 1))


@dataclass(frozen=True)
class TextTokens(TokenCount):
    """Tokens that a loss on the text is over: all but a first one that nothing predicts.

    A control, by which products are made one per token; not registered.
    """

    name = "text_tokens"
    unit = "tokens that a loss on the training example's text is over; a control, no baseline"

    def count(self, lm: LM, example: Encoded) -> int:
        """Return the tokens of BOS, prompt and completion but the first."""
        return len(lm.bos) + len(example.ids) - 1


def trained_tokens(loss_on: str) -> TokenCount:
    """Return the method that counts the tokens which a loss on "completion" or "text" is over."""
    return TextTokens() if loss_on == "text" else CompletionLength()


@dataclass(frozen=True)
class Lexical(Baseline):
    """Cosine of the texts' TF-IDF vectors, in [0, 1].

    A text is prompt and completion, whole (`max_length` does not cut it), as words in lower case.
    With n texts in pool and queries together, d_w of which have the word w, a text's entry for w is
    how often it has it times 1 + log((1 + n) / (1 + d_w)). A text without words is similar to none.
    """

    name = "lexical"
    title = "words (TF-IDF)"
    unit = "cosine; of TF-IDF vectors, 0 to 1, positive = presumed to help"
    needs_pool = True
    in_explorer = True

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> tuple:
        """Count the words of all texts; return the vectorizer and the queries' vectors."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = _texts(pool), _texts(queries)
        vectorizer = TfidfVectorizer(**TFIDF, dtype=np.float64).fit(texts[0] + texts[1])
        return vectorizer, vectorizer.transform(texts[1])

    def score(self, prepared: tuple, train: Examples) -> np.ndarray:
        """Return the cosines [n, M], 0 to 1."""
        vectorizer, queries = prepared
        return np.minimum((vectorizer.transform(_texts(train)) @ queries.T).toarray(), 1)


@dataclass(frozen=True)
class Embedding(Baseline):
    """Cosine of the mean hidden states in the middle of the model, in [-1, 1].

    On the suite `grid`, SmolLM2-135M's middle layer puts an example of the query's own task above
    one of another task in 95 % of the cases, the last layer in 86 %. The mean vector of all N + M
    examples is subtracted first: hidden states have a large part in common, so that all cosines
    would be close to 1.
    """

    name = "embedding"
    title = "hidden states"
    unit = "cosine; of mean hidden states, positive = presumed to help"
    needs_pool = True
    in_explorer = True

    @property
    def options(self) -> dict[str, Any]:
        """The key of finished scores has the layer (None: the middle) and the centring."""
        return {**super().options, "layer": None, "centre": True}

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError for an example without a prompt, or too long for the model."""
        models.check_lengths(lm, [*pool.tokens, *queries.tokens], [()])

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> dict[str, Any]:
        """Read all texts; return unit vectors of the queries, and of the pool by row."""
        from icprobe.methods.hidden_states import mean_states

        vectors = mean_states(lm, [*pool.tokens, *queries.tokens])
        vectors = vectors - vectors.mean(axis=0)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        own, queries = unit[: len(pool)], unit[len(pool) :]
        return {"queries": queries, "pool": own, "rows": {k: i for i, k in enumerate(pool.ids)}}

    def score(self, prepared: dict[str, Any], train: Examples) -> np.ndarray:
        """Return the cosines [n, M], -1 to 1."""
        own = prepared["pool"][[prepared["rows"][name] for name in train.ids]]
        return (own @ prepared["queries"].T).clip(-1, 1)


@dataclass(frozen=True)
class SameCompletion(Baseline):
    """Whether completions are equal but for case and white space: 1 or 0."""

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
    """Each training example's own loss, in nats per completion token: the same along a row.

    What the model does not know yet, it could learn.
    """

    name = "own_loss"
    title = "own loss"
    unit = "the training example's own loss, nats per token; positive = presumed to help"
    block_size = 256  # packing makes a mask for all of them

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError for an example without a prompt, or too long for the model."""
        models.check_packing(lm)
        models.check_lengths(lm, pool.tokens, [()])

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the losses [n, M] in nats per token."""
        lm, queries = prepared
        lengths = [len(one.completion) for one in train.tokens]
        return _along_rows(-models.log_likelihoods(lm, train.tokens)[0] / lengths, len(queries))


@dataclass(frozen=True)
class Random(Baseline):
    """Independent standard normal scores, from a seed."""

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
        """Return the scores [n, M] drawn for the block."""
        return np.stack([prepared[name] for name in train.ids])


def _texts(examples: Examples) -> list[str]:
    return [row["prompt"] + row["completion"] for row in examples.rows]


def _along_rows(values, count: int) -> np.ndarray:
    """Return one value per training example for every query: float32 [n, count]."""
    return np.repeat(np.asarray(values, dtype=np.float32)[:, None], count, axis=1)
