"""Scoring with Ray, in real processes: the same scores as without it, whatever goes wrong."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import experiment_on, texts
from test_store import files

from icprobe import cluster, engines, icp, influence, retraining

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements.txt")
# workers need not be able to import this file
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

N, M, BLOCK = 40, 3, 4
MATRIX = np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return an experiment and its tiny model; scores go to folders of the tests."""
    folder = tmp_path_factory.mktemp("cluster")
    frames = texts(N, "t"), texts(M, "q")
    train, queries = (frame.to_dict("records") for frame in frames)
    experiment = experiment_on(folder, train, queries)
    # two workers wherever this runs
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             object_store_memory=cluster.OBJECT_STORE)  # fmt: skip
    yield experiment, experiment.load_model()
    cluster.release()
    ray.shutdown()


def opened(experiment, folder, block_size=BLOCK):
    """Return an empty store, or the one that is there, of a method without a meaning."""
    ids = [f"train-{i}" for i in range(N)], [f"query-{j}" for j in range(M)]
    return replace(experiment, scores_dir=str(folder)).store(
        "made_up", *ids, {}, block_size=block_size
    )


def filled(made, folder, fault=None):
    """Fill a store with MATRIX by Ray; `fault(block)` is called in the worker before each block."""
    experiment, lm = made
    matrix, block_size = MATRIX, BLOCK  # of this function, so that they travel with it

    def start(lm):
        def score(rows):
            if fault:
                fault(rows.start // block_size)
            return [matrix[rows.start : rows.stop]]

        return score

    kept = opened(experiment, folder)
    (scores,) = engines.fill("ray", experiment, lm, [kept], start, lambda rows: (rows,))
    return scores


def once(folder, block, what):
    """Return a fault that happens the first time that this block is scored."""
    flag = str(folder / "happened")

    def fault(number):
        if number == block:
            try:
                os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            what()

    return fault


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def complete(made, folder, scores, block_size=BLOCK):
    """Check that scores and the files of their store are those of a run without Ray."""
    kept, reference = (
        opened(made[0], place, block_size) for place in (folder, folder / "reference")
    )
    reference.fill(lambda rows: MATRIX[rows.start : rows.stop], progress=False)
    assert scores.tobytes() == MATRIX.tobytes()
    assert files(kept.folder) == files(reference.folder)


# ------------------------------------------------------------------------------------ the same


@pytest.mark.parametrize("method", ["icp", "influence", "retraining"])
def test_scores_have_the_same_bytes_as_without_ray(made, tmp_path, method, two_threads):
    experiment, lm = made
    results = {}
    torch.set_num_threads(1)  # as a worker's; another number may round otherwise
    for engine in engines.ENGINES:
        there = replace(experiment, scores_dir=str(tmp_path / engine))
        measure = {"icp": icp.probe, "influence": influence.attribute}.get(
            method, retraining.measure
        )
        measure(there, lm, engine=engine)
        stores = sorted((tmp_path / engine).iterdir())
        results[engine] = {folder.name: files(folder) for folder in stores}
    assert results["ray"] == results["local"]
    assert sum(map(len, results["ray"].values())) >= 4  # manifests and parts


def test_finished_scores_start_no_worker(made, tmp_path):
    filled(made, tmp_path)
    cluster.release()
    filled(made, tmp_path)
    assert not cluster._held


def test_without_ray_it_is_not_imported():
    code = "import sys; from icprobe import icp, influence, retraining; print('ray' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_an_unknown_engine_is_refused(made, tmp_path):
    experiment, lm = made
    with pytest.raises(ValueError, match="engine is 'dask', expected 'local' or 'ray'"):
        engines.fill("dask", experiment, lm, [], None, None)


@pytest.mark.parametrize(
    ("machines", "needed", "count", "each"),
    [
        ([{"GPU": 8.0, "CPU": 64.0}], 2e9, 8, {"num_cpus": 1, "num_gpus": 1}),
        ([{"CPU": 2.0, "memory": 16e9}], 2e9, 2, {"num_cpus": 1, "memory": 2e9}),
        # memory for three of them
        ([{"CPU": 16.0, "memory": 15e9}], 4e9, 3, {"num_cpus": 5, "memory": 4e9}),
        ([{"CPU": 4.0, "memory": 1e9}], 3e10, 1, {"num_cpus": 4}),
        # no worker is spread over two machines, and the smaller one counts
        ([{"CPU": 4.0, "memory": 11e9}] * 3, 13e9, 1, {"num_cpus": 4}),
        ([{"CPU": 8.0, "memory": 9e9}, {"CPU": 2.0, "memory": 9e9}, {"memory": 9e9}], 4e9, 4,
         {"num_cpus": 1, "memory": 4e9}),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}], 4e9, 3,
         {"num_cpus": 1, "num_gpus": 1}),
    ],
)  # fmt: skip
def test_workers_share_gpus_or_cores_and_memory(machines, needed, count, each):
    assert cluster._share(machines, needed) == (count, each)


