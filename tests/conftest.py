"""The order of the tests, and their properties: the same examples everywhere, none judged by its time."""

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tqdm.std import tqdm

from tests.simulated_cuda import parent as with_device
from tests.support.parent import started_parent, use_parent

gc.disable()  # until tests are collected: beside imports it takes a fifth of the time
# Of torch.compile: by default each process starts others, which import torch, too.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

DEVICE = Path(with_device.__file__).parent
LONG = (
    "real/test_smollm2.py",
    "simulated_cuda/test_gpu_tests.py",
    "e2e/test_sweep.py",
    "e2e/test_slurm.py",
    "golden/test_trajectory.py",
    "e2e/test_kills.py",
    "e2e/test_benchmarks.py",
    "e2e/test_resume.py",
    "dist/test_network.py",
    "e2e/test_samples.py",
    "dist/test_checkpoint.py",
    "dist/test_families.py",
    "dist/test_losses.py",
)
"""Files of long tests, which start first: at the end of a run a worker would wait for them."""


def pytest_runtest_setup() -> None:
    """Give the bars of each test a new lock.

    Their own one is shared with forked processes: one that is killed while it holds it would block this one
    forever. And a bar whose write fails keeps it: threads of later tests would wait forever.
    """
    tqdm.set_lock(threading.RLock())


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Workers of xdist share the warm parents that their tests need: unit tests need none."""
    chosen = [Path(word.partition("::")[0]).resolve() for word in node.config.args]
    if not all("unit" in path.parts for path in chosen):
        node.workerinput["parent"] = started_parent()
    if any(path in (DEVICE, *DEVICE.parents) or DEVICE in path.parents for path in chosen):
        node.workerinput["parent with device"] = with_device.started_parent()


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", {})
    if address := given.get("parent"):
        use_parent(address)
    if address := given.get("parent with device"):
        with_device.use_parent(address)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make check` does not import files of slow tests only: half of the seconds before its first test."""
    is_file = config.option.markexpr == "not slow" and collection_path.suffix == ".py"
    return True if is_file and "\npytestmark = pytest.mark.slow\n" in collection_path.read_text() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ends = {end: place for place, end in enumerate(LONG)}
    items.sort(key=lambda item: ends.get("/".join(item.path.parts[-2:]), len(LONG)))


def pytest_collection_finish() -> None:
    """Garbage collection in a test skips the million objects of imported libraries."""
    gc.freeze()
    gc.enable()
