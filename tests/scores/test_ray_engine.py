"""Scoring with Ray, in real processes: the same scores as without it, whatever goes wrong."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers import experiment_on, texts

from icprobe.methods import icp, training_effect
from icprobe.methods.gradient import GradientProducts
from icprobe.scores import engines, score, store

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements.txt")
from icprobe.scores import ray_engine  # noqa: E402 - needs Ray

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
STARTS = {"RAY_raylet_start_wait_time_s": "120"}  # on a busy machine
os.environ |= STARTS

N, M, BLOCK = 40, 3, 4
MATRIX = np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return an experiment and its tiny model, with two workers wherever this runs."""
    rows = [frame.to_dict("records") for frame in (texts(N, "t"), texts(M, "q"))]
    experiment = experiment_on(tmp_path_factory.mktemp("ray"), *rows)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             object_store_memory=ray_engine.OBJECT_STORE)  # fmt: skip
    yield experiment, experiment.load_model()
    ray_engine.release()
    ray.shutdown()


def opened(experiment, folder, block_size=BLOCK):
    """Return an empty store, or the one that is there, of a method without a meaning."""
    ids = [f"train-{i}" for i in range(N)], [f"query-{j}" for j in range(M)]
    return store.open(folder, "made_up", experiment.identity, *ids, block_size=block_size)


def filled(made, folder, fault=lambda block: None, start_fault=lambda: None):
    """Fill a store with MATRIX; workers call `fault(block)` before each block."""
    matrix, block_size = MATRIX, BLOCK  # of this function, so that they travel with it

    def start(lm):
        start_fault()

        def score(rows):
            fault(rows.start // block_size)
            return [matrix[rows.start : rows.stop]]

        return score

    kept = opened(made[0], folder)
    scorer = engines.scorer("ray", *made, start, lambda rows: (rows,), kept.train_ids)
    engines.fill([kept], scorer, progress=False)
    return kept.matrix()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_complete(made, folder, block_size=BLOCK):
    """Check that a store's files are those of a run without Ray."""
    kept, reference = (opened(made[0], f, block_size) for f in (folder, folder / "reference"))
    engines.fill([reference], lambda wanted: ((r, [MATRIX[r.start : r.stop]]) for r in wanted))
    assert kept.matrix().tobytes() == MATRIX.tobytes()
    assert files(kept.folder) == files(reference.folder)


@pytest.mark.parametrize(
    "method",
    [
        icp.ICP(),
        GradientProducts(),
        training_effect.TrainingEffect([training_effect.Step("sgd", 3e-3)]),
    ],
    ids=lambda m: m.name,
)
def test_scores_have_the_same_bytes_as_those_of_one_local_thread(
    made, tmp_path, method, two_threads
):
    experiment, lm = made
    torch.set_num_threads(1)
    for engine in engines.ENGINES:
        score(replace(experiment, scores_dir=str(tmp_path / engine)), method, lm, engine)
    local, by_ray = (
        {folder.name: files(folder) for folder in (tmp_path / engine).iterdir()}
        for engine in engines.ENGINES
    )
    assert by_ray == local
    assert sum(map(len, local.values())) >= 4  # manifests and parts


def test_ray_is_only_imported_and_started_where_it_is_needed(made, tmp_path):
    code = "import sys; from icprobe.scores import engines, run; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    filled(made, tmp_path)
    ray_engine.release()
    filled(made, tmp_path)
    assert not ray_engine._workers
    with pytest.raises(ValueError, match=r"'dask'.*'local' or 'ray'"):
        score(made[0], icp.ICP(), made[1], engine="dask")


# ------------------------------------------------------------------------------ faults of a worker


def test_a_killed_worker_is_restarted(made, tmp_path):
    def fault(number):
        if number == 3 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    flag = tmp_path / "killed"
    filled(made, tmp_path, fault)
    assert flag.exists()
    check_complete(made, tmp_path)


def raises():
    raise FloatingPointError("not finite")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("what", "reason"), [(raises, "FloatingPointError: not finite"),
                                              (dies, "its worker died")])  # fmt: skip
