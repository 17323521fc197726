"""What timings say: methods beside each other, and what their seconds buy.

A table of timings has the columns of `comparison.compare`; all functions but `read` take one of a
single dtype and number of training examples.
"""

from collections.abc import Mapping

import pandas as pd

from icprobe.artifact.benchmark.methods import METHODS, NATS, OURS, PRODUCTS
from icprobe.data import paths
from icprobe.models import LM

KEY = ["method", "model", "lengths", "dtype", "device", "n", "m"]
# our methods that are compared with probing, and what `costs.by_queries` calls them
COUNTED = {
    "gradient products": "gradient products",
    "projected": "projected gradients",
    "query set": "query set, forward mode",
}
# scores that are compared with training effects, and our method that makes them
TIMED = {
    "hidden states": "hidden states",
    "gain": "probing",
    "ICP score": "probing",
    "product": "gradient products",
    "cosine": "gradient products",
    "product, projected": "projected",
    "cosine, projected": "projected",
    "product, query set": "query set",
}


def read(file: str | None, lm: LM) -> pd.DataFrame:
    """Return a file's timings of a model in all dtypes, of the most training examples in its own.

    Empty without a file, or if it has none in the model's own dtype. ValueError if the file is of
    something else.
    """
    if file is None:
        return pd.DataFrame(columns=KEY)
    table = pd.read_csv(paths.resolve(file))
    if missing := [name for name in KEY if name not in table]:
        raise ValueError(f"{file} has no timings: it lacks the columns {', '.join(missing)}")
    table = table[table["model"] == lm.identity["name"]]
    most = table.loc[table["dtype"] == lm.identity["dtype"], "n"].max()
    return table[table["n"] == most]


def beside(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return timings by lengths, of the M for which most methods were timed."""
    counts = table.groupby(["lengths", "m"])["method"].nunique()
    chosen = counts.groupby("lengths").idxmax()
    return {
        lengths: table[(table["lengths"] == lengths) & (table["m"] == m)] for lengths, m in chosen
    }


def panels(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return what `figures.durations` shows, by quantity and lengths; not what only we compute."""
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
    """Return ratios of seconds on the same work: quantity, unit, estimate, low, high, n (examples).

    These are: our other methods over probing; other libraries over our method of the same kind; and
    their gradient products over their log-likelihoods. Of a library, the fastest batch size counts.
    Low and high are the least and most that the ranges over repeats allow, NaN for a single run.
    """
    table = table.sort_values("seconds")
    table = table.assign(
        library=table["method"].str.partition(", ")[0],
        kind=[METHODS[name].kind for name in table["method"]],
        low=table["low"].where(table["repeats"] > 1),  # a single run has no range
        high=table["high"].where(table["repeats"] > 1),
    )
    peers = table[[bool(METHODS[name].script) for name in table["method"]]]
    table = pd.concat([table, peers.assign(library="others'")])
    rows = []
    for (lengths, m), timed in table.groupby(["lengths", "m"]):
        fastest = timed.drop_duplicates(["library", "kind"]).set_index(["library", "kind"])
        for what, pair in _compared().items():
            if set(pair) <= set(fastest.index):
                a, b = (fastest.loc[one] for one in pair)
                ratio = a.seconds / b.seconds, a.low / b.high, a.high / b.low
                said = f"{what}, {lengths}, M = {m}"
                rows.append((said, "ratio of seconds", *ratio, table["n"].max()))
    return pd.DataFrame(rows, columns=["quantity", "unit", "estimate", "low", "high", "n"])


def _compared() -> dict:
    """Return which two (library, kind) are compared, by what their ratio is called."""
    found = {}
    for name, method in METHODS.items():
        library, kind = name.partition(", ")[0], method.kind
        if library != "icprobe":
            found[f"{library} over {kind}"] = (library, kind), ("icprobe", kind)
        elif kind != "probing":
            found[f"{kind} over probing"] = ("icprobe", kind), ("icprobe", "probing")
    pair = ("others'", "gradient products"), ("others'", "probing")
    return found | {"others' gradient products over others' probing": pair}


def accuracy_per_second(table: pd.DataFrame, effects: pd.DataFrame, level: str) -> pd.DataFrame:
    """Return method, seconds, estimate, low, high: what methods tell of a training step, by price.

    Of timings of one lengths and number of queries, and the agreement of `TIMED` scores with
    effects of one step, as in 03. At the level "per example", the product's is the query set's,
    too, since both rank by the same mean.
    """
    known = effects[effects["level"] == level].rename(columns={"first": "method"})
    if level == "per example":
        same = known[known["method"] == "product"].assign(method="product, query set")
        known = pd.concat([known, same])
    seconds = table.set_index("method")["seconds"]
    known = known.assign(seconds=(OURS + known["method"].map(TIMED)).map(seconds))
    columns = ["method", "seconds", "estimate", "low", "high"]
    return known[columns].dropna().sort_values("seconds").reset_index(drop=True)


def crossings(table: pd.DataFrame, counts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return from how many queries on probing costs more than each other method timed beside it.

    Cheaper and dearer are the sizes timed between which the seconds cross; operations and
    nothing_shared the least size of `counts` (`costs.by_queries` by lengths) at which probing, or
    probing that shares nothing, takes more operations. NaN where there is no such size.
    """
    table = table.assign(method=table["method"].str.removeprefix(OURS))
    rows = []
    for lengths, counted in counts.items():
        seconds = table[table["lengths"] == lengths].pivot_table("seconds", "m", "method")
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
