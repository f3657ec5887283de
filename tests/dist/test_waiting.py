"""Timeouts of collective calls, and heartbeats of ranks that still work."""

import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from dpo_dist.config.schema import ParallelismKind
from dpo_dist.distributed import peers
from dpo_dist.distributed import world as world_module
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.model.load import load_packed
from dpo_dist.reference.engine import load_reference
from tests.dist.scenario import Assets
from tests.support.ranks import OPTIM, run_ranks, start_ranks


def timeouts_of_all_groups(assets: Assets, world: World, _folder: Path) -> list[float]:
    config = assets.config(assets.policy)
    load_reference(assets.reference, config, world)
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
    """Work three times as long as a collective call may wait."""
    beats: list[float] = []

    def work() -> str:
        time.sleep(6)
        return f"from {world.rank}"

    on_main = world.on_main(work, beats.append)
    mine = world.together((lambda: "quick") if world.rank else work, beats.append)
    return {
        "on_main": on_main,
        "mine": mine,
        "beats": len(beats),
        "ascending": beats[:3] == sorted(beats[:3]),
    }


def test_a_rank_with_a_heartbeat_is_waited_for(tmp_path: Path) -> None:
    first, second = run_ranks(slow_work, 2, tmp_path / "ranks", timeout=2)
    assert (first["on_main"], first["mine"]) == ("from 0", "from 0")
    assert (second["on_main"], second["mine"]) == ("from 0", "quick")
    assert first["ascending"]
    assert first["beats"] > 4
    assert second["beats"] == 0, "it has nothing to do"


def silent_work(world: World, _folder: Path) -> None:
    world.on_main(lambda: time.sleep(5))


def test_a_silent_rank_times_out(tmp_path: Path) -> None:
    """In set-up, checkpoints and fill rounds, a hung file system ends the job with one error."""
    ranks = start_ranks(silent_work, 2, tmp_path / "ranks", timeout=2)
    _, second = ranks.finish()
    assert (second.error, second.reporting_rank) == ("PeerLostError", 1), second.log
    assert "does not answer" in second.message
    assert "Timed out" in second.message


def stopped_host_of_the_store(world: World, _folder: Path) -> None:
    peers._STORE_SECONDS = world_module._PEER_PATIENCE_SECONDS = 2
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.barrier()


def test_a_hanging_process_with_the_store_times_out(tmp_path: Path) -> None:
    """Processes report failures through rank 0 or its launcher."""
    ranks = start_ranks(stopped_host_of_the_store, 3, tmp_path / "ranks", timeout=2)
    deadline = time.monotonic() + 40
    while not all((tmp_path / "ranks" / f"rank-{rank}.json").exists() for rank in (1, 2)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    _, second, third = ranks.finish()
    assert (second.error, second.reporting_rank) == ("PeerLostError", 1), second.log
    assert "does not answer" in second.message
    assert (third.error, third.reporting_rank) == ("PeerLostError", peers.NOBODY), third.log
