"""The start of a run on joined processes: lock its directory, find where to resume, write its description."""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import set_seed

from dpo_dist.batching.plan import ComputeCosts
from dpo_dist.batching.sampler import Indices
from dpo_dist.config.load import to_yaml
from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.config.schema import Offload, Resume, RunConfig
from dpo_dist.config.user_code import find_function
from dpo_dist.data.dataset import PreferenceDataset, RankBatch, shard_batch
from dpo_dist.distributed.checkpoint import Checkpoint, latest_checkpoint, remove_unfinished
from dpo_dist.distributed.join import joined, load_async_io
from dpo_dist.distributed.processes import Reports
from dpo_dist.distributed.world import Stops, World, with_sequence_groups
from dpo_dist.distributed.zero import STATES_OF_ADAM, policy_config
from dpo_dist.foundation import files
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError, warn_on_bug
from dpo_dist.foundation.files import collect_abandoned, recover_folder, write_text
from dpo_dist.foundation.process import StopRequest
from dpo_dist.foundation.text import counted, first_few, size
from dpo_dist.insight.metrics.log import describe_environment
from dpo_dist.insight.pages.run import write_page
from dpo_dist.model.flops import matmul_peak
from dpo_dist.model.load import TORCH_DTYPES
from dpo_dist.model.numerics import deterministic_kernels
from dpo_dist.objective.losses import check_custom_loss
from dpo_dist.training.clock import WorkClock
from dpo_dist.training.resume import (
    RunState,
    check_configuration,
    check_fresh_start,
    find_finished,
    write_state,
)

T = TypeVar("T")


class Run:
    """One start of a run, or of a verb about one: its configuration on its joined processes.

    `stops` is asked after every step; one rank's vote ends the run on all. `clock` has the time by kind of
    work since `began`, by `time.monotonic`.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        console: Console,
        stop: StopRequest | None = None,
        began: float | None = None,
    ):
        self.config, self.world, self.console = config, world, console
        self.folder = RunFolder.of(config)
        self.stops = Stops(stop or StopRequest(), world)
        self.clock = WorkClock(world.size, time.monotonic() if began is None else began)

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        self.console.say(text)

    def shard(self, dataset: PreferenceDataset, indices: Indices, costs: ComputeCosts) -> RankBatch:
        """Return this rank's micro-batches of a global batch."""
        world, budget = self.world, self.config.trainer.micro_batch_tokens
        one_sided = self.config.loss.is_one_sided
        return shard_batch(dataset, indices, world.replica, world.replicas, budget, costs, one_sided)

    def write(self, work: Callable[[], T]) -> T:
        """Run `work`, which writes files of the run, on rank 0 and return its result on all; collective."""

        def guarded() -> T:
            if not self.folder.path.is_dir():  # moved away or unmounted; no part of it is made again
                raise FileNotFoundError(errno.ENOENT, "the run directory is missing", str(self.folder))
            return work()

        return self.world.on_main(guarded)


@contextlib.contextmanager
def open_run(
    config: RunConfig, console: Console, stop: StopRequest | None = None, *, trains: bool = False
) -> Iterator[Run]:
    """Yield the run on the joined processes of this launch, set up as `config` says; collective.

    `trains`: whether there is an optimizer; without one, no kernel for it is compiled.
    """
    began = time.monotonic()
    if config.reference.offload is Offload.nvme:
        load_async_io(console.say)
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
        set_seed(config.trainer.seed % 2**32)
        grouped = with_sequence_groups(world, config.parallelism.sequence_parallel)
        yield Run(config, grouped, console, stop, began)


@contextlib.contextmanager
def locked(run: Run) -> Iterator[None]:
    """Lock the run directory until this start ends, and remove what a killed one was writing. Collective."""
    folder, world = run.folder, run.world
    with contextlib.ExitStack() as lock:
        owner = "is training in this run directory"
        world.on_main(lambda: lock.enter_context(files.locked(folder.lock, owner)))
        for written in (folder.path, folder.metrics, folder.samples, folder.logs, folder.wandb_id.parent):
            world.on_main(partial(collect_abandoned, written))
        world.on_main(partial(remove_unfinished, folder.checkpoints))
        yield


