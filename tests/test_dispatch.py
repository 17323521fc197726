"""Which worker scores which block, with made-up workers and a made-up clock: nothing waits here."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from icprobe import dispatch
from icprobe.dispatch import ClusterError, Dispatch, NotReadyError

SIZE = 4
DAY = 24 * 3600.0


class RayError(Exception):
    """Whatever Ray raises."""


class RayActorError(RayError):
    """A worker died or cannot be reached."""


class RayTaskError(RayError):
    """A worker raised an error."""

    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


@dataclass(eq=False)
class Answer:
    """What a call brings, and when; never where its worker cannot be reached."""

    at: float
    what: object


class Time:
    """Ray and the clock, as `dispatch` sees them."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self):
        self.now = 0.0
        self.killed = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def wait(self, calls, timeout):
        assert calls
        first = min(calls, key=lambda call: call.at)
        self.now = max(self.now, min(first.at, self.now + timeout))
        assert self.now < DAY, "waited in vain"
        return ([first], []) if first.at <= self.now else ([], calls)

    def get(self, call):
        if isinstance(call.what, Exception):
            raise call.what
        return call.what

    def kill(self, worker):
        self.killed.append(worker)


class Made:
    """A worker: `work(block, now)` returns seconds and what comes of it; None: no answer, ever."""

    def __init__(self, time: Time, work: Callable, begin=(0.0, None)):
        self.time, self.work, self.free, self.blocks = time, work, 0.0, []
        self.begin = begin

    @property
    def forget(self):
        return SimpleNamespace(remote=lambda: self.answer(*self.begin))

    def score(self, rows):
        self.blocks.append(rows.start // SIZE)
        return self.answer(*self.work(self.blocks[-1], self.time.now))

    def answer(self, seconds, what):
        self.free = float("inf") if seconds is None else max(self.time.now, self.free) + seconds
        return Answer(self.free, what)


def good(block, now):
    return 10, ["scores"]


def full_disk(block, now):
    return 0.1, RayTaskError(OSError("disk full"))


def gone(block, now):
    return None, None


def unable(block, now):
    return 0.1, RayTaskError(NotReadyError("OutOfMemoryError: GPU"))


def unless(blocks, otherwise, work=good):
    """Return what a worker does to whom something else happens on some blocks."""
    return lambda block, now: otherwise(block, now) if block in blocks else work(block, now)


def dies(block, now):
    return 1, RayActorError()


@pytest.fixture
def time(monkeypatch):
    made = Time()
    monkeypatch.setattr(dispatch, "time", made)
    return made


def spread(time, works, blocks=40, hired=(good,), begins=()):
    """Return the finished blocks, what failed, and the workers that there were."""
    workers = [Made(time, work) for work in works]
    for worker, begin in zip(workers, begins, strict=False):
        worker.begin = begin
    all_of_them = list(workers)

    def hire():
        all_of_them.append(Made(time, *hired))
        return all_of_them[-1]

    wanted = (range(k * SIZE, (k + 1) * SIZE) for k in range(blocks))
    sending = Dispatch(time, workers, hire, Made.score, wanted)
    done = [rows.start // SIZE for rows, _ in sending.results(lambda: None)]
    assert len(set(done)) == len(done), "a block came twice"
    failed = {rows.start // SIZE: reason for rows, reason in sending.failed.items()}
    assert sorted([*done, *failed]) == list(range(blocks))
    return done, failed, all_of_them


def test_blocks_go_to_whom_is_idle_in_order(time):
    done, failed, (one, other) = spread(time, [good, good], 6)
    assert (done, failed, time.now) == ([0, 1, 2, 3, 4, 5], {}, 30)
    assert (one.blocks, other.blocks) == ([0, 2, 4], [1, 3, 5])
    assert spread(time, [good], 0)[0] == []


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_workers_that_fail_on_everything_cost_no_block(time, bad):
    """Such as those of machines whose disk is full, or whose GPU is broken: they answer first."""
    _, failed, workers = spread(time, [*[full_disk] * bad, *[good] * (8 - bad)])
    assert not failed
    assert all(len(worker.blocks) < 8 for worker in workers[:bad])
    assert time.now < 100 * 40 / (8 - bad) / 5


def test_a_block_that_fails_everywhere_is_given_up_and_others_finished(time):
    for count, tried in ((1, ""), (2, " (tried 2 times)"), (8, " (tried 3 times)")):
        raising = unless((0, 1, 17), lambda block, now: (1, RayTaskError(ValueError("not finite"))))
        time.now = 0
        _, failed, workers = spread(time, [raising] * count)
        assert failed == dict.fromkeys((0, 1, 17), f"ValueError: not finite{tried}")
        assert all(max(map(worker.blocks.count, range(40))) == 1 for worker in workers)
        assert time.now < 60 + 370 / count


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_block_that_kills_is_given_up_and_workers_are_replaced(time, count):
    killed = unless((5,), dies)
    _, failed, workers = spread(time, [killed] * count, hired=(killed,))
    assert failed == {5: "its worker died (tried 3 times)"}
    assert len(workers) == count + 3
    assert len(time.killed) == 3


def test_a_machine_that_kills_all_workers_costs_no_block(time):
    _, failed, workers = spread(time, [dies, good, good, good], hired=(dies,))
    assert not failed
    assert len(workers) < 12


def test_a_machine_that_is_lost_costs_nothing(time):
    """Its processes end; Ray says so after a while, and then answers nothing for some time."""

    def lost(block, now):
        return (4, RayActorError()) if now > 20 else good(block, now)

    for begin in (0, None):  # for the one that stands in for it, there may be no machine
        _, failed, workers = spread(time, [lost, good, good, good], hired=(good, (begin, None)))
        assert not failed
        assert len(workers) == 5


@pytest.mark.parametrize("blocks", [1, 2, 40])
def test_workers_that_cannot_be_reached_are_not_waited_for(time, blocks):
    _, failed, _ = spread(time, [gone, gone, good], blocks)
    assert not failed
    # or never come up
    assert not spread(time, [good, good], blocks, begins=[(None, None)])[1]


def test_a_worker_that_is_gone_while_another_fails_leaves_an_error(time):
    _, failed, _ = spread(time, [unless((0,), full_disk), unless((1,), gone)], 4)
    assert failed == {0: "OSError: disk full (tried 3 times)"} or not failed
    _, failed, _ = spread(time, [full_disk, gone], 4)
    assert set(failed) == {0, 1, 2, 3}


def test_what_takes_long_is_scored_twice_and_the_first_counts(time):
    slow = unless((0,), lambda block, now: (600, ["scores"]))
    _, failed, (one, other) = spread(time, [slow, good], 4)
    assert not failed
    assert (one.blocks, other.blocks) == ([0], [1, 2, 3, 0])
    assert time.now < 60


def test_of_two_copies_one_counts(time):
    slow = unless((0,), lambda block, now: (45, ["scores"]))
    slower = unless((2,), lambda block, now: (1000, ["scores"]))
    _, failed, workers = spread(time, [slow, good, slower], 3)
    assert not failed
    assert sum(worker.blocks.count(0) for worker in workers) == 2


def test_what_takes_less_than_a_second_is_not_late(time):
    seconds = {8: 0.5, 9: 0.9}
    quick = lambda block, now: (seconds.get(block, 0.01), ["scores"])  # noqa: E731
    _, failed, workers = spread(time, [quick] * 3, 10)
    assert not failed
    assert sum(worker.blocks.count(9) for worker in workers) == 1


def test_scores_of_a_block_that_was_given_up_are_welcome(time):
    slower = unless((1,), lambda block, now: (600, ["scores"]))
    slow = unless((0,), lambda block, now: (500, ["scores"]), slower)
    done, failed, _ = spread(time, [slow, *[unless((0,), full_disk, slower)] * 4], 8)
    assert not failed
    assert done[-2:] == [0, 1]


def test_copies_that_fail_leave_the_first_alone(time):
    slow = unless((0,), lambda block, now: (45, ["scores"]))
    for fault in (dies, full_disk):
        works = [slow, *[unless((0,), fault)] * 4]
        _, failed, _ = spread(time, works, 20, hired=(unless((0,), fault),))
        assert not failed


def test_whoever_cannot_begin_takes_no_part(time, capsys):
    _, failed, workers = spread(time, [unable, unable, *[good] * 6])
    assert not failed
    assert [len(worker.blocks) for worker in workers[:2]] == [1, 1]
    assert capsys.readouterr().out == "ray: 2 workers took no part: OutOfMemoryError: GPU\n"
    cannot_start = (5, RayActorError("killed"))
    _, failed, workers = spread(
        time, [good, good], hired=(good, cannot_start), begins=[cannot_start]
    )
    assert not failed
    assert [worker.blocks for worker in workers if worker is not workers[1]] == [[], []]
    assert "1 worker took no part: it could not start: killed" in capsys.readouterr().out


def test_it_is_an_error_if_nobody_can_begin(time):
    with pytest.raises(ClusterError, match="no worker can begin: OutOfMemoryError: GPU"):
        spread(time, [unable, unable])
    with pytest.raises(ClusterError, match="no worker can begin: it could not start: killed"):
        dead = (5, RayActorError("killed"))
        spread(time, [good, good], hired=(good, dead), begins=[dead] * 2)


def test_one_that_died_since_the_last_matrix_is_replaced(time):
    _, failed, workers = spread(time, [good, good], begins=[(0, RayActorError())])
    assert not failed
    assert [len(worker.blocks) > 0 for worker in workers] == [False, True, True]


def test_it_says_so_when_nothing_comes(time, capsys):
    looked = []
    worker = Made(time, lambda block, now: (1000, ["scores"]))
    sending = Dispatch(time, [worker], None, Made.score, iter([range(4)]))
    assert len(list(sending.results(lambda: looked.append(time.now)))) == 1
    assert capsys.readouterr().out.count("no block is finished yet") == 1
    assert 10 < len(looked) < 20