# ---------------------------------------------------------------------------------------- faults


def test_a_worker_that_is_killed_loses_nothing(made, tmp_path):
    complete(made, tmp_path, filled(made, tmp_path, once(tmp_path, 3, killed)))


def test_a_slow_worker_holds_nobody_up(made, tmp_path):
    start = time.monotonic()
    fault = once(tmp_path, 0, lambda: time.sleep(600))
    complete(made, tmp_path, filled(made, tmp_path, fault))
    assert time.monotonic() - start < 300
    cluster.release()  # one worker is asleep


def test_a_block_that_raises_is_named_and_all_others_are_finished(made, tmp_path):
    def fault(number):
        if number in (2, 7):
            raise FloatingPointError("not finite")

    with pytest.raises(cluster.ClusterError) as caught:
        filled(made, tmp_path, fault)
    said = str(caught.value)
    assert "8 training examples have no scores" in said
    assert "'train-8' to 'train-11' (4): FloatingPointError: not finite" in said
    assert "'train-28' to 'train-31' (4)" in said
    assert opened(made[0], tmp_path).missing() == [2, 7]
    complete(made, tmp_path, filled(made, tmp_path))


def test_a_block_that_raises_on_one_worker_is_scored_by_another(made, tmp_path):
    """As where one machine's disk is full: it would fail one block after the other."""
    flag = tmp_path / "pid"
    cluster.release()

    def fault(number):
        try:
            with flag.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            time.sleep(0.2)
        if flag.read_text() == str(os.getpid()):
            raise OSError("disk full")

    complete(made, tmp_path, filled(made, tmp_path, fault))


def test_what_no_worker_can_prepare_is_said_at_once(made, tmp_path):
    experiment, lm = made
    count = tmp_path / "count"

    def start(lm):
        with count.open("a") as file:
            file.write("x")
        raise FloatingPointError("a query is not finite")

    kept = opened(experiment, tmp_path)
    with pytest.raises(
        cluster.ClusterError, match="no worker can begin: FloatingPointError: a query"
    ):
        engines.fill("ray", experiment, lm, [kept], start, lambda rows: (rows,))
    assert len(count.read_text()) < kept.n_blocks
    complete(made, tmp_path, filled(made, tmp_path))


def test_workers_forget_a_method_when_it_is_finished(made, tmp_path):
    filled(made, tmp_path)
    (team,) = cluster._held.values()
    held = [worker.__ray_call__.remote(lambda self: self._score) for worker in team.workers]
    assert ray.get(held) == [None] * len(team.workers)


def test_a_block_that_kills_every_worker_is_named(made, tmp_path):
    def fault(number):
        if number == 5:
            os.kill(os.getpid(), 9)

    said = r"'train-20' to 'train-23' \(4\): its worker died \(tried 3 times\)"
    with pytest.raises(cluster.ClusterError, match=said):
        filled(made, tmp_path, fault)
    assert opened(made[0], tmp_path).missing() == [5]
    complete(made, tmp_path, filled(made, tmp_path))


def test_a_worker_with_another_model_is_refused(made, tmp_path):
    experiment, lm = made
    other = type(lm)(lm.model, lm.tokenizer, {**lm.identity, "sha256": "another"})
    with pytest.raises(cluster.ClusterError, match="this machine's model is"):
        filled((experiment, other), tmp_path)


@contextmanager
def small_disk(folder: Path, size: str):
    """Mount a disk of this size."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_loses_nothing(made, tmp_path):
    with small_disk(tmp_path / "disk", "32k") as disk:
        with pytest.raises(Exception, match=r"cannot write .*No space left on device"):
            filled(made, disk)
        kept = opened(made[0], disk)
        assert 0 < len(kept.missing()) < kept.n_blocks
        assert not list(kept.folder.glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        complete(made, disk, filled(made, disk))


def test_a_read_only_store_is_named_and_what_is_there_can_be_read(made, tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        kept = opened(made[0], disk)
        kept.write(0, MATRIX[:BLOCK])
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(Exception, match=r"cannot write .*Read-only file system"):
            filled(made, disk)
        assert len(kept.missing()) == kept.n_blocks - 1
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        scores = filled(made, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert filled(made, disk).tobytes() == scores.tobytes() == MATRIX.tobytes()


def test_a_corrupt_part_is_named(made, tmp_path):
    filled(made, tmp_path)
    part = opened(made[0], tmp_path).part(4)
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(Exception, match=r"part-00004.parquet is damaged or foreign"):
        filled(made, tmp_path)
    part.unlink()
    complete(made, tmp_path, filled(made, tmp_path))


# ------------------------------------------------------------------- drivers in their own processes

DRIVER = """
import sys, time
from pathlib import Path

import numpy as np

from icprobe import engines
from icprobe.experiment import Experiment

