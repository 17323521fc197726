"""The claims table: what the paper says, what was measured here, and a verdict by a fixed rule.

The rules stand here and see the findings that notebooks wrote (`<output_dir>/NN_findings.csv`, or
another table of that form), nothing else. Where there are no findings, the verdict is "not run".

They were written before the first results, and some things have changed since. A rule that reads
"above a threshold" no longer calls an interval that merely holds it "partly": P2 became "not
reproduced" by it. Intervals of correlations are normal on Fisher's scale, since percentiles lay too
low (`statistics.ends`). The two rows "each query for itself" were added, and those of data that
queries choose in turn; their tests say so. Of fine-tuning, intervals became longer for so few seeds
(`comparison`: verdicts from three on, then Student's t), random data of the same lengths are
matched in the tokens that are learnt rather than in all, and a longer run was added. The shifts of
C4 were chosen when a prototype's results were known, the rule of C5 when single timings were.
Verdicts are not corrected for the number of claims.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from icprobe import paths

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced"
NOT_TESTABLE, NOT_RUN = "not testable here", "not run"

# where C4 looks for less agreement, see `regression.agreements.CONDITIONS`
SHIFTS = (
    "unrelated task",
    "opposite task",
    "covariates 3 times as wide",
    "mean covariates 4 apart",
)
FAR = "tasks far from the prior"
INFORMED = "informative prior: "  # how quantities of networks with such a prior begin

# takes the findings that a claim is tested by, in order: quantity, unit, estimate, low, high, n
Rule = Callable[[pd.DataFrame], str]


def above(full: float, least: float) -> Rule:
    """Reproduced if the interval is above `full`, partly if it is above `least`."""

    def rule(rows: pd.DataFrame) -> str:
        low = rows["low"].iloc[0]
        return REPRODUCED if low > full else PARTLY if low > least else NOT

    return rule


def all_above(threshold: float) -> Rule:
    """Reproduced if all intervals are above the threshold, partly if some are."""

    def rule(rows: pd.DataFrame) -> str:
        above = rows["low"] > threshold
        return REPRODUCED if above.all() else PARTLY if above.any() else NOT

    return rule


all_positive = all_above(0)


def weakens(rows: pd.DataFrame) -> str:
    """Reproduced if all intervals are above zero, partly if the first and some others are."""
    positive = (rows["low"] > 0).to_numpy()
    if not positive[0] or not positive[1:].any():
        return NOT
    return REPRODUCED if positive.all() else PARTLY


def exceeds(threshold: float) -> Rule:
    """Reproduced if the interval is above the threshold."""

    def rule(rows: pd.DataFrame) -> str:
        return REPRODUCED if rows["low"].iloc[0] > threshold else NOT

    return rule


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        id: The paper's claims are C1 to C5, those about its premise P1 to P9.
        statement: What is claimed.
        test: How it was tested, and the rule in words.
        notebook: Number of the notebook whose findings have the rows.
        quantities: The rows; the first is the one shown.
        rule: The verdict; None while there is nothing to judge by.
        unit: Of the rows.
        shown: The row whose numbers are shown; by default the first of these.
        table: Of the notebook, which has the rows: <notebook>_<table>.csv.
    """

    id: str
    statement: str
    test: str
    notebook: str
    quantities: Sequence[str] = ()
    rule: Rule | None = None
    unit: str = "Spearman"
    shown: str = ""
    table: str = "findings"


