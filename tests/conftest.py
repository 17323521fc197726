"""Options and fixtures of all tests; helpers.py has what they import."""

import gc
import os

import pytest
import torch
from helpers import save_tiny

from icprobe import models
from icprobe.artifact import provenance

# workers share the cores, as does what they start: with more threads they would wait for each other
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:
    share = max(1, provenance.usable_cores() // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    torch.set_num_threads(share)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run what needs a GPU, and only that")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same blocks and numbers on every machine
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: there is no GPU")


def freeze():
    """Spare the garbage collector what is there: libraries call it after each piece of work."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    freeze()


def pytest_collection_modifyitems(config, items):
    other = [one for one in items if bool(one.get_closest_marker("gpu")) != config.option.gpu]
    config.hook.pytest_deselected(items=other)
    items[:] = [one for one in items if one not in set(other)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a function that loads the tiny model of a family, made once per session."""
    made = {}

    def load(family="llama", bos=False, dtype="float32"):
        key = (family, bos)
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / f"{family}-{'bos' if bos else 'plain'}"
            made[key] = save_tiny(folder, family, bos)
        return models.load(str(made[key]), dtype, device="cpu")

    return load


@pytest.fixture
def two_threads():
    """Let torch use two threads, so that what can runs side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def frozen():
    """Spare the garbage collector, too, what a training imports: most of a tiny one's time."""
    import torchmetrics.functional.text  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    freeze()
