"""Stages of work with whole models on every process: finished part by part, resumable."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Offload, ParallelismKind, RunConfig
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.device_memory import explain_out_of_memory
from dpo_dist.distributed.joined import joined
from dpo_dist.distributed.monitor import Reports
from dpo_dist.distributed.world import World
from dpo_dist.generation.sampling.parts import Parts, work_on
from dpo_dist.generation.sampling.responder import KEY, ModelSource, find_model


class Screen(Protocol):
    """The part of `report.terminal.console.Console` that is used here; it prints on rank 0."""

    def say(self, text: str) -> None:
        """Print one line and log it."""

    def show(self, text: str) -> None:
        """Print one line without logging it."""

    def alarm(self, text: str) -> None:
        """Print and log an error."""

    def heartbeat(self, work: str) -> Callable[[float], None]:
        """Return a function that prints the seconds spent on `work`, once a minute."""

    def progress(self, title: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Yield a function that takes the number of units done and their total."""


@dataclass(frozen=True)
class Stages:
    """The processes that finish stages together. Methods are collective.

    Attributes:
        world: the processes.
        screen: of rank 0.
        remedy: the keys to lower if memory runs out.
    """

    world: World
    screen: Screen
    remedy: str

    def finish(self, title: str, parts: Parts, work: Callable[[int], list[dict[str, Any]]]) -> None:
        """Finish all parts of a stage, with a progress bar."""

        def guarded(index: int) -> list[dict[str, Any]]:
            with explain_out_of_memory(title, self.remedy):
                return work(index)

        unfinished = self.world.on_main(parts.open, self.screen.heartbeat(f"{title}: looking for parts"))
        with self.screen.progress(title, "part") as show:

            def beat(_seconds: float) -> None:
                if self.world.is_main and unfinished:
                    show(parts.finished(), parts.count)

            work_on(parts, unfinished, self.world, guarded, beat)
            beat(0)

    def found(self, name: str, config: RunConfig, key: str = KEY) -> ModelSource:
        """Return the files of a model on every rank; rank 0 downloads first."""
        searching = self.screen.heartbeat(f"reading the files of {name} to identify it")
        self.world.on_main(lambda: find_model(name, config, key), searching)
        return self.world.together(lambda: find_model(name, config, key), searching)


@contextmanager
def joined_stages(config: RunConfig, screen: Screen, remedy: str) -> Iterator[Stages]:
    """Join the processes, each of which loads whole models."""
    whole = replace(
        config.parallelism,
        kind=ParallelismKind.ddp,
        offload_parameters=Offload.none,
        offload_optimizer=Offload.none,
    )
    deepspeed_config = policy_config(whole, config.optim, config.model.dtype)
    stacks = RunFolder.of(config).rank_stacks(os.environ.get("RANK", "0"))
    reports = Reports(screen.alarm, screen.say, stacks)
    with joined(deepspeed_config, config.parallelism.timeout_seconds, reports) as world:
        yield Stages(world, screen, remedy)
