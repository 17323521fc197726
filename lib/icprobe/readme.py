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
LONG = "laptop_long"  # the folder of 04's longer run
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
        "synthetic": synthetic,
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
{_choosing()}
{_exactly()}"""


def _exactly() -> str:
    """Return what 05 found, as a point of the headline."""
    table = pd.read_csv(FIGURES / "laptop" / "05_conditions.csv")
    corrupted = pd.read_csv(FIGURES / "laptop" / "05_corrupted.csv")
    spoilt, flipped = (corrupted[corrupted["corruption"] == x] for x in ("outlier", "flip"))
    of = {name: tables.in_words(rows) for name, rows in table.groupby("condition")}
    near, unrelated, opposite, wide, apart = (
        of[name]
        for name in (
            "in domain", "unrelated task", "opposite task", "covariates 3 times as wide",
            "mean covariates 4 apart",
        )
    )  # fmt: skip
    forms = pd.read_csv(FIGURES / "laptop" / "05_in_domain.csv").query(
        "k == 0 and probing == 'gain'"
    )
    forms = tables.in_words(forms.rename(columns={"influence": "quantity"}))
    areas = tables.in_words(spoilt.rename(columns={"method": "quantity"}))
    flips = tables.in_words(flipped.rename(columns={"method": "quantity"}))
    return f"""\
- **Where everything is exact.** Networks that learned linear regression from their context rank
  examples by gain as TracIn at the zero-shot state does with {near["gain against TracIn"]}
  (Spearman), by the published ICP score with {near["ICP score against TracIn"]}; but as
  influence on a learner already fitted to the whole pool (leave-one-out) with
  {forms["leave-one-out, exact"]}. For examples of an unrelated or the opposite task, the
  first is {unrelated["gain against TracIn"]} and {opposite["gain against TracIn"]},
  while the mean gain falls from {near["mean gain"]} to {unrelated["mean gain"]} and
  {opposite["mean gain"]} (half squared errors). For covariates three times as wide it is
  {wide["gain against TracIn"]} (Bayes, the exact learner:
  {wide["gain of Bayes against TracIn"]}),
  for those whose means are apart {apart["gain against TracIn"]} (Bayes
  {apart["gain of Bayes against TracIn"]}). Outliers among the labels are found by gains
  with an area under the ROC curve of {areas["gain"]}, by TracIn with {areas["TracIn"]};
  flipped signs by both ({flips["gain"]} and {flips["TracIn"]})."""


def _choosing() -> str:
    """Return what 04 found of selections, in its longer run, and of LDS, for the headline."""
    folder = FIGURES / LONG
    compared = pd.read_csv(folder / "04_differences.csv").set_index(["first", "second"])
    size = pd.read_csv(folder / "04_results.csv").iloc[0]
    overlap = pd.read_csv(folder / "04_overlaps.csv").set_index("selection")
    of_tasks = pd.read_csv(folder / "04_differences_by_task.csv").set_index(["first", "second"])
    both, random_icp, random_product, in_turn, worst_icp, worst_product = (
        f"{row.verdict} ({_signed(row.share)}, {_signed(row.share_low)} to "
        f"{_signed(row.share_high)}; with new tasks {_signed(row.tasks_low)} to "
        f"{_signed(row.tasks_high)})"
        for row in (
            compared.loc[pair]
            for pair in (
                ("ICP score, top", "product, top"), ("ICP score, top", "random"),
                ("product, top", "random"), ("gain, in turn", "random"),
                ("ICP score, top", "ICP score, bottom"), ("product, top", "product, bottom"),
            )
        )
    )  # fmt: skip
    parts = of_tasks.loc[("ICP score, top", "random")].reset_index(drop=True)
    largest = parts.loc[parts["contribution"].abs().idxmax()]
    sizes = pd.read_csv(folder / "04_budgets.csv")["examples"]
    chosen = f"{sizes.iloc[0]:.0f} of {sizes.max():.0f}"
    share = f"{overlap.loc['ICP score, top', 'product, top']:.0%}"
    queries = f"{size.queries} held-out queries, {size.seeds} seeds"
    part = (
        f"{_signed(largest['contribution'])} of the ICP score's is one task's, `{largest['task']}`"
    )
    tops = [
        compared.loc[(f"{name}, top", "random"), "verdict"] for name in ("ICP score", "product")
    ]
    against = "Against" if any("better" in verdict for verdict in tops) else "Neither beats"
    lds = tables.in_words(pd.read_csv(folder / "04_lds.csv"))
    cosine, product, gain, score, words, beyond = (
        lds[f"LDS of {name}"]
        for name in (
            "cosine", "product", "gain", "ICP score", "words (TF-IDF)", "gain less words (TF-IDF)",
        )
    )  # fmt: skip
    return f"""\
