"""What tables on synthetic regression share: networks, their problems, agreement, intervals.

Agreement is, as for language models, Spearman's correlation over the N examples of a task between
two methods' means over its M queries. Each task gives one; tables have their mean over B tasks,
with 95 % intervals of Student's t. Of several networks the mean is taken task by task, and the
standard deviation between networks stands beside it (network_sd): intervals are for new tasks, and
for these networks.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy import stats
from tqdm import tqdm

from icprobe import statistics
from icprobe.data import paths
from icprobe.regression.learners import Ridge
from icprobe.regression.probing import gain_and_score
from icprobe.regression.problems import Prior, Problems, Shift, draw
from icprobe.regression.transformer import Regressor, fingerprint, learner
from icprobe.scores import store

VERSION = 1  # raise it when the same study begins to give other numbers
BLOCK_SIZE = 5  # tasks in one part of a store
PARTS = ("value", "remainder", "defined")
DESCRIPTION = "quantities by task; each is its value plus its remainder, where it is defined"

GAIN, SCORE, BAYES, BAYES_SCORE = "gain", "ICP score", "gain of Bayes", "ICP score of Bayes"

Condition = TypeVar("Condition", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Networks, and the problems that they are asked about.

    Attributes:
        prior: Of the problems' tasks, and of those the networks were trained on.
        networks: S of them, trained alike but for the seed.
        scores_dir: Folder of the stores with what networks computed.
        B: Tasks of every table.
        N: Training examples of each.
        M: Queries of each.
        seed: Of the problems. All conditions have the same tasks, noise and directions.
        fresh: Compute everything anew.
    """

    prior: Prior
    networks: Sequence[Regressor]
    scores_dir: str | Path
    B: int = 20
    N: int = 200
    M: int = 100
    seed: int = 0
    fresh: bool = False

    def problems(self, shift: Shift | None = None, K: int = 0, C: int = 1) -> Problems:
        """Draw the B problems; see `problems.draw`."""
        rng = np.random.default_rng(self.seed)
        return draw(self.prior, rng, self.B, self.N, self.M, shift, K, C)

    def probing(self, task: Problems, k: int = 0) -> dict[str, np.ndarray]:
        """Return gain and ICP score of the networks [S, N, M] and the Bayes learner [1, N, M].

        Args:
            task: A single problem.
            k: Pairs of each base context.
        """
        found = [gain_and_score(learner(network), task, k) for network in self.networks]
        gains, scores = (np.concatenate(each) for each in zip(*found, strict=True))
        bayes, bayes_scores = gain_and_score(Ridge(self.prior), task, k)
        return {GAIN: gains, SCORE: scores, BAYES: bayes, BAYES_SCORE: bayes_scores}

    def tabulate(
        self,
        name: str,
        conditions: Mapping[Condition, dict],
        columns: Mapping[Condition, Mapping[str, int]],
        compute_task: Callable[[Condition, int], Mapping],
        networks: Sequence[str] | None = None,
    ) -> dict[Condition, dict[str, np.ndarray]]:
        """Return quantities of all tasks by condition; those that no store has are computed.

        Each condition has a store, so what is interrupted goes on with the next tasks. A store
        keeps float32, and tables show digits of float64: three columns stand for each number, its
        float32 value, the remainder, and whether there is a number at all (1 or 0).

        Args:
            name: Of the table; its stores are called regression_<name>.
            conditions: By condition, what determines its numbers beside this study.
            columns: By condition and quantity, how many numbers a task has: S or 1.
            compute_task: Takes a condition and the number of a task, returns its numbers.
            networks: Names of others in the place of the study's networks.

        Returns:
            By condition and quantity, [S or 1, B].

        Raises:
            store.StoreError: See `store.open` and `store.ScoreStore`.
        """
        same = {
            "version": VERSION,
            "prior": asdict(self.prior),
            "networks": networks or [fingerprint(network) for network in self.networks],
            **{size: getattr(self, size) for size in ("B", "N", "M", "seed")},
        }
        stores = {}
        for condition, identity in conditions.items():
            ids = [f"{q}, {i}" for q, n in columns[condition].items() for i in range(n)]
            ids = [f"{part} of {number}" for part in PARTS for number in ids]
            stores[condition] = self._store(f"regression_{name}", same | identity, ids)
        left = sum(len(kept.rows(block)) for kept in stores.values() for block in kept.missing())
        total = self.B * len(stores)
        print(f"{name}: {total - left} of {total} rows were there")
        progress = {"total": total, "initial": total - left, "unit": " tasks", "disable": not left}
        with tqdm(desc=name, **progress) as bar:
            for condition, kept in stores.items():
                for block in kept.missing():
                    rows = []
                    for b in kept.rows(block):
                        rows.append(_split(compute_task(condition, b), columns[condition]))
                        bar.update()
                    kept.write(block, np.stack(rows))
        return {c: _joined(kept.matrix(), columns[c]) for c, kept in stores.items()}

    def _store(self, name: str, identity: dict, columns: Sequence[str]) -> store.ScoreStore:
        """Return a reference store that is complete, else the one in `scores_dir`."""
        if not self.fresh:
            with suppress(store.ScoresNotFound):
                return store.find([self.scores_dir, paths.REFERENCE_SCORES], name, identity)
        tasks = [f"task {b}" for b in range(self.B)]
        where = self.scores_dir, name, identity, tasks, columns
        return store.open(*where, BLOCK_SIZE, self.fresh, DESCRIPTION)


