"""Kernels that cannot be compiled, and the lock of another build."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.ops.op_builder.builder import MissingCUDAException, OpBuilder

from dpo_dist.config.load import load_run_config
from dpo_dist.distributed.join import joined
from dpo_dist.distributed.kernels import load_kernel
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.insight.console import Console
from dpo_dist.training import start
from dpo_dist.training.start import open_run
from tests.support.alone import ALONE


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    return path


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


def test_a_lock_of_another_build_is_said(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of a kernel which another one loads."""
    other = lock.parents[1] / "pin_memory" / "lock"
    other.parent.mkdir()
    other.touch()
    monkeypatch.setattr(AsyncIOBuilder, "load", lambda _, verbose: None)
    said: list[str] = []
    load_kernel(AsyncIOBuilder(), "reference.offload", "set reference.offload=cpu", said.append)
    (line,) = said
    assert f"delete {other}" in line


def test_a_host_without_the_compiler_of_cuda_gets_one_error(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: object, verbose: bool = False) -> None:
        raise MissingCUDAException("no nvcc")

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
    def joined_with(deepspeed_config: dict[str, Any], *_: object) -> Iterator[Any]:
        given.append(deepspeed_config["zero_optimization"])
        yield ALONE

    monkeypatch.setattr(start, "joined", joined_with)
    overrides = ["model.path=m", "data.train=[a]", "parallelism.offload_optimizer=cpu", f"run.dir={tmp_path}"]
    config = load_run_config(overrides)
    for trains in (False, True):
        with open_run(config, Console(None), trains=trains):
            pass
    assert ["offload_optimizer" in zero for zero in given] == [False, True]
