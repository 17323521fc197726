"""The command line of the benchmark."""

import argparse
import itertools

import pandas as pd

from icprobe import assets, figures, paths
from icprobe import lm as language_model
from icprobe.artifact import benchmark
from icprobe.artifact.benchmark.comparison import compare
from icprobe.artifact.benchmark.methods import METHODS
from icprobe.artifact.benchmark.timings import CLAIMED, merged
from icprobe.artifact.benchmark.work import LENGTHS

TABLE = "cost"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {benchmark.__name__}", description=benchmark.__doc__.splitlines()[0]
    )
    some = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--methods", **some, choices=METHODS, default=list(METHODS),
        help=f"in quotes, by default all: {'; '.join(METHODS)}",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", **some, choices=LENGTHS, default=LENGTHS,
        help="lengths of examples: those of the suite grid, or long ones made of these (both)",
    )  # fmt: skip
    parser.add_argument("--train", type=int, default=32, metavar="N", help="examples (32)")
    parser.add_argument(
        "--queries", type=int, nargs="+", default=CLAIMED, metavar="M",
        help=f"numbers of queries ({', '.join(map(str, CLAIMED))})",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    parser.add_argument(
        "--dtype", **some, choices=language_model.DTYPES, default=["float32"],
        help="of the model (float32)",
    )  # fmt: skip
    parser.add_argument(
        "--model", default=assets.DEFAULT_MODEL, help="a folder or a hub name (the built-in one)"
    )
    parser.add_argument("--output", default="figures/mine", help="a folder (figures/mine)")
    return parser.parse_args()


def main() -> None:
    """Run the comparisons asked for, and write the table after each."""
    options = _arguments()
    table = paths.resolve(options.output) / f"{TABLE}.csv"
    for lengths, dtype, m in itertools.product(options.lengths, options.dtype, options.queries):
        what = options.model, dtype, "cpu", lengths, options.train, m
        rows = compare(*what, options.methods, options.repeats)
        before = pd.read_csv(table) if table.exists() else pd.DataFrame()
        figures.save_table(merged(before, rows), TABLE, options.output)
        print(rows.drop(columns="versions").to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
