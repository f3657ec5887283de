"""Kernels that cannot be compiled, and the lock that a killed build leaves."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException, OpBuilder

from dpo_dist.config.load import load_run_config
from dpo_dist.distributed import kernels
from dpo_dist.distributed.join import joined
from dpo_dist.distributed.kernels import load_kernel, wait_for_build
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.insight.console import Console
from dpo_dist.training import start
from dpo_dist.training.start import open_world

HOUR = 3600


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "_POLL_SECONDS", 0.01)
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


def test_the_lock_of_a_kernel_that_another_one_loads_is_looked_for(lock: Path) -> None:
    other = lock.parents[1] / "pin_memory" / "lock"
    other.parent.mkdir()
    make(other, 3 * HOUR)
    with pytest.raises(ConfigError, match="left its lock") as found:
        load_kernel(AsyncIOBuilder(), "reference.offload", "set reference.offload=cpu", lambda _line: None)
    assert found.value.where == str(other)


@pytest.mark.parametrize("fault", [MissingCUDAException, CUDAMismatchException, TypeError])
def test_a_host_without_the_compiler_of_cuda_gets_one_error(
    fault: type[Exception], lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: object, verbose: bool = False) -> None:
        raise fault("no nvcc")

    monkeypatch.setattr(AsyncIOBuilder, "load", load)
    assert not lock.exists()
    with pytest.raises(ConfigError, match="async_io cannot be compiled") as found:
        load_kernel(AsyncIOBuilder(), "reference.offload", "set reference.offload=cpu", lambda _line: None)
    assert "no nvcc" in found.value.got


def test_without_an_optimizer_no_kernel_for_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def joined_with(deepspeed_config: dict[str, Any], *_: object) -> Iterator[None]:
        given.append(deepspeed_config["zero_optimization"])
        yield

    monkeypatch.setattr(start, "joined", joined_with)
    overrides = ["model.path=m", "data.train=[a]", "parallelism.offload_optimizer=cpu", f"run.dir={tmp_path}"]
    config = load_run_config(overrides)
    for trains in (False, True):
        with open_world(config, Console(None), trains=trains):
            pass
    assert ["offload_optimizer" in zero for zero in given] == [False, True]
