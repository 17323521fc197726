"""Make a finished run the reference: `./run_all.sh publish laptop`, then commit what it changed.

Tables, figures, verdicts and minutes of figures/<name>/ go to figures/reference/<name>/, finished
scores and trainings of data/scores/<name>/ (or another folder there) to data/scores/reference/, and
networks to data/networks/. Nothing with texts of a data set goes along.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from icprobe.data import paths
from icprobe.scores import store

RESULTS = ("*.csv", "*.png", "*.pdf", "claims.json", "logs/timing.csv")
RECORDS = ("finetuned", "regression")  # folders of what is kept as .json files


def publish(name: str, scores: str | None = None) -> list[Path]:
    """Copy a run's results into the reference folders; return the files that are there now.

    Of the notebooks and the scores that are copied, files of an earlier run are removed. Scores
    that are not finished stay where they are.

    Raises:
        FileNotFoundError: If there are no results of this name.
        ValueError: If a record or a store is damaged; nothing is copied then.
    """
    results, figures = paths.ROOT / "figures" / name, paths.REFERENCE_FIGURES / name
    made = {file: figures / file.name for kind in RESULTS for file in sorted(results.glob(kind))}
    if not made:
        raise FileNotFoundError(f"there are no results in {paths.shown(results)}")
    numbers = {file.name[:3] for file in made if file.name[:2].isdigit()}
    earlier = {old for number in numbers for old in figures.glob(f"{number}*")}
    kept = paths.ROOT / "data" / "scores" / (scores or name)
    for manifest in kept.glob(f"*/{store.MANIFEST}"):
        scored = store.load(manifest.parent)
        if scored.complete:
            scored.check()  # nothing damaged takes the place of a reference
            folder = paths.REFERENCE_SCORES / manifest.parent.name
            earlier |= set(folder.glob("part-*"))
            parts = manifest.parent.glob("part-*.parquet")
            made |= {file: folder / file.name for file in (manifest, *parts)}
    for folder in RECORDS:
        for record in (kept / folder).glob("*.json"):
            if _is_whole(record):
                made[record] = paths.REFERENCE_SCORES / folder / record.name
    for network in (kept / "networks").glob("*"):
        made[network] = paths.REFERENCE_NETWORKS / network.name
    for file, target in made.items():
        with paths.replacing(target) as temporary:
            shutil.copyfile(file, temporary)
    for old in earlier - set(made.values()):
        old.unlink()
    return list(made.values())


def _is_whole(record: Path) -> bool:
    """Tell whether a table of 05 has all its tasks; a training's record is always whole."""
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        numbers = fields.get("numbers", {}).values()
        return all(len(tasks) == fields["identity"]["B"] for tasks in numbers)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{paths.shown(record)} is damaged, delete it: {error!r}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 where nothing can be published."""
    parser = argparse.ArgumentParser(prog="run_all.sh publish", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="of a run's folder in figures/: laptop")
    parser.add_argument(
        "--scores", metavar="NAME", help="of its folder in data/scores/, if another"
    )
    options = parser.parse_args(argv)
    try:
        made = publish(options.name, options.scores)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(made)} files; next: ./run_all.sh python docs/generate.py, and commit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
