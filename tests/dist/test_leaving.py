"""Processes of a run communicate, agree on errors, wait for each other, and end together with one error."""

import ctypes
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import (
    Dtype,
    FolderConfig,
    ModelConfig,
    ParallelismConfig,
    ParallelismKind,
    RunConfig,
)
from dpo_dist.distributed.processes import failures
from dpo_dist.distributed.processes import world as world_module
from dpo_dist.distributed.processes.world import World, check_shared
from dpo_dist.foundation import background
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import CheckpointError, DataError, DpoDistError
from dpo_dist.foundation.signals import StopRequest, stopped_by
from dpo_dist.model.files import load
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference import engine
from dpo_dist.reference.engine import run_start_check
from dpo_dist.training.start.open_run import Run
from tests.dist.scenario import Assets, load_policy, load_reference
from tests.support.families import tiny_family
from tests.support.ranks import Outcome, run_ranks, start_ranks
from tests.support.tiny_model import write_model

libc = ctypes.CDLL(None)
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS


def raised_by(work: Callable[[], Any]) -> list[str]:
    """Kind, message and remedy of the error that `work` raises."""
    try:
        work()
    except DpoDistError as error:
        return [type(error).__name__, error.message, error.remedy]
    return []


def fail_on(ranks: tuple[int, ...], world: World) -> str:
    if world.rank in ranks:
        raise DataError(f"rank {world.rank} fails", remedy="mend it")
    return f"rank {world.rank} is well"


def fail_to_write() -> None:
    raise CheckpointError("no room", remedy="make room")


def conversation(world: World, _folder: Path) -> dict[str, Any]:
    worked: list[int] = []
    results = {
        "on_main": world.on_main(lambda: worked.append(world.rank) or f"from {world.rank}"),
        "on_main fails": raised_by(lambda: world.on_main(fail_to_write)),
        "together": world.together(partial(fail_on, (), world)),
        "together, rank 1 fails": raised_by(lambda: world.together(partial(fail_on, (1,), world))),
        "together, two fail": raised_by(lambda: world.together(partial(fail_on, (2, 1), world))),
        "sum": world.sum(torch.tensor([world.rank + 1.0, 10.0])).tolist(),
        "gather": world.gather({"rank": world.rank}),
        "agree, rank 1": world.agree(world.rank == 1),
        "agree, nobody": world.agree(False),
    }
    return {**results, "worked": worked}


def test_ranks_communicate_and_agree_on_errors(tmp_path: Path) -> None:
    for rank, of_rank in enumerate(run_ranks(conversation, 3, tmp_path / "ranks")):
        assert of_rank == {
            "on_main": "from 0",
            "on_main fails": ["CheckpointError", "no room", "make room"],
            "together": f"rank {rank} is well",
            "together, rank 1 fails": ["DataError", "rank 1 fails", "mend it"],
            "together, two fail": ["DataError", "rank 1 fails", "mend it"],
            "sum": [6.0, 30.0],
            "gather": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "agree, rank 1": True,
            "agree, nobody": False,
            "worked": [0] if rank == 0 else [],
        }


