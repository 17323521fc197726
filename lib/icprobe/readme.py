"""Write the README's numbers from figures/: `python -m icprobe.readme`.

What stands between `<!-- NAME: ... -->` and `<!-- end -->` is generated; a test fails where the
README says something else than the committed results.
"""

import json
import re

import pandas as pd

from icprobe import correlation, paths, tables

README = paths.ROOT / "README.md"
FIGURES = paths.ROOT / "figures"
BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+): [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """Return the README's text with every generated block made anew.

    Raises:
        KeyError: If a block has an unknown name.
    """
    blocks = {
        "headline": headline,
        "claims": claims,
        "findings-01": lambda: findings("01"),
        "findings-02": lambda: findings("02"),
        "finetuning": finetuning,
        "lds": lds,
        "minutes": minutes,
    }
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]()}\n{match[3]}", text)


def headline() -> str:
    """Return what 03 and 07 found on the laptop profile, in sentences."""
    found = pd.read_csv(FIGURES / "laptop" / "03_findings.csv")
    published = pd.read_csv(FIGURES / "laptop" / "07_findings.csv")
    both = published[published["quantity"] == "ICP score against mean influence"]
    (authors,) = tables.in_words(both[both["unit"] == "Spearman"]).values()
    folder = FIGURES / "laptop"
    conditions = pd.read_csv(folder / "03_conditions.csv").query("level == 'per query'")
    higher = correlation.weakening(conditions).loc[:, "per query"]
    step = pd.unique(pd.read_csv(folder / "03_training_effect.csv")["second"])[1]
    conditions = conditions[conditions["scores"] == "gain and cosine"].assign(
        quantity=lambda frame: frame["pool"] + " " + frame["condition"]
    )
    elsewhere = tables.in_words(conditions)
    answers = pd.read_csv(folder / "03_same_answer.csv")
    answers = tables.in_words(answers.assign(quantity=answers["pool"] + " " + answers["given"]))
    said = tables.in_words(found)
    task, kind, content, neither = (
        said[f"gain against cosine, {condition}, per query"]
        for condition in ("same task", "same type", "same content", "neither")
    )
    cosine, gain, over_neutral, states, words, answer = (
        said[f"{method} against training effect, per query"]
        for method in (
            "cosine", "gain", "gain over neutral", "hidden states", "words (TF-IDF)",
            "same completion",
        )
    )  # fmt: skip
    within = {
        method: said[f"{method} against training effect, within a task"]
        for method in ("cosine", "gain", "hidden states", "words (TF-IDF)")
    }
    rival, rival_within, beyond, gradients = (
        tables.compared(found, name)
        for name in (
            "gain less best similarity, per query", "gain less best similarity, within a task",
            "gain over neutral less best similarity, per query", "cosine less gain, per query",
        )
    )  # fmt: skip
    return f"""\
- **Where probing and gradients agree.** In the suite `crossed`, gains and gradient cosines agree
  among training examples of a query's own task with Spearman {task}; where only the
  type is shared, {kind}, only the content, {content}, neither,
  {neither}: {higher["crossed", "gain and cosine"]} differences are measurable. In `grid`,
  with fewer examples of each, these are {elsewhere["grid same task"]},
  {elsewhere["grid same type"]}, {elsewhere["grid same content"]}
  and {elsewhere["grid neither"]}: {higher["grid", "gain and cosine"]}. In `sentiment` they agree
  with {answers["sentiment nothing"]}, but with {answers["sentiment same completion"]}
  beyond sharing the query's answer. All this is for each query by itself. The published
  aggregation, ICP score against product averaged over queries, gives
  {said["ICP score against product, same task"]} in the same task of `crossed`. The authors' own
  two scores, over their whole pool, give {authors}; the interval
  leaves the queries of their ICP score as they are.
- **What predicts training.** The effect of one real training step ({step}) on each query is
  ranked by gradient cosines with {cosine}, by gains with
  {gain}, by gains over the neutral demonstration's with
  {over_neutral}, by the similarity of hidden states with
  {states}, of words with {words}, and by merely
  having the same answer with {answer}. **So here gains predict training
  {rival} the better of both similarities** (gains over
  neutral do so {beyond} it), and gradient cosines do
  {gradients} gains; but to first order, such a step is the gradients' product by definition.
- **Within a task**, where it is not enough to know which tasks help, the effect is ranked by
  cosines with {within["cosine"]}, by gains with {within["gain"]},
  by hidden states with {within["hidden states"]} and by words with
  {within["words (TF-IDF)"]}; as differences, gains do {rival_within}
  the better similarity.
{_choosing()}"""


