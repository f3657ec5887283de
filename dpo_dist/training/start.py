"""The start of a run on joined processes: lock its directory, find where to resume, write its description."""

import contextlib
import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from dpo_dist.batching.sampler import BatchSampler
from dpo_dist.config.data import SourceConfig
from dpo_dist.config.load import to_yaml
from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.config.schema import Offload, OptimizerKind, Resume, RunConfig
from dpo_dist.config.user_code import find_function
from dpo_dist.distributed.checkpoint import Checkpoint, has_all_files, latest_checkpoint, remove_unfinished
from dpo_dist.distributed.join import joined
from dpo_dist.distributed.kernels import load_async_io
from dpo_dist.distributed.processes import Reports
from dpo_dist.distributed.sequence_parallel import with_sequence_groups
from dpo_dist.distributed.world import Stops, WhileWaiting, World
from dpo_dist.distributed.zero import STATES_OF_ADAM, policy_config
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import CheckpointError, ConfigError, RunOutcome, StoppedError
from dpo_dist.foundation.files import collect_abandoned, is_temporary, recover_folder, write_text
from dpo_dist.foundation.text import counted, first_few, percent, size
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import describe_environment
from dpo_dist.insight.pages.run import write_page
from dpo_dist.insight.recorder import spared
from dpo_dist.model.flops import matmul_peak
from dpo_dist.model.load import TORCH_DTYPES
from dpo_dist.model.numerics import deterministic_kernels
from dpo_dist.model.optional_packages import check_bitsandbytes
from dpo_dist.objective.custom_loss import check_custom_loss
from dpo_dist.training.resume import (
    RunState,
    check_configuration,
    check_fresh_start,
    check_unused,
    find_finished,
    write_state,
)

T = TypeVar("T")


@contextlib.contextmanager
def open_world(config: RunConfig, console: Console, *, trains: bool = False) -> Iterator[World]:
    """Yield the world of this process's launch, set up as `config` says; collective.

    `trains`: whether there is an optimizer; without one, no kernel for it is compiled.
    """
    if config.reference.offload is Offload.nvme:
        load_async_io(console.say)
    if config.reference.quantization is not None:
        check_bitsandbytes(config.reference.quantization, "reference.quantization")
    if trains and config.optim.kind is OptimizerKind.adamw_8bit:
        check_bitsandbytes(config.optim.kind, "optim.kind", instead=OptimizerKind.adamw)
    parallelism = config.parallelism
    if not trains:
        parallelism = replace(parallelism, offload_optimizer=Offload.none)
    deepspeed_config = policy_config(parallelism, config.optim, config.model.dtype)
    stacks = RunFolder.of(config).rank_stacks(os.environ.get("RANK", "0"))
    reports = Reports(console.alarm, console.say, stacks)
    with (
        deterministic_kernels(config.trainer.deterministic),
        joined(deepspeed_config, config.parallelism.timeout_seconds, reports) as world,
    ):
        # Every generator whose state a checkpoint has; a user's loss may draw from any.
        random.seed(config.trainer.seed)
        np.random.seed(config.trainer.seed % 2**32)
        torch.manual_seed(config.trainer.seed)
        yield with_sequence_groups(world, config.parallelism.sequence_parallel)


@contextlib.contextmanager
def locked(folder: RunFolder, world: World) -> Iterator[None]:
    """Lock the run directory until this start ends, and remove what a killed one was writing. Collective."""
    with contextlib.ExitStack() as lock:
        owner, remedy = "is training in this run directory", "wait for it to end, or set another run.dir"
        world.on_main(lambda: lock.enter_context(files.locked(folder.lock, owner, remedy)))
        for written in (folder.path, folder.metrics, folder.samples, folder.logs, folder.wandb_id.parent):
            world.on_main(partial(collect_abandoned, written))
        world.on_main(partial(remove_unfinished, folder.checkpoints))
        yield


@dataclass(frozen=True)
class Start:
    """The point from which a start continues: nothing, a checkpoint, or a written model with its state."""

    checkpoint: Checkpoint | None = None
    finished: RunState | None = None

    @property
    def step(self) -> int:
        """The number of steps done."""
        return 0 if self.checkpoint is None else int(self.checkpoint.state["step"])


def find_start(config: RunConfig, folder: RunFolder, world: World) -> Start:
    """Return the point to continue from, according to `run.resume`; collective."""
    if config.run.resume is Resume.never:
        world.on_main(partial(check_unused, folder))
        return Start()
    world.on_main(partial(recover_folder, folder.model))
    if finished := world.on_main(partial(find_finished, config, folder)):
        return Start(finished=finished)
    checkpoint = latest_checkpoint(folder.checkpoints, world)
    if checkpoint is None:
        world.on_main(partial(check_fresh_start, config, folder))
    else:
        world.on_main(partial(check_configuration, checkpoint.state, config, folder))
    return Start(checkpoint)


def write_on_main(
    work: Callable[[], T], folder: RunFolder, world: World, while_waiting: WhileWaiting | None = None
) -> T:
    """Run `work`, which writes files of the run, on rank 0 and return its result on all; collective."""

    def guarded() -> T:
        try:
            if not folder.path.is_dir():  # moved away or unmounted; no part of it is made again
                raise FileNotFoundError(errno.ENOENT, "the run directory is missing", str(folder.path))
            return work()
        except OSError as error:
            raise CheckpointError(
                "a file of the run cannot be written",
                where=str(error.filename or folder),
                got=str(error),
                remedy="free disk space or correct the permissions; the same command resumes the run",
            ) from error

    return world.on_main(guarded, while_waiting)