CLAIMS = (
    Claim(
        "C1",
        "ICP and gradient attribution rank training data alike where task type and content are "
        "shared",
        "ICP score against mean gradient dot product among examples of the queries' own task, mean "
        "over the tasks of the suite crossed (else of the pool); reproduced if the interval is "
        "above 0.3, partly if above 0",
        "03",
        ["ICP score against product, same task"],
        above(0.3, 0),
    ),
    Claim(
        "C1, published scores",
        "the same over a whole pool, whatever type and content",
        "the authors' published ICP and influence scores (the interval is over training examples "
        "and the influence's queries; ICP was published as a mean); the same rule",
        "07",
        ["ICP score against mean influence"],
        above(0.3, 0),
    ),
    Claim(
        "C2",
        "the agreement weakens as task type, content or both move away",
        "agreement in the same task less that with the same type only, the same content only, and "
        "neither (shown); reproduced if all three intervals are above 0, partly if some are",
        "03",
        [
            "ICP score against product, same task less neither",
            "ICP score against product, same task less same type",
            "ICP score against product, same task less same content",
        ],
        all_positive,
    ),
    *(
        Claim(
            f"C1 and C2, each query for itself: {first} and {second}",
            "the same, in the suite crossed (else in the pool), with no mean over unlike queries",
            f"{first} against {second}, each query ranking the examples for itself (for one query, "
            "an ICP score is whether its gain is positive; added when the first results had shown "
            "how much a mean over queries hides); reproduced if the "
            "agreement in the same task (shown) is above 0 and above that in the three other "
            "conditions, partly if some of these four hold",
            "03",
            [
                f"{first} against {second}, same task{less}, per query"
                for less in ("", " less neither", " less same type", " less same content")
            ],
            all_positive,
        )
        for first, second in (("ICP score", "product"), ("gain", "cosine"))
    ),
    Claim(
        "C3",
        "models fine-tuned on data chosen by either method do equally well, and better than on "
        "low-ranked data",
        "log-likelihood of held-out queries after fine-tuning on the best by ICP score, less that "
        "on the best by product (shown), as a share of what the full pool brings; reproduced if "
        "TOST at 5 % finds the two equivalent (margin 0.1, or the notebook's) and each is better "
        "than the worst by the same method, partly if some of these three hold",
        "04",
        [
            "ICP score, top less product, top: room within the margin",
            "ICP score, top less ICP score, bottom",
            "product, top less product, bottom",
        ],
        all_positive,
        unit="share of the full pool's gain",
        shown="ICP score, top less product, top",
    ),
    *(
        Claim(
            f"C4{more}{'' if name == 'ICP score' else ', ' + name}",
            f"on synthetic linear regression the same picture appears: {name} agrees with "
            f"influence in domain, and less out of distribution (tasks around {prior})",
            f"a transformer trained to regress in context: one-shot {name} against TracIn at the "
            "zero-shot state, averaged over tasks (shown: in domain), less the same under each of "
            f"four shifts ({'; '.join(SHIFTS)}); reproduced if the agreement in domain and all "
            "differences are above 0, partly if the former and some are",
            "05",
            [
                f"{about}{name} against TracIn, in domain",
                *(f"{about}{name} against TracIn, in domain less {shift}" for shift in SHIFTS),
            ],
            weakens,
        )
        for prior, more, about in (
            ("zero", "", ""),
            (
                "a mean, so that the zero-shot model knows something",
                ", informative prior",
                INFORMED,
            ),
        )
        for name in ("ICP score", "gain")
    ),
    Claim(
        "C4, far tasks",
        "the agreement is less where tasks are unlike those the model was trained on",
        "as before, by gain: agreement in domain less that for tasks around minus the prior mean "
        "(examples and queries alike); reproduced if the interval is above 0",
        "05",
        [f"{INFORMED}gain against TracIn, in domain less {FAR}"],
        exceeds(0),
    ),
    Claim(
        "C5",
        "ICP needs no backward pass and is cheaper",
        "seconds that exact gradient products of the same training examples and M queries take "
        "over those that probing takes, both by this library, on one machine (shown: M = 48, "
        "lengths of grid; the interval is no confidence interval, but the range that repeats "
        "allow); reproduced if they take longer for M = 1, 12 and 48, at the lengths of grid and "
        "at long ones, partly if for some",
        "06",
        [
            f"gradient products over probing, {lengths}, M = {m}"
            for lengths in ("grid", "long")
            for m in (48, 12, 1)
        ],
        all_above(1),
        unit="ratio of seconds",
    ),
    Claim(
        "rho > 0.85",
        "a summary of the paper: Spearman above 0.85",
        "the authors' published scores; reproduced if the interval is above 0.85",
        "07",
        ["ICP score against mean influence"],
        exceeds(0.85),
    ),
    Claim(
        "P1",
        "beyond the paper: a query's gains predict what a training step on each example does to it",
        "gain against the effect of one SGD step of finite size, per query; reproduced if the "
        "interval is above 0.3, partly if above 0",
        "03",
        ["gain against training effect, per query"],
        above(0.3, 0),
    ),
    Claim(
        "P2",
        "beyond the paper: they do so better than the similarity of texts does",
        "the same less that of the better of TF-IDF and embedding similarity; reproduced if the "
        "interval is above 0",
        "03",
        ["gain less best similarity, per query"],
        exceeds(0),
    ),
    Claim(
        "P3",
        "beyond the paper: gradients do so better than gains do",
        "the same of gradient cosines, less that of gains; reproduced if the interval is above 0 "
        "(what a small step does is the product by definition: this says how far that carries)",
        "03",
        ["cosine less gain, per query"],
        exceeds(0),
    ),
    *(
        Claim(
            number,
            f"beyond the paper: data chosen by {name} train better models than random data, and "
            "than random data of the same lengths",
            "log-likelihood of held-out queries after fine-tuning on the best by this, less that "
            "on random data (shown), and on random data with as many tokens to learn, as a share "
            "of what the full pool brings; reproduced if both intervals are above 0, partly if one "
            "is",
            "04",
            [f"{name}, top less random", f"{name}, top less random, as long as {name}"],
            all_positive,
            unit="share of the full pool's gain",
        )
        for number, name in (("P4", "ICP score"), ("P5", "product"))
    ),
    *(
        Claim(
            number,
            f"beyond the paper: so do data that queries choose in turn, each by its {name}s",
            "log-likelihood of held-out queries after fine-tuning on these, less that on random "
            "data, as a share of what the full pool brings (added when the first results had shown "
            "that the mean over queries chooses from few tasks); reproduced if the interval is "
            "above 0",
            "04",
            [f"{name}, in turn less random"],
            exceeds(0),
            unit="share of the full pool's gain",
        )
        for number, name in (("P6", "gain"), ("P7", "cosine"))
    ),
    *(
        Claim(
            number,
            f"beyond the paper: sums of {name}s predict what training on a subset does",
            "linear datamodelling score: over random subsets, per query; reproduced if the "
            "interval is above 0.3, partly if above 0",
            "04",
            [f"LDS of {name}"],
            above(0.3, 0),
            table="lds",
        )
        for number, name in (("P8", "gain"), ("P9", "product"))
    ),
)