def test_a_block_that_always_fails_is_named_and_others_are_finished(made, tmp_path, what, reason):
    def fault(number):
        if number in (2, 7):
            with (tmp_path / str(number)).open("a") as file:
                file.write("x")
            what()

    with pytest.raises(ray_engine.ClusterError) as caught:
        filled(made, tmp_path, fault)
    for block, ends in ((2, "'train-8' to 'train-11'"), (7, "'train-28' to 'train-31'")):
        assert f"{ends}: {reason}" in str(caught.value)
        assert len((tmp_path / str(block)).read_text()) == ray_engine.ATTEMPTS
    assert opened(made[0], tmp_path).missing() == [2, 7]
    filled(made, tmp_path)
    check_complete(made, tmp_path)


def test_a_worker_on_which_every_block_raises_does_not_spoil_the_others(made, tmp_path):
    """As where one machine's disk is full."""

    def fault(number):
        try:
            with bad.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            time.sleep(0.1)
        if bad.read_text() == str(os.getpid()):
            with failures.open("a") as file:
                file.write("x")
            raise OSError("disk full")

    bad, failures = tmp_path / "pid", tmp_path / "failures"
    filled(made, tmp_path, fault)
    check_complete(made, tmp_path)
    assert len(failures.read_text()) < 3


def test_what_cannot_be_prepared_is_said_at_once(made, tmp_path):
    with pytest.raises(ray_engine.ClusterError, match="FloatingPointError: not finite"):
        filled(made, tmp_path, start_fault=raises)
    with pytest.raises(ray_engine.ClusterError, match="cannot begin"):
        filled(made, tmp_path, start_fault=dies)
    experiment, lm = made
    other = type(lm)(lm.model, lm.tokenizer, {**lm.identity, "sha256": "another"})
    with pytest.raises(ray_engine.ClusterError, match=lm.identity["sha256"]):
        filled((experiment, other), tmp_path)
    filled(made, tmp_path)
    check_complete(made, tmp_path)
    (workers,) = ray_engine._workers.values()
    held = [worker.__ray_call__.remote(lambda self: self._score) for worker in workers]
    assert ray.get(held) == [None, None], "workers forget what they have prepared"


# ---------------------------------------------------------------------------- faults of the store


