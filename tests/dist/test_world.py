"""Collective calls, agreement on errors, and survivors of dead ranks."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.distributed.processes import NOBODY
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import CheckpointError, DataError, DpoDistError
from tests.support.ranks import run_ranks, start_ranks

SIZE = 3


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
        "together without a result": world.together(lambda: None),
        "sum": world.sum(torch.tensor([world.rank + 1.0, 10.0])).tolist(),
        "gather": world.gather({"rank": world.rank}),
        "agree, rank 1": world.agree(world.rank == 1),
        "agree, nobody": world.agree(False),
    }
    return {**results, "worked": worked}


def test_ranks_communicate_and_agree_on_errors(tmp_path: Path) -> None:
    results = run_ranks(conversation, SIZE, tmp_path / "ranks")
    for rank, of_rank in enumerate(results):
        assert of_rank == {
            "on_main": "from 0",
            "on_main fails": ["CheckpointError", "no room", "make room"],
            "together": f"rank {rank} is well",
            "together, rank 1 fails": ["DataError", "rank 1 fails", "mend it"],
            "together, two fail": ["DataError", "rank 1 fails", "mend it"],
            "together without a result": None,
            "sum": [6.0, 30.0],
            "gather": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "agree, rank 1": True,
            "agree, nobody": False,
            "worked": [0] if rank == 0 else [],
        }


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_others_wait_for_rank_0(world: World, _folder: Path) -> None:
    world.on_main(die)


def die_while_others_wait_at_a_barrier(dying: int, world: World, _folder: Path) -> None:
    if world.rank == dying:
        die()
    world.barrier()


def die_while_one_waits_and_one_is_busy(world: World, _folder: Path) -> None:
    if world.rank == 0:
        die()
    if world.rank == 2:
        time.sleep(1)
    world.barrier()


@pytest.mark.parametrize(
    ("scenario", "dead", "size"),
    [
        (die_while_others_wait_for_rank_0, 0, 3),
        (die_while_one_waits_and_one_is_busy, 0, 3),
        (partial(die_while_others_wait_at_a_barrier, 2), 2, 3),
        (partial(die_while_others_wait_at_a_barrier, 1), 1, 2),
    ],
    ids=[
        "rank 0 in on_main",
        "rank 0, seen late by rank 2",
        "last of three at a barrier",
        "rank 1 at a barrier",
    ],
)
def test_one_survivor_names_the_dead(scenario: Any, dead: int, size: int, tmp_path: Path) -> None:
    outcomes = start_ranks(scenario, size, tmp_path / "ranks").finish()
    assert outcomes[dead].exit_code == -signal.SIGKILL
    survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != dead]
    assert {outcome.error for outcome in survivors} == {"PeerLostError"}, survivors
    (printed,) = [outcome for outcome in survivors if outcome.reporting_rank != NOBODY]
    assert f"rank {dead} of {size} died" in printed.message