def _choosing() -> str:
    """Return what 04 found of selections and of LDS, as a point of the headline."""
    folder = FIGURES / "laptop"
    compared = pd.read_csv(folder / "04_differences.csv").set_index(["first", "second"])
    margin = compared["margin"].iloc[0]
    both, random_icp, random_product, worst_icp, worst_product = (
        f"{row.verdict} ({row.share:+.2f}, {row.share_low:+.2f} to {row.share_high:+.2f})"
        for row in (
            compared.loc[pair]
            for pair in (
                ("ICP score, top", "product, top"), ("ICP score, top", "random"),
                ("product, top", "random"), ("ICP score, top", "ICP score, bottom"),
                ("product, top", "product, bottom"),
            )
        )
    )  # fmt: skip
    lds = tables.in_words(pd.read_csv(folder / "04_lds.csv"))
    cosine, product, gain, score, words = (
        lds[f"LDS of {name}"]
        for name in ("cosine", "product", "gain", "ICP score", "words (TF-IDF)")
    )
    return f"""\
- **What a choice is worth.** Models fine-tuned on the best examples by ICP score, held against
  those by product: {both}, as a share of what the full pool
  brings; equivalent means within {margin:g}. Against random data of the same size: ICP score
  {random_icp}, product {random_product}.
  Against the lowest-ranked by the same method: ICP score {worst_icp},
  product {worst_product}. What training on random subsets does to each
  query is predicted (LDS) by cosines with {cosine}, products
  {product}, gains {gain}, ICP scores
  {score}, similarity of words {words}."""


def finetuning() -> str:
    """Return what 04 found on the laptop profile, in sentences and as a table."""
    folder = FIGURES / "laptop"
    compared = pd.read_csv(folder / "04_differences.csv")
    results = pd.read_csv(folder / "04_results.csv").query("measure == 'nats_per_token'")
    full = results.set_index("selection").loc["full pool"]
    margin = compared["margin"].iloc[0]
    lines = [
        f"Trained on the full pool, the model gains {full.estimate:.2f} ({full.low:.2f} to "
        f"{full.high:.2f}) nats a token on {full.queries} held-out queries. As shares of that, "
        f"over {full.seeds} seeds:",
        "",
        f"| selection | less | difference (95 %) | 90 % | TOST p, margin {margin:g} | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in compared.itertuples():
        cells = (
            row.first,
            row.second,
            f"{row.share:+.2f} ({row.share_low:+.2f} to {row.share_high:+.2f})",
            f"{row.tost_low:+.2f} to {row.tost_high:+.2f}",
            f"{row.p_equivalent:.3f}",
            f"**{row.verdict}**",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def lds() -> str:
    """Return the linear datamodelling scores on the laptop profile."""
    found = pd.read_csv(FIGURES / "laptop" / "04_lds.csv")
    first = found.iloc[0]
    each = ", ".join(
        f"{row.quantity.removeprefix('LDS of ')} {row.estimate:.2f} ({row.low:.2f} to "
        f"{row.high:.2f})"
        for row in found.itertuples()
    )
    return (
        f"Linear datamodelling scores over {first.n} random subsets, {first.seeds} trainings each "
        f"(noise ceiling {first.ceiling:.2f}): {each}."
    )


def claims() -> str:
    """Return the table of claims and verdicts on the laptop profile."""
    records = json.loads((FIGURES / "laptop" / "claims.json").read_text(encoding="utf-8"))
    lines = [
        "| claim | | how tested | estimate (95 %) | n | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for claim in records:
        number = "{estimate:.2f} ({low:.2f} to {high:.2f})".format(**claim) if claim["n"] else "–"
        notebook = f"{claim['test']} (notebook {claim['notebook']})"
        cells = (claim["id"], claim["statement"], notebook, number, str(claim["n"] or "–"))
        verdict, allows = claim["verdict"], claim["allows"]
        more = "" if allows in (verdict, None) else f" (the interval allows: {allows})"
        lines.append(f"| {' | '.join(cells)} | **{verdict}**{more} |")
    return "\n".join(lines)


def findings(notebook: str) -> str:
    """Return the table of what a notebook found on the laptop profile."""
    frame = pd.read_csv(FIGURES / "laptop" / f"{notebook}_findings.csv")
    lines = ["| quantity | estimate | 95 % interval | unit | n |", "|---|---|---|---|---|"]
    for row in frame.itertuples():
        digits = 2 if abs(row.estimate) < 100 else 0
        interval = f"{row.low:.{digits}f} to {row.high:.{digits}f}"
        cells = (row.quantity, f"{row.estimate:.{digits}f}", interval, row.unit, str(row.n))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def promote_timings() -> None:
    """Take over the minutes that fresh runs leave in their logs, notebook by notebook."""
    for measured in FIGURES.glob("*/logs/timing.csv"):
        committed = measured.parents[1] / "timing.csv"
        found = pd.read_csv(measured)
        if committed.exists():
            before = pd.read_csv(committed)
            found = pd.concat([before[~before["notebook"].isin(found["notebook"])], found])
        found.sort_values("notebook").to_csv(committed, index=False, float_format="%.2f")
        measured.unlink()


def minutes() -> str:
    """Return the table of minutes per notebook and profile, from fresh runs."""
    runs = {
        profile: pd.read_csv(FIGURES / profile / "timing.csv").set_index("notebook")
        for profile in ("smoke", "laptop")
    }
    lines = ["| notebook | smoke (minutes) | laptop (minutes) |", "|---|---|---|"]
    for name in sorted({name for run in runs.values() for name in run.index}):
        cells = [f"{run.minutes.get(name, float('nan')):.1f}" for run in runs.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = runs["laptop"].iloc[0]
    lines.append(f"\nEverything computed anew, on {machine.cores} cores ({machine.processor}).")
    return "\n".join(lines)


if __name__ == "__main__":
    promote_timings()
    README.write_text(render(README.read_text()))