- **What a choice is worth.** Models fine-tuned on the best {chosen} examples of the pool by ICP
  score, held against those by product, of which they share {share}:
  {both},
  as a share of what the full pool brings in log-likelihood ({queries});
  equivalent means that the 90 % interval is within {compared["margin"].iloc[0]:g}, for new queries
  of the same tasks. **{against} random data** of
  the same size: ICP score {random_icp},
  product {random_product};
  {part}. Queries that choose in turn by gain: {in_turn}.
  Against the lowest-ranked by the same method: ICP score
  {worst_icp},
  product {worst_product}. What
  training on random subsets does to each query is predicted (LDS) by cosines with
  {cosine}, products {product}, gains {gain}, ICP
  scores {score}, similarity of words {words} (gains less words: {beyond})."""


def finetuning() -> str:
    """Return what 04 found in its two runs on the laptop, in sentences and as a table."""
    runs, brings, sizes = [], [], []
    for name in ("laptop", LONG):
        runs.append(pd.read_csv(FIGURES / name / "04_differences.csv"))
        results = pd.read_csv(FIGURES / name / "04_results.csv")
        full = results.query("measure == 'nats_per_token' and selection == 'full pool'").iloc[0]
        sizes.append(f"{full.queries} queries, {full.seeds} seeds")
        brings.append(f"{full.estimate:.2f} ({full.low:.2f} to {full.high:.2f}; {sizes[-1]})")
    lines = [
        f"Trained on the full pool, the model gains {' and '.join(brings)} nats a token on "
        "held-out queries. As shares of that:",
        "",
        f"| selection | less | {sizes[0]} (95 %) | verdict | {sizes[1]} (95 %) | 90 % | with new "
        "tasks (95 %) | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pairs = runs[0].merge(runs[1], on=["first", "second"], suffixes=("_short", ""))
    for row in pairs.itertuples():
        cells = (
            row.first,
            row.second,
            _interval(row.share_short, row.share_low_short, row.share_high_short),
            row.verdict_short,
            _interval(row.share, row.share_low, row.share_high),
            f"{_signed(row.tost_low)} to {_signed(row.tost_high)}",
            f"{_signed(row.tasks_low)} to {_signed(row.tasks_high)}",
            f"**{row.verdict}**",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(estimate: float, low: float, high: float) -> str:
    return f"{_signed(estimate)} ({_signed(low)} to {_signed(high)})"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0 turns -0.0 into 0.0


def lds() -> str:
    """Return the linear datamodelling scores of 04's longer run."""
    found = pd.read_csv(FIGURES / LONG / "04_lds.csv")
    first, most = found.iloc[0], found["queries"].max()
    each = []
    for row in found.itertuples():
        few = f"; of {row.queries} queries" if row.queries < most else ""
        name = row.quantity.removeprefix("LDS of ")
        each.append(f"{name} {row.estimate:.2f} ({row.low:.2f} to {row.high:.2f}{few})")
    return (
        f"Linear datamodelling scores over {first.n} random subsets, {first.seeds} trainings each, "
        f"of {most} selecting queries (noise ceiling {first.ceiling:.2f}): {', '.join(each)}."
    )


def synthetic() -> str:
    """Return what 05 found under the shifts that claim C4 looks at, as a table."""
    shown = {
        "gain against TracIn": "gain",
        "gain of Bayes against TracIn": "gain, Bayes",
        "ICP score against TracIn": "ICP score",
        "ICP score of Bayes against TracIn": "ICP score, Bayes",
        "mean gain": "mean gain",
    }
    lines = [
        "Spearman with TracIn at the zero-shot state, of the networks and of the exact Bayes "
        "learner, and the networks' mean gain (in half squared errors):",
        "",
        f"| tasks | shift | {' | '.join(shown.values())} |",
        "|---|---|" + "---|" * len(shown),
    ]
    for prior, name in (("around zero", "conditions"), ("around a mean", "informative_prior")):
        table = pd.read_csv(FIGURES / "laptop" / f"05_{name}.csv")
        for condition, rows in table.groupby("condition", sort=False):
            rows = tables.in_words(rows)
            lines.append(f"| {prior} | {condition} | {' | '.join(rows[q] for q in shown)} |")
    return "\n".join(lines)


def claims() -> str:
    """Return the table of claims and verdicts; those of 04 are its longer run's."""
    records, longer = (
        json.loads((FIGURES / name / "claims.json").read_text(encoding="utf-8"))
        for name in ("laptop", LONG)
    )
    longer = {claim["id"]: claim for claim in longer if claim["notebook"] == "04" and claim["n"]}
    records = [longer.get(claim["id"], claim) for claim in records]
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
        cells = [f"{run.minutes[name]:.1f}" if name in run.index else "–" for run in runs.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = runs["laptop"].iloc[0]
    lines.append(f"\nEverything computed anew, on {machine.cores} cores ({machine.processor}).")
    return "\n".join(lines)


if __name__ == "__main__":
    promote_timings()
    README.write_text(render(README.read_text()))