def find_start(run: Run) -> Checkpoint | RunState | None:
    """Return the checkpoint to continue from, or the state of a run whose model is written; collective."""
    config, folder, world = run.config, run.folder, run.world
    checkpoint = None
    if config.run.resume is not Resume.never:
        world.on_main(partial(recover_folder, folder.model))
        if finished := world.on_main(partial(find_finished, config, folder)):
            return finished
        checkpoint = latest_checkpoint(folder.checkpoints, world)
    if checkpoint is None:
        world.on_main(partial(check_fresh_start, config, folder))
    else:
        world.on_main(partial(check_configuration, checkpoint.state, config, folder))
    return checkpoint


def describe_run(run: Run) -> dict[str, Any]:
    """Return the content of environment.json; collective."""
    config, world = run.config, run.world
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
    # A checkpoint is complete before an older one is deleted; the model, which is smaller, is written then.
    there = len(checkpoint_folders(folder.checkpoints))
    spare = max(1, trainer.keep_last) + bool(trainer.keep_best) - there
    intervals = trainer.save_every, trainer.eval_every if trainer.keep_best else 0
    borders = sum((steps - 1) // each - done // each for each in intervals if each)
    saves = 1 + borders if done < steps else 0
    at_once = min(saves, max(1, spare + 1))
    needed = at_once * checkpoint + (model if at_once <= spare or not saves else 0)
    if needed > disk.free:
        raise ConfigError(
            "the disk has no room for the checkpoints and the model of this run",
            where="run.dir",
            got=f"{size(disk.free)} free on the file system of {folder}",
            expected=f"{size(needed)}: up to {at_once} more checkpoints of {size(checkpoint)}, a model of "
            f"{size(model)}",
            remedy="make room, set run.dir to another disk, or lower trainer.keep_last",
        )


def mark_started(run: Run, environment: dict[str, Any], state: RunState) -> None:
    """Record that a run trains, after all checks, and remove the summary of an earlier start; collective.

    A run that starts at step 0 also removes samples, which may be of another model.
    """
    folder = run.folder

    def work() -> None:
        write_text(folder.config, to_yaml(run.config))
        write_text(folder.environment, json.dumps(environment, indent=2) + "\n")
        write_state(folder, state)
        if not state.step:
            shutil.rmtree(folder.samples, ignore_errors=True)
        if folder.summary.exists():
            folder.summary.unlink()
            with warn_on_bug(folder.report.name, run.say):
                write_page(folder)

    run.write(work)


def peak_flops(run: Run) -> float:
    """Return the peak FLOP/s of all devices, measured while all of them are busy; collective."""
    world = run.world
    world.barrier()
    peaks = world.gather(matmul_peak(world.device, TORCH_DTYPES[run.config.model.dtype]))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without those matrices
    return sum(peaks)


def say_header(run: Run) -> None:
    """Print everything that is known before the data are read."""
    config, world = run.config, run.world
    hosts = len({peer.host for peer in world.peers})
    processes = counted(world.size, "process", "processes")
    share = f"{config.data.eval_share:g} of them" if config.data.eval_share else "none"
    train = first_few([source.path for source in config.data.train])
    evaluation = first_few([source.path for source in config.data.eval])
    run.say(f"run directory: {run.folder}")
    run.say(f"model: {config.model.path}, {config.model.dtype}, {config.parallelism.kind}")
    run.say(f"data: {train}; evaluation: {evaluation or share}")
    groups = "" if world.sequence is None else f", in groups of {world.sequence.ranks} that share tokens"
    run.say(f"world: {processes} on {counted(hosts, 'host')}, {world.device.type}{groups}")
