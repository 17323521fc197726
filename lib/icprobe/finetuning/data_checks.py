"""What is in one's own data: lengths, repeated texts, and training examples that copy a query."""

from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from icprobe import data
from icprobe.methods.baselines import TFIDF
from icprobe.models import Encoded

POOL, QUERIES = "training pool", "queries"
PARTS = ("prompt", "completion")

RUN = 3  # words
NEAR = 0.6  # the suites' training examples reach 0.27 of a query, one changed word in ten 0.76


def summary(
    pool: datasets.Dataset,
    queries: datasets.Dataset,
    encoded: tuple[Sequence[Encoded], Sequence[Encoded]],
) -> pd.DataFrame:
    """Return counts and lengths of the training pool and of the queries, a row each.

    Columns: examples; tasks; tokens of prompts and of completions (median and most), as encoded;
    truncated (prompts that lost their beginning); glued (no white space between prompt and
    completion); repeated (examples whose text an earlier one has); contradicted (examples whose
    prompt an earlier one has with another completion).
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
                "glued": sum(map(_glued, examples["prompt"], examples["completion"])),
                "repeated": int(texts.duplicated().sum()),
                "contradicted": int((asked.duplicated() & ~texts.duplicated()).sum()),
            }
        )
    return pd.DataFrame(rows, index=[POOL, QUERIES])


def near_duplicates(
    pool: datasets.Dataset, queries: datasets.Dataset, near: float = NEAR
) -> pd.DataFrame:
    """Return the training examples that copy a query: to train on them is to train on the test.

    Near copies have at least the fraction near of a query's runs of `RUN` words, whatever else they
    have; a run weighs its squared TF-IDF, so those of an instruction that many texts have count for
    little.

    One row per such example, the closest first: example and query (ids), row (its number in the
    pool), shared (the fraction of the query's runs; of the query of which it is largest) and kind:
    "same text" (but for white space) or "near copy".
    """
    texts, asked = _texts(pool), _texts(queries)
    shared, closest = _closest(texts, asked)
    first = asked.drop_duplicates()
    same = texts.map(pd.Series(first.index, index=first))
    closest = same.fillna(pd.Series(closest)).astype(int)
    found = pd.DataFrame(
        {
            "example": pool["id"],
            "query": np.asarray(queries["id"])[closest],
            "row": np.arange(len(pool)),
            "shared": np.where(same.notna(), 1.0, shared),
            "kind": np.where(same.notna(), "same text", "near copy"),
        }
    )
    found = found[found["shared"] >= near]
    return found.sort_values("shared", ascending=False, kind="stable").reset_index(drop=True)


def selectable(N: int, copies: pd.DataFrame, keep: bool = False) -> np.ndarray:
    """Return the row numbers of N training examples that may be selected: of copies, if kept.

    Raises:
        ValueError: If all are copies.
    """
    rows = np.arange(N) if keep else np.setdiff1d(np.arange(N), copies["row"])
    if not len(rows):
        raise ValueError(
            f"all {N} training examples copy a query, so none is left to select: are train and "
            "queries the same data? keep_copies selects among copies, a larger near finds fewer"
        )
    return rows


def _closest(texts: pd.Series, asked: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest fraction of a query's runs in each text [N], and of which query."""
    vectorizer = TfidfVectorizer(**TFIDF, ngram_range=(RUN, RUN))
    try:
        vectorizer.fit([*texts, *asked])
    except ValueError:  # no text has so many words
        return np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    has, weights = vectorizer.transform(texts), vectorizer.transform(asked)
    has.data[:] = 1
    fractions = has @ weights.multiply(weights).tocsr().T  # a query's squared weights add up to 1
    closest = np.asarray(fractions.argmax(axis=1)).ravel()
    return fractions.max(axis=1).toarray().ravel(), closest


def _glued(prompt: str, completion: str) -> bool:
    return bool(prompt) and not (prompt[-1].isspace() or completion[0].isspace())


def _texts(examples: datasets.Dataset) -> pd.Series:
    return pd.Series([data.plain_text(row) for row in examples.select_columns(list(PARTS))])
