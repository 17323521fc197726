"""Score blocks of training examples with Ray: workers that each hold one copy of the model.

A worker is an actor on one GPU or, in a cluster without any, on one thread. Ray places it and
restarts it where it dies. The driver hands out one block at a time and alone writes the scores, so
workers need the environment and the model, and nothing else. See docs/cluster.md for failures.
"""

import gc
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator

import numpy as np
import torch

from icprobe import models
from icprobe.models import LM
from icprobe.scores.method import Block, Inputs, Method, Scored, score_block

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError('engine "ray" needs Ray: pip install "icprobe[cluster]"') from error

ATTEMPTS = 3  # at a block, and at preparing a worker, before it has failed
MODELS_HELD = 3  # memory of a CPU worker, in models: weights, gradients, activations
OBJECT_STORE = 2**28  # bytes, on this machine: queries, and blocks of scores on their way

_workers: dict[tuple, list] = {}  # kept between calls, since loading a model takes long


class ClusterError(RuntimeError):
    """There is no cluster, workers cannot begin, or blocks could not be scored."""


@ray.remote(num_cpus=1, max_restarts=10, max_task_retries=-1)  # calls wait during a restart
class Worker:
    """One copy of the model, and what the method has prepared with it."""

    def __init__(self, model: str, dtype: str, identity: dict) -> None:
        """Load a model; raises ValueError if its identity is not that of the driver's model."""
        torch.set_num_threads(1)  # the bytes of a sum depend on their number
        self._lm = models.load(model, dtype)
        if self._lm.identity != identity:
            raise ValueError(f"this machine's model is {self._lm.identity}, expected {identity}")
        self._of = self._method = self._prepared = None

    @ray.method(max_task_retries=ATTEMPTS - 1)
    def prepare(self, sent: list = (None,)) -> None:
        """Prepare a method for its inputs; by default, free what another one holds."""
        if sent[0] == self._of:  # Ray would fetch a reference that is not in a sequence
            return
        self._of = self._method = self._prepared = None
        gc.collect()
        torch.cuda.empty_cache()
        if sent[0]:
            self._method, *inputs = ray.get(sent[0])
            self._prepared, self._of = self._method.prepare(self._lm, *inputs), sent[0]

    @ray.method(max_task_retries=0)  # another worker may be faster
    def score(self, sent: list, block: Block) -> dict[str, np.ndarray]:
        """Score one block."""
        self.prepare(sent)  # anew, if this worker was restarted while it was idle
        return score_block(self._method, self._prepared, block)


def score_blocks(model: str, method: Method, inputs: Inputs, blocks: Iterator[Block]) -> Scored:
    """Yield numbers and scores of blocks as workers finish them; see `run.fill`.

    Workers load `model`, a name or a folder.

    Raises:
        ClusterError: If there is no cluster, a worker cannot begin, or blocks have failed: at the
            end, when all others are finished.
    """
    lm, pool, queries = inputs
    try:
        workers = _start_workers(model, lm, method.worker_gib)
        sent = [ray.put((method, queries, pool if method.needs_pool else None))]
        failed = yield from _results(workers, sent, blocks)
    except BaseException:
        release()  # they may be in the middle of blocks that nobody wants any more
        raise
    if failed:
        told = "".join(f"\n  {name}: {reason}" for name, reason in list(failed.items())[:5])
        raise ClusterError(f"{len(failed)} blocks failed, all others are kept; such as{told}")


def release() -> None:
    """End this process's workers, which frees their memory."""
    for worker in [one for team in _workers.values() for one in team]:
        ray.kill(worker)
    _workers.clear()


def _join() -> None:
    """Connect to a cluster; raises ClusterError if there is none at RAY_ADDRESS."""
    _workers.clear()
    address = os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").rpartition(":")
    own = {} if address else {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
    try:
        if port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        # "local": without an address, Ray would join whatever runs on this machine
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, RayError) as error:
        token = "does it ask for a token? then set RAY_AUTH_MODE=token"
        raise ClusterError(f"no Ray cluster at RAY_ADDRESS={address} ({token}): {error}") from error


def _start_workers(model: str, lm: LM, gib: float) -> list:
    """Return the workers with this model; they are started unless they are there."""
    if not ray.is_initialized():
        _join()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count, each = int(sum(machine.get("GPU", 0) for machine in machines)), {"num_gpus": 1}
    if not count:
        needed = MODELS_HELD * lm.model.get_memory_footprint() + int(2**30 * max(1, gib))
        fit = sum(int(min(m.get("CPU", 0), m.get("memory", 0) // needed)) for m in machines)
        # Ray leaves much of the memory aside, so one may fit all the same
        count, each = (fit, {"memory": needed}) if fit else (1, {})
    key = str(lm.identity), str(each)
    if key not in _workers:
        release()
        torch.cuda.empty_cache()  # a worker may be on the GPU of this process's model
        who = lm.identity
        if "revision" in who:  # the driver's, where another machine might take a newer one
            model = f"{who['name']}@{who['revision']}"
        hire = Worker.options(**each).remote
        _workers[key] = [hire(model, who["dtype"], who) for _ in range(count)]
        print(f"ray: {count} workers, each with {'a GPU' if 'num_gpus' in each else 'one thread'}")
    return _workers[key]


def _results(workers: list, sent: list, blocks: Iterator[Block]) -> Iterator:
    """Yield numbers of blocks and their scores; return why others have failed, by name.

    A block that raises, or whose worker dies, is tried again. A worker on which one raised rests
    while others work: a full disk on its machine would fail one block after the other.
    """
    calls = {worker.prepare.remote(sent): (worker, None) for worker in workers}
    again, attempts, failed, idle, resting = deque(), Counter(), {}, [], []
    while True:
        busy = any(block for _, block in calls.values())
        if not (calls or idle):
            idle, resting = resting, []
        while idle and (block := again.popleft() if again else next(blocks, None)):
            worker = idle.pop()
            calls[worker.score.remote(sent, block)] = worker, block
            busy = True
        if idle and not busy:
            break  # nothing is left to hand out
        ready, _ = ray.wait(list(calls), timeout=60)
        if not (ready or busy):
            print("ray: no worker is ready yet (has another run taken the machines?)")
            idle, resting = resting, []
        for call in ready:
            worker, block = calls.pop(call)
            try:
                scores = ray.get(call)
            except RayError as error:
                raised = isinstance(error, RayTaskError)
                reason = f"{type(error.cause).__name__}: {error.cause}" if raised else str(error)
                if block is None:
                    raise ClusterError(f"a worker cannot begin: {reason}") from error
                if raised:
                    resting.append(worker)
                else:  # it died, or its machine is gone: Ray restarts it where there is a place
                    calls[worker.prepare.remote(sent)] = worker, None
                attempts[block.number] += 1
                if attempts[block.number] < ATTEMPTS:
                    again.append(block)
                else:  # the block is to blame
                    failed[_name(block)] = reason if raised else "its worker died"
                    idle, resting = idle + resting, []
            else:
                idle.append(worker)
                if block:
                    yield block.number, scores
    for worker in workers:
        worker.prepare.remote()  # frees what the method holds
    return failed


def _name(block: Block) -> str:
    ids = block.train.ids
    return f"{ids[0]!r} to {ids[-1]!r}" if ids else "the only row"
