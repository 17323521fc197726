"""The scores that the paper's authors published, and how far their two methods agree.

Files and layout are those of the authors' repository, which has no licence: they are fetched at
first use or read from a copy of one's own, and never become part of this one.

    data/scores/icp_scores.json       {"0": [share], "1": [share], ...}: ICP scores, N
    data/scores/infl_ip-K-of-9.pt     float32 [M, N / 9]: influence on each query, K = 1 to 9

Both are positive where the training example helps. The influences are sums over weight matrices of
signed logarithms of products of clamped gradients (see `clamped`), so they have no unit.
"""

import hashlib
import http.client
import json
import pickle
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau, rankdata, spearmanr
from tqdm import tqdm

from icprobe import assets, paths, statistics
from icprobe.assets import AssetError, Unavailable

N, M, PARTS = 52_002, 100, 9
REPOSITORY = "https://github.com/cxcscmu/InContextDataAttribution"
URL = "https://raw.githubusercontent.com/cxcscmu/InContextDataAttribution/main/data/scores"
FOLDER = Path("data", "scores")
ICP_FILE = "icp_scores.json"
INFLUENCE_FILES = [f"infl_ip-{part}-of-{PARTS}.pt" for part in range(1, PARTS + 1)]
SHA256 = {
    ICP_FILE: "d7140239a009ff4e9469ba41ea5c59bca46be5ab377cc80418a60a93e13a7319",
    "infl_ip-1-of-9.pt": "4d5583ea8726b51d40bd8417f1f8bc7d3875afaca978cdfc35a321489dd00b06",
    "infl_ip-2-of-9.pt": "a9517ba1bdc9380890a52764445bc0c7acee0f410aca8f14a3246df196b87d9c",
    "infl_ip-3-of-9.pt": "c505e4940378a4a6e547ed597c728fde8d35340c1f025e030a67fc87e7a1af06",
    "infl_ip-4-of-9.pt": "199740bf4fa3f7a3d60e0a30a5a729f9045c053b6484cff42486faac334a8e75",
    "infl_ip-5-of-9.pt": "6336125ddd7a181472eb9ea2326534478a88b2117cac14f1868ef740a2e36126",
    "infl_ip-6-of-9.pt": "8d51132d81c73199b0edebca72be7ae7ba21902bbd71c2731dc950d5a17b8d34",
    "infl_ip-7-of-9.pt": "61d7ddd9e29f59ba510b2a10f82786789dc02c63463f772cb3e51745a7cf38d0",
    "infl_ip-8-of-9.pt": "e8e7d677db1c4059cc4a5a5aa379b2bbd990f4721ac07ae8d00843244762adb6",
    "infl_ip-9-of-9.pt": "fbc50829dbe55cf73bf141e430c25642b7eabf6fac8c8521816e43aa6e0710f9",
}
TIMEOUT = 30  # seconds without a byte

# where the paper cuts the pool by ICP: the end, and the score beyond which an example belongs to it
CUTS = [("top", 0.8), ("top", 0.85), ("top", 0.9), ("bottom", 0.5)]
# units of overlaps in findings
IN_COMMON, REPEATED = "share of both sets", "share of both sets, simulated"


@dataclass(frozen=True)
class Scores:
    """Both published scores of the same pool.

    Attributes:
        icp: [N] share of the M queries that each training example helps.
        influence: [N, M] float32.
        pinned: Whether the files are those whose hashes are known.
    """

    icp: np.ndarray
    influence: np.ndarray
    pinned: bool

    @cached_property
    def mean_influence(self) -> np.ndarray:
        """The mean influence over queries, [N]."""
        return self.influence.mean(axis=1, dtype=float)