N, M = 40, 3
folder, model, train, queries, seconds, block_size = sys.argv[1:]
experiment = Experiment(scores_dir=folder, model=model, train=train, queries=queries)
ids = [f"train-{i}" for i in range(N)], [f"query-{j}" for j in range(M)]
kept = experiment.store("made_up", *ids, {}, block_size=int(block_size))
matrix = np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)
seconds = float(seconds)

def start(lm):
    def score(rows):
        time.sleep(seconds)
        with open(f"{folder}.scored", "a") as file:
            file.write("x")
        return [matrix[rows.start : rows.stop]]
    return score

lm = experiment.load_model()
engines.fill("ray", experiment, lm, [kept], start, lambda rows: (rows,))
print("finished")
"""


def plain_environment() -> dict[str, str]:
    """Return the environment without what Ray has told this process, and without tokens."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "disabled"}


def driver(made, folder, seconds: float, block_size=BLOCK, **environment) -> subprocess.Popen:
    """Start a driver with a Ray of its own, which takes so many seconds for a block."""
    experiment = made[0]
    sources = experiment.model, experiment.train, experiment.queries
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(folder), *sources, str(seconds),
         str(block_size)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=plain_environment() | environment,
    )  # fmt: skip


def wait_for(condition, process=None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        if process and process.poll() is not None:
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)


def test_a_driver_that_is_killed_leaves_no_worker_and_is_resumed(made, tmp_path):
    process = driver(made, tmp_path, 0.5)
    kept = opened(made[0], tmp_path)
    wait_for(lambda: len(kept.missing()) <= kept.n_blocks - 3, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in one.name() for one in family)
    process.kill()
    process.communicate()
    done = kept.n_blocks - len(kept.missing())
    assert 3 <= done < kept.n_blocks
    _, alive = psutil.wait_procs(family, timeout=30)
    # Ray's own helpers may stay for a while; they hold no model
    assert not [one for one in alive if "Agent" not in one.name()]
    complete(made, tmp_path, filled(made, tmp_path))


def test_a_node_agent_that_is_killed_loses_nothing(made, tmp_path):
    process = driver(made, tmp_path, 0.5)
    kept = opened(made[0], tmp_path)
    wait_for(lambda: len(kept.missing()) <= kept.n_blocks - 3, process)
    family = psutil.Process(process.pid).children(recursive=True)
    (agent,) = [one for one in family if one.name() == "raylet"]
    agent.kill()
    said, _ = process.communicate(timeout=300)
    assert "Raylet is terminated" in said
    # its workers may live long enough to finish; if not, that is an error
    assert ("finished" in said) == (process.returncode == 0) == (not kept.missing()), said
    assert kept.n_blocks - len(kept.missing()) >= 3
    complete(made, tmp_path, filled(made, tmp_path))


def test_two_drivers_fill_one_store(made, tmp_path):
    folder = tmp_path / "scores"
    processes = [driver(made, folder, 0.5, block_size=1) for _ in range(2)]
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert "finished" in said
    scored = len(Path(f"{folder}.scored").read_text())
    assert N <= scored < 1.6 * N, "each skips what the other has finished"
    complete(made, folder, MATRIX, block_size=1)


ADDRESS = "127.0.0.1:46379"


@contextmanager
def machine(*options: str):
    """Start Ray as on a machine of its own; yield its process."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    process = subprocess.Popen(
        [*command, "--node-ip-address=127.0.0.1", "--block", *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=plain_environment(),
    )  # fmt: skip
    try:
        wait_for(lambda: any("raylet" in c.name() for c in children(process.pid)), process)
        yield process
    finally:
        if process.poll() is None:
            family = children(process.pid)
            process.terminate()
            process.communicate(timeout=60)
            psutil.wait_procs(family, timeout=60)


def head(cores: int):
    port = ADDRESS.rpartition(":")[2]
    return machine("--head", f"--port={port}", "--include-dashboard=false", f"--num-cpus={cores}")


def test_an_existing_cluster_is_joined(made, tmp_path):
    with head(cores=1):
        process = driver(made, tmp_path, 0.01, RAY_ADDRESS=ADDRESS)
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "ray: 1 workers, each with the model and 1 thread" in said
    complete(made, tmp_path, MATRIX)


def test_a_machine_that_is_lost_costs_nothing(made, tmp_path):
    kept = opened(made[0], tmp_path)
    other = f"--address={ADDRESS}", "--num-cpus=1"
    with head(cores=0), machine(*other), machine(*other) as lost:
        process = driver(made, tmp_path, 0.5, RAY_ADDRESS=ADDRESS)
        wait_for(lambda: len(kept.missing()) <= kept.n_blocks - 3, process)
        for one in [*children(lost.pid), psutil.Process(lost.pid)]:
            one.kill()
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "ray: 2 workers" in said
    complete(made, tmp_path, MATRIX)


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_no_cluster_at_the_address_is_an_error(made, tmp_path):
    process = driver(made, tmp_path, 0.01, RAY_ADDRESS="127.0.0.1:1")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "no Ray cluster at RAY_ADDRESS=127.0.0.1:1" in said
