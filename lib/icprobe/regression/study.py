"""What tables on synthetic regression share: networks, their problems, agreement, intervals.

Agreement is, as for language models, Spearman's correlation over the N examples of a task between
two methods' means over its M queries. Each task gives one; tables have their mean over B tasks,
with 95 % intervals of Student's t. Of several networks the mean is taken task by task, and the
standard deviation between networks stands beside it (network_sd): intervals are for new tasks, and
for these networks.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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

GAIN, SCORE, BAYES, BAYES_SCORE = "gain", "ICP score", "gain of Bayes", "ICP score of Bayes"


@dataclass(frozen=True, kw_only=True)
class Study:
    """S networks trained alike but for the seed, and B problems [N, M] of their prior.

    All conditions have the same tasks, noise and directions, drawn by `seed`.
    """

    prior: Prior
    networks: Sequence[Regressor]
    scores_dir: str | Path
    B: int = 20
    N: int = 200
    M: int = 100
    seed: int = 0
    fresh: bool = False  # compute everything anew

    def problems(self, shift: Shift | None = None, K: int = 0, C: int = 1) -> Problems:
        """Draw the B problems; see `problems.draw`."""
        rng = np.random.default_rng(self.seed)
        return draw(self.prior, rng, self.B, self.N, self.M, shift, K, C)

    def probing(self, task: Problems, k: int = 0) -> dict[str, np.ndarray]:
        """Return gains and ICP scores [.., N, M] of a task, of networks and the Bayes learner."""
        found = [gain_and_score(learner(network), task, k) for network in self.networks]
        gains, scores = (np.concatenate(each) for each in zip(*found, strict=True))
        bayes, bayes_scores = gain_and_score(Ridge(self.prior), task, k)
        return {GAIN: gains, SCORE: scores, BAYES: bayes, BAYES_SCORE: bayes_scores}

    def tabulate(
        self,
        name: str,
        conditions: Mapping[Hashable, dict],
        compute: Callable[[Hashable, range], Iterable[Mapping]],
    ) -> dict[Hashable, dict[str, np.ndarray]]:
        """Return a table's quantities [S or 1, B] by condition; what no file has is computed.

        Each condition has a file `<scores_dir>/regression/<name>-<key>.json`, written anew after
        each task, so what is interrupted goes on with the next. Files of the reference are read.
        StoreError names one that is damaged.

        Args:
            name: Of the table.
            conditions: By condition, what determines its numbers beside this study.
            compute: Yields each task's quantities, [S] or a number, for a condition and tasks.
        """
        same = {
            "version": VERSION,
            "prior": asdict(self.prior),
            "networks": [fingerprint(network) for network in self.networks],
            **{size: getattr(self, size) for size in ("B", "N", "M", "seed")},
        }
        there, found = 0, {}
        for condition, its_own in conditions.items():
            record = {"identity": same | its_own, "made_with": store.made_with()}
            file = Path("regression", f"{store.key(name, record['identity'])}.json")
            own = paths.resolve(self.scores_dir) / file
            numbers = record["numbers"] = self._finished(name, file)
            left = range(_n_tasks(numbers), self.B)
            there += left.start
            if left and paths.is_reference(own):
                raise store.StoreError(f"{paths.shown(own)}: reference numbers are only read")
            new = compute(condition, left) if left else ()
            bar = {"initial": left.start, "total": self.B, "unit": " tasks", "disable": not left}
            for quantities in tqdm(new, f"{name}, {condition}", leave=False, **bar):
                for quantity, values in quantities.items():
                    values = [None if np.isnan(v) else float(v) for v in np.atleast_1d(values)]
                    numbers.setdefault(quantity, []).append(values)
                with paths.replacing(own) as temporary:
                    temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
            found[condition] = {q: np.array(rows, dtype=float).T for q, rows in numbers.items()}
        print(f"{name}: {there} of {self.B * len(found)} tasks were there")
        return found

    def _finished(self, name: str, file: Path) -> dict[str, list]:
        found = [{}]
        for folder in () if self.fresh else (self.scores_dir, paths.REFERENCE_SCORES):
            kept = paths.resolve(folder) / file
            try:
                if kept.exists():
                    record = json.loads(kept.read_text(encoding="utf-8"))
                    numbers = record["numbers"]
                    if store.key(name, record["identity"]) != file.stem:
                        raise ValueError("it is of another table")
                    tasks = {len(np.asarray(rows, dtype=float)) for rows in numbers.values()}
                    if len(tasks) > 1 or max(tasks, default=0) > self.B:
                        raise ValueError(f"quantities of {sorted(tasks)} tasks, of {self.B}")
                    found.append(numbers)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise store.StoreError(
                    f"{paths.shown(kept)} is damaged ({error}): delete it and run again"
                ) from error
        return max(found, key=_n_tasks)


def _n_tasks(numbers: Mapping[str, list]) -> int:
    return len(next(iter(numbers.values()), ()))


def agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman's correlations [S] of means over queries, network by network.

    Scores are [S or 1, N, M]. Not a number where a method does not tell examples apart.
    """
    first, second = np.broadcast_arrays(first, second)
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
    """Return the mean over tasks of values [S or 1, B]: estimate, low, high, network_sd.

    network_sd, of networks' means, is NaN for one row; everything is where a task's value is.
    """
    of_tasks = np.mean(values, axis=0)
    estimate = float(of_tasks.mean())
    half = stats.t.ppf(0.975, len(of_tasks) - 1) * stats.sem(of_tasks)
    sd = np.mean(values, axis=1).std(ddof=1) if len(values) > 1 else np.nan
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half, "network_sd": sd}


def difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Return first - second, the mean over tasks with its interval: less, less_low, less_high."""
    found = interval(first - second)
    return {"less": found["estimate"], "less_low": found["low"], "less_high": found["high"]}
