"""Score blocks of training examples with Ray: workers that each hold one copy of the model.

Ray (the extra `cluster`) joins the cluster that RAY_ADDRESS names, or else uses this machine. There
is a worker on each GPU, or without any as many as there are cores and memory for. Each scores one
block after the other, and the driver writes the results, so that workers need the environment and
the model, and nothing else. What may go wrong:

- a worker dies: Ray starts another one in its place, and the block is scored again; a block that
  kills `TRIES` workers has failed;
- a block raises an error: another worker tries it, and if that raises one, too, it has failed; all
  others are finished before that is an error here, with the names of its training examples;
- a worker is slow, or its machine is gone: when no other block is left, idle workers score those
  that take long, too, and what comes first counts;
- the driver dies: its workers end, finished blocks are in the store, and the same call goes on.
"""

import atexit
import gc
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from icprobe import lm as language_model
from icprobe import paths
from icprobe.dispatch import ClusterError, Dispatch, NotReadyError
from icprobe.experiment import Experiment
from icprobe.lm import LM

# a CPU worker takes the memory of so many models (weights, gradients or a second copy, passes) and
# a GiB, in which a method may hold something
MODELS_HELD = 3
OBJECT_STORE = 2**28  # bytes, on this machine: queries, and blocks of scores on their way


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

        Raises:
            NotReadyError: If the method's function fails.
        """
        import ray

        if start[0] != self._of:
            self.forget()
            try:
                self._score, self._of = ray.get(start[0])(self._lm), start[0]
            except Exception as error:
                raise NotReadyError(f"{type(error).__name__}: {error}") from None
        return self._score(*arguments)

    def forget(self) -> None:
        """Free what a method has prepared."""
        self._of = self._score = None
        gc.collect()
        torch.cuda.empty_cache()


# the workers of this process and what they are for; kept, since loading a model takes long
_held: dict[tuple, "_Team"] = {}


def score_blocks(
    experiment: Experiment,
    lm: LM,
    start: Callable[[LM], Callable],
    arguments: Callable[[range], tuple],
    names: Sequence[str],
    gib: float = 0,
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
            team = _team(ray, experiment, lm, gib)
            yield from _results(ray, team, start, arguments, wanted, names)
        except BaseException:
            release()  # whatever they are at is of no use any more
            raise

    return score


def release() -> None:
    """End this process's workers, which frees their memory."""
    import ray

    for worker in itertools.chain.from_iterable(team.workers for team in _held.values()):
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


@dataclass(frozen=True)
class _Team:
    """Workers with one model, how to start another one, and what Ray gives each of them."""

    workers: list
    hire: Callable[[], object]
    resources: dict[str, float]


def _team(ray, experiment: Experiment, lm: LM, gib: float) -> _Team:
    """Return the workers with this model, which are started if they are not there."""
    folder = paths.resolve(experiment.model)
    source = str(folder) if folder.is_dir() else experiment.model
    if "revision" in lm.identity:  # the driver's, where another machine might take a newer one
        source = f"{lm.identity['name']}@{lm.identity['revision']}"
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needed = MODELS_HELD * lm.model.get_memory_footprint() + 2**30 * max(1, gib)
    count, resources = _share(machines, needed)
    key = str(lm.identity), source, str(resources)
    if key not in _held:
        release()
        torch.cuda.empty_cache()  # a worker may have the GPU that this process's model is on
        threads = int(resources["num_cpus"])
        options = ray.remote(Worker).options(**resources)
        hire = partial(options.remote, source, lm.identity["dtype"], lm.identity, threads)
        _held[key] = _Team([hire() for _ in range(count)], hire, resources)
        what = "GPU" if resources.get("num_gpus") else f"{threads} thread{'s' * (threads > 1)}"
        print(f"ray: {count} workers, each with the model and {what}")
    return _held[key]


def _share(machines: Sequence[Mapping[str, float]], needed: float) -> tuple[int, dict[str, float]]:
    """Return how many workers there should be, and what Ray is to give each.

    Args:
        machines: What each has: CPU, GPU, memory (bytes).
        needed: Bytes that a worker on a CPU takes.
    """
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    if gpus:
        return gpus, {"num_cpus": 1, "num_gpus": 1}
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    fit = [min(n, int(m.get("memory", 0) // needed)) for n, m in zip(cores, machines, strict=True)]
    if not any(fit):  # Ray leaves much of the memory aside, so one may fit all the same
        return 1, {"num_cpus": max(1, *cores)}
    threads = min(n // count for n, count in zip(cores, fit, strict=True) if count)
    return sum(fit), {"num_cpus": threads, "memory": int(needed)}


def _results(ray, team: _Team, start, arguments, wanted, names: Sequence[str]) -> Iterator:
    """Yield blocks and their scores as they come."""
    reference = [ray.put(start)]

    def send(worker, rows: range):
        return worker.score.remote(reference, arguments(rows))

    blocks = Dispatch(ray, team.workers, team.hire, send, wanted)
    yield from blocks.results(lambda: _check_alive(ray, team))
    for worker in team.workers:
        worker.forget.remote()
    if blocks.failed:
        raise ClusterError(_failure(blocks.failed, names))


def _check_alive(ray, team: _Team) -> None:
    """Raise ClusterError if no machine is left that a worker could be on."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    for node in ray.nodes():
        has = node["Resources"]
        fits = all(has.get(names[name], 0) >= n for name, n in team.resources.items())
        if node["Alive"] and fits:
            return
    raise ClusterError("no machine is left for workers; finished blocks are kept, run again")


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
