"""Score blocks of training examples with Ray: workers that each hold one copy of the model.

Ray (the extra `cluster`) joins the cluster that RAY_ADDRESS names, or else uses this machine. There
is a worker on each GPU, or without any as many as there are cores and memory for. Each scores one
block after the other, and the driver writes the results, so that workers need the environment and
the model, and nothing else. What may go wrong:

- a worker dies: Ray starts another one in its place, and the block is scored again; a block that
  kills `TRIES` workers has failed;
- a block raises an error: it has failed, and all others are finished before that is an error here,
  with the names of its training examples;
- a worker is slow, or its machine is gone: when no other block is left, idle workers score the
  oldest unfinished ones, too, and what comes first counts;
- the driver dies: its workers end, finished blocks are in the store, and the same call goes on.
"""

import atexit
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from icprobe import lm as language_model
from icprobe import paths
from icprobe.experiment import Experiment
from icprobe.lm import LM

TRIES = 3  # workers that may die over one block
PATIENCE = 60  # seconds without any result after which it is looked whether workers are left

# a CPU worker takes the memory of so many models: weights, gradients or a second copy, passes
MODELS_HELD = 3
OBJECT_STORE = 2**28  # bytes, on this machine: queries, and blocks of scores on their way


class ClusterError(RuntimeError):
    """Ray is not there, no worker is left, or blocks could not be scored."""


class Worker:
    """One copy of the model, and what the method at hand has prepared with it."""

    def __init__(self, model: str, dtype: str, identity: dict, threads: int) -> None:
        """Load the model.

        Args:
            model: Its name or folder.
            dtype: See `lm.load`.
            identity: The driver's model's.
            threads: Of the CPU.

        Raises:
            ValueError: If it is not the driver's model.
        """
        torch.set_num_threads(threads)
        self._lm = language_model.load(model, dtype)
        if self._lm.identity != identity:
            raise ValueError(f"this machine's model is {self._lm.identity}, expected {identity}")
        self._of = self._score = None

    def score(self, start: Sequence, arguments: tuple) -> Sequence[np.ndarray | None]:
        """Score one block.

        Args:
            start: A reference to the method's function of this name, see `engines`. In a sequence,
                or Ray would fetch what it stands for at every call.
            arguments: Of the function that it returns.
        """
        import ray

        if start[0] != self._of:
            self._score = None  # what an earlier method holds is gone before there is more
            self._score, self._of = ray.get(start[0])(self._lm), start[0]
        return self._score(*arguments)


# the workers of this process and what they are for; kept, since loading a model takes long
_held: dict[tuple, list] = {}


def score_blocks(
    experiment: Experiment,
    lm: LM,
    start: Callable[[LM], Callable],
    arguments: Callable[[range], tuple],
    names: Sequence[str],
) -> Callable[[Iterator[range]], Iterator[tuple[range, Sequence[np.ndarray | None]]]]:
    """Return how to score all blocks with Ray, for `store.compute`.

    See `engines.fill` for the arguments and errors; `names` are the ids of the training examples.
    """

    def score(wanted: Iterator[range]) -> Iterator[tuple[range, Sequence[np.ndarray | None]]]:
        first = next(wanted, None)
        if first is None:
            return  # nothing is missing, so nothing is started
        wanted = itertools.chain([first], wanted)
        ray = _joined()
        try:
            workers = _workers(ray, experiment, lm)
            yield from _spread(ray, workers, start, arguments, wanted, names)
        except BaseException:
            release()  # whatever they are at is of no use any more
            raise

    return score


def release() -> None:
    """End this process's workers, which frees their memory."""
    import ray

    for worker in itertools.chain.from_iterable(_held.values()):
        if ray.is_initialized():
            ray.kill(worker)
    _held.clear()


def _joined():
    """Return Ray, connected to a cluster.

    Raises:
        ClusterError: If it is not installed, or there is no cluster at RAY_ADDRESS.
    """
    try:
        import ray
    except ImportError:
        raise ClusterError(
            'engine "ray" needs Ray: pip install "icprobe[cluster]", or take engine "local"'
        ) from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        _check_answers(address)
        own = {} if address else {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
        # "local": without an address, Ray would join whatever runs on this machine
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address or "local", **quiet, **own)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise ClusterError(
                f"cannot join the Ray cluster at {address or 'this machine'} (does it ask for a "
                f"token? then set RAY_AUTH_MODE=token): {error}"
            ) from error
        atexit.register(_held.clear)
    return ray