def load(published_dir: str | Path = "") -> Scores:
    """Return the published scores.

    Args:
        published_dir: A copy of the authors' repository, or a folder laid out like it; if empty,
            the files are fetched once and kept in the cache.

    Raises:
        AssetError: If a file is missing, damaged, or not what was expected.
        Unavailable: If the files are to be fetched and cannot be.
    """
    folder = (paths.resolve(published_dir) if published_dir else fetch()) / FOLDER
    for name in SHA256:
        if not (folder / name).is_file():
            raise AssetError(
                f"there is no {folder / name}; published_dir must be a copy of {REPOSITORY}, "
                f"with {ICP_FILE} and {INFLUENCE_FILES[0]} to {INFLUENCE_FILES[-1]} in {FOLDER}"
            )
    parts = [_read_influence(folder / name) for name in INFLUENCE_FILES]
    influence = np.ascontiguousarray(np.concatenate(parts, axis=1).T)
    icp = _read_icp(folder / ICP_FILE)
    pinned = all(_sha256((folder / name).read_bytes()) == SHA256[name] for name in SHA256)
    return Scores(icp, influence, pinned)


def fetch(url: str = URL, sha256: Mapping[str, str] = SHA256) -> Path:
    """Return a folder in the cache with the authors' files, fetched at first use (21 MB).

    Args:
        url: Where the files are.
        sha256: Their names and hashes.

    Raises:
        Unavailable: If a file cannot be had.
        AssetError: If a file is another one than expected.
    """
    folder = assets.cache_dir() / "published"
    if folder.exists():
        return folder
    with assets.locked(folder.name):
        if not folder.exists():  # another process may have been faster
            with assets.temporary_folder(folder.name) as temporary:
                (temporary / "done" / FOLDER).mkdir(parents=True)
                for name in tqdm(sha256, desc="published scores", unit="file"):
                    content = _download(f"{url}/{name}", sha256[name])
                    (temporary / "done" / FOLDER / name).write_bytes(content)
                (temporary / "done").replace(folder)
    return folder


