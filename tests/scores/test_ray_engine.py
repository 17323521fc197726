"""Scoring with Ray, in real processes: the same scores as without it, whatever goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from helpers import experiment_on, texts
from stores import files, some_scores

from icprobe.data import paths
from icprobe.methods import icp
from icprobe.methods.gradient import GradientProducts
from icprobe.methods.training_effect import Step, TrainingEffect
from icprobe.scores import Method, run, score, store
from icprobe.scores.method import Inputs, setting

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements.txt")
from icprobe.scores import ray_engine  # noqa: E402 - needs Ray

pytestmark = pytest.mark.slow
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
STARTS = {"RAY_raylet_start_wait_time_s": "120"}  # on a busy machine
os.environ |= STARTS

N, M = 40, 3
MATRIX = some_scores(N, M)


@dataclass(frozen=True)
class MadeUp(Method):
    """Rows of MATRIX; `fault(block)` is called before each block, `start_fault` at the start."""

    name = "made_up"
    unit = "none"
    block_size = 4

    fault: Callable = setting(lambda block: None)
    start_fault: Callable = setting(lambda: None)

    def prepare(self, lm, queries, pool):
        self.start_fault()
        return MATRIX, self.block_size

    def score(self, prepared, train):
        matrix, block_size = prepared
        rows = [int(name.removeprefix("t-")) for name in train.ids]
        self.fault(rows[0] // block_size)
        return matrix[rows]


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


def filled(made, folder, engine="ray", **faults):
    """Fill the store in a folder."""
    experiment, lm = made
    score(replace(experiment, scores_dir=str(folder)), MadeUp(**faults), lm, engine)


def opened(folder):
    """Return the store in a folder."""
    return store.load(next(folder.glob("made_up-*")))


def check_complete(made, folder):
    """Check that a store's files are those of a run without Ray."""
    filled(made, folder / "reference", "local")
    kept, reference = opened(folder), opened(folder / "reference")
    assert kept.matrix().tobytes() == MATRIX.tobytes()
    assert files(kept.folder) == files(reference.folder)


@pytest.mark.parametrize(
    "method",
    [icp.ICP(), GradientProducts(), TrainingEffect([Step("sgd", 3e-3)])],
    ids=lambda m: m.name,
)
def test_scores_have_the_same_bytes_as_those_of_one_local_thread(
    made, tmp_path, method, two_threads
):
    experiment, lm = made
    torch.set_num_threads(1)
    for engine in run.ENGINES:
        score(replace(experiment, scores_dir=str(tmp_path / engine)), method, lm, engine)
    local, by_ray = (
        {folder.name: files(folder) for folder in (tmp_path / engine).iterdir()}
        for engine in run.ENGINES
    )
    assert by_ray == local
    assert sum(map(len, local.values())) >= 4  # manifests and parts


def test_ray_is_only_imported_and_started_where_it_is_needed(made, tmp_path):
    code = "import sys; from icprobe.scores import run; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    filled(made, tmp_path)
    ray_engine.release()
    filled(made, tmp_path)
    assert not ray_engine._workers


# ------------------------------------------------------------------------------ faults of a worker


def test_a_killed_worker_is_restarted(made, tmp_path):
    def fault(number):
        if number == 3 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    flag = tmp_path / "killed"
    filled(made, tmp_path, fault=fault)
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
        filled(made, tmp_path, fault=fault)
    for block, ends in ((2, "'t-8' to 't-11'"), (7, "'t-28' to 't-31'")):
        assert f"{ends}: {reason}" in str(caught.value)
        assert len((tmp_path / str(block)).read_text()) == ray_engine.ATTEMPTS
    assert opened(tmp_path).missing() == [2, 7]
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
    filled(made, tmp_path, fault=fault)
    check_complete(made, tmp_path)
    assert len(failures.read_text()) < 3