def die(*_arguments: Any, **_options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rank_0_dies(world: World, _folder: Path) -> None:
    failures.FAREWELL_SECONDS = 2.0
    if world.rank == 2:
        time.sleep(0.5)  # sees it late
    world.on_main(die)


def test_one_survivor_names_the_dead(tmp_path: Path) -> None:
    dead, *survivors = outcomes_of(rank_0_dies, tmp_path, size=3)
    assert dead.exit_code == -signal.SIGKILL
    assert {outcome.error for outcome in survivors} == {"PeerLostError"}, survivors
    (printed,) = [outcome for outcome in survivors if outcome.is_printed_here]
    assert "rank 0 of 3 died" in printed.message


def loading_while_one_dies(folder: Path, world: World, _folder: Path) -> None:
    if world.rank == 1:
        deepspeed.zero.GatheredParameters.__enter__ = die
    load_packed(folder, ModelConfig(dtype=Dtype.fp32), 64, world.device)


def test_a_rank_that_dies_while_a_sharded_model_loads_is_no_fault_of_the_model(tmp_path: Path) -> None:
    survivor, dead = outcomes_of(partial(loading_while_one_dies, write_model(tmp_path / "model")), tmp_path)
    assert dead.exit_code == -signal.SIGKILL
    assert (survivor.error, survivor.is_printed_here) == ("PeerLostError", True), survivor.log
    assert "rank 1 of 2 died" in survivor.message


def misreading(folder: Path, world: World, _folder: Path) -> list[str]:
    load._RENAMED.clear()
    return raised_by(lambda: load_packed(folder, ModelConfig(dtype=Dtype.fp32), 64, world.device))


def test_a_weight_that_only_sharded_loading_misses_is_not_left_at_random(tmp_path: Path) -> None:
    tiny_family("deepseek_v4", 64).save_pretrained(tmp_path / "model")
    for _, message, remedy in run_ranks(partial(misreading, tmp_path / "model"), 2, tmp_path / "ranks"):
        assert "lacks weights" in message
        assert "parallelism.kind=zero2" in remedy


def block_in_c(seconds: int, grace_seconds: float = 1.0) -> None:
    """Block outside of the interpreter, like a collective call of NCCL: no Python signal handler runs."""
    failures.GRACE_SECONDS = grace_seconds
    libc.sleep(seconds)


def refuse(*_: Any) -> None:
    raise DataError("the data are refused", remedy="correct them")


def terminated_after(seconds: float) -> None:
    """Ask this process to end, as the launcher does when another one has left."""
    # To the main thread: sent to the process, it may reach another one, and the main thread sleeps on.
    threading.Timer(seconds, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()


def be_brief(_rank: int) -> None:
    """Wait for the last reports of other ranks for one second in place of five."""
    failures.FAREWELL_SECONDS = 1.0


def outcomes_of(scenario: Any, folder: Path, size: int = 2) -> list[Outcome]:
    return start_ranks(scenario, size, folder / "ranks", enter=be_brief).finish()


def printing(outcomes: Sequence[Outcome]) -> list[int]:
    """The ranks that print an error."""
    return [rank for rank, outcome in enumerate(outcomes) if outcome.is_printed_here]


def blocked_while_one_dies(world: World, _folder: Path) -> None:
    if world.rank == 1:
        die()
    block_in_c(1000, grace_seconds=2.0 if world.rank == 0 else 1.0)


def test_blocked_ranks_name_the_dead_one_and_end(tmp_path: Path) -> None:
    first, _, other = outcomes_of(blocked_while_one_dies, tmp_path, size=3)
    assert first.exit_code == other.exit_code == 69, first.log + other.log
    assert (first.log + other.log).count("process lost: rank 1 of 3 died") == 1


def dies_while_joining(rank: int) -> None:
    """Let rank 0, which has the store of the rendezvous, die in the last call of `start_world`."""
    gather = dist.all_gather_object

    def gather_or_die(*arguments: Any, **options: Any) -> None:
        # One that still connects to a dead rank would try until the timeout.
        distributed_c10d._get_default_store().set(f"rank {rank}", "connected")
        if rank == 0:
            distributed_c10d._get_default_store().wait(["rank 1", "rank 2"])
            die()
        gather(*arguments, **options)

    dist.all_gather_object = gather_or_die


def test_a_rank_that_dies_while_all_join_is_one_block_of_each_other(tmp_path: Path) -> None:
    """The launcher ends the others, of which each may have printed it before."""
    _, *others = start_ranks(refuse, 3, tmp_path / "ranks", enter=dies_while_joining).finish()
    for outcome in others:
        assert outcome.error == "PeerLostError", outcome.log
        assert "not all 3 processes of the run have joined" in outcome.message


def end_before_joining(missing: int, rank: int) -> None:
    if rank == missing:
        raise SystemExit(2)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_rank_that_never_arrives_is_named_by_the_others(missing: int, tmp_path: Path) -> None:
    """It was refused, or could not import, under a launcher of its own."""
    began = time.monotonic()
    enter = partial(end_before_joining, missing)
    outcomes = start_ranks(refuse, 3, tmp_path / "ranks", enter=enter, timeout=4).finish()
    assert time.monotonic() - began < 200
    arrived = [outcome for rank, outcome in enumerate(outcomes) if rank != missing]
    named = f"not all 3 processes of the run have joined: rank {missing} did not arrive"
    assert any(named in outcome.message for outcome in arrived), arrived
    for outcome in arrived:
        assert outcome.error == "PeerLostError", outcome.log
        assert "not all 3 processes of the run have joined" in outcome.message


def one_fails(world: World, _folder: Path) -> None:
    if world.rank == 1:
        raise KeyError("a bug")
    world.barrier()


def test_an_error_of_one_rank_is_no_lost_process_for_the_others(tmp_path: Path) -> None:
    waiting, failing = outcomes_of(one_fails, tmp_path)
    assert failing.error == "KeyError"  # with its traceback
    assert (waiting.error, waiting.is_printed_here) == ("PeerLostError", False), waiting.log
    assert "process of the run failed" in waiting.message


def write_in_a_removed_folder(world: World, folder: Path) -> None:
    failures.FAREWELL_SECONDS = 4.0  # the others ask each second
    config = RunConfig(model=ModelConfig("unused"), run=FolderConfig(dir=str(folder / "removed")))
    Run(config, world, Console(None)).write(lambda: None)


def test_a_removed_run_directory_is_printed_by_rank_0_and_ends_the_others(tmp_path: Path) -> None:
    """The store of the rendezvous ends with rank 0, and the barrier of the other only then."""
    failing, waiting = outcomes_of(write_in_a_removed_folder, tmp_path)
    assert (failing.error, failing.is_printed_here) == ("ConfigError", True), failing.log
    assert "the run directory is missing" in failing.message
    assert (waiting.error, waiting.is_printed_here) == ("PeerLostError", False), waiting.log
    assert "process of the run failed" in waiting.message


def out_of_memory_while_blocked(world: World, _folder: Path) -> None:
    if world.rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    block_in_c(1000)


def test_out_of_memory_on_one_rank_is_one_block_and_ends_all(tmp_path: Path) -> None:
    blocked, failing = outcomes_of(out_of_memory_while_blocked, tmp_path)
    assert (failing.error, failing.is_printed_here) == ("DeviceMemoryError", True)
    assert "Tried to allocate 20.00 MiB" in failing.message
    assert blocked.exit_code == 2, blocked.log
    assert "process lost" not in blocked.log


def refused_at_different_times(world: World, _folder: Path) -> None:
    """Each rank finds the same fault by itself."""
    time.sleep(0.5 * (1 - world.rank))
    refuse()


def terminated_while_it_waits(world: World, _folder: Path) -> None:
    if world.rank == 1:
        terminated_after(0.5)
        world.barrier()
    refuse()


@pytest.mark.parametrize("scenario", [refused_at_different_times, terminated_while_it_waits])
def test_an_error_of_all_ranks_is_printed_once_and_is_not_a_lost_process(
    scenario: Any, tmp_path: Path
) -> None:
    """The launcher ends the others as soon as the first has left; they add nothing to what it said."""
    outcomes = outcomes_of(scenario, tmp_path)
    assert len(printing(outcomes)) == 1
    assert all("died" not in outcome.message for outcome in outcomes), outcomes[1].log


def signalled_while_rank_0_works(world: World, _folder: Path) -> None:
    """As while rank 0 encodes; the process group must not be used any more."""
    failures.GRACE_SECONDS = 1.0
    with StopRequest().listening():
        if world.rank == 1:
            terminated_after(0.5)
        world.on_main(lambda: time.sleep(1000))


def test_a_signal_to_a_rank_that_waits_for_work_ends_all(tmp_path: Path) -> None:
    working, signalled = outcomes_of(signalled_while_rank_0_works, tmp_path)
    assert (signalled.error, signalled.is_printed_here) == ("StoppedError", True), signalled.log
    assert working.exit_code == 75, working.log


def stopped_late(world: World, _folder: Path) -> None:
    """Both ranks are stopped; rank 1 notices it when rank 0 has said so."""
    time.sleep(world.rank)
    raise stopped_by("SIGTERM")


def waiting_for_a_stopped_rank(world: World, _folder: Path) -> None:
    if world.is_main:
        raise stopped_by("SIGTERM")
    dist.barrier(group=world.control)


@pytest.mark.parametrize("scenario", [stopped_late, waiting_for_a_stopped_rank])
def test_every_rank_of_a_stopped_run_ends_as_stopped(scenario: Any, tmp_path: Path) -> None:
    """A script that catches the stop must not end with a traceback on one of them."""
    outcomes = outcomes_of(scenario, tmp_path)
    assert [each.error for each in outcomes] == ["StoppedError"] * 2, [each.log for each in outcomes]
    assert [each.is_printed_here for each in outcomes] == [True, False]


def own_disk(folder: Path, rank: int) -> None:
    """Give rank 1 an empty disk of its own at the folder, which it makes."""
    if rank == 1:
        assert libc.unshare(_NEW_MOUNTS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)


def share_a_folder(world: World, folder: Path) -> list[str]:
    world_module._SEEN_SECONDS = 0.5
    return raised_by(lambda: check_shared(world, folder.parent / "cache", "data.cache"))


@pytest.mark.parametrize("is_shared", [True, False])
def test_ranks_that_see_different_folders_are_named(is_shared: bool, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    if not is_shared and os.getuid():
        pytest.skip("only root can give a rank a disk of its own")
    enter = None if is_shared else partial(own_disk, cache)
    outcomes = start_ranks(share_a_folder, 2, tmp_path / "ranks", enter=enter).finish()
    results = [outcome.result for outcome in outcomes]
    assert results[0] == results[1], outcomes
    if is_shared:
        assert results[0] == []
    else:
        kind, message, remedy = results[0]
        assert (kind, message) == ("ConfigError", "the processes see different folders")
        assert remedy.startswith("put data.cache on a file system that every node sees")
    assert [*cache.iterdir()] == []


def terminated_while_blocked(world: World, _folder: Path) -> None:
    """As `evaluate`, which saves nothing."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    # The other threads take the signal, so that nothing wakes this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    block_in_c(100, grace_seconds=1000.0)


def test_sigterm_ends_blocked_ranks_that_have_nothing_to_save(tmp_path: Path) -> None:
    first, second = outcomes_of(terminated_while_blocked, tmp_path)
    assert first.exit_code == second.exit_code == 143, first.log + second.log
    assert (first.log + second.log).count("ended by SIGTERM") == 1


# Of the forward of the check at start that fails: by the model's own code, or packed.
OWN, PACKED = Arrangement.single, Arrangement.packed


def settle(
    folder: Path, fails: Arrangement, on: range, late: float, world: World, _folder: Path
) -> Arrangement:
    """Settle a model of which layer 1 fails in one arrangement on the ranks of `on`; rank 1 begins late."""
    failures.GRACE_SECONDS = engine.FAULT_SECONDS = 1.0
    policy = load_policy(folder, world)
    if world.rank in on:
        layer = policy.causal_lm.model.layers[1]
        layer.register_forward_pre_hook(partial(fail_in, policy.model, fails))
    time.sleep(late * world.rank)
    run_start_check(policy, 512, world, trains=True)
    return policy.model.arrangement


def fail_in(model: PackedCausalLM, fails: Arrangement, _layer: nn.Module, _inputs: Any) -> None:
    if model.arrangement is fails:
        raise RuntimeError("layer 1 is broken")


def settled(
    fails: Arrangement,
    on: range,
    folder: Path,
    size: int = 2,
    kind: ParallelismKind | ParallelismConfig = ParallelismKind.zero3,
    late: float = 0.0,
) -> list[Outcome]:
    work = partial(settle, write_model(folder / "model"), fails, on, late)
    ranks = start_ranks(work, size, folder / "ranks", kind, enter=be_brief)
    return ranks.finish(60)  # a tenth of timeout_seconds


def test_a_forward_that_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    """The others wait for that rank in a collective call of the same forward, which it has left."""
    first, failing, last = settled(PACKED, range(1, 2), tmp_path, size=3)
    assert (failing.error, failing.is_printed_here) == ("ConfigError", True), failing.log
    assert "RuntimeError: layer 1 is broken" in failing.message
    for other in (first, last):
        assert (other.error, other.exit_code) in [("PeerLostError", 0), ("", 2)], other.log
        assert not other.is_printed_here


SHARED = ParallelismConfig(ParallelismKind.zero2, sequence_parallel=2)


@pytest.mark.parametrize(
    ("kind", "on", "late"),
    [
        # Ranks with whole weights finish the forward, and print the error of the one that failed.
        pytest.param(ParallelismKind.zero2, range(1, 2), 0.0, id="one rank with whole weights"),
        pytest.param(SHARED, range(2), 2.0, id="ranks that begin at unequal times"),
    ],
)
def test_an_error_of_all_ranks_or_of_whole_models_is_one_error(
    kind: ParallelismKind | ParallelismConfig, on: range, late: float, tmp_path: Path
) -> None:
    for outcome in settled(OWN, on, tmp_path, kind=kind, late=late):
        assert outcome.error == "ConfigError", outcome.log
        assert "own forward cannot score" in outcome.message
        assert "layer 1 is broken" in outcome.message


def test_an_arrangement_that_fails_on_all_ranks_is_followed_by_the_next(tmp_path: Path) -> None:
    outcomes = settled(PACKED, range(2), tmp_path)
    assert [outcome.result for outcome in outcomes] == [Arrangement.padded] * 2, outcomes[0].log


def timeouts_of_all_groups(assets: Assets, world: World, _folder: Path) -> list[float]:
    load_reference(assets.reference, assets.config(assets.policy), world)
    load_policy(assets.policy, world)
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_every_process_group_has_the_configured_timeout(assets: Assets, tmp_path: Path) -> None:
    for found in run_ranks(partial(timeouts_of_all_groups, assets), 2, tmp_path / "ranks", timeout=77):
        assert len(found) >= 3, "the default group, ours on the host, DeepSpeed's clone"
        assert set(found) == {77.0}


def slow_work(world: World, _folder: Path) -> dict[str, Any]:
    """Work longer than a collective call may wait: rank 0 within a call, then rank 1 before one."""
    beats: list[float] = []

    def work() -> str:
        time.sleep(3)
        return f"from {world.rank}"

    background._BEAT_SECONDS = 1.0
    on_main = world.on_main(background.call_periodically(beats.append)(work))
    gathered = world.gather(work() if world.rank else "quick")
    return {"on_main": on_main, "gather": gathered, "beats": beats}


def test_a_rank_that_works_is_waited_for(tmp_path: Path) -> None:
    first, second = run_ranks(slow_work, 2, tmp_path / "ranks", timeout=2)
    for of_rank in (first, second):
        assert (of_rank["on_main"], of_rank["gather"]) == ("from 0", ["quick", "from 1"])
    assert first["beats"]
    assert first["beats"] == sorted(first["beats"])
    assert second["beats"] == [], "it has nothing to do"


def hangs_in_a_file_system() -> None:
    time.sleep(1000)


def hanging_work(world: World, _folder: Path) -> None:
    failures.PATIENCE_SECONDS = failures.GRACE_SECONDS = 1
    failures.FAREWELL_SECONDS = 2
    if world.rank == 1:
        hangs_in_a_file_system()
    world.sum(torch.ones(1))


def test_a_rank_that_hangs_is_named_and_writes_its_stacks(tmp_path: Path) -> None:
    """In steps, a hung file system ends the job with one error."""
    ranks = start_ranks(hanging_work, 3, tmp_path / "ranks", timeout=4)
    first, hanging, other = ranks.finish()
    assert (first.error, first.is_printed_here) == ("PeerLostError", True), first.log
    assert "rank 1 of 3 does not answer" in first.message
    assert f"rank 1 (process {ranks.processes[1].pid} on {socket.gethostname()})" in first.message
    assert (other.error, other.is_printed_here) == ("PeerLostError", False), other.log
    assert (hanging.exit_code, hanging.error) == (69, ""), hanging.log
    stacks = (tmp_path / "ranks" / "rank-1.stacks.txt").read_text()
    assert f"in {hangs_in_a_file_system.__name__}" in stacks


def stopped_host_of_the_store(world: World, _folder: Path) -> None:
    failures.STORE_SECONDS = failures.PATIENCE_SECONDS = 2
    failures.FAREWELL_SECONDS = 1
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.sum(torch.ones(1))


def test_a_hanging_process_with_the_store_times_out(tmp_path: Path) -> None:
    """Processes report failures through rank 0 or its launcher."""
    ranks = start_ranks(stopped_host_of_the_store, 3, tmp_path / "ranks", timeout=2)
    for rank in (1, 2):
        ranks.processes[rank].join(120)
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    _, second, third = ranks.finish()
    assert (second.error, second.is_printed_here) == ("PeerLostError", True), second.log
    assert "rank 0 of 3 does not answer" in second.message
    assert (third.error, third.is_printed_here) == ("PeerLostError", False), third.log
