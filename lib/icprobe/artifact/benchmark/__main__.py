"""The command line of the benchmark."""

import argparse
import itertools

import pandas as pd

from icprobe import figures, models
from icprobe.artifact import benchmark
from icprobe.artifact.benchmark.comparison import compare
from icprobe.artifact.benchmark.methods import METHODS
from icprobe.artifact.benchmark.timings import CLAIMED, KEY
from icprobe.artifact.benchmark.work import LENGTHS
from icprobe.data import assets, paths


def main() -> None:
    """Run the comparisons asked for, and write the table after each: rows replace those before."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {benchmark.__name__}",
        description=benchmark.__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--methods", **several, choices=METHODS, default=list(METHODS), help="in quotes"
    )
    parser.add_argument(
        "--lengths", **several, choices=LENGTHS, default=LENGTHS,
        help="of examples: those of the suite grid, or long ones made of these",
    )  # fmt: skip
    parser.add_argument("--train", type=int, default=32, metavar="N", help="examples")
    parser.add_argument(
        "--queries", type=int, nargs="+", default=CLAIMED, metavar="M", help="numbers of queries"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    parser.add_argument(
        "--dtype", **several, choices=models.DTYPES, default=["float32"],
        help="of the model",
    )  # fmt: skip
    parser.add_argument("--model", default=assets.DEFAULT_MODEL, help="a folder or a hub name")
    parser.add_argument("--output", default="figures/mine", help="a folder")
    options = parser.parse_args()
    file = paths.resolve(options.output) / "cost.csv"
    for lengths, dtype, m in itertools.product(options.lengths, options.dtype, options.queries):
        what = options.model, dtype, "cpu", lengths, options.train, m
        rows = compare(*what, options.methods, options.repeats)
        table = pd.concat([pd.read_csv(file), rows]) if file.exists() else rows
        table = table.drop_duplicates(KEY, keep="last").sort_values(KEY[1:])
        figures.save_table(table, file.stem, file.parent)
        print(rows.drop(columns="versions").to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
