"""Write the README's numbers from figures/: `python -m icprobe.readme`.

What stands between `<!-- NAME: ... -->` and `<!-- end -->` is generated; a test fails where the
README says something else than the committed results.
"""

import re

import pandas as pd

from icprobe import paths

README = paths.ROOT / "README.md"
FIGURES = paths.ROOT / "figures"
BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+): [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """Return the README's text with every generated block made anew.

    Raises:
        KeyError: If a block has an unknown name.
    """
    blocks = {
        "findings-01": lambda: findings("01"),
        "findings-02": lambda: findings("02"),
        "minutes": minutes,
    }
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]()}\n{match[3]}", text)


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
    """Take over the minutes that complete fresh runs leave in their logs, to be committed."""
    for measured in FIGURES.glob("*/logs/timing.csv"):
        measured.replace(measured.parents[1] / "timing.csv")


def minutes() -> str:
    """Return the table of minutes per notebook and profile, from complete fresh runs."""
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
