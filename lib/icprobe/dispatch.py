"""Which worker scores which block, where either may fail.

A worker gets blocks once it has answered that it is there. An idle one takes, in this order,

1. a block that failed elsewhere; one that failed `TRIES` times, or on every worker, is given up;
2. the next block that is missing;
3. a block that takes long; what comes first counts.

A worker that failed on a block rests for a while, unless all do: with a full disk, it would fail on
one block after the other. One that died is replaced, and left out if the new one cannot start. One
that cannot prepare what all blocks share is left out, too.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import numpy as np

TRIES = 3  # times that a block may fail
TICK = 1  # most seconds between looks at what should be sent
LATE = 3  # a block takes long if it takes so many times what others have taken
PATIENCE = 60  # seconds: the same as long as none is finished; and how often to look for machines

Scores = Sequence[np.ndarray | None]


class ClusterError(RuntimeError):
    """Ray is not there, no worker is left, or blocks could not be scored."""


class NotReadyError(RuntimeError):
    """A worker could not prepare what all blocks share, so no block can be scored on it."""


class Dispatch:
    """The blocks of one matrix, on their way to workers and back.

    Attributes:
        failed: By block that was given up, what happened last.
    """

    def __init__(
        self,
        ray: ModuleType,
        workers: list,
        hire: Callable[[], object],
        send: Callable[[object, range], object],
        wanted: Iterator[range],
    ) -> None:
        """Begin with workers of which nothing is known.

        Args:
            ray: The module.
            workers: Handles of Ray actors with a method `forget`. Changed in place where some are
                replaced or left out.
            hire: Starts another worker and returns its handle.
            send: Has a worker score a block; returns Ray's reference.
            wanted: The blocks, each asked for when a worker is there for it.
        """
        self._ray, self._workers, self._hire = ray, workers, hire
        self._call, self._wanted = send, wanted
        self.failed: dict[range, str] = {}
        self._done: set[range] = set()  # given up, too
        self._seconds: deque[float] = deque(maxlen=100)  # of the blocks that were finished last
        self._idle: list = []
        self._resting: dict = {}  # workers, and until when
        self._new: set = set()  # workers that stand in for others and have not answered yet
        self._left_out: list[str] = []  # why
        # by Ray's reference: block (None: it is asked whether it is there), worker, and when sent
        self._flying: dict = {}
        # blocks that are to be scored again: workers that failed on them, and when the last one did
        self._again: dict[range, tuple[list, float]] = {}

    def results(self, check: Callable[[], None]) -> Iterator[tuple[range, Scores]]:
        """Yield blocks as workers finish them.

        Args:
            check: Called now and then while nothing comes; may raise.

        Raises:
            ClusterError: If no worker can begin.
        """
        for worker in self._workers:
            self._ask(worker)
        news = begun = time.monotonic()
        told = False
        while self._send_all():
            ready = self._flying and self._ray.wait(list(self._flying), timeout=TICK)[0]
            now = time.monotonic()
            if ready:
                news = now
                rows, scores = self._receive(ready[0])
                if scores is not None:
                    yield rows, scores
            elif not self._flying:
                time.sleep(TICK)
            elif now - news > PATIENCE:
                news = now
                check()
            if not (told or self._seconds) and now - begun > PATIENCE:
                told = True
                print("ray: no block is finished yet (has another run taken the machines?)")
        if self._left_out:
            count = f"{len(self._left_out)} worker{'s' * (len(self._left_out) > 1)}"
            print(f"ray: {count} took no part: {self._left_out[-1]}")

    def _send_all(self) -> bool:
        """Send what may be sent; tell whether anything is still to come."""
        now, usual = time.monotonic(), self._usual()
        for rows, (workers, at) in list(self._again.items()):
            if rows not in self._in_work():
                # after a while those that it failed on may have it, too: others might be gone
                self._send(rows, self._free(but=workers if now - at < usual else ()))
        more = True
        while more and (free := self._free()):
            rows = next(self._wanted, None)
            more = rows is not None
            if more:
                self._send(rows, free)
        late = self._out() - self._in_work() - self._again.keys()
        for rows in sorted(late, key=lambda rows: rows.start):
            self._send(rows, self._free())
        return more or bool(self._again or self._out())

    def _out(self) -> set[range]:
        """Return the blocks that were sent and have not come back."""
        return {rows for rows, *_ in self._flying.values()} - self._done - {None}

    def _in_work(self) -> set[range]:
        """Return those of them that may still come."""
        since = time.monotonic() - self._usual()
        return self._out() & {rows for rows, _, sent in self._flying.values() if sent > since}

    def _usual(self) -> float:
        """Return after how many seconds a block takes long; a second never is long."""
        return max(1, LATE * statistics.median(self._seconds)) if self._seconds else PATIENCE

    def _free(self, but: Sequence = ()) -> list:
        """Return the workers that may have a block now."""
        now = time.monotonic()
        tired = [worker for worker in self._workers if self._resting.get(worker, 0) > now]
        if len(tired) == len(self._workers):
            tired = []
        return [worker for worker in self._idle if worker not in tired and worker not in but]

    def _ask(self, worker) -> None:
        """Ask a worker whether it is there: it is idle when it answers."""
        self._flying[worker.forget.remote()] = None, worker, time.monotonic()

    def _send(self, rows: range, free: list) -> None:
        """Send a block to the first of some workers, if there is one."""
        if free:
            self._idle.remove(free[0])
            self._flying[self._call(free[0], rows)] = rows, free[0], time.monotonic()

    def _receive(self, call) -> tuple[range | None, Scores | None]:
        """Take what a worker has answered; return a block and its scores, if they are new."""
        rows, worker, sent = self._flying.pop(call)
        try:
            scores = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if rows is None or isinstance(error.cause, NotReadyError):
                self._leave_out(worker, str(error.cause))
                self._fail(rows, None, "")
            else:
                self._idle.append(worker)
                self._resting[worker] = time.monotonic() + self._usual()
                self._fail(rows, worker, f"{type(error.cause).__name__}: {error.cause}")
        except self._ray.exceptions.RayError as error:  # it died, or what it sent is lost
            if worker in self._new:
                self._leave_out(worker, f"it could not start: {error}")
            else:
                self._replace(worker)
                self._fail(rows, worker, "its worker died")
        else:
            self._idle.append(worker)
            self._new.discard(worker)
            # a copy of a block that was given up is welcome, of a finished one not
            if rows is not None and (rows not in self._done or self.failed.pop(rows, None)):
                self._seconds.append(time.monotonic() - sent)
                self._done.add(rows)
                self._again.pop(rows, None)
                return rows, scores
        return rows, None

    def _fail(self, rows: range | None, worker, reason: str) -> None:
        """Have a block scored again, or give it up; without a worker, it is not to blame."""
        if rows is None or rows in self._done:
            return
        blamed = [] if worker is None else [worker]
        workers = [*self._again.get(rows, ([],))[0], *blamed]
        self._again[rows] = workers, time.monotonic()
        everywhere = blamed and set(self._workers) <= set(workers)
        if len(workers) >= TRIES or everywhere:
            times = f" (tried {len(workers)} times)" if len(workers) > 1 else ""
            self.failed[rows] = reason + times
            self._done.add(rows)
            del self._again[rows]

    def _replace(self, worker) -> None:
        """Start a new worker instead of one that died, or cannot be reached."""
        self._ray.kill(worker)
        new = self._hire()
        self._workers[self._workers.index(worker)] = new
        self._new.add(new)
        self._resting[new] = time.monotonic() + self._usual()
        self._ask(new)

    def _leave_out(self, worker, reason: str) -> None:
        """Give a worker no more blocks.

        Raises:
            ClusterError: If it was the last one.
        """
        self._ray.kill(worker)
        self._workers.remove(worker)
        self._left_out.append(reason)
        if not self._workers:
            raise ClusterError(f"no worker can begin: {reason}")
