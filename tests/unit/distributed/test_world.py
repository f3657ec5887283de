"""A world of one process: what it answers, how it ends, kernels it compiles, and faults told apart."""

import contextlib
import errno
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.distributed import distributed_c10d

from dpo_dist.config.schema import AttentionBackend, Dtype, OptimConfig, ParallelismConfig
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.processes import failures
from dpo_dist.distributed.processes import join as joined_module
from dpo_dist.distributed.processes.failures import Reports, is_communication_error, watch_world
from dpo_dist.distributed.processes.failures import _origin as origin_of
from dpo_dist.distributed.processes.join import join_world, leave_world
from dpo_dist.distributed.processes.world import Interrupted, Peer, Stops, World
from dpo_dist.distributed.zero import Engine
from dpo_dist.foundation.errors import ConfigError, StoppedError
from dpo_dist.foundation.process import PROGRESS, check_launch
from dpo_dist.foundation.signals import BY_STEPS, BY_TRACKER, StopRequest
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.engine import run_start_check
from tests.support.families import tiny_family
from tests.support.packing import VOCABULARY

_NETWORK = (
    errno.ECONNABORTED,
    errno.ENOTCONN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EPIPE,
)
CONFIG = policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_gpus_exchange_gradients_while_backward_computes(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = policy_config(ParallelismConfig(), OptimConfig(), Dtype.bf16)
    assert config["zero_optimization"]["overlap_comm"] is has_gpu


def test_launchers_need_not_say_how_many_processes_a_host_has() -> None:
    world = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    check_launch({**world, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, {})  # as srun and DeepSpeed


def alone() -> World:
    return World(None, 0, 1, torch.device("cpu"), (Peer.here(0),))


@pytest.mark.parametrize(("rank", "whole"), [(0, 2.0), (1, 0.0)])
def test_one_rank_of_a_replica_counts_what_all_of_them_have(rank: int, whole: float) -> None:
    exchange: Any = SimpleNamespace(rank=rank, ranks=2)
    world = replace(alone(), sequence=exchange)
    assert world.sum_replicas(torch.tensor(2.0)) == whole


def test_a_run_outside_of_the_main_thread_changes_no_handler() -> None:
    def watch() -> str:
        with watch_world(alone(), Reports()):
            return "left"

    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(watch).result() == "left"
    assert signal.signal(signal.SIGTERM, handler) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("gpus", "variables", "error"),
    [
        (0, {"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES names GPUs, but PyTorch finds none"),
        (2, {"LOCAL_WORLD_SIZE": "3"}, "there are more processes than GPUs on this host"),
        (2, {"LOCAL_WORLD_SIZE": "2"}, ""),
        (0, {"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        (2, {"ACCELERATE_USE_CPU": "true"}, "--cpu does not hide the GPUs"),
    ],
)
def test_gpus_that_are_asked_for_are_there(
    gpus: int, variables: dict[str, str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    with contextlib.ExitStack() as stack:
        if error:
            stack.enter_context(pytest.raises(ConfigError, match=error))
        joined_module._check_devices()


def test_a_process_without_a_launcher_is_a_world_of_one_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """No port is chosen before it is opened, and the environment is the caller's again."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as `accelerate launch --cpu` starts one process
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    before, timeout = dict(os.environ), distributed_c10d.default_pg_timeout
    theirs = PartialState(cpu=True)  # of another library in this process
    for _ in range(2):
        with join_world(CONFIG, 7, Reports()) as world:
            assert (world.size, world.gather("here"), os.environ["MASTER_PORT"]) == (1, ["here"], "0")
            assert distributed_c10d.default_pg_timeout.total_seconds() == 7
        assert dict(os.environ) == before
        assert distributed_c10d.default_pg_timeout == timeout
        assert theirs.device.type == "cpu"


def test_a_run_in_the_process_group_of_a_script_leaves_it_with_its_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    leave_world()
    hour = timedelta(hours=1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=hour)
    theirs = dist.group.WORLD
    backend = theirs._get_backend(torch.device("cpu"))
    try:
        with join_world(CONFIG, 7, Reports()) as world:
            assert backend.options._timeout.total_seconds() == 7
            assert world.gather("here") == ["here"]
        assert dist.group.WORLD is theirs
        assert backend.options._timeout == hour
    finally:
        leave_world()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Stops:
    """Of a rank beside one that has got SIGTERM."""
    monkeypatch.setattr(World, "gather", lambda _, own: [own, "", "SIGTERM"])
    return Stops(StopRequest(stop_after_steps=1), alone())


def test_work_ends_only_when_a_rank_is_asked(asked: Stops) -> None:
    asked.check()
    asked.raise_if_stopping()
    asked.request.ask("SIGUSR1")
    with pytest.raises(Interrupted):
        asked.raise_if_stopping()
    with pytest.raises(StoppedError, match="stopped: by SIGTERM, SIGUSR1 before the first step"):
        asked.check()
    assert asked.agreed_reasons == "SIGTERM, SIGUSR1"


@pytest.mark.parametrize("reason", ["SIGUSR1", BY_TRACKER, BY_STEPS])
def test_a_stop_of_a_person_is_noted(
    reason: str, asked: Stops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS, str(tmp_path / "progress"))
    asked.request.ask(reason)
    asked.reasons()
    noted = (tmp_path / "progress").read_text() if (tmp_path / "progress").exists() else ""
    assert (noted.startswith("stopped by") and reason in noted) is (reason != "SIGUSR1")


TIMEOUT = "[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 4000ms for send operation to complete"


def settle_failing(error: Exception, *, is_synchronised: bool) -> None:
    def token_logps(*_arguments: Any) -> None:
        raise error

    model = PackedCausalLM(tiny_family("olmo3", VOCABULARY), AttentionBackend.sdpa)
    engine = SimpleNamespace(model=model, is_synchronised=is_synchronised, token_logps=token_logps)
    world = SimpleNamespace(
        size=2,
        device=torch.device("cpu"),
        sequence=None,
        barrier=lambda _seconds=None: None,
        gather=lambda fault: [fault],
        on_main=lambda work: work(),
        differences=lambda _facts: {},
    )
    run_start_check(cast(Engine, engine), 64, cast(World, world))


@pytest.mark.parametrize(
    ("text", "is_synchronised", "error"),
    [
        # The world makes it the error that names the rank, whose exit code lets clusters start the job again.
        (TIMEOUT, True, RuntimeError),
        ("sizes of tensors must match", True, ConfigError),
        ("the hub timed out", False, ConfigError),
    ],
)
def test_a_forward_that_waits_in_vain_is_no_error_of_the_model(
    text: str, is_synchronised: bool, error: type[Exception]
) -> None:
    said = "own forward cannot score" if error is ConfigError else "Timed out"
    with pytest.raises(error, match=said):
        settle_failing(RuntimeError(text), is_synchronised=is_synchronised)


@pytest.mark.parametrize("from_cause", [True, False])
@pytest.mark.parametrize(
    ("first", "is_of_call"),
    [(RuntimeError(TIMEOUT), True), (RuntimeError("a bad file"), False), (OSError("timed out"), False)],
)
def test_an_error_that_a_call_of_all_ranks_caused_is_told_from_one_of_a_file(
    first: Exception, is_of_call: bool, from_cause: bool
) -> None:
    error = ConfigError("the model cannot be loaded")
    if from_cause:
        error.__cause__ = first
    else:
        error.__context__ = first
    assert origin_of(error) is (first if is_of_call else error)


def test_a_kernel_that_cannot_be_compiled_is_an_error_before_processes_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(CPUAdamBuilder, "cxx_args", lambda _: [])  # describing the processor takes seconds
    monkeypatch.setenv("CXX", "/bin/false")
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    with (
        pytest.raises(ConfigError, match="cpu_adam cannot be compiled") as found,
        join_world(offload, 60, Reports()),
    ):
        pass
    assert found.value.where == "parallelism.offload_optimizer"
    assert "/bin/false" in found.value.expected
    assert not (tmp_path / "cpu_adam" / "lock").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[pair.cc:525] Connection closed by peer [10.77.0.2]:38000",
        "[pair.cc:553] Read error [10.77.0.2]:38000: Software caused connection abort",
        *(f"writev [10.77.0.2]:38000: {os.strerror(number)}" for number in _NETWORK),
    ],
)
def test_what_a_system_says_of_a_connection_is_no_bug(text: str) -> None:
    assert is_communication_error(f"RuntimeError: {text}")
    assert not is_communication_error("RuntimeError: shapes cannot be multiplied")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Connection closed by peer [10.0.0.2]:34567", "has lost a connection to another rank"),
        ("writev [10.0.0.2]:34567: No route to host", "has lost a connection to another rank"),
        ("Timed out waiting 1800000ms for recv operation", "waits in a different collective call"),
    ],
)
def test_a_lost_connection_is_not_called_another_collective_call(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks still pass the last barrier."""
    monkeypatch.setattr(failures, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(failures, "FAREWELL_SECONDS", 0.0)
    monkeypatch.setattr(dist, "monitored_barrier", lambda *_, **__: None)
    record = SimpleNamespace(exit_code=None, report=lambda _: True, wait_for_all=lambda: None)
    monkeypatch.setattr(failures, "FailureRecord", lambda _: record)
    peers = tuple(replace(alone().peers[0], rank=rank, place=f"node {rank}") for rank in range(2))
    world = replace(alone(), size=2, peers=peers, control=None)
    error = failures.Watcher(world, Reports()).report_failure(RuntimeError(text))
    assert error is not None
    assert said in error.message
    assert ("collective call" in error.message) == ("different" in said)
