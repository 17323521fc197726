"""The scores that the paper's authors published: two methods, one pool, the same queries.

Files and layout are those of the authors' repository, which has no licence: they are fetched at
first use or read from a copy of one's own, and never become part of this one.

    data/scores/icp_scores.json       {"0": [share], "1": [share], ...}: ICP scores, N
    data/scores/infl_ip-K-of-9.pt     float32 [M, N / 9]: influence on each query, K = 1 to 9

Both are positive where the training example helps. The influences are sums over weight matrices of
signed logarithms of products of clamped gradients (see `methods.gradient.clamped_log`), so they
have no unit.
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
from tqdm import tqdm

from icprobe.data import cache, paths
from icprobe.data.assets import AssetError, Unavailable

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


@dataclass(frozen=True)
class Scores:
    """Both published scores of the same pool."""

    icp: np.ndarray  # [N], share of the M queries that each training example helps
    influence: np.ndarray  # [N, M], float32
    pinned: bool  # whether the files are those whose hashes are known

    @cached_property
    def mean_influence(self) -> np.ndarray:
        """The mean over queries, [N]."""
        return self.influence.mean(axis=1, dtype=float)


def load(published_dir: str | Path = "") -> Scores:
    """Return the published scores, from a copy of the authors' repository.

    `published_dir` may also be a folder laid out like it; if empty, the files are fetched once and
    kept in the cache.

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
    pinned = all(cache.sha256(folder / name) == known for name, known in SHA256.items())
    return Scores(_read_icp(folder / ICP_FILE), influence, pinned)


def fetch(url: str = URL, sha256: Mapping[str, str] = SHA256) -> Path:
    """Return a folder in the cache with the files at a URL, by name and hash."""

    def fill(temporary: Path, folder: Path) -> None:
        (temporary / FOLDER).mkdir(parents=True)
        for name in tqdm(sha256, desc="published scores", unit="file"):
            content = _download(f"{url}/{name}", sha256[name])
            (temporary / FOLDER / name).write_bytes(content)
        cache.keep(temporary, folder)

    return cache.filled("published", fill, [(FOLDER / name).as_posix() for name in sha256])


def _download(url: str, sha256: str) -> bytes:
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
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise AssetError(
            f"{url} has sha256 {found}, expected {sha256}: it was damaged on the way, or the "
            "authors have replaced it. Try again, or give another copy with -p published_dir PATH"
        )
    return content


def _read_icp(file: Path) -> np.ndarray:
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
    import torch

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
