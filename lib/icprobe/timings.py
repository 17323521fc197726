"""What the benchmark's timings say: methods beside each other, and what their seconds buy."""

import numpy as np
import pandas as pd

from icprobe import paths
from icprobe.benchmark import CLAIMED, KEY, METHODS, NATS, OURS, PRODUCTS
from icprobe.lm import LM


def read(file: str | None, lm: LM) -> pd.DataFrame:
    """Return the timings of a model in a file, of the most training examples in its dtype.

    Args:
        file: Table of `benchmark.compare`'s rows, or None.
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
    """Return timings by lengths, of that number of queries for which most methods were timed.

    Args:
        table: See `benchmark.compare`; of one dtype.
    """
    counts = table.groupby(["lengths", "m"])["method"].nunique()
    chosen = {lengths: counts[lengths].idxmax() for lengths in counts.index.unique("lengths")}
    return {
        lengths: table[(table["lengths"] == lengths) & (table["m"] == m)]
        for lengths, m in chosen.items()
    }


def panels(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return what `figures.durations` shows of timings in one dtype: by quantity and lengths.

    Means over queries and similarities are left out, which only we compute.
    """
    found = {}
    for lengths, rows in beside(table).items():
        for gives, part in rows.groupby("gives"):
            if gives in (NATS, PRODUCTS):
                n, m = part[["n", "m"]].iloc[0]
                found[f"{gives}: {lengths}, N = {n}, M = {m}"] = part.assign(
                    ours=part["method"].str.startswith(OURS),
                    exact=[METHODS[name].exact for name in part["method"]],
                    note=part["error"].map("error {:.0e}".format),
                )
    return found


def findings(table: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """Return what methods cost beside each other, one row a quantity.

    Args:
        table: See `benchmark.compare`; timings of the most training examples are taken.
        dtype: Whose timings.

    Returns:
        Columns quantity, unit, estimate, low, high, n (training examples): how many times the
        seconds of probing our other methods take, and of each of ours what peers take (the fastest
        of their batch sizes), on the same work; and of the peers' fastest log-likelihoods their
        fastest exact products. Low and high are the least and the most that the ranges over
        repeats allow, no numbers for a single run. Not numbers for gradient products over probing
        at `CLAIMED` numbers of queries that were not timed.
    """
    table = table[table["dtype"] == dtype]
    table = table[table["n"] == table["n"].max()]
    works = [(lengths, m) for lengths in ("grid", "long") for m in CLAIMED]
    works = sorted({*works, *table[["lengths", "m"]].itertuples(index=False, name=None)})
    rows = []
    for lengths, m in works:
        timed = table[(table["lengths"] == lengths) & (table["m"] == m)].set_index("method")
        for (ours, other), names in _rivals().items():
            rivals = timed[timed.index.isin(names)]
            claimed = other == "gradient products" and m in CLAIMED
            ratio = (np.nan,) * 3
            if ours in timed.index and len(rivals):
                ratio = _ratio(rivals.loc[rivals["seconds"].idxmin()], timed.loc[ours])
            elif not claimed:
                continue
            said = f"{other} over {ours.removeprefix(OURS)}, {lengths}, M = {m}"
            rows.append((said, "ratio of seconds", *ratio, table["n"].max()))
        exact = [bool(METHODS[k].peer) and METHODS[k].exact for k in timed.index]
        peers = timed[np.array(exact, dtype=bool)]
        fastest = {
            gives: theirs.loc[theirs["seconds"].idxmin()]
            for gives, theirs in peers.groupby("gives")
        }
        if {NATS, PRODUCTS} <= fastest.keys():
            said = f"others' gradient products over others' probing, {lengths}, M = {m}"
            ratio = _ratio(fastest[PRODUCTS], fastest[NATS])
            rows.append((said, "ratio of seconds", *ratio, table["n"].max()))
    return pd.DataFrame(rows, columns=["quantity", "unit", "estimate", "low", "high", "n"])


def _ratio(one: pd.Series, other: pd.Series) -> tuple[float, float, float]:
    """Return how many times the seconds one row takes of the other's, and the range of that.

    Of single runs there is no range.
    """
    ranges = one.low / other.high, one.high / other.low
    few = min(one.repeats, other.repeats) < 2
    return (one.seconds / other.seconds, *((np.nan, np.nan) if few else ranges))


def _rivals() -> dict[tuple[str, str], list[str]]:
    """Return the methods that each of ours is compared with, by its name and their library.

    Our own others are compared with probing, a peer with what computes the same.
    """
    probing, found = f"{OURS}probing", {}
    for name, method in METHODS.items():
        if name == probing:
            continue
        if name.startswith(OURS):
            key = probing, name.removeprefix(OURS)
        else:
            ours = next(one for one, mine in METHODS.items() if mine.needs is method.needs)
            key = ours, name.split(",")[0]
        found.setdefault(key, []).append(name)
    return found


def bought(table: pd.DataFrame, effects: pd.DataFrame, level: str) -> pd.DataFrame:
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
    seconds = table.set_index("method")["seconds"]
    takes = {
        "hidden states": "hidden states",
        "gain": "probing",
        "ICP score": "probing",
        "product": "gradient products",
        "cosine": "gradient products",
        "product, projected": "projected",
        "cosine, projected": "projected",
    }
    known = effects[effects["level"] == level].rename(columns={"first": "method"})
    if level == "per example":
        same = known[known["method"] == "product"].assign(method="product, query set")
        known, takes = pd.concat([known, same]), {**takes, "product, query set": "query set"}
    known = known[known["method"].isin(takes)]
    known = known.assign(seconds=[seconds.get(OURS + takes[name]) for name in known["method"]])
    columns = ["method", "seconds", "estimate", "low", "high"]
    return known[columns].dropna().sort_values("seconds").reset_index(drop=True)
