"""What is in one's own data: lengths, repeated texts, and training examples that copy a query."""

from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from icprobe import data
from icprobe.baselines import TFIDF
from icprobe.lm import Encoded

POOL, QUERIES = "training pool", "queries"
PARTS = ("prompt", "completion")

RUN = 3  # words
NEAR = 0.5  # the suites' training examples and queries reach 0.28, one changed word in ten 0.8


def summary(
    pool: datasets.Dataset,
    queries: datasets.Dataset,
    encoded: tuple[Sequence[Encoded], Sequence[Encoded]],
) -> pd.DataFrame:
    """Return counts and lengths of the training pool and of the queries, a row each.

    Args:
        pool: N training examples.
        queries: M queries.
        encoded: The same as the model's tokens, N and M.

    Returns:
        Index: training pool, queries. Columns: examples; tasks; tokens of prompts and of
        completions (median and most); truncated (prompts that lost their beginning); repeated
        (examples whose text an earlier one has); contradicted (examples whose prompt an earlier one
        has with another completion).
    """
    rows = []
    for examples, tokens in zip((pool, queries), encoded, strict=True):
        prompts, completions = ([len(getattr(e, part)) for e in tokens] for part in PARTS)
        texts, asked = _texts(examples), pd.Series(examples["prompt"])
        rows.append(
            {
                "examples": len(examples),
                "tasks": len(set(examples["task"])),
                "prompt tokens (median)": np.median(prompts),
                "prompt tokens (most)": max(prompts),
                "completion tokens (median)": np.median(completions),
                "completion tokens (most)": max(completions),
                "truncated": sum(e.truncated > 0 for e in tokens),
                "repeated": int(texts.duplicated().sum()),
                "contradicted": int((asked.duplicated() & ~texts.duplicated()).sum()),
            }
        )
    return pd.DataFrame(rows, index=[POOL, QUERIES])


def leaks(pool: datasets.Dataset, queries: datasets.Dataset, near: float = NEAR) -> pd.DataFrame:
    """Return the training examples that copy a query: to train on them is to train on the test.

    Near copies are found by the cosine of TF-IDF vectors of runs of `RUN` words, whose order so
    counts; runs of an instruction that many texts share count for little.

    Args:
        pool: N training examples.
        queries: M queries.
        near: The least similarity of a near copy.

    Returns:
        One row per such example, the closest first: example and query (ids), row (its number in
        the pool), similarity to the query that it is closest to (1 where the texts are equal), and
        kind: "same text" (but for white space) or "near copy".

    Raises:
        ValueError: If `near` is not above 0 and up to 1.
    """
    if not 0 < near <= 1:
        raise ValueError(f"near is {near!r}, expected a similarity above 0, up to 1")
    texts, asked = _texts(pool), _texts(queries)
    similarity, closest = _closest(texts, asked)
    first = asked.drop_duplicates()
    same = texts.map(pd.Series(first.index, index=first))
    closest = same.fillna(pd.Series(closest)).astype(int)
    found = pd.DataFrame(
        {
            "example": pool["id"],
            "query": np.asarray(queries["id"])[closest],
            "row": np.arange(len(pool)),
            "similarity": np.where(same.notna(), 1.0, similarity),
            "kind": np.where(same.notna(), "same text", "near copy"),
        }
    )
    found = found[found["similarity"] >= near]
    return found.sort_values("similarity", ascending=False, kind="stable").reset_index(drop=True)


def _closest(texts: pd.Series, asked: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarity of each text [N] to the closest of those asked [M], and which it is."""
    vectorizer = TfidfVectorizer(**TFIDF, ngram_range=(RUN, RUN))
    try:
        vectorizer.fit([*texts, *asked])
    except ValueError:  # no text has so many words
        return np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    both = vectorizer.transform(texts) @ vectorizer.transform(asked).T
    return both.max(axis=1).toarray().ravel(), np.asarray(both.argmax(axis=1)).ravel()


def _texts(examples: datasets.Dataset) -> pd.Series:
    """Return the texts as `data.check_disjoint` compares them."""
    return pd.Series([data.plain_text(row) for row in examples.select_columns(list(PARTS))])
