"""Write the README's numbers from figures/: `python -m icprobe.readme`.

What stands between `<!-- NAME: ... -->` and `<!-- end -->` is generated; a test fails where the
README says something else than the committed results.
"""

import json
import re

import numpy as np
import pandas as pd

from icprobe import benchmark, parameters, paths, statistics, timings
from icprobe.statistics import recommendation
from icprobe.statistics.conditions import condition_contrasts

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
        "agreement": agreement,
        "choosing": choosing,
        "exactly": exactly,
        "claims": claims,
        "findings-01": lambda: findings("01"),
        "findings-02": lambda: findings("02"),
        "finetuning": finetuning,
        "lds": lds,
        "synthetic": synthetic,
        "cost": cost,
        "gpu": on_a_gpu,
        "growth": growth,
        "your-data": your_data,
        "minutes": minutes,
        "parameters": parameter_tables,
    }
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]()}\n{match[3]}", text)


def headline() -> str:
    """Return the answers in short, a sentence or two for each question."""
    folder = FIGURES / "laptop"
    said = statistics.as_text(pd.read_csv(folder / "03_findings.csv"))
    of_step = {
        name: said[f"{name} against training effect, per query"]
        for name in ("cosine", "gain", "hidden states")
    }
    compared = pd.read_csv(FIGURES / LONG / "04_differences.csv").set_index(["first", "second"])
    both, icp, product = (
        compared.loc[pair, "verdict"]
        for pair in (
            ("ICP score, top", "product, top"), ("ICP score, top", "random"),
            ("product, top", "random"),
        )
    )  # fmt: skip
    exact = pd.read_csv(folder / "05_in_domain.csv").query("k == 0")
    exact = {
        name: statistics.as_text(rows.rename(columns={"influence": "quantity"}))
        for name, rows in exact.groupby("probing")
    }
    state = "TracIn at the zero-shot state"
    shifts = pd.read_csv(folder / "05_conditions.csv")
    opposite = statistics.as_text(shifts[shifts["condition"] == "opposite task"])
    dearer = statistics.as_text(pd.read_csv(folder / "06_findings.csv").dropna())
    products = [f"{dearer[f'gradient products over probing, grid, M = {m}']}" for m in (1, 12, 48)]
    return f"""\
- **Do probing and gradients rank training examples alike?** For each query by itself, gains and
  gradient cosines agree with Spearman {said["gain against cosine, same task, per query"]} among
  examples of the query's own task, and with {said["gain against cosine, neither, per query"]} where
  nothing is shared. The published aggregation, over all queries, gives
  {said["ICP score against product, same task"]} here, and {_authors()} in the authors' own files.
- **Do they predict what training does?** What one real training step on an example does to each
  query is ranked by gradient cosines with {of_step["cosine"]}, by gains with
  {of_step["gain"]}, by plain similarity of hidden states with {of_step["hidden states"]}.
- **Do they choose good training data?** Held against random data of the same size, models
  fine-tuned on the best {_chosen()} examples by ICP score are **{icp}**, those on the best by
  product **{product}**; held against each other, **{both}** (a longer run of 04, see below).
- **And where everything can be computed?** In linear regression, gains rank examples as their
  influence on an untrained learner does, with {exact["gain"][state]} (the published ICP
  score: {exact["ICP score"][state]}), and not as their influence on a fitted one
  (leave-one-out: {exact["gain"]["leave-one-out, exact"]}). Examples of the opposite task, which
  hurt, are ranked so with {opposite["gain against TracIn"]}.
- **Is probing the cheaper one?** Exact gradient products of the same pairs take {products[0]} times
  its seconds for one query, {products[1]} for 12 and {products[2]} for 48 (ranges over runs): it
  takes a pass for each pair, they take one for each example. It needs log-probabilities only."""


def _authors() -> str:
    """Return how far the authors' two scores agree."""
    published = pd.read_csv(FIGURES / "laptop" / "07_findings.csv")
    both = published[published["quantity"] == "ICP score against mean influence"]
    (said,) = statistics.as_text(both[both["unit"] == "Spearman"]).values()
    return said


