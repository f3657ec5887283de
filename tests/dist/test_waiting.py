"""Timeouts of collective calls, and ranks that are waited for."""

import os
import signal
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from dpo_dist.distributed import processes
from dpo_dist.distributed.world import World
from dpo_dist.foundation import process
from dpo_dist.reference.engine import load_reference
from tests.dist.scenario import Assets, files_of, load_policy
from tests.support.ranks import run_ranks, start_ranks


def timeouts_of_all_groups(assets: Assets, world: World, _folder: Path) -> list[float]:
    load_reference(files_of(assets.reference), assets.config(assets.policy), world)
    load_policy(assets.policy, world)
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_every_process_group_has_the_configured_timeout(assets: Assets, tmp_path: Path) -> None:
    for found in run_ranks(partial(timeouts_of_all_groups, assets), 2, tmp_path / "ranks", timeout=77):
        assert len(found) >= 3, "the default group, ours on the host, DeepSpeed's clone"
        assert set(found) == {timedelta(seconds=77).total_seconds()}


def slow_work(world: World, _folder: Path) -> dict[str, Any]:
    """Work longer than a collective call may wait: rank 0 within a call, then rank 1 before one."""
    beats: list[float] = []

    def work() -> str:
        time.sleep(6)
        return f"from {world.rank}"

    process._BEAT_SECONDS = 1.0
    on_main = world.on_main(process.beating(beats.append)(work))
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
    time.sleep(1000)


def hanging_work(world: World, _folder: Path) -> None:
    processes.PATIENCE_SECONDS, processes.GRACE_SECONDS = 2, 1
    if world.rank == 1:
        hangs_in_a_file_system()
    world.sum(torch.ones(1))


def test_a_rank_that_hangs_is_named_and_writes_its_stacks(tmp_path: Path) -> None:
    """In steps, a hung file system ends the job with one error."""
    ranks = start_ranks(hanging_work, 3, tmp_path / "ranks", timeout=4)
    first, hanging, other = ranks.finish()
    assert (first.error, first.reporting_rank) == ("PeerLostError", 0), first.log
    assert "rank 1 of 3 does not answer" in first.message
    assert f"rank 1 (process {ranks.processes[1].pid} on {socket.gethostname()})" in first.message
    assert (other.error, other.reporting_rank) == ("PeerLostError", processes.NOBODY), other.log
    assert (hanging.exit_code, hanging.error) == (69, ""), hanging.log
    stacks = (tmp_path / "ranks" / "rank-1.stacks.txt").read_text()
    assert f"in {hangs_in_a_file_system.__name__}" in stacks


def stopped_host_of_the_store(world: World, _folder: Path) -> None:
    processes.STORE_SECONDS = processes.PATIENCE_SECONDS = 2
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
    assert (second.error, second.reporting_rank) == ("PeerLostError", 1), second.log
    assert "rank 0 of 3 does not answer" in second.message
    assert (third.error, third.reporting_rank) == ("PeerLostError", processes.NOBODY), third.log
