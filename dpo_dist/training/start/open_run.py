"""Open one start of a run, or of a verb that reads one: configuration, processes, console and files."""

import contextlib
import errno
import os
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.sampler import Indices
from dpo_dist.batching.step_batch import RankBatch, shard_batch
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import (
    AdapterConfig,
    Dtype,
    Offload,
    OptimConfig,
    ParallelismConfig,
    ParallelismKind,
    RunConfig,
)
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.processes.world import Stops, World
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.foundation.text import first_few, pluralize
from dpo_dist.model.numerics import deterministic_kernels, has_products
from dpo_dist.training.start.environment import check_same_start

if TYPE_CHECKING:
    from dpo_dist.training.after_checkpoint import AfterCheckpoint

T = TypeVar("T")

DEFAULT_TOKENS = 8192  # of a micro-batch
_ON_CPU = 2048  # more are not faster


class Run:
    """One start of a run, or of a verb that reads one: the configuration and this rank's process.

    Attributes:
        stops: checked after every step; one rank's request stops all ranks.
        after_checkpoint: runs the command `run.after_checkpoint` of a training run; on rank 0.
        micro_batch_tokens: with `auto`, changed when the model's shape is known.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        console: Console,
        stop: StopRequest | None = None,
    ):
        self.config = config
        self.world = world
        self.console = console
        tokens = config.trainer.micro_batch_tokens
        usual = _ON_CPU if world.device.type == "cpu" else DEFAULT_TOKENS
        self.micro_batch_tokens = usual if tokens == "auto" else tokens
        self.folder = RunFolder(config.run.path)
        self.stops = Stops(stop or StopRequest(), world)
        self.after_checkpoint: AfterCheckpoint | None = None

    def say(self, text: str) -> None:
        """Print a line; on rank 0 only."""
        self.console.say(text)

    def note(self, text: str) -> None:
        """Write a line to the log only."""
        self.console.note(text)

    def warn(self, text: str) -> None:
        """Print a warning; on rank 0 only."""
        self.console.warn(text)

    def shard(
        self, dataset: PreferenceDataset, indices: Indices, costs: ComputeCosts, scorers: Collection[str] = ()
    ) -> RankBatch:
        """Return this rank's micro-batches of a global batch, for live scorers and the given ones, too."""
        place = (self.world.replica, self.world.replicas)
        loss = self.config.loss
        live = self.config.live_scorers.union(scorers)
        return shard_batch(dataset, indices, *place, self.micro_batch_tokens, costs, loss, live=live)

    def write(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 to write files of the run; return its result on all ranks. Collective."""

        def work_in_folder() -> T:
            # Moved or unmounted: writing would create a new folder, which lacks all earlier files.
            if not self.folder.path.is_dir():
                raise FileNotFoundError(errno.ENOENT, "the run directory is missing", str(self.folder))
            return work()

        return self.world.on_main(work_in_folder)


@contextlib.contextmanager
def join(config: RunConfig, deepspeed_config: dict[str, Any], console: Console) -> Iterator[World]:
    """Yield this launch's processes, which have one configuration and the same software; collective.

    Console and run directory get reports of their failures.
    """
    # Imports DeepSpeed, which `--check` does without.
    from dpo_dist.distributed.processes.failures import Reports  # noqa: PLC0415
    from dpo_dist.distributed.processes.join import join_world  # noqa: PLC0415

    stacks = RunFolder(config.run.path).rank_stacks(os.environ.get("RANK", "0"))
    reports = Reports(console.alarm, console.say, stacks)
    with join_world(deepspeed_config, config.parallelism.timeout_seconds, reports) as world:
        check_same_start(config, world)
        yield world


@contextlib.contextmanager
def open_run(
    config: RunConfig, console: Console, stop: StopRequest | None = None, *, trains: bool = False
) -> Iterator[Run]:
    """Join the processes of this launch, seed them, and yield the run; collective.

    `trains`: whether there is an optimizer; without one, its kernels are not compiled.
    """
    # Imports DeepSpeed, which `--check` does without.
    from dpo_dist.distributed.parallel_groups import parallel_groups  # noqa: PLC0415

    parallelism = config.parallelism
    if not trains:
        parallelism = replace(parallelism, offload_optimizer=Offload.none)
        # What is scored does not depend on these, and fewer processes than a run had may score.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes % (parallelism.shard_size or 1):
            parallelism = replace(parallelism, shard_size=None)
        if processes % parallelism.experts:
            parallelism = replace(parallelism, experts=1)
    deepspeed_config = policy_config(parallelism, config.optim, config.model.dtype)
    joins = join(config, deepspeed_config, console)
    with deterministic_kernels(config.trainer.deterministic), joins as world:
        # Not transformers' `set_seed`: its module imports peft, which most models do not need.
        seed = config.trainer.seed % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with parallel_groups(world, parallelism) as grouped:
            yield Run(config, grouped, console, stop)


@contextlib.contextmanager
def joined_run(config: RunConfig, console: Console, lock: AbstractContextManager[Any]) -> Iterator[Run]:
    """Join the processes, each of which loads whole models; rank 0 holds the lock."""
    whole = ParallelismConfig(ParallelismKind.ddp)
    deepspeed_config = policy_config(whole, config.optim, config.model.dtype)
    with contextlib.ExitStack() as locks, join(config, deepspeed_config, console) as world:
        world.on_main(lambda: locks.enter_context(lock))
        yield Run(config, world, console)


def say_header(run: Run) -> None:
    """Print run directory, model, data and world."""
    config = run.config
    world = run.world
    hosts = len({peer.host for peer in world.peers})
    processes = pluralize(world.size, "process", "processes")
    share = f"{config.data.eval_share:g} of them" if config.data.eval_share else "none"
    train = first_few([source.path for source in config.data.train])
    evaluation = first_few([source.path for source in config.data.eval])
    run.say(f"run directory: {run.folder}")
    groups = ""
    if world.sequence is not None:
        groups += f", in groups of {world.sequence.ranks} for sequence parallelism"
    if world.experts is not None:
        groups += f", in groups of {world.experts.ranks} that share experts"
    if world.shards is not None:
        groups += f", with a copy of the weights in each {world.shards.ranks}"
    place = f"{processes} on {pluralize(hosts, 'host')}, {world.device.type}{groups}"
    run.say(f"model: {config.model.path}, {config.model.dtype}, {config.parallelism.kind}, {place}")
    if world.device.type == "cpu" and config.model.dtype is Dtype.bf16 and not has_products(Dtype.bf16):
        run.say("hint: this CPU has no instructions for bf16: model.dtype=fp32 is several times faster")
    run.say(f"data: {train}; evaluation: {evaluation or share}")
    warning = rate_warning(config.model.adapter, config.optim)
    if warning:
        run.warn(warning)


def rate_warning(adapter: AdapterConfig | None, optim: OptimConfig) -> str:
    """Return a warning, in words, if an adapter has a learning rate for all weights; else ""."""
    if adapter is None or optim.lr >= _LEAST_ADAPTER_RATE:
        return ""
    return (
        f"optim.lr={optim.lr:g} is a rate for training all weights: an adapter hardly learns by it; "
        "1e-4 to 3e-4 is usual for an adapter (optim.lr=1e-4)"
    )


_LEAST_ADAPTER_RATE = 5e-6  # of public recipes for adapters