def _download(url: str, sha256: str) -> bytes:
    """Return what is at the address, verified."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"the authors' score files could not be fetched.\nTried {url}: {error}\n"
            f"Where there is a network, git clone {REPOSITORY}\n"
            f"(or download its folder {FOLDER.as_posix()}, keeping the layout), and give the "
            "folder that holds data/ with -p published_dir PATH"
        ) from error
    found = _sha256(content)
    if found != sha256:
        raise AssetError(
            f"{url} has sha256 {found}, expected {sha256}: it was damaged on the way, or the "
            "authors have replaced it. Try again, or give another copy with -p published_dir PATH"
        )
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_icp(file: Path) -> np.ndarray:
    """Return ICP scores [N]."""
    expected = f"expected one share for each of '0' to '{N - 1}'"
    try:
        entries = json.loads(file.read_bytes())
        icp = np.array([entries[str(i)] for i in range(len(entries))], dtype=float)
    except (ValueError, TypeError, KeyError) as error:
        raise AssetError(f"{file} cannot be read ({error}); {expected}") from error
    if icp.shape != (N, 1):
        raise AssetError(f"{file} has an array of shape {icp.shape}; {expected}, {(N, 1)}")
    if not (np.abs(icp * M - np.clip(np.rint(icp * M), 0, M)) < 1e-6).all():
        raise AssetError(f"{file} has other numbers than shares of {M} queries, 0 to 1")
    return icp[:, 0]


def _read_influence(file: Path) -> np.ndarray:
    """Return one part of the influences, [M, N / PARTS]."""
    expected = f"expected a float32 tensor {[M, N // PARTS]}"
    try:
        part = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise AssetError(f"{file} cannot be read ({error}); {expected}") from error
    if not isinstance(part, torch.Tensor):
        raise AssetError(f"{file} has a {type(part).__name__}; {expected}")
    if part.shape != (M, N // PARTS) or part.dtype != torch.float32:
        raise AssetError(f"{file} has {part.dtype} {list(part.shape)}; {expected}")
    if not part.isfinite().all():
        raise AssetError(f"{file} has numbers that are not finite")
    return part.numpy()


# ---------------------------------------------------------------------------- statistics


def findings(
    scores: Scores, rng: np.random.Generator, resamples: int = 1000, splits: int = 50
) -> pd.DataFrame:
    """Return how far the two scores agree, with 95 % intervals.

    Intervals resample training examples, and queries for the influences. The ICP score is published
    as a share only, so its queries cannot be resampled with them. What differs: agreement "with
    these queries" resamples examples alone, agreement by query resamples queries alone, and see
    `reliability_interval`.

    Args:
        scores: Scores.
        rng: For the bootstrap.
        resamples: How many.
        splits: Number of halvings of the queries, see `statistics.reliability`.

    Returns:
        One row each: quantity, unit, estimate, low, high, n. Overlaps have the unit `IN_COMMON`
        and n = k, and by chance would be k / N. Those of `repeated_overlaps` have the unit
        `REPEATED`.
    """
    N, M = scores.influence.shape
    influence = scores.influence.astype(float)  # once, for products with weights
    sizes = cut_sizes(scores.icp)
    reliable = statistics.reliability(scores.influence, rng, splits)
    whole = agreement(scores.icp, scores.mean_influence, M, sizes, reliable)
    resampled, same_queries = [], []
    for _ in range(resamples):
        rows, columns = rng.integers(N, size=N), rng.integers(M, size=M)
        mean = influence @ (np.bincount(columns, minlength=M) / M)
        resampled.append(agreement(scores.icp[rows], mean[rows], M, sizes, reliable))
        given = spearmanr(scores.icp[rows], scores.mean_influence[rows]).statistic
        same_queries.append(given)
    plain = {
        ("ICP score against mean influence", unit) for unit in ("Spearman", "Kendall", "Pearson")
    }
    kinds = np.array(["fisher" if name in plain else "percentile" for name in whole])
    lows, highs = statistics.ends([*whole.values()], pd.DataFrame(resampled).to_numpy(), kinds)
    table = [
        (*name, estimate, low, high, sizes.get(name[0], (None, N))[1])
        for (name, estimate), low, high in zip(whole.items(), lows, highs, strict=True)
    ]
    spearman = whole["ICP score against mean influence", "Spearman"]
    name = ("ICP score against mean influence, these queries", "Spearman")
    table.insert(1, (*name, spearman, *np.percentile(same_queries, [2.5, 97.5]), N))
    for name, values in repeated_overlaps(scores.icp, M, rng).items():
        spread = np.percentile(values, [2.5, 97.5])
        table.append((name, REPEATED, values.mean(), *spread, sizes[name][1]))

    rho = by_query(scores)
    measures = {
        ("ICP score against influence on one query, median", "Spearman"): np.median,
        ("queries on whose influence it agrees negatively", "share"): lambda x: (x < 0).mean(),
    }
    for name, measure in measures.items():
        found = statistics.estimated(lambda _, j, m=measure: m(rho[j]), (1, M), rng)
        table.append((*name, *map(float, found), M))
    name = ("reliability of the mean influence, split-half", "Spearman")
    table.append((*name, reliable, *reliability_interval(scores.influence, rng), N))
    return pd.DataFrame(table, columns=["quantity", "unit", "estimate", "low", "high", "n"])


def agreement(
    icp: np.ndarray,
    influence: np.ndarray,
    M: int,
    sizes: Mapping[str, tuple[str, int]],
    reliable: float,
) -> dict[tuple[str, str], float]:
    """Return the agreement of both scores in one sample, by (quantity, unit).

    Args:
        icp: [N] share of M queries helped.
        influence: [N] mean over queries.
        M: Number of queries.
        sizes: Of the sets compared, see `cut_sizes`.
        reliable: Reliability of the mean influence.
    """
    ranks = rankdata(icp), rankdata(influence)
    pearson, spearman = (float(np.corrcoef(*both)[0, 1]) for both in ((icp, influence), ranks))
    kr21 = share_reliability(icp, M)
    ceiling = (max(kr21, 0) * reliable) ** 0.5
    both = "ICP score against mean influence"
    found = {
        (both, "Spearman"): spearman,
        (both, "Kendall"): float(kendalltau(icp, influence).statistic),
        (both, "Pearson"): pearson,
    }
    for name, (end, k) in sizes.items():
        measure = statistics.overlap(icp[:, None], influence[:, None], k, end)
        found[name, IN_COMMON] = measure(np.arange(len(icp)), np.zeros(1, int))
    return found | {
        ("reliability of the ICP score, at least (KR-21)", "Pearson"): kr21,
        ("noise ceiling, at least", "correlation"): ceiling,
        (f"{both} over the ceiling, at most", "Spearman"): spearman / ceiling
        if ceiling
        else np.nan,
        (f"{both} over the ceiling, at most", "Pearson"): pearson / ceiling if ceiling else np.nan,
    }


def cut_sizes(icp: np.ndarray) -> dict[str, tuple[str, int]]:
    """Return by name the end ("top" or "bottom") and size k of the sets that the paper cuts off.

    Args:
        icp: [N]; k is how many of them lie beyond the cut. Sets without examples are left out.
    """
    sizes = {}
    for end, cut in CUTS:
        k = int((icp > cut).sum() if end == "top" else (icp <= cut).sum())
        sign = ">" if end == "top" else "<="
        if k:
            sizes[f"in common, ICP score {sign} {cut:g}"] = (end, k)
    return sizes


def overlap_curve(scores: Scores, end: str, points: int = 60) -> pd.Series:
    """Return the share in common of the k best (or worst) by either score, for k from 100 to N."""
    N = len(scores.icp)
    sizes = np.unique(np.geomspace(min(100, N), N, points).astype(int))
    columns = scores.icp[:, None], scores.mean_influence[:, None]
    whole = np.arange(N), np.zeros(1, int)
    return pd.Series({k: statistics.overlap(*columns, k, end)(*whole) for k in sizes.tolist()})


def by_query(scores: Scores) -> np.ndarray:
    """Return Spearman's rho [M] between the ICP score [N] and the influence on each query [N]."""
    ranks = rankdata(scores.icp)
    return np.array([np.corrcoef(ranks, rankdata(one))[0, 1] for one in scores.influence.T])


