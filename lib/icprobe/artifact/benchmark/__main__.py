"""The command line of the benchmark."""

import argparse
import functools
import itertools

import pandas as pd

from icprobe import figures, models
from icprobe.artifact import benchmark
from icprobe.artifact.benchmark.comparison import compare
from icprobe.artifact.benchmark.methods import LENGTHS, METHODS
from icprobe.artifact.benchmark.timings import KEY
from icprobe.data import assets, paths


def main() -> None:
    """Run the comparisons asked for, and write the table after each: rows replace those before."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {benchmark.__name__}",
        description=benchmark.__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, several = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    add("--methods", **several, choices=METHODS, default=list(METHODS), help="in quotes")
    add("--lengths", **several, choices=LENGTHS, default=LENGTHS,
        help="of examples: those of the suite grid, or long ones made of these")  # fmt: skip
    add("--train", type=int, default=32, metavar="N", help="examples")
    add("--queries", type=int, nargs="+", default=[1, 12, 48], metavar="M", help="their numbers")
    add("--repeats", type=int, default=3, help="runs of each")
    add("--dtype", **several, choices=models.DTYPES, default=["float32"], help="of the model")
    add("--model", default=assets.DEFAULT_MODEL, help="a folder or a hub name")
    add("--output", default="figures/mine", help="a folder")
    options = parser.parse_args()
    file = paths.resolve(options.output) / "cost.csv"
    load = functools.cache(lambda dtype: models.load(options.model, dtype, "cpu"))
    for dtype, lengths, m in itertools.product(options.dtype, options.lengths, options.queries):
        lm = load(dtype)
        work = options.model, lm, lengths, options.train, [m]
        rows = compare(*work, options.methods, options.repeats)
        table = pd.concat([pd.read_csv(file), rows]) if file.exists() else rows
        table = table.drop_duplicates(KEY, keep="last").sort_values(KEY[1:])
        figures.save_table(table, file.stem, file.parent)
        print(rows.drop(columns="versions").to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
