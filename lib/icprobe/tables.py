"""Tables and text for people to read: shown in notebooks, never written to the repository."""

import html
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import pandas as pd
from IPython.display import HTML

from icprobe import lm as language_model
from icprobe.lm import LM, Encoded


def composition(examples: datasets.Dataset, encoded: Sequence[Encoded]) -> pd.DataFrame:
    """Return one row per task: type, content, examples, mean tokens, prompts truncated."""
    frame = examples.select_columns(["task", "type", "content"]).to_pandas()
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
    lm: LM, example: Encoded, context: Sequence[int], values: np.ndarray, title: str
) -> HTML:
    """Show what the model reads, its completion tokens marked with their values below.

    Args:
        lm: The model, for its tokenizer.
        example: The query.
        context: Token ids before its prompt.
        values: [T] one number per completion token, in nats.
        title: Stands above.
    """
    ids, mask = language_model.sequence(lm, example, context)
    before = lm.tokenizer.decode(ids[: mask.index(1)])
    cells = "".join(
        "<span style='display:inline-block;text-align:center;margin:2px;padding:1px 4px;"
        "border:1px solid #0072B2;border-radius:3px'>"
        f"{html.escape(lm.tokenizer.decode([token]))}<br><small>{value:+.2f}</small></span>"
        for token, value in zip(example.completion, values, strict=True)
    )
    return HTML(
        f"<b>{html.escape(title)}</b>: {values.sum():+.2f} nats"
        f"<pre style='white-space:pre-wrap;margin:4px 0'>{html.escape(before)}</pre>{cells}"
    )


def learnt(lm: LM, ids: Sequence[int], labels: Sequence[int]) -> HTML:
    """Show one row of a training batch: all its tokens, those that are learnt marked.

    Args:
        lm: The model, for its tokenizer.
        ids: [T] token ids, padding included.
        labels: [T] the same, but -100 where there is no loss.
    """
    cells = "".join(
        f"<b style='background:#CDE7F5;border:1px solid #0072B2;border-radius:3px'>{shown}</b>"
        if label != -100
        else f"<span style='color:#555555'>{shown}</span>"
        for shown, label in (
            (html.escape(lm.tokenizer.decode([int(token)])), int(label))
            for token, label in zip(ids, labels, strict=True)
        )
    )
    count = sum(int(label) != -100 for label in labels)
    return HTML(
        f"<b>{count} of {len(labels)} tokens are learnt</b>"
        f"<pre style='white-space:pre-wrap;margin:4px 0'>{cells}</pre>"
    )


def ranked_first(
    ranked: Mapping[str, np.ndarray], train: datasets.Dataset, top: int = 3, width: int = 160
) -> pd.DataFrame:
    """Return the training examples that methods rank first.

    Args:
        ranked: By method, what ranks the N examples: [N], higher = better.
        train: N rows.
        top: How many of each.
        width: Characters of text shown.
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
    """Return the mean of each matrix [N, M] over each group of pairs ([N, M] bool), and its size.

    Groups without pairs are left out.
    """
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


def in_words(findings: pd.DataFrame) -> dict[str, str]:
    """Return "estimate (low to high)" by quantity, for sentences."""
    return {
        row.quantity: f"{row.estimate:.2f} ({row.low:.2f} to {row.high:.2f})"
        if np.isfinite(row.low)
        else f"{row.estimate:.2f} (in too few rankings for an interval)"
        for row in findings.itertuples()
    }


def compared(findings: pd.DataFrame, difference: str) -> str:
    """Return "better than", "worse than" or neither, as a difference's interval has it."""
    row = findings.set_index("quantity").loc[difference]
    if row["low"] > 0:
        return "better than"
    return "worse than" if row["high"] < 0 else "neither measurably better nor worse than"


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
    """Return a label whose text is no HTML."""
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