def test_what_cannot_be_prepared_is_said_at_once(made, tmp_path):
    with pytest.raises(ray_engine.ClusterError, match="FloatingPointError: not finite"):
        filled(made, tmp_path, start_fault=raises)
    with pytest.raises(ray_engine.ClusterError, match="cannot begin"):
        filled(made, tmp_path, start_fault=dies)
    experiment, lm = made
    other = type(lm)(lm.model, lm.tokenizer, {**lm.identity, "sha256": "another"})
    inputs = Inputs(other, *experiment.examples(lm))
    with pytest.raises(ray_engine.ClusterError, match=lm.identity["sha256"]):
        next(ray_engine.score_blocks(experiment.model, MadeUp(), inputs, iter([])))
    filled(made, tmp_path)
    check_complete(made, tmp_path)
    (workers,) = ray_engine._workers.values()
    held = [worker.__ray_call__.remote(lambda self: self._prepared) for worker in workers]
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
        filled(made, disk, "local")
        kept = opened(disk)
        for block in range(1, kept.n_blocks):
            kept.part(block).unlink()
        subprocess.run([*mount, f"remount,{broken}"], check=True)
        with pytest.raises(store.StoreError, match=rf"{kept.folder}/part.*{reason}"):
            filled(made, disk)
        assert 0 < len(kept.missing()) < kept.n_blocks
        assert not list(kept.folder.glob("*.tmp"))
        subprocess.run([*mount, "remount,rw,size=2m"], check=True)
        filled(made, disk)
        check_complete(made, disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------- drivers in their own processes

DRIVER = """
import json, sys, time
from icprobe.scores import Experiment, score
from test_ray_engine import MadeUp

experiment, seconds, block_size = json.loads(sys.argv[1])
MadeUp.block_size = block_size

def slowly(block):
    time.sleep(seconds)
    with open(experiment["scores_dir"] + ".scored", "a") as file:
        file.write("x")

score(Experiment(**experiment), MadeUp(slowly), engine="ray")
print("finished")
"""
QUIET = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
ADDRESS = "127.0.0.1:46379"


def environment(**more):
    """Return the environment without what Ray has told this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "disabled"} | STARTS | more


def driver(made, folder, seconds=0.5, block_size=4, **more):
    """Start a process that fills a store, with a Ray of its own or one that exists."""
    what = asdict(replace(made[0], scores_dir=str(folder))), seconds, block_size
    path = os.pathsep.join(map(str, [*Path(__file__).parents[:2], paths.ROOT / "lib"]))
    command = [sys.executable, "-c", DRIVER, json.dumps(what)]
    return subprocess.Popen(command, env=environment(PYTHONPATH=path, **more), **QUIET)


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


def begun(folder, process):
    """Wait until three blocks are finished; return the process's children."""
    wait_for(lambda: len(list(folder.glob("made_up-*/part-*.parquet"))) >= 3, process)
    return psutil.Process(process.pid).children(recursive=True)


def test_a_killed_driver_leaves_no_worker_and_is_resumed(made, tmp_path):
    process = driver(made, tmp_path)
    family = begun(tmp_path, process)
    assert any("Worker" in one.name() for one in family)
    process.kill()
    process.communicate()
    assert opened(tmp_path).missing()
    _, alive = psutil.wait_procs(family, timeout=30)
    # Ray's own helpers may stay for a while; they hold no model
    assert not [one for one in alive if "Agent" not in one.name()]
    filled(made, tmp_path)
    check_complete(made, tmp_path)


def test_two_drivers_share_one_store(made, tmp_path, monkeypatch):
    folder = tmp_path / "scores"
    for process in [driver(made, folder, block_size=1) for _ in range(2)]:
        assert "finished" in said(process)
    assert N <= len(Path(f"{folder}.scored").read_text()) < 1.6 * N, "each skips what is finished"
    monkeypatch.setattr(MadeUp, "block_size", 1)
    check_complete(made, folder)


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
    other = f"--address={ADDRESS}", "--num-cpus=1"
    with head(cores=0), machine(*other), machine(*other) as lost:
        process = driver(made, tmp_path, RAY_ADDRESS=ADDRESS)
        begun(tmp_path, process)
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