def _split(quantities: Mapping, columns: Mapping[str, int]) -> np.ndarray:
    """Return a task's numbers as a row of a store, by `PARTS`."""
    numbers = np.concatenate([np.broadcast_to(quantities[q], n) for q, n in columns.items()])
    defined = ~np.isnan(numbers)
    numbers = np.where(defined, numbers, 0.0)
    value = numbers.astype(np.float32)
    return np.concatenate([value, numbers - value, defined])


def _joined(matrix: np.ndarray, columns: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the quantities [S or 1, B] of a store's rows [B, ...]."""
    value, remainder, defined = np.split(matrix.astype(np.float64), len(PARTS), axis=1)
    numbers = np.where(defined == 1, value + remainder, np.nan)
    ends = np.cumsum(list(columns.values()))[:-1]
    return dict(zip(columns, np.split(numbers.T, ends), strict=True))


def agreement(first: np.ndarray, second: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """Return Spearman's correlation of means over queries, network by network.

    Args:
        first: [S or 1, N, M].
        second: The same.
        kept: [N] which examples count; all by default.

    Returns:
        [S]; not a number where a method does not tell examples apart.

    Raises:
        ValueError: If there are neither equally many networks, nor one.
    """
    first, second = np.broadcast_arrays(first, second)
    if kept is not None:
        first, second = first[:, kept], second[:, kept]
    every = np.arange(first.shape[1]), np.arange(first.shape[2])
    pairs = zip(first, second, strict=True)
    return np.array([statistics.agreements([a], [b], "example")(*every).item() for a, b in pairs])


def agreements(first: Mapping, second: Mapping) -> dict[str, np.ndarray]:
    """Return "<one> against <other>" for each of the first and each of the second."""
    return {
        f"{one} against {other}": agreement(mine, theirs)
        for one, mine in first.items()
        for other, theirs in second.items()
    }


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean over tasks with its interval, and how much networks differ.

    Args:
        values: [S, B], or [1, B] where no network is involved.

    Returns:
        estimate; low and high, not numbers with a single task, or where a task's value is not one;
        network_sd, the standard deviation of networks' means, not a number for one.
    """
    of_tasks = np.mean(values, axis=0)
    estimate, B = float(of_tasks.mean()), len(of_tasks)
    error = stats.sem(of_tasks) if B > 1 else np.nan
    half = stats.t.ppf(0.975, max(B - 1, 1)) * error
    sd = np.mean(values, axis=1).std(ddof=1) if len(values) > 1 else np.nan
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half, "network_sd": sd}


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Return first - second, the mean over tasks with its interval: less, less_low, less_high."""
    found = interval(first - second)
    return {"less": found["estimate"], "less_low": found["low"], "less_high": found["high"]}
