"""The warm parent, from which processes of tests are forked: it has imported everything once.

It is started by the first test that needs it; for the workers of xdist once, by the process that starts them.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "TOKENIZERS_PARALLELISM": "false",
}
PRELOADED = [
    "dpo_dist.training.run",
    "dpo_dist.tools.report.recorder",
    "tests.support.ranks",
    "transformers.models.qwen2.modeling_qwen2",
    "tests.support.preloaded",
]

context = multiprocessing.get_context("forkserver")


class OfOtherProcess(forkserver.ForkServer):
    """A parent that another process has started, and ends."""

    def __init__(self, address: str):
        super().__init__()
        self._forkserver_address = address
        self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)

    def ensure_running(self) -> None:
        resource_tracker.ensure_running()


_parent = forkserver._forkserver


def start_parent() -> None:
    """Start the warm parent of this test session, if it does not run yet."""
    _parent.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        _parent.ensure_running()


def start_quietly(start: Callable[[], None]) -> None:
    """Start a parent for other processes. What it and its forks print is not shown."""
    nowhere, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(number) for number in (1, 2)]
    for number in (1, 2):
        os.dup2(nowhere, number)
    try:
        start()
    finally:
        for number, own in enumerate(kept, 1):
            os.dup2(own, number)
            os.close(own)
        os.close(nowhere)


def started_parent() -> str:
    """Start the warm parent for other processes; its address."""
    start_quietly(start_parent)
    return _parent._forkserver_address


def use_parent(address: str) -> None:
    """From now on fork from the parent that another process has started."""
    global _parent  # noqa: PLW0603
    _parent = OfOtherProcess(address)
    forkserver.connect_to_new_process = _parent.connect_to_new_process


def check_warm() -> None:
    """Fail in a process whose parent could not import everything, of which a fork server says nothing."""
    last = PRELOADED[-1]
    assert last in sys.modules, f"the warm parent cannot import {last}: see why by importing it"


def environment() -> dict[str, str]:
    """This process's, without variables of trackers and launchers, and with one thread a process."""
    kept = {k: value for k, value in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
