"""What timings say: methods beside each other, and what their seconds buy."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from icprobe.artifact.benchmark.methods import METHODS, NATS, OURS, PRODUCTS
from icprobe.artifact.benchmark.work import LENGTHS
from icprobe.data import paths
from icprobe.models import LM

KEY = ["method", "model", "lengths", "dtype", "device", "n", "m"]
CLAIMED = (1, 12, 48)  # numbers of queries that claim C5 looks at
# our methods that are compared with probing, and what `costs.by_queries` calls them
COUNTED = {
    "gradient products": "gradient products",
    "projected": "projected gradients",
    "query set": "query set, forward mode",
}


def read(file: str | None, lm: LM) -> pd.DataFrame:
    """Return the timings of a model in a file, of the most training examples in its dtype.

    Args:
        file: Table of `compare`'s rows, or None.
        lm: The model.

    Returns:
        Rows of all dtypes; empty if there are none in the model's own.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if file is None:
        return pd.DataFrame(columns=KEY)
    table = pd.read_csv(paths.resolve(file))
    table = table[table["model"] == lm.identity["name"]]
    most = table.loc[table["dtype"] == lm.identity["dtype"], "n"].max()
    return table[table["n"] == most]


def beside(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return timings of one dtype by lengths, of the M for which most methods were timed."""
    counts = table.groupby(["lengths", "m"])["method"].nunique()
    chosen = counts.groupby("lengths").idxmax()
    return {
        lengths: table[(table["lengths"] == lengths) & (table["m"] == m)] for lengths, m in chosen
    }


def panels(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return what `figures.durations` shows of timings in one dtype: by quantity and lengths.

    Means over queries and similarities are left out, which only we compute.
    """
    found = {}
    for lengths, rows in beside(table).items():
        for quantity, part in rows[rows["quantity"].isin([NATS, PRODUCTS])].groupby("quantity"):
            n, m = part[["n", "m"]].iloc[0]
            found[f"{quantity}: {lengths}, N = {n}, M = {m}"] = part.assign(
                ours=part["method"].str.startswith(OURS),
                exact=[METHODS[name].kind != "projected" for name in part["method"]],
                note=part["error"].map("error {:.0e}".format),
            )
    return found


def findings(table: pd.DataFrame) -> pd.DataFrame:
    """Return ratios of seconds on the same work, one row a quantity.

    These are: our other methods over probing; other libraries over our method of the same kind; and
    their gradient products over their log-likelihoods. Of a library, the fastest batch size counts.

    Args:
        table: See `compare`; of one dtype and number of training examples.

    Returns:
        Columns quantity, unit, estimate, low, high, n (training examples). Low and high are the
        least and the most that the ranges over repeats allow, NaN for a single run. All are NaN for
        gradient products over probing at `CLAIMED` numbers of queries that were not timed.
    """
    table = table.sort_values("seconds").assign(
        library=table["method"].str.partition(", ")[0],
        kind=table["method"].map(lambda name: METHODS[name].kind),
        low=table["low"].where(table["repeats"] > 1),  # a single run has no range
        high=table["high"].where(table["repeats"] > 1),
    )
    peers = table[[bool(METHODS[name].script) for name in table["method"]]]
    table = pd.concat([table, peers.assign(library="others'")])
    works = {(lengths, m) for lengths in LENGTHS for m in CLAIMED}
    works |= set(zip(table["lengths"], table["m"], strict=True))
    rows = []
    for lengths, m in sorted(works):
        timed = table[(table["lengths"] == lengths) & (table["m"] == m)]
        fastest = timed.drop_duplicates(["library", "kind"]).set_index(["library", "kind"])
        for what, (one, other) in _compared().items():
            if {one, other} <= set(fastest.index):
                a, b = fastest.loc[one], fastest.loc[other]
                ratio = a.seconds / b.seconds, a.low / b.high, a.high / b.low
            elif what == "gradient products over probing" and m in CLAIMED:
                ratio = (np.nan,) * 3
            else:
                continue
            said = f"{what}, {lengths}, M = {m}"
            rows.append((said, "ratio of seconds", *ratio, table["n"].max()))
    return pd.DataFrame(rows, columns=["quantity", "unit", "estimate", "low", "high", "n"])


def _compared() -> dict[str, tuple[tuple[str, str], tuple[str, str]]]:
    """Return which two (library, kind) are compared, by what their ratio is called."""
    found = {}
    for name, method in METHODS.items():
        library, ours = name.partition(", ")[0], method.kind
        called = library
        if library == "icprobe":
            called, ours = method.kind, "probing"
        if called != ours:
            found[f"{called} over {ours}"] = (library, method.kind), ("icprobe", ours)
    pair = ("others'", "gradient products"), ("others'", "probing")
    return found | {"others' gradient products over others' probing": pair}


def accuracy_per_second(table: pd.DataFrame, effects: pd.DataFrame, level: str) -> pd.DataFrame:
    """Return what methods tell of a training step, beside the seconds that they take.

    Args:
        table: Timings of one dtype, lengths and number of queries.
        effects: 03's table of agreement with training effects, of one step; methods beside those
            of 03: "product, projected" and "cosine, projected".
        level: Of agreement. For "per example", the product's is the query set's, too, since both
            rank by the same mean.

    Returns:
        Columns method, seconds, estimate, low, high; a row for each method that both have.
    """
    timed = {
        "hidden states": "hidden states", "gain": "probing", "ICP score": "probing",
        "product": "gradient products", "cosine": "gradient products",
        "product, projected": "projected", "cosine, projected": "projected",
        "product, query set": "query set",
    }  # fmt: skip
    known = effects[effects["level"] == level].rename(columns={"first": "method"})
    if level == "per example":
        same = known[known["method"] == "product"].assign(method="product, query set")
        known = pd.concat([known, same])
    seconds = table.set_index("method")["seconds"]
    known = known.assign(seconds=(OURS + known["method"].map(timed)).map(seconds))
    columns = ["method", "seconds", "estimate", "low", "high"]
    return known[columns].dropna().sort_values("seconds").reset_index(drop=True)


def crossings(table: pd.DataFrame, counts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return from how many queries on probing costs more than each other method.

    Args:
        table: See `compare`; of one dtype and number of training examples.
        counts: By lengths, see `costs.by_queries`.

    Returns:
        Columns lengths, against, cheaper and dearer: the sizes timed between which the seconds
        cross; operations and nothing_shared: the least size counted at which probing, or probing
        that shares nothing, takes more operations. NaN where there is no such size. A row for each
        method that was timed beside probing.
    """
    rows = []
    for lengths, counted in counts.items():
        seconds = table[table["lengths"] == lengths].pivot_table("seconds", "m", "method")
        seconds = seconds.rename(columns=lambda name: name.removeprefix(OURS))
        operations = counted.pivot_table("operations", "m", "method")
        for name, called in COUNTED.items():
            if not {name, "probing"} <= set(seconds):
                continue
            both = seconds[["probing", name]].dropna()
            dearer = both.index[both["probing"] > both[name]].min()
            cheaper = both.index[~(both.index >= dearer)].max()
            by_count = [
                operations.index[operations[probing] > operations[called]].min()
                for probing in ("probing", "probing, nothing shared")
            ]
            rows.append((lengths, name, cheaper, dearer, *by_count))
    columns = ["lengths", "against", "cheaper", "dearer", "operations", "nothing_shared"]
    return pd.DataFrame(rows, columns=columns)
