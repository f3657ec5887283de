"""A world of one process, which may survive an error, as in a notebook."""

import contextlib
import ctypes
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import PartialState

from dpo_dist.config.schema import Dtype, OptimConfig, ParallelismConfig
from dpo_dist.distributed import join as joined_module
from dpo_dist.distributed.join import joined, start_world
from dpo_dist.distributed.processes import Peer, Watcher
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import policy_config
from dpo_dist.foundation.errors import ConfigError, PeerLostError

_PR_GET_PDEATHSIG = 2


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("timed out"), ValueError("a bug")])
def test_an_error_of_the_only_process_is_raised_at_once(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other process caused it, and SIGTERM ends this process again afterwards."""
    monkeypatch.delattr(Watcher, "_consequence")
    handler = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(type(failure)) as caught,
        World(None, 0, 1, torch.device("cpu"), (Peer.here(0),)).watch(),
    ):
        raise failure
    assert caught.value is failure
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_run_outside_of_the_main_thread_changes_no_handler() -> None:
    def watch() -> str:
        with World(None, 0, 1, torch.device("cpu"), (Peer.here(0),)).watch():
            return "left"

    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(watch).result() == "left"
    assert signal.signal(signal.SIGTERM, handler) is signal.SIG_DFL


@pytest.mark.parametrize(("launched", "signal_of_death"), [(True, signal.SIGTERM), (False, 0)])
def test_a_verb_with_nothing_to_save_ends_with_its_launcher(
    launched: bool, signal_of_death: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    asked = ctypes.c_int(-1)

    def ask() -> int:
        assert ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(asked)) == 0
        return asked.value

    with World(None, 0, 1, torch.device("cpu"), (Peer.here(0),)).watch():
        assert ask() == signal_of_death
    assert ask() == 0


def test_a_launch_without_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    with pytest.raises(ConfigError, match="without DeepSpeed") as found:
        start_world({}, 60)
    assert "cpu_2.yaml" in str(found.value)


@pytest.mark.parametrize(
    ("gpus", "variables", "error"),
    [
        (0, {"CUDA_VISIBLE_DEVICES": "0"}, "GPUs are asked for, and PyTorch finds none"),
        (2, {"LOCAL_WORLD_SIZE": "3"}, "there are more processes than GPUs on this host"),
        (2, {"LOCAL_WORLD_SIZE": "2"}, ""),
        (0, {"LOCAL_WORLD_SIZE": "3"}, ""),
        (0, {"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        (0, {"CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_USE_CPU": "true"}, ""),
        (2, {"LOCAL_WORLD_SIZE": "3", "ACCELERATE_USE_CPU": "true"}, ""),
    ],
)
def test_gpus_that_are_asked_for_are_there(
    gpus: int, variables: dict[str, str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    with contextlib.ExitStack() as stack:
        if error:
            stack.enter_context(pytest.raises(ConfigError, match=error))
        joined_module._check_devices(variables)


def test_accelerate_may_have_been_used_in_this_process_before() -> None:
    PartialState(cpu=True)
    with joined(policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32), 60) as world:
        assert world.gather("here") == ["here"]


def test_a_process_without_a_launcher_is_a_world_of_one_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """No port is chosen before it is opened, and the environment is the caller's again."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    for _ in range(2):
        with joined(policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32), 60) as world:
            assert (world.size, world.gather("here"), os.environ["MASTER_PORT"]) == (1, ["here"], "0")
        assert {name for name in os.environ if name not in before and "RANK" in name} == set()
        assert "MASTER_PORT" not in os.environ


def test_a_rendezvous_that_times_out_is_an_error_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(**_: object) -> None:
        raise RuntimeError("Timed out after 61 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(joined_module, "Accelerator", wait)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32)
    with pytest.raises(PeerLostError, match="not all 2 processes") as found, joined(config, 60):
        pass
    assert "1/2 clients joined" in found.value.got
