"""Kernels that cannot be compiled, and the lock that a killed build leaves."""

import os
import threading
import time
from pathlib import Path

import pytest
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder

from dpo_dist.distributed import kernel_builds
from dpo_dist.distributed.joined import joined
from dpo_dist.distributed.kernel_builds import wait_for_build
from dpo_dist.errors import ConfigError

HOUR = 3600


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(kernel_builds, "_POLL_SECONDS", 0.01)
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    return path


def make(lock: Path, age: float = 0.0) -> None:
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)


def test_without_a_lock_nothing_is_said(lock: Path) -> None:
    said: list[str] = []
    wait_for_build("cpu_adam", said.append)
    assert said == []


def test_an_old_lock_without_an_owner_is_refused_with_its_path(lock: Path) -> None:
    make(lock, 3 * HOUR)
    with pytest.raises(ConfigError, match="was killed and has left its lock") as found:
        wait_for_build("cpu_adam", lambda _line: None)
    assert found.value.where == str(lock)
    assert "3 h" in found.value.got
    assert lock.exists(), "another host may have made it"


def test_a_new_lock_without_an_owner_is_waited_for_and_named(lock: Path) -> None:
    make(lock)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        threading.Timer(0.1, lock.unlink).start()

    wait_for_build("cpu_adam", say)
    assert len(said) == 1
    assert str(lock) in said[0]
    assert "delete this file" in said[0]


def test_a_lock_that_a_process_has_open_is_waited_for_whatever_its_age(lock: Path) -> None:
    make(lock, 3 * HOUR)
    said: list[str] = []
    with lock.open():

        def say(line: str) -> None:
            said.append(line)
            threading.Timer(0.1, lock.unlink).start()

        wait_for_build("cpu_adam", say)
    assert "delete" not in said[0]


def test_a_run_that_offloads_its_optimizer_looks_for_the_lock_before_it_joins(lock: Path) -> None:
    make(lock, 3 * HOUR)
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match="left its lock"), joined(offload, 60):
        pass


def test_a_kernel_that_cannot_be_compiled_is_an_error_before_processes_join(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not lock.exists()
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(CPUAdamBuilder, "cxx_args", lambda _: [])  # describing the processor takes seconds
    monkeypatch.setenv("CXX", "/bin/false")
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match="cpu_adam cannot be compiled") as found, joined(offload, 60):
        pass
    assert found.value.where == "parallelism.offload_optimizer"
    assert "/bin/false" in found.value.expected
    assert not lock.exists()