def share_reliability(share: np.ndarray, M: int) -> float:
    """Return a lower bound of the reliability of shares [N] of M queries, from the shares alone.

    Kuder and Richardson's formula 21 (1937): M / (M - 1) (1 - m (M - m) / (M s^2)), with m and s^2
    the mean and variance of the number of queries helped. It takes what queries of equal hardness
    would scatter by chance, the binomial variance, for noise. Where some queries are harder than
    others, they scatter less, so the reliability (formula 20) is higher.
    """
    helped = share * M
    mean, variance = helped.mean(), helped.var()
    if not variance:
        return np.nan
    return float(M / (M - 1) * (1 - mean * (M - mean) / (M * variance)))


def repeated_overlaps(
    icp: np.ndarray, M: int, rng: np.random.Generator, repeats: int = 100
) -> dict[str, np.ndarray]:
    """Return how far ICP's sets would agree with those of ICP on M other queries, simulated.

    Each example helps each query with its own probability, whatever the query, as in
    `share_reliability`; these probabilities are the shares, drawn together around their mean until
    the simulated shares vary as the published ones do.

    Args:
        icp: [N] share of M queries helped.
        M: Number of queries.
        rng: Draws who is helped.
        repeats: Number of simulated pairs of scores.

    Returns:
        By the names of `cut_sizes`, overlaps [repeats].
    """
    reliable = max(share_reliability(icp, M), 0)
    chances = np.clip(icp.mean() + reliable**0.5 * (icp - icp.mean()), 0, 1)
    sizes = cut_sizes(icp)
    found = {name: np.zeros(repeats) for name in sizes}
    for repeat in range(repeats):
        twice = [rng.binomial(M, chances)[:, None] for _ in range(2)]
        for name, (end, k) in sizes.items():
            measure = statistics.overlap(*twice, k, end)
            found[name][repeat] = measure(np.arange(len(icp)), np.zeros(1, int))
    return found


def reliability_interval(
    scores: np.ndarray, rng: np.random.Generator, resamples: int = 100, most: int = 5000
) -> tuple[float, float]:
    """Return a 95 % interval of the reliability of row means [N] over M queries.

    Drawing queries with replacement would put the same query into both halves. So half of the
    queries are drawn without replacement, which varies as much as all queries would if they were
    drawn anew, and their reliability is stepped up to M. At most `most` examples are ranked.
    """
    N, M = scores.shape
    values = []
    for _ in range(resamples):
        rows = rng.choice(N, min(N, most), replace=False)
        half = scores[np.ix_(rows, rng.permutation(M)[: M // 2])]
        r = statistics.reliability(half, rng, splits=10)
        values.append(2 * r / (1 + r))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
