"""Timeouts of collective calls, and heartbeats of ranks that still work."""

import os
import re
import signal
import socket
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from dpo_dist.config.schema import ParallelismKind
from dpo_dist.distributed import failures
from dpo_dist.distributed import failures as rendezvous_store
from dpo_dist.distributed import world as world_module
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.reference.engine import load_reference
from tests.dist.scenario import Assets, files_of
from tests.support.ranks import OPTIM, run_ranks, start_ranks


def timeouts_of_all_groups(assets: Assets, world: World, _folder: Path) -> list[float]:
    config = assets.config(assets.policy)
    load_reference(files_of(assets.reference), config, world)
    PolicyEngine(load_packed(assets.policy, config.model, 64, world.device), OPTIM, world)
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.parametrize("kind", [ParallelismKind.zero3, ParallelismKind.zero2])
def test_every_process_group_has_the_configured_timeout(
    kind: ParallelismKind, assets: Assets, tmp_path: Path
) -> None:
    for found in run_ranks(partial(timeouts_of_all_groups, assets), 2, tmp_path / "ranks", kind, timeout=77):
        assert len(found) >= 3, "the default group, ours on the host, DeepSpeed's clone"
        assert set(found) == {timedelta(seconds=77).total_seconds()}


def slow_work(world: World, _folder: Path) -> dict[str, Any]:
    """Work longer than a collective call may wait: rank 0 within a call, then rank 1 before one."""
    beats: list[float] = []

    def work() -> str:
        time.sleep(6)
        return f"from {world.rank}"

    on_main = world.on_main(work, beats.append)
    gathered = world.gather(work() if world.rank else "quick")
    return {"on_main": on_main, "gather": gathered, "beats": beats}


def test_a_rank_that_works_is_waited_for(tmp_path: Path) -> None:
    first, second = run_ranks(slow_work, 2, tmp_path / "ranks", timeout=4)
    for of_rank in (first, second):
        assert (of_rank["on_main"], of_rank["gather"]) == ("from 0", ["quick", "from 1"])
    assert first["beats"]
    assert first["beats"] == sorted(first["beats"])
    assert second["beats"] == [], "it has nothing to do"


def hangs_in_a_file_system() -> None:
    time.sleep(7)


def hanging_work(world: World, _folder: Path) -> None:
    world_module._PEER_PATIENCE_SECONDS = 2
    world.activity.enter("saving")
    if world.rank == 1:
        hangs_in_a_file_system()
    world.sum(torch.ones(1))


def test_a_rank_that_hangs_is_named_with_its_place_and_writes_its_stacks(tmp_path: Path) -> None:
    """In steps, a hung file system ends the job with one error."""
    ranks = start_ranks(hanging_work, 2, tmp_path / "ranks", timeout=4)
    first, _ = ranks.finish()
    assert (first.error, first.reporting_rank) == ("PeerLostError", 0), first.log
    assert "rank 1 of 2 keeps the others waiting" in first.message
    assert "saving, at dist" not in first.message, "a place in the package only"
    assert "where:    rank 0: saving, waiting in all_reduce, for" in first.message
    assert f"{socket.gethostname()}): saving" in first.message
    assert "its heartbeat arrives" in first.message
    assert "Timed out" in first.message
    for rank, function in enumerate(["all_reduce", hangs_in_a_file_system.__name__]):
        assert f"in {function}" in (tmp_path / "ranks" / f"rank-{rank}.stacks.txt").read_text()


def stopped(world: World, _folder: Path) -> None:
    world_module._PEER_PATIENCE_SECONDS = 2
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.barrier()


def test_a_stopped_rank_is_named_with_the_time_of_its_last_heartbeat(tmp_path: Path) -> None:
    ranks = start_ranks(stopped, 3, tmp_path / "ranks", timeout=4)
    _wait_for_files(tmp_path / "ranks", 0, 2)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    outcomes = ranks.finish()
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error == "PeerLostError", outcome.log
    first, other = outcomes[0], outcomes[2]
    message = (first if first.reporting_rank == 0 else other).message
    assert "rank 1 of 3 does not answer" in message
    assert re.search(
        r"no heartbeat since \d\d:\d\d:\d\d \(it is stopped, by a signal or a debugger\)", message
    )
    assert "except of processes that are stopped" in message
    files = [(tmp_path / "ranks" / f"rank-{rank}.stacks.txt") for rank in range(3)]
    assert ["in barrier" in file.read_text() if file.exists() else None for file in files] == [
        True,
        None,
        True,
    ]


def signalled_while_it_waits(world: World, _folder: Path) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    world.barrier()


def test_a_signal_is_answered_while_the_main_thread_waits_for_a_silent_rank(tmp_path: Path) -> None:
    ranks = start_ranks(signalled_while_it_waits, 2, tmp_path / "ranks", timeout=60)
    ranks.processes[0].join(240)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    first, _ = ranks.finish()
    assert first.exit_code == 75, first.log
    assert "stopped: by SIGUSR1 while this process waited for another one" in first.log
    assert "rank 1 (process" in first.log


def slow_rank(world: World, _folder: Path) -> str:
    if world.rank == 1:
        time.sleep(6)
    world.barrier()
    time.sleep(2.5)
    return "done"


def test_a_slow_rank_is_named_and_waited_for(tmp_path: Path) -> None:
    ranks = start_ranks(slow_rank, 2, tmp_path / "ranks", timeout=8)
    first, second = ranks.finish()
    assert (first.result, second.result) == ("done", "done"), first.log
    assert re.search(r"waiting for rank 1 \(process \d+ on .*\): starting.*its heartbeat arrives", first.log)
    assert "no rank waits for another one any more" in first.log
    assert "waiting for rank" not in second.log


def _wait_for_files(folder: Path, *ranks: int) -> None:
    """Wait until ranks have written their outcome."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not all((folder / f"rank-{rank}.json").exists() for rank in ranks):
        time.sleep(0.1)


def stopped_host_of_the_store(world: World, _folder: Path) -> None:
    rendezvous_store.STORE_SECONDS = world_module._PEER_PATIENCE_SECONDS = 2
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.barrier()


def test_a_hanging_process_with_the_store_times_out(tmp_path: Path) -> None:
    """Processes report failures through rank 0 or its launcher."""
    ranks = start_ranks(stopped_host_of_the_store, 3, tmp_path / "ranks", timeout=2)
    _wait_for_files(tmp_path / "ranks", 1, 2)
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    _, second, third = ranks.finish()
    assert (second.error, second.reporting_rank) == ("PeerLostError", 1), second.log
    assert "the host 127.0.0.1, or the network to it, does not answer" in second.message
    assert (third.error, third.reporting_rank) == ("PeerLostError", failures.NOBODY), third.log