@pytest.mark.parametrize(
    ("broken", "reason"), [("size=32k", "No space left"), ("ro,size=2m", "Read-only file system")]
)
def test_a_disk_that_takes_no_more_is_named_and_loses_nothing(made, tmp_path, broken, reason):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk), "-o"]
    if os.geteuid() or subprocess.run([*mount, "size=2m"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        kept = opened(made[0], disk)
        kept.write(0, MATRIX[:BLOCK])
        subprocess.run([*mount, f"remount,{broken}"], check=True)
        with pytest.raises(Exception, match=rf"{kept.folder}/part.*{reason}"):
            filled(made, disk)
        assert 0 < len(kept.missing()) < kept.n_blocks
        assert not list(kept.folder.glob("*.tmp"))
        subprocess.run([*mount, "remount,rw,size=2m"], check=True)
        filled(made, disk)
        check_complete(made, disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_corrupt_part_is_named(made, tmp_path):
    filled(made, tmp_path)
    part = opened(made[0], tmp_path).part(4)
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(Exception, match=r"part-00004.parquet is damaged"):
        filled(made, tmp_path)
    part.unlink()
    filled(made, tmp_path)
    check_complete(made, tmp_path)


# ------------------------------------------------------------------- drivers in their own processes

DRIVER = """
import sys, time
import numpy as np
from icprobe.scores import Experiment, engines, store

folder, model, train, queries, seconds, block_size = sys.argv[1:]
experiment = Experiment(scores_dir=folder, model=model, train=train, queries=queries)
matrix = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
ids = [f"train-{i}" for i in range(40)], [f"query-{j}" for j in range(3)]
kept = store.open(folder, "made_up", experiment.identity, *ids, block_size=int(block_size))

def start(lm):
    def score(rows):
        time.sleep(float(seconds))
        with open(f"{folder}.scored", "a") as file:
            file.write("x")
        return [matrix[rows.start : rows.stop]]
    return score

lm = experiment.load_model()
engines.fill([kept], engines.scorer("ray", experiment, lm, start, lambda r: (r,), kept.train_ids))
print("finished")
"""
QUIET = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
ADDRESS = "127.0.0.1:46379"


def environment(**more):
    """Return the environment without what Ray has told this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "disabled"} | STARTS | more


def driver(made, folder, seconds=0.5, block_size=BLOCK, **more):
    """Start a process that fills a store, with a Ray of its own or one that exists."""
    what = made[0].model, made[0].train, made[0].queries, str(seconds), str(block_size)
    command = [sys.executable, "-c", DRIVER, str(folder), *what]
    return subprocess.Popen(command, env=environment(**more), **QUIET)


def said(process, success=True):
    """Wait for a process; return what it has printed."""
    text, _ = process.communicate(timeout=300)
    assert (process.returncode == 0) == success, text
    return text


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def begun(kept, process):
    """Wait until three blocks are finished; return the process's children."""
    wait_for(lambda: kept.n_blocks - len(kept.missing()) >= 3, process)
    return psutil.Process(process.pid).children(recursive=True)


def test_a_killed_driver_leaves_no_worker_and_is_resumed(made, tmp_path):
    process, kept = driver(made, tmp_path), opened(made[0], tmp_path)
    family = begun(kept, process)
    assert any("Worker" in one.name() for one in family)
    process.kill()
    process.communicate()
    assert kept.missing()
    _, alive = psutil.wait_procs(family, timeout=30)
    # Ray's own helpers may stay for a while; they hold no model
    assert not [one for one in alive if "Agent" not in one.name()]
    filled(made, tmp_path)
    check_complete(made, tmp_path)


def test_two_drivers_share_one_store(made, tmp_path):
    folder = tmp_path / "scores"
    for process in [driver(made, folder, block_size=1) for _ in range(2)]:
        assert "finished" in said(process)
    assert N <= len(Path(f"{folder}.scored").read_text()) < 1.6 * N, "each skips what is finished"
    check_complete(made, folder, block_size=1)


@contextmanager
def machine(*options, **more):
    """Start Ray as on a machine of its own; yield its processes."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--block", *options]
    process = subprocess.Popen(command, env=environment(**more), **QUIET)
    mine = psutil.Process(process.pid)
    try:
        wait_for(lambda: any("raylet" in c.name() for c in mine.children(recursive=True)), process)
        yield [*mine.children(recursive=True), mine]
    finally:
        family = mine.children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.communicate(timeout=60)
        psutil.wait_procs(family, timeout=60)


def head(cores, **more):
    port = f"--port={ADDRESS.rpartition(':')[2]}"
    return machine("--head", port, "--include-dashboard=false", f"--num-cpus={cores}", **more)


def test_a_machine_that_is_lost_costs_nothing(made, tmp_path):
    kept, other = opened(made[0], tmp_path), (f"--address={ADDRESS}", "--num-cpus=1")
    with head(cores=0), machine(*other), machine(*other) as lost:
        process = driver(made, tmp_path, RAY_ADDRESS=ADDRESS)
        begun(kept, process)
        for one in lost:
            one.kill()
        assert "ray: 2 workers" in said(process)
    check_complete(made, tmp_path)


def test_a_cluster_is_joined_with_its_token_only(made, tmp_path):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    with head(cores=1, **token):
        refused = said(driver(made, tmp_path, 0.01, RAY_ADDRESS=ADDRESS), success=False)
        assert f"ClusterError: no Ray cluster at RAY_ADDRESS={ADDRESS}" in refused
        assert "RAY_AUTH_MODE=token" in refused
        joined = said(driver(made, tmp_path, 0.01, RAY_ADDRESS=ADDRESS, **token))
    assert "ray: 1 workers, each with one thread" in joined
    check_complete(made, tmp_path)


def test_no_cluster_at_the_address_is_said_at_once(made, tmp_path):
    start = time.monotonic()
    text = said(driver(made, tmp_path, RAY_ADDRESS="127.0.0.1:1"), success=False)
    assert "ClusterError: no Ray cluster at RAY_ADDRESS=127.0.0.1:1" in text
    assert time.monotonic() - start < 60