def judge(output_dir: str | Path) -> list[dict]:
    """Return one record per claim, from the findings in a folder.

    Args:
        output_dir: Folder of the findings.

    Returns:
        id, statement, test, notebook, estimate, low, high, unit, n, verdict, and allows: the
        verdict if the truth lay at the upper ends of the intervals. Where it is another, more data
        might change the verdict. Numbers, and this, are None where there are no results.

    Raises:
        KeyError: If findings are there but lack a row that a claim is tested by.
    """
    folder = paths.resolve(output_dir)
    records = []
    for claim in CLAIMS:
        record = {key: getattr(claim, key) for key in ("id", "statement", "test", "notebook")}
        numbers = dict.fromkeys(("estimate", "low", "high", "unit", "n"))
        verdict, allows = NOT_RUN, None
        file = folder / f"{claim.notebook}_{claim.table}.csv"
        if claim.rule and file.exists():
            findings = pd.read_csv(file)
            findings = findings[findings["unit"] == claim.unit].set_index("quantity")
            shown = claim.shown or claim.quantities[0]
            missing = [n for n in (*claim.quantities, shown) if n not in findings.index]
            if missing:
                raise KeyError(f"{paths.shown(file)} has no row {missing[0]!r} for {claim.id}")
            rows = findings.loc[list(claim.quantities)]
            if rows[["estimate", "low", "high"]].isna().any(axis=None):
                verdict = NOT_TESTABLE  # such as in data with a single task
            else:
                verdict = claim.rule(rows)
                allows = claim.rule(rows.assign(low=rows["high"]))
                numbers = findings.loc[shown, list(numbers)].to_dict()
                numbers["n"] = int(numbers["n"])
        records.append({**record, **numbers, "verdict": verdict, "allows": allows})
    return records


def write(output_dir: str | Path) -> pd.DataFrame:
    """Judge all claims and write <output_dir>/claims.json; return them as a table."""
    records = judge(output_dir)
    file = paths.resolve(output_dir) / "claims.json"
    with paths.replacing(file) as temporary:
        temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return pd.DataFrame(records)