def _chosen() -> str:
    """Return how many examples of how many a method chooses in 04."""
    sizes = pd.read_csv(FIGURES / LONG / "04_budgets.csv")["examples"]
    return f"{sizes.iloc[0]:.0f} of {sizes.max():.0f}"


def agreement() -> str:
    """Return what 03 found of probing against gradients, and of both against training."""
    folder = FIGURES / "laptop"
    found = pd.read_csv(folder / "03_findings.csv")
    conditions = pd.read_csv(folder / "03_conditions.csv").query("level == 'per query'")
    higher = condition_contrasts(conditions).loc[:, "per query"]
    step = pd.unique(pd.read_csv(folder / "03_training_effect.csv")["second"])[1]
    conditions = conditions[conditions["scores"] == "gain and cosine"].assign(
        quantity=lambda frame: frame["pool"] + " " + frame["condition"]
    )
    at = statistics.as_text(conditions)
    answers = pd.read_csv(folder / "03_same_answer.csv")
    answers = statistics.as_text(answers.assign(quantity=answers["pool"] + " " + answers["given"]))
    said = statistics.as_text(found)
    kinds = ("same task", "same type", "same content", "neither")
    rows = [
        f"| `{pool}` | {' | '.join(at[f'{pool} {kind}'] for kind in kinds)} "
        f"| {higher[pool, 'gain and cosine']} |"
        for pool in ("crossed", "grid")
    ]
    methods = (
        "cosine", "gain", "gain over neutral", "hidden states", "words (TF-IDF)",
        "same completion",
    )  # fmt: skip
    effects = []
    for method in methods:
        within = said.get(f"{method} against training effect, within a task", "–")
        effect = said[f"{method} against training effect, per query"]
        effects.append(f"| {method} | {effect} | {within} |")
    rival, rival_within, beyond, gradients = (
        statistics.compared(found, name)
        for name in (
            "gain less best similarity, per query", "gain less best similarity, within a task",
            "gain over neutral less best similarity, per query", "cosine less gain, per query",
        )
    )  # fmt: skip
    lines = [
        "Spearman of gains with gradient cosines, each query for itself, by what an example shares "
        "with the query; the last column counts in how many of the three other conditions it is "
        "measurably less than in the same task:",
        "",
        "| suite | same task | type only | content only | neither | measurably less |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"In `sentiment`, where one type meets four contents, they agree with "
        f"{answers['sentiment nothing']}, but with {answers['sentiment same completion']} beyond "
        "sharing the query's answer.",
        "",
        f"Spearman with the effect of one real training step ({step}) on each query:",
        "",
        "| scores | per query | within a task |",
        "|---|---|---|",
        *effects,
        "",
        f"So gains predict training {rival} the better of both similarities (over neutral: "
        f"{beyond} it; within a task: {rival_within} it), and gradient cosines do {gradients} "
        "gains; but to first order, such a step is the gradients' product by definition.",
    ]
    return "\n".join(lines)


def exactly() -> str:
    """Return what 05 found, in sentences."""
    table = pd.read_csv(FIGURES / "laptop" / "05_conditions.csv")
    corrupted = pd.read_csv(FIGURES / "laptop" / "05_corrupted.csv")
    spoilt, flipped = (corrupted[corrupted["corruption"] == x] for x in ("outlier", "flip"))
    of = {name: statistics.as_text(rows) for name, rows in table.groupby("condition")}
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
    forms = statistics.as_text(forms.rename(columns={"influence": "quantity"}))
    areas = statistics.as_text(spoilt.rename(columns={"method": "quantity"}))
    flips = statistics.as_text(flipped.rename(columns={"method": "quantity"}))
    return f"""\
Networks that learned linear regression from their context rank examples by gain as TracIn at the
zero-shot state does with Spearman {near["gain against TracIn"]}, but as influence on a learner that
is already fitted to the whole pool (leave-one-out) with {forms["leave-one-out, exact"]}. For
examples of an unrelated or the opposite task, the first is {unrelated["gain against TracIn"]} and
{opposite["gain against TracIn"]}, while the mean gain goes from {near["mean gain"]} to
{unrelated["mean gain"]} and {opposite["mean gain"]}. For covariates three times as wide it is
{wide["gain against TracIn"]} (for Bayes, the exact learner, {wide["gain of Bayes against TracIn"]}:
what the two do not share is the networks' failure), for those whose means are apart
{apart["gain against TracIn"]} (Bayes {apart["gain of Bayes against TracIn"]}). Outliers among the
labels are found by gains with an area under the ROC curve of {areas["gain"]}, by TracIn with
{areas["TracIn"]}; flipped signs by both ({flips["gain"]} and {flips["TracIn"]})."""


