"""Make a finished run the reference: `./run_all.sh publish laptop`, then commit what it changed.

Tables, figures, verdicts and minutes of figures/<name>/ go to figures/reference/<name>/, finished
scores and trainings of data/scores/<name>/ (or another folder there) to data/scores/reference/, and
networks to data/networks/. Nothing with texts of a data set goes along, nor checkpoints.
"""

import argparse
import shutil
import sys
from pathlib import Path

from icprobe.data import paths

RESULTS = ("*.csv", "*.png", "*.pdf", "claims.json", "logs/timing.csv")
RECORDS = ("*/manifest.json", "*/part-*.parquet", "finetuned/*.json", "regression/*.json")


def publish(name: str, scores: str | None = None) -> list[Path]:
    """Copy a run's results into the reference folders; return the files that are there now.

    Args:
        name: Of the run's folder in figures/.
        scores: Of its folder in data/scores/, if that is another one.

    Raises:
        FileNotFoundError: If there are no results of this name.
    """
    results = paths.ROOT / "figures" / name
    kept = paths.ROOT / "data" / "scores" / (scores or name)
    found = [file for kind in RESULTS for file in sorted(results.glob(kind))]
    if not found:
        raise FileNotFoundError(f"there are no results in {paths.shown(results)}")
    made = {file: paths.REFERENCE_FIGURES / name / file.name for file in found}
    for kind in RECORDS:
        for file in kept.glob(kind):
            made[file] = paths.REFERENCE_SCORES / file.relative_to(kept)
    for file in (kept / "networks").glob("*"):
        made[file] = paths.REFERENCE_NETWORKS / file.name
    for file, target in made.items():
        with paths.replacing(target) as temporary:
            shutil.copyfile(file, temporary)
    return list(made.values())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 where there is nothing to publish."""
    parser = argparse.ArgumentParser(prog="run_all.sh publish", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="of a run's folder in figures/: laptop")
    parser.add_argument(
        "--scores", metavar="NAME", help="of its folder in data/scores/, if another"
    )
    options = parser.parse_args(argv)
    try:
        made = publish(options.name, options.scores)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(made)} files; next: ./run_all.sh python docs/generate.py, and commit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