def _check_answers(address: str | None) -> None:
    """Raise ClusterError if nothing answers at host:port, where Ray would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster at RAY_ADDRESS={address}: {error}") from error


def _workers(ray, experiment: Experiment, lm: LM) -> list:
    """Return the workers with this model, which are started if they are not there."""
    model = paths.resolve(experiment.model)
    name = str(model) if model.is_dir() else experiment.model
    key = name, experiment.dtype, str(lm.identity)
    if key not in _held:
        release()
        count, resources = _share(ray.cluster_resources(), lm.model.get_memory_footprint())
        made = ray.remote(Worker).options(max_restarts=-1, max_task_retries=TRIES - 1, **resources)
        threads = int(resources["num_cpus"])
        _held[key] = [
            made.remote(name, experiment.dtype, lm.identity, threads) for _ in range(count)
        ]
        what = "GPU" if resources.get("num_gpus") else f"{threads} thread{'s' * (threads > 1)}"
        print(f"ray: {count} workers, each with the model and {what}")
    return _held[key]


def _share(cluster: dict[str, float], model_bytes: int) -> tuple[int, dict[str, float]]:
    """Return how many workers there should be, and what each takes.

    Args:
        cluster: What the cluster has, see `ray.cluster_resources`.
        model_bytes: Size of the model's weights.
    """
    if cluster.get("GPU", 0) >= 1:
        return int(cluster["GPU"]), {"num_cpus": 1, "num_gpus": 1}
    cores = max(1, int(cluster.get("CPU", 1)))
    room = int(cluster.get("memory", 0) // (MODELS_HELD * model_bytes + 2**30))
    count = min(cores, max(1, room))
    return count, {"num_cpus": cores // count}


def _spread(ray, workers: list, start, arguments, wanted, names: Sequence[str]) -> Iterator:
    """Yield blocks as workers finish them; see this module for what happens where they do not."""
    reference = [ray.put(start)]
    idle, flying = list(workers), {}  # flying: by Ray's reference, the rows and who scores them
    done, failed = set(), {}

    def send(rows: range) -> None:
        worker = idle.pop()
        flying[worker.score.remote(reference, arguments(rows))] = rows, worker

    while True:
        while idle and (rows := next(wanted, None)) is not None:
            send(rows)
        unfinished = [rows for rows, _ in flying.values() if rows not in done]
        if not unfinished:
            break
        # where no other block is left, idle workers help with those that wait longest
        for rows in [rows for rows in unfinished if unfinished.count(rows) == 1][: len(idle)]:
            send(rows)
        ready, _ = ray.wait(list(flying), timeout=PATIENCE)
        if not ready:
            _check_alive(ray)
            continue
        rows, worker = flying.pop(ready[0])
        idle.append(worker)
        if rows in done:
            continue
        try:
            yield rows, ray.get(ready[0])
        except ray.exceptions.ActorDiedError as error:  # where it might live, it is started again
            raise ClusterError(f"a worker could not start: {error}") from error
        except ray.exceptions.RayActorError:
            failed[rows] = f"{TRIES} workers died of it"
        except ray.exceptions.RayTaskError as error:
            failed[rows] = f"{type(error.cause).__name__}: {error.cause}"
        done.add(rows)
    if failed:
        raise ClusterError(_failure(failed, names))


def _check_alive(ray) -> None:
    """Raise ClusterError if no machine is left that workers could be on."""
    if not any(node["Alive"] for node in ray.nodes()):
        raise ClusterError("the cluster has no machine left; finished blocks are kept, run again")


def _failure(failed: dict[range, str], names: Sequence[str]) -> str:
    """Return which blocks have failed, with the ids of their training examples, and of what."""
    count = sum(map(len, failed))
    lines = [f"{count} training examples have no scores; all others have, and are kept:"]
    for rows, reason in sorted(failed.items(), key=lambda item: item[0].start)[:5]:
        ends = dict.fromkeys([names[rows.start], names[rows.stop - 1]])
        lines.append(f"  {' to '.join(map(repr, ends))} ({len(rows)}): {reason}")
    if len(failed) > 5:
        lines.append(f"  and {len(failed) - 5} blocks more")
    return "\n".join(lines)
