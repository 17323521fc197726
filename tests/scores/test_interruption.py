"""Killed at any moment, and many at once: at most the block in work is lost, bytes are the same."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stores import files, fill, filled, from_matrix, opened, some_scores

from icprobe.data import paths

pytestmark = pytest.mark.slow

SETUP = """
import os, sys, time
from pathlib import Path
from stores import fill, opened, some_scores
"""

WORKER = """
folder, log, N, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
seen = 0

def kill_at_event(event, arguments):
    # Python announces every file it opens to write, links or removes: die just before the n-th.
    global seen
    if event in ("open", "os.link", "os.remove") and str(arguments[0]).endswith(".tmp"):
        if seen == kill_at:
            os.kill(os.getpid(), 9)
        seen += 1

def score_rows(rows):
    with log.open("a") as file:
        print(rows.start, file=file)
    time.sleep(0.002)
    return matrix[list(rows)]

if kill_at >= 0:
    sys.addaudithook(kill_at_event)
scores, matrix = opened(folder, N), some_scores(N, 5)
assert (fill(scores, score_rows) == matrix).all()
"""


def start(*arguments, code: str = WORKER) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SETUP + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{paths.ROOT / 'lib'}:{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def logged(log: Path) -> list[int]:
    """Return the blocks that a worker began to compute."""
    return [int(line) // 3 for line in log.read_text().splitlines()] if log.exists() else []


def succeeded(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    return output


def finished(folder: Path, N: int) -> set[int]:
    scores = opened(folder, N=N)
    return set(range(scores.n_blocks)) - set(scores.missing())


def test_killed_at_random_moments_loses_at_most_the_block_in_work(tmp_path):
    N, chance = 240, random.Random(0)
    reference = filled(tmp_path / "reference", N=N)
    begun = []
    for run in range(4):
        before, log = finished(tmp_path / "killed", N), tmp_path / f"log-{run}"
        process, after_blocks = start(tmp_path / "killed", log, N, -1), chance.randint(1, 18)
        while process.poll() is None and len(logged(log)) < after_blocks:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        process.communicate()
        after = finished(tmp_path / "killed", N)
        assert process.returncode == -signal.SIGKILL, "finished too early to be killed"
        assert not before.intersection(logged(log)), "a finished block was computed again"
        assert before <= after, "a finished block was lost"
        assert len(set(logged(log)) - after) <= 1, "more than the block in work was lost"
        begun += logged(log)
    succeeded(start(tmp_path / "killed", tmp_path / "last", N, -1))
    begun += logged(tmp_path / "last")
    assert set(begun) == set(range(80))
    assert len(begun) <= 80 + 4
    assert files(opened(tmp_path / "killed", N=N).folder) == files(reference.folder)


def test_killed_at_every_step_of_writing(tmp_path):
    """Just before the temporary is opened, linked and removed: the manifest's, then each part's."""
    reference = files(filled(tmp_path / "reference", N=4).folder)
    steps = range(9)  # 3 files of 3 steps each
    for first in steps[::2]:  # two at a time: starting Python takes longest
        pair = [step for step in (first, first + 1) if step in steps]
        killed = [start(tmp_path / str(step), tmp_path / f"log-{step}", 4, step) for step in pair]
        for step, process in zip(pair, killed, strict=True):
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
            scores, computed = opened(tmp_path / str(step), N=4), []
            fill(scores, from_matrix(some_scores(4, 5), computed))
            # With the second step (link) done, the file is there: two parts follow the manifest.
            assert len(computed) == [2, 2, 2, 2, 2, 1, 1, 1, 0][step]
            assert files(scores.folder) == reference


def test_many_processes_fill_one_store(tmp_path):
    """Two fill, one fills and is killed, and one opens (and tidies) all the time."""
    N = 150
    reference = filled(tmp_path / "reference", N=N)
    opener = "while opened(Path(sys.argv[1]), int(sys.argv[3])).missing(): pass"
    shared = tmp_path / "shared"
    workers = [start(shared, tmp_path / f"log-{name}", N, -1) for name in ("a", "b", "killed")]
    workers.insert(2, start(shared, "", N, code=opener))
    *living, doomed = workers
    while len(logged(tmp_path / "log-killed")) < 5 and doomed.poll() is None:
        time.sleep(0.001)
    doomed.kill()
    doomed.communicate()
    for process in living:
        succeeded(process)
    assert files(opened(shared, N=N).folder) == files(reference.folder)


def test_processes_that_create_a_store_at_once_agree_on_its_blocks(tmp_path):
    code = """
Path(sys.argv[1], sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 3:
    pass
print(opened(Path(sys.argv[1]), 7, block_size=int(sys.argv[3])).block_size)
"""
    processes = [start(tmp_path, f"ready-{size}", size, code=code) for size in (1, 2, 3)]
    assert len({succeeded(process) for process in processes}) == 1


def test_works_without_hard_links(tmp_path):
    code = """
def refuse(event, arguments):
    if event == "os.link":
        raise PermissionError(1, "Operation not permitted")

sys.addaudithook(refuse)
"""
    succeeded(start(tmp_path / "bare", tmp_path / "log", 7, -1, code=code + WORKER))
    reference = filled(tmp_path / "reference")
    assert files(opened(tmp_path / "bare").folder) == files(reference.folder)


def test_leftovers_go_once_their_file_is_there_and_not_before(tmp_path):
    scores = opened(tmp_path)
    scores.write(0, some_scores(7, 5)[:3])
    useless = scores.folder / f"part-00000.parquet.{'a' * 32}.tmp"
    perhaps_alive = scores.folder / f"part-00001.parquet.{'b' * 32}.tmp"
    for path in (useless, perhaps_alive):
        path.write_bytes(b"PAR1 half a part")
    opened(tmp_path)
    assert not useless.exists()
    assert perhaps_alive.exists()
    filled(tmp_path)
    assert not perhaps_alive.exists()