def describe_run(config: RunConfig, world: World) -> dict[str, Any]:
    """Return the content of environment.json; collective."""
    own_loss = world.together(lambda: check_custom_loss(config.loss, world.device))
    environment = world.on_main(lambda: describe_environment(world.size))
    if own_loss is None:
        return environment
    digests = world.gather(find_function(config.loss.function).digest[:8])
    if len(set(digests)) > 1:
        raise ConfigError(
            "ranks have different sources of the loss function",
            where="loss.function",
            got=", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests)),
            remedy="copy the same module to every node",
        )
    return environment | {"loss_function": own_loss}


def check_disk_room(config: RunConfig, weights: int, done: int, steps: int) -> None:
    """Check that the disk of `run.dir` has room for the checkpoints and the model of a run of `steps`.

    Not of an adapter, which is small, and not on a file system that reports no size. `done`: steps before
    this start.
    """
    folder, trainer = RunFolder.of(config), config.trainer
    disk = shutil.disk_usage(folder.path)
    if config.model.adapter is not None or not disk.total:
        return
    copies = 1 + STATES_OF_ADAM[config.optim.kind] + (trainer.ema_decay is not None)  # in float32
    checkpoint, model = int(4 * copies * weights), TORCH_DTYPES[config.model.dtype].itemsize * weights
    # A checkpoint is complete before an older one is deleted; the model is written beside those kept.
    there = sum(map(has_all_files, checkpoint_folders(folder.checkpoints)))
    kept = max(1, trainer.keep_last) + bool(trainer.keep_best)
    intervals = trainer.save_every, trainer.eval_every if trainer.keep_best else 0
    borders = sum((steps - 1) // each - done // each for each in intervals if each)
    saves = 0 if done >= steps else 1 + borders
    at_once = max(min(saves, kept + 1 - there), min(saves, 1))
    needed = max(at_once * checkpoint, (min(there + saves, kept) - there) * checkpoint + model)
    if needed > disk.free:
        raise ConfigError(
            "the disk has no room for the checkpoints and the model of this run",
            where="run.dir",
            got=f"{size(disk.free)} free on the file system of {folder}",
            expected=f"{size(needed)}: up to {at_once} more checkpoints of {size(checkpoint)}, a model of "
            f"{size(model)}",
            remedy="make room, set run.dir to another disk, or lower trainer.keep_last",
        )


def write_description(config: RunConfig, environment: dict[str, Any], world: World) -> None:
    """Write config.yaml and environment.json, after every check that may refuse the start; collective."""
    folder = RunFolder.of(config)

    def write() -> None:
        write_text(folder.config, to_yaml(config))
        write_text(folder.environment, json.dumps(environment, indent=2) + "\n")

    write_on_main(write, folder, world)


def mark_started(folder: RunFolder, state: RunState, world: World, console: Console) -> None:
    """Record that a run trains, and remove the summary of an earlier start; collective."""

    def work() -> None:
        write_state(folder, state)
        for leftover in folder.path.glob(f"{folder.model.name}.*"):
            if is_temporary(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        if folder.summary.exists():
            folder.summary.unlink()
            with spared(folder.report.name, console.say):
                write_page(folder)

    write_on_main(work, folder, world)


@contextlib.contextmanager
def recorded_stop(folder: RunFolder, state: RunState, stops: Stops) -> Iterator[None]:
    """Write the state of a run that is stopped inside the block, before a step of this start."""
    try:
        yield
    except StoppedError:
        if stops.world.is_main:
            with contextlib.suppress(OSError):
                write_state(folder, replace(state, outcome=RunOutcome.preempted, stopped_by=stops.agreed))
        raise


def peak_flops(config: RunConfig, world: World) -> float:
    """Return the peak FLOP/s of all devices, measured while all of them are busy; collective."""
    world.barrier()
    peaks = world.gather(matmul_peak(world.device, TORCH_DTYPES[config.model.dtype]))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without those matrices
    return sum(peaks)


def say_header(config: RunConfig, world: World, console: Console) -> None:
    """Print everything that is known before the data are read."""
    hosts = len({peer.host for peer in world.peers})
    processes = counted(world.size, "process", "processes")
    share = f"{config.data.eval_share:g} of them" if config.data.eval_share else "none"
    console.say(f"run directory: {RunFolder.of(config)}")
    console.say(f"model: {config.model.path}, {config.model.dtype}, {config.parallelism.kind}")
    console.say(f"data: {_sources(config.data.train)}; evaluation: {_sources(config.data.eval) or share}")
    console.say(f"world: {processes} on {counted(hosts, 'host')}, {world.device.type}")
    if world.sequence is not None:
        console.say(f"world: in groups of {world.sequence.ranks} that share the tokens of each micro-batch")


def say_steps(sampler: BatchSampler, first: int, ema_decay: float | None, console: Console) -> None:
    """Print the number of steps, of which `first` are done, and how much a moving average forgets in them."""
    pairs = counted(sampler.global_batch_pairs, "pair")
    left = f", {first:,} of them done" if first else ""
    console.say(f"training: {counted(sampler.steps, 'step')} of {pairs}{left}")
    if ema_decay is not None:
        kept = percent(ema_decay**sampler.steps)
        console.say(f"moving average of the weights: at the end {kept} of it are the weights at the start")


def _sources(sources: Sequence[SourceConfig]) -> str:
    return first_few([source.path for source in sources])
