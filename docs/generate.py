"""Write the README's numbers from figures/reference/: `./run_all.sh python docs/generate.py`.

What stands between `<!-- NAME: ... -->` and `<!-- end -->` is the macro NAME of `readme.md.j2`,
with numbers from committed tables; a test fails where the README says something else.
"""

import json
import re
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from icprobe.artifact.benchmark import comparison, methods, timings
from icprobe.data import paths
from icprobe.statistics import recommendation

README = paths.ROOT / "README.md"
FIGURES = paths.REFERENCE_FIGURES
BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+): [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """Return the README's text with every generated block made anew.

    Raises:
        AttributeError: If a block has an unknown name.
        KeyError: If a table lacks a row that a block names.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    helpers = (rows, cell, interval, signed, compared, weaker, judged, timed, coarser)
    environment.globals |= {helper.__name__: helper for helper in (*helpers, fresh_minutes, demo)}
    environment.globals |= {"CHECKED": comparison.CHECKED, "OURS": methods.OURS}
    macros = environment.get_template("readme.md.j2").module

    def block(match: re.Match) -> str:
        made = getattr(macros, match["name"].replace("-", "_"))()
        return f"{match[1]}{made.strip()}\n{match[3]}"

    return BLOCK.sub(block, text)


def read(table: str) -> pd.DataFrame:
    """Return a reference table, such as "laptop_long/04_lds.csv"; without a folder, laptop's."""
    return pd.read_csv(FIGURES / table if "/" in table else FIGURES / "laptop" / table)


def rows(table: str, **equal) -> list[dict]:
    """Return a table's rows whose columns equal the values given."""
    frame = read(table)
    for column, value in equal.items():
        frame = frame[frame[column] == value]
    return frame.to_dict("records")


def cell(table: str, quantity: str | None = None, column: str = "", **equal) -> object:
    """Return a number of the one row that is meant; by default "estimate (low to high)".

    Raises:
        KeyError: If there is no such row, or several.
    """
    equal |= {} if quantity is None else {"quantity": quantity}
    found = rows(table, **equal)
    if len(found) != 1:
        raise KeyError(f"{table} has {len(found)} rows with {equal}, expected one")
    return found[0][column] if column else interval(found[0])


def interval(row: dict) -> str:
    """Return "estimate (low to high)"."""
    estimate, low, high = (row[name] for name in ("estimate", "low", "high"))
    if not np.isfinite(low):
        return f"{estimate:.2f} (in too few rankings for an interval)"
    return f"{estimate:.2f} ({low:.2f} to {high:.2f})"


def signed(*values: float) -> str:
    """Return a number with its sign, or the two ends of an interval."""
    return " to ".join(f"{value:+z.2f}" for value in values)


def compared(quantity: str) -> str:
    """Return how the first of two methods predicts training, as their difference in 03 has it."""
    low, high = (cell("03_findings.csv", quantity, column) for column in ("low", "high"))
    worse = "worse than" if high < 0 else "neither measurably better nor worse than"
    return "better than" if low > 0 else worse


def weaker(pool: str) -> str:
    """Return in how many conditions gains and cosines agree measurably less than in a task."""
    found = read("03_conditions.csv").dropna(subset="low")
    found = found[found["condition"].str.contains(" less ") & (found["pool"] == pool)]
    low = found.query("level == 'per query' and scores == 'gain and cosine'")["low"]
    return f"{(low > 0).sum()} of {len(low)}"


def judged() -> list[dict]:
    """Return the claims and verdicts; those of 04 are its longer run's."""
    shorter, longer = (
        json.loads((FIGURES / name / "claims.json").read_text(encoding="utf-8"))
        for name in ("laptop", "laptop_long")
    )
    longer = {claim["id"]: claim for claim in longer if claim["notebook"] == "04" and claim["n"]}
    return [longer.get(claim["id"], claim) for claim in shorter]


def timed() -> list:
    """Return the timings in float32, of the number of queries that most methods were timed for."""
    parts = timings.beside(read("cost.csv").query("dtype == 'float32'")).values()
    return [row for part in parts for row in part.sort_values(["quantity", "seconds"]).itertuples()]


def coarser() -> list:
    """Return the timings in bfloat16, with `faster`: how many times the speed of float32."""
    key = ["method", "lengths", "m"]
    frame = read("cost.csv")
    exact = frame[frame["dtype"] == "float32"].set_index(key)["seconds"].rename("exact")
    both = frame[frame["dtype"] == "bfloat16"].join(exact, on=key, how="inner")
    return list(both.assign(faster=both["exact"] / both["seconds"]).itertuples())


def fresh_minutes() -> pd.DataFrame:
    """Return minutes by notebook (row) and profile (column), from fresh runs."""
    runs = {name: read(f"{name}/timing.csv").set_index("notebook") for name in ("smoke", "laptop")}
    return pd.DataFrame({name: run["minutes"] for name, run in runs.items()}).sort_index()


def demo() -> str:
    """Return the verdict of 08 on the demo data."""
    found, pool = read("demo/08_findings.csv"), len(read("demo/08_scores.csv"))
    said = recommendation.recommend(found)
    return recommendation.as_text(said, recommendation.TOLERANCE, (pool, found["m"].iloc[0]))


if __name__ == "__main__":
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
