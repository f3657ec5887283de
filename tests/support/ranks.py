"""Scenarios on several real processes: gloo, DeepSpeed on the CPU, one process per rank.

They are forked from the warm parent of `tests.support.warm`.
"""

import faulthandler
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import Dtype, OptimConfig, ParallelismConfig, ParallelismKind
from dpo_dist.distributed import zero
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.parallel_groups import parallel_groups
from dpo_dist.distributed.processes.failures import Reports, watch_world
from dpo_dist.distributed.processes.join import start_world
from dpo_dist.distributed.processes.world import World
from tests.support.warm import be_random_anew, context, reserve_port, start_parent

ROOT = Path(__file__).resolve().parents[2]
# Steps large enough to see, and clipped.
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
# Of AdamW on every rank: smooth where a gradient is only rounding.
EPS = 1e-3

Scenario = Callable[[World, Path], Any]


@dataclass(frozen=True)
class Outcome:
    """End of a rank: with a result, with an error, or killed (then with neither)."""

    exit_code: int | None
    log: str
    result: Any = None
    error: str = ""
    message: str = ""
    is_printed_here: bool | None = None


@dataclass(frozen=True)
class Ranks:
    """The running processes of one world."""

    folder: Path
    processes: tuple[Any, ...]

    def finish(self, seconds: float = 240) -> list[Outcome]:
        """Wait for all ranks; those that hang are killed, leave a traceback, and fail the test."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            os.kill(self.processes[rank].pid, signal.SIGABRT)
            self.processes[rank].join()
        outcomes = [self._outcome(rank) for rank in range(len(self.processes))]
        assert not hanging, "\n".join(f"rank {rank} hangs:\n{outcomes[rank].log}" for rank in hanging)
        return outcomes

    def _outcome(self, rank: int) -> Outcome:
        file = self.folder / f"rank-{rank}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        return Outcome(self.processes[rank].exitcode, (self.folder / f"rank-{rank}.log").read_text(), **found)


def start_ranks(
    scenario: Scenario,
    size: int,
    folder: Path,
    kind: ParallelismKind | ParallelismConfig = ParallelismKind.zero3,
    dtype: Dtype = Dtype.fp32,
    timeout: int = 600,
    enter: Callable[[int], None] | None = None,
    optim: OptimConfig = OPTIM,
) -> Ranks:
    """Start `scenario` on every rank of a new world; logs and results go to the new `folder`.

    A collective call waits `timeout` seconds. `enter` is called with the rank before it joins.
    """
    folder.mkdir(parents=True)
    start_parent()
    port = reserve_port()
    processes = tuple(
        context.Process(
            target=_be_rank, args=(scenario, rank, size, port, kind, dtype, folder, timeout, enter, optim)
        )
        for rank in range(size)
    )
    for process in processes:
        process.start()
    return Ranks(folder, processes)


def run_ranks(
    scenario: Scenario,
    size: int,
    folder: Path,
    kind: ParallelismKind | ParallelismConfig = ParallelismKind.zero3,
    dtype: Dtype = Dtype.fp32,
    seconds: float = 240,
    timeout: int = 600,
    optim: OptimConfig = OPTIM,
    enter: Callable[[int], None] | None = None,
) -> list[Any]:
    """Return the result of `scenario` on each rank; no rank may fail or take longer than `seconds`."""
    outcomes = start_ranks(scenario, size, folder, kind, dtype, timeout, enter, optim).finish(seconds)
    for rank, outcome in enumerate(outcomes):
        assert (outcome.exit_code, outcome.error) == (0, ""), f"rank {rank}:\n{outcome.log}"
    return [outcome.result for outcome in outcomes]


def be_alone_on_a_node(_rank: int) -> None:
    """Be a node of one process: over several nodes gradients are summed in float32."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")


def _be_rank(
    scenario: Scenario,
    rank: int,
    size: int,
    port: int,
    kind: ParallelismKind | ParallelismConfig,
    dtype: Dtype,
    folder: Path,
    timeout: int,
    enter: Callable[[int], None] | None,
    optim: OptimConfig,
) -> None:
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    be_random_anew()
    zero.ADAM_EPS = EPS
    if enter is not None:
        enter(rank)
    outcome: dict[str, Any]
    parallelism = kind if isinstance(kind, ParallelismConfig) else ParallelismConfig(kind)
    try:
        world = start_world(policy_config(parallelism, optim, dtype), timeout_seconds=timeout)
        reports = Reports(stacks=folder / f"rank-{rank}.stacks.txt")
        with watch_world(world, reports), parallel_groups(world, parallelism) as grouped:
            outcome = {"result": scenario(grouped, folder)}
            world.barrier()
    except BaseException as error:
        traceback.print_exc()
        outcome = {
            "error": type(error).__name__,
            "message": str(error),
            "is_printed_here": getattr(error, "is_printed_here", None),
        }
    (folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