def choosing() -> str:
    """Return what 04 found of selections, in its longer run, in sentences."""
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
    share = f"{overlap.loc['ICP score, top', 'product, top']:.0%}"
    queries = f"{size.queries} held-out queries, {size.seeds} seeds"
    part = (
        f"{_signed(largest['contribution'])} of the ICP score's is one task's, `{largest['task']}`"
    )
    tops = [
        compared.loc[(f"{name}, top", "random"), "verdict"] for name in ("ICP score", "product")
    ]
    against = "Against" if any("better" in verdict for verdict in tops) else "Neither beats"
    return f"""\
The best {_chosen()} examples of the pool by ICP score, of which those by product share {share},
train models that are {both} to those by product, as a share of what the full pool brings
in log-likelihood ({queries}); equivalent means that the 90 % interval is within
{compared["margin"].iloc[0]:g}, for new queries of the same tasks. **{against} random data** of the
same size: ICP score {random_icp}, product {random_product};
{part}. Queries that choose in turn by gain: {in_turn}. Against the lowest-ranked by the same
method: ICP score {worst_icp}, product {worst_product}.

By size (nats a token over the untouched model, mean over seeds):

{_sizes()}"""


def _sizes() -> str:
    """Return 04's sweep over budgets, in its longer run, as a table."""
    swept = pd.read_csv(FIGURES / LONG / "04_budgets.csv")
    cells = swept.apply(lambda row: f"{row.estimate:.2f} ({row.low:.2f} to {row.high:.2f})", axis=1)
    table = swept.assign(cells=cells).set_index(["method", "examples"])["cells"].unstack()  # noqa: PD010
    head = "".join(f" {size} examples |" for size in table.columns)
    rows = [f"| {name} | {' | '.join(row)} |" for name, row in table.iterrows()]
    return "\n".join([f"| chosen by |{head}", "|---|" + "---|" * table.shape[1], *rows])


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
    pairs = runs[0].merge(runs[1], "right", ["first", "second"], suffixes=("_short", ""))
    for row in pairs.itertuples():
        short = _interval(row.share_short, row.share_low_short, row.share_high_short)
        both = pd.notna(row.share_short)
        cells = (
            row.first,
            row.second,
            short if both else "–",
            row.verdict_short if both else "–",
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
    return f"{value:+z.2f}"


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
            rows = statistics.as_text(rows)
            lines.append(f"| {prior} | {condition} | {' | '.join(rows[q] for q in shown)} |")
    return "\n".join(lines)


def cost() -> str:
    """Return what methods cost beside each other, in sentences and as a table."""
    folder = FIGURES / "laptop"
    timed = pd.read_csv(folder / "cost.csv")
    exact = timed[timed["dtype"] == "float32"]
    found = pd.read_csv(folder / "06_findings.csv").dropna(subset="estimate")
    single = found["low"].isna()
    found = statistics.as_text(found[~single]) | {
        row.quantity: f"{row.estimate:.2f} (one run)" for row in found[single].itertuples()
    }
    crossings = pd.read_csv(folder / "06_crossings.csv").query("against == 'gradient products'")
    lines = []
    for row in crossings.itertuples():
        begins = f"gradient products over probing, {row.lengths}, "
        ratios = ", ".join(
            f"{ratio} for {name.removeprefix(begins)}"
            for name, ratio in found.items()
            if name.startswith(begins)
        )
        seconds = _between(row.cheaper, row.dearer)
        operations = f"{row.operations:.0f}" if np.isfinite(row.operations) else "no number"
        lines += [
            f"Exact gradient products of {exact['n'].max()} training examples and M queries of the "
            f"lengths `{row.lengths}` take so many times the seconds of probing: {ratios}. Probing "
            f"becomes the dearer one {seconds}; in counted operations, from {operations} on, and "
            f"if nothing were shared between pairs, from {row.nothing_shared:.0f} on.",
            "",
        ]
    lines += [_coarser(timed), ""]
    lines += [
        "| lengths | M | gives | method | seconds (range) | efficiency | GiB | error | rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in timings.beside(exact).values():
        for row in rows.sort_values(["gives", "seconds"]).itertuples():
            ours = row.method.startswith(benchmark.OURS)
            several = f" ({row.low:.1f} to {row.high:.1f})" if row.repeats > 1 else ""
            errors = ("–", "–") if pd.isna(row.error) else (f"{row.error:.1g}", f"{row.rank:.2f}")
            cells = (
                f"`{row.lengths}`",
                str(row.m),
                row.gives,
                f"**{row.method}**" if ours else row.method,
                f"{row.seconds:.1f}{several}",
                f"{row.efficiency:.2f}",
                f"{row.peak:.1f}",
                *errors,
            )
            lines.append(f"| {' | '.join(cells)} |")
    runs = exact["repeats"]
    lines += [
        "",
        f"On {exact['threads'].max()} cores ({exact['machine'].iloc[0]}); medians and ranges of up "
        f"to {runs.max()} runs (no range: a single one). *Error* and *rank* are over all training "
        f"examples and {benchmark.CHECKED} queries.",
    ]
    return "\n".join(lines)


def on_a_gpu() -> str:
    """Return what `benchmarks/gpu.py` timed, as a table."""
    timed = pd.read_csv(FIGURES / "gpu" / "gpu.csv")
    lines = [
        f"On one {timed['device'].iloc[0]}, with a model of Pythia-1b's shape and random weights, "
        f"{timed['m'].iloc[0]} queries, and examples of {timed['tokens'].mean():.0f} tokens on "
        "average; minutes for 52,002 training examples are from the runs of N and of a few:",
        "",
        "| dtype | method | N | seconds (range) | 52,002 (minutes) | efficiency | GiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in timed.itertuples():
        lines.append(
            f"| {row.dtype} | {row.method} | {row.n:,} | {row.seconds:.1f} ({row.low:.1f} to "
            f"{row.high:.1f}) | {row.minutes:.0f} | {row.floor / row.seconds:.2f} | {row.peak:.1f} "
            f"| {row.error:.1g} |"
        )
    return "\n".join(lines)


def growth() -> str:
    """Return what `benchmarks/growth.py` measured: exponents, workers, resuming."""
    exponents, workers, resume = (
        pd.read_csv(FIGURES / "growth" / f"{name}.csv")
        for name in ("exponents", "workers", "resume")
    )
    lines = [
        "| model | method | grows | exponent of seconds (larger half) | MiB more |",
        "|---|---|---|---|---|",
    ]
    for row in exponents.itertuples():
        lines.append(
            f"| {row.model} | {row.method} | {row.grows}, {row.first:,} to {row.last:,} | "
            f"{row.seconds:.2f} ({row.seconds_upper:.2f}) | {row.grown:,.0f} |"
        )
    lines += [
        "",
        "| method | N, M | engine | workers | threads each | seconds (range) |",
        "|---|---|---|---|---|---|",
    ]
    for row in workers.itertuples():
        lines.append(
            f"| {row.method} | {row.n}, {row.m} | {row.engine} | {row.workers} | {row.threads} | "
            f"{row.seconds:.1f} ({row.low:.1f} to {row.high:.1f}) |"
        )
    seconds = resume.set_index("what")["seconds"]
    lines += [
        "",
        f"A store of {resume['parts'].iloc[0]:,} parts is opened in {seconds['open']:.2f} s, and "
        f"what it lacks is found in {seconds['find what is missing']:.2f} s; one part scored anew "
        f"and all scores read take {seconds['resume one missing part and read all']:.1f} s "
        f"(reading alone {seconds['read all scores']:.1f} s).",
    ]
    return "\n".join(lines)


def your_data() -> str:
    """Return the verdict of 08 on the demo data."""
    agreed = pd.read_csv(FIGURES / "demo" / "08_findings.csv")
    scored = pd.read_csv(FIGURES / "demo" / "08_scores.csv")
    n, m = agreed[["n", "m"]].iloc[0]
    said = recommendation.as_text(
        recommendation.recommend(agreed), recommendation.TOLERANCE, (len(scored), m)
    )
    return f"From a sample of {n} of {len(scored)} training examples and {m} queries:\n\n> {said}"


def _between(cheaper: float, dearer: float) -> str:
    """Return in words where seconds cross, see `costs.crossings`."""
    if pd.isna(dearer):
        return f"for more than {cheaper:.0f} queries, the most that were timed"
    if pd.isna(cheaper):
        return f"for {dearer:.0f} or less"
    return f"between {cheaper:.0f} and {dearer:.0f} queries"


def _coarser(timed: pd.DataFrame) -> str:
    """Return what bfloat16 brings, in a sentence for each method."""
    key = ["method", "lengths", "m"]
    rows = timed[timed["dtype"] == "bfloat16"].set_index(key)
    exact = timed[timed["dtype"] == "float32"].set_index(key)
    rows = rows[rows.index.isin(exact.index)]
    said = [
        f"{method.removeprefix(benchmark.OURS)} ({lengths}, M = {m}) "
        f"{exact.loc[(method, lengths, m), 'seconds'] / row['seconds']:.1f} times as fast as in "
        f"float32, rank {row['rank']:.3f}"
        for (method, lengths, m), row in rows.iterrows()
    ]
    return f"In bfloat16: {'; '.join(said)}."


def claims() -> str:
    """Return the table of claims and verdicts; those of 04 are its longer run's."""
    records, longer = (
        json.loads((FIGURES / name / "claims.json").read_text(encoding="utf-8"))
        for name in ("laptop", LONG)
    )
    longer = {claim["id"]: claim for claim in longer if claim["notebook"] == "04" and claim["n"]}
    records = [longer.get(claim["id"], claim) for claim in records]
    lines = ["| claim | | estimate (95 %) | n | verdict |", "|---|---|---|---|---|"]
    tests = []
    for claim in records:
        values = [claim[end] or 0 for end in ("estimate", "low", "high")]
        interval = (
            "({:z.2f} to {:z.2f})"
            if claim["unit"] != "ratio of seconds"
            else "(runs: {:z.2f} to {:z.2f})"
        )
        number = f"{{:z.2f}} {interval}".format(*values) if claim["n"] else "–"
        cells = (claim["id"], claim["statement"], number, str(claim["n"] or "–"))
        verdict, allows = claim["verdict"], claim["verdict_at_upper_end"]
        more = "" if allows in (verdict, None) else f" (the interval allows: {allows})"
        lines.append(f"| {' | '.join(cells)} | **{verdict}**{more} |")
        tests.append(f"- **{claim['id']}** (notebook {claim['notebook']}): {claim['test']}.")
    summary = "<details><summary>How each claim is tested, and by what rule</summary>"
    return "\n".join([*lines, "", summary, "", *tests, "", "</details>"])


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


def parameter_tables() -> str:
    """Return what the notebooks' parameters cells say: a table for each, and one of what is alike.

    A parameter is in the first table if several notebooks say the same of it.
    """
    rows = pd.DataFrame(
        [
            (path.stem, f"`{one.name}`", one.words, f"`{one.default!r}`", one.comment)
            for path in sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
            for one in parameters.read(path).values()
        ],
        columns=["notebook", "parameter", "type", "default", "meaning"],
    )
    alike = ["parameter", "type", "default", "meaning"]
    rows["notebooks"] = rows.groupby(alike)["notebook"].transform(
        lambda names: ", ".join(name[:2] for name in names)
    )
    several = rows["notebooks"].str.contains(",")
    shared = rows[several].drop_duplicates(alike)
    parts = [_folded("Of several notebooks", shared[[*alike, "notebooks"]])]
    for name, own in rows[~several].groupby("notebook"):
        parts.append(_folded(f"Only of {name}", own[alike]))
    return "\n".join(parts)


def _folded(title: str, table: pd.DataFrame) -> str:
    """Return a table that opens when its title is clicked on."""
    lines = [" | ".join(table.columns), "|".join(["---"] * table.shape[1])]
    lines += [" | ".join(row) for row in table.itertuples(index=False)]
    body = "\n".join(f"| {line} |" for line in lines)
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


if __name__ == "__main__":
    promote_timings()
    README.write_text(render(README.read_text()))
