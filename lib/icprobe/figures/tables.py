"""Tables and text for people to read: shown in notebooks, never written to the repository."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML

BOX = "border:1px solid #0072B2;border-radius:3px"
PRE = "<pre style='white-space:pre-wrap;margin:4px 0'>"


def composition(examples: Mapping, encoded: Sequence) -> pd.DataFrame:
    """Return one row per task: type, content, examples, mean tokens, prompts truncated.

    `examples` has columns task, type and content; `encoded` are the same examples as tokens.
    """
    frame = pd.DataFrame({key: list(examples[key]) for key in ("task", "type", "content")})
    frame["prompt_tokens"] = [len(e.prompt) for e in encoded]
    frame["completion_tokens"] = [len(e.completion) for e in encoded]
    frame["truncated"] = [e.truncated > 0 for e in encoded]
    return (
        frame.groupby(["task", "type", "content"], sort=False)
        .agg(
            examples=("task", "size"),
            prompt_tokens=("prompt_tokens", "mean"),
            completion_tokens=("completion_tokens", "mean"),
            truncated=("truncated", "sum"),
        )
        .round(1)
        .reset_index()
    )


def token_values(
    tokenizer: Any, ids: Sequence[int], mask: Sequence[int], values: np.ndarray, title: str
) -> HTML:
    """Show what the model reads, its completion tokens marked with their `values` (nats) below.

    `mask` is 1 for completion tokens, which come last, else 0.
    """
    start = list(mask).index(1)
    cells = "".join(
        f"<span style='display:inline-block;text-align:center;margin:2px;padding:1px 4px;{BOX}'>"
        f"{html.escape(tokenizer.decode([token]))}<br><small>{value:+.2f}</small></span>"
        for token, value in zip(ids[start:], values, strict=True)
    )
    before = html.escape(tokenizer.decode(ids[:start]))
    return HTML(f"<b>{html.escape(title)}</b>: {values.sum():+.2f} nats{PRE}{before}</pre>{cells}")


def trained_tokens(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> HTML:
    """Show one row of a training batch: all its tokens [T], those that are trained on marked.

    `labels` [T] are -100 where there is no loss.
    """
    trained = [int(label) != -100 for label in labels]
    styles = {True: f"background:#CDE7F5;font-weight:bold;{BOX}", False: "color:#555555"}
    cells = "".join(
        f"<span style='{styles[marked]}'>{html.escape(tokenizer.decode([int(token)]))}</span>"
        for token, marked in zip(ids, trained, strict=True)
    )
    return HTML(f"<b>{sum(trained)} of {len(labels)} tokens are trained on</b>{PRE}{cells}</pre>")


def ranked_first(
    ranked: Mapping[str, np.ndarray], train: Sequence[Mapping], top: int = 3, width: int = 160
) -> pd.DataFrame:
    """Return the training examples that methods rank first, with so many characters of text.

    `ranked` has, by method, what ranks the N examples (higher = better).
    """
    rows = [
        {
            "method": name,
            "place": place,
            "value": values[i],
            "task": train[int(i)]["task"],
            "training example": line(train[int(i)], width),
        }
        for name, values in ranked.items()
        for place, i in enumerate(np.argsort(-values, kind="stable")[:top], 1)
    ]
    return pd.DataFrame(rows).set_index(["method", "place"])


def by_group(matrices: dict[str, np.ndarray], groups: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return the mean of each matrix [N, M] over each group of pairs (bool) that has any."""
    return pd.DataFrame(
        {"pairs": mask.sum(), **{name: values[mask].mean() for name, values in matrices.items()}}
        for mask in groups.values()
        if mask.any()
    ).set_index(pd.Index([name for name, mask in groups.items() if mask.any()], name="pairs of"))


def line(row: dict, width: int = 160) -> str:
    """Return an example in one line: the end of the prompt matters more than its beginning."""
    prompt, completion = (" ".join(row[part].split()) for part in ("prompt", "completion"))
    if len(completion) > width // 2:
        completion = f"{completion[: width // 2]}…"
    room = max(0, width - len(completion))
    return f"{'…' if len(prompt) > room else ''}{prompt[-room:] if room else ''} ▸ {completion}"


def wrapped(frame: pd.DataFrame) -> HTML:
    """Show a table with its text wrapped and numbers at two decimals; unknown ones are a dash."""
    digits = {name: _digits(frame[name]) for name in frame.columns}
    style = frame.style.format(digits, na_rep="–", escape="html").set_properties(
        **{"white-space": "pre-wrap", "text-align": "left", "vertical-align": "top"}
    )
    for axis in (0, 1):
        style = style.format_index(_escaped, axis=axis)
    return HTML(style.to_html())


def _escaped(label: object) -> object:
    return html.escape(label) if isinstance(label, str) else label


def _digits(column: pd.Series) -> str | None:
    """Return the format of a column: p-values with four decimals, errors with two digits."""
    if not pd.api.types.is_float_dtype(column):
        return None
    if column.name == "error":
        return "{:.2g}"
    if column.name in ("p", "p_holm"):
        return "{:.4f}"
    known = column.dropna()
    return "{:.0f}" if len(known) and (known % 1 == 0).all() and known.max() > 1 else "{:z.2f}"
