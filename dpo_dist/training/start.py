"""The start of a run: lock its directory, find where to resume, write the files that every start writes."""

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
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Offload, OptimizerKind, Resume, RunConfig
from dpo_dist.config.user_code import find_function
from dpo_dist.distributed.checkpoint import Checkpoint, latest_checkpoint, remove_unfinished
from dpo_dist.distributed.join import joined
from dpo_dist.distributed.kernels import load_async_io
from dpo_dist.distributed.processes import Reports
from dpo_dist.distributed.sequence_parallel import with_sequence_groups
from dpo_dist.distributed.world import Stops, WhileWaiting, World
from dpo_dist.distributed.zero import policy_config
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import CheckpointError, ConfigError, RunOutcome, StoppedError
from dpo_dist.foundation.files import collect_abandoned, is_temporary, recover_folder, write_text
from dpo_dist.foundation.text import counted, first_few, percent
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import describe_environment
from dpo_dist.insight.pages.run import write_page
from dpo_dist.insight.recorder import spared
from dpo_dist.model.flops import PeakFlops, datasheet_peak, matmul_peak
from dpo_dist.model.load import TORCH_DTYPES
from dpo_dist.model.numerics import deterministic_kernels
from dpo_dist.model.optional_packages import check_bitsandbytes
from dpo_dist.objective.custom_loss import check_custom_loss
from dpo_dist.training.schedule import check_longer, former_length
from dpo_dist.training.startup import check_configuration
from dpo_dist.training.state import RunState, check_no_progress, read_state, write_state

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """The point from which a start continues: nothing, a checkpoint, or a written model.

    Attributes:
        checkpoint: resume from it; None for a fresh run.
        finished: the state of a run whose model is written; None otherwise.
    """

    checkpoint: Checkpoint | None = None
    finished: RunState | None = None

    @property
    def step(self) -> int:
        """The number of steps done."""
        return 0 if self.checkpoint is None else int(self.checkpoint.state["step"])


@contextlib.contextmanager
def locked(folder: RunFolder, world: World) -> Iterator[None]:
    """Lock the run directory against a second start until this one ends, in error or not. Collective.

    Raises:
        ConfigError: another process trains there.
    """
    with contextlib.ExitStack() as lock:
        owner, remedy = "is training in this run directory", "wait for it to end, or set another run.dir"
        world.on_main(lambda: lock.enter_context(files.locked(folder.lock, owner, remedy)))
        for written in (folder.path, folder.metrics, folder.samples, folder.logs, folder.wandb_id.parent):
            world.on_main(partial(collect_abandoned, written))
        world.on_main(partial(remove_unfinished, folder.checkpoints))
        yield


def find_start(config: RunConfig, folder: RunFolder, world: World) -> Start:
    """Return the point to continue from, according to `run.resume`; collective.

    Raises:
        CheckpointError: `run.resume` cannot be obeyed, the directory belongs to another configuration, or
            every checkpoint is damaged.
    """
    if config.run.resume is Resume.never:
        world.on_main(partial(check_folder_unused, folder))
        return Start()
    world.on_main(partial(recover_folder, folder.model))
    if finished := world.on_main(partial(find_finished, config, folder)):
        return Start(finished=finished)
    checkpoint = latest_checkpoint(folder.checkpoints, world)
    if checkpoint is None:
        world.on_main(partial(check_fresh_start, config, folder))
        return Start()
    world.on_main(partial(check_configuration, checkpoint.state, config, folder))
    world.on_main(partial(check_longer, checkpoint.state, config, folder))
    return Start(checkpoint)


def find_finished(config: RunConfig, folder: RunFolder) -> RunState | None:
    """Return the state of a run that is complete at the length of `config` and has its model, else None."""
    state = read_state(folder)
    if state is None or not _is_finished(state) or former_length(state.identity, config, folder) is not None:
        return None
    return state if any(folder.model.glob("*.safetensors")) else None


def _is_finished(state: RunState) -> bool:
    return state.outcome in (RunOutcome.exported, RunOutcome.completed)


def check_fresh_start(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a start without a checkpoint where one is required, or where it would replace a result."""
    state, has_model, model = read_state(folder), folder.model.is_dir(), f"{folder.model.name}/"
    is_finished = state is not None and _is_finished(state)
    has_other_length = state is not None and former_length(state.identity, config, folder) is not None
    if has_other_length and (is_finished or has_model):
        raise CheckpointError(
            "this run has another length and no checkpoint from which it could continue to this one",
            where=str(folder.checkpoints),
            remedy="set the length that it had, or train a new run with another run.dir; runs with "
            "trainer.keep_last of 1 or more can be continued",
        )
    if is_finished:
        raise CheckpointError(
            "this run is complete, but its model and its checkpoints were removed",
            where=str(folder),
            remedy=f"put {model} back, or delete {folder.state.name} to train again",
        )
    if has_model:
        raise CheckpointError(
            "there is a model in the run directory, but no checkpoint to resume from",
            where=str(folder.model),
            remedy=f"move {model} away to train again, or set another run.dir",
        )
    if config.run.resume is Resume.must:
        raise CheckpointError(
            "there is no checkpoint to resume from",
            where=str(folder.checkpoints),
            remedy="set run.resume=auto to start a new run",
        )
    check_no_progress(state, folder)


def check_folder_unused(folder: RunFolder) -> None:
    """Refuse a directory with results, for `run.resume=never`."""
    used = [path.name for path in (folder.checkpoints, folder.metrics, folder.model) if path.exists()]
    if used:
        raise CheckpointError(
            "the run directory has results of a run, and run.resume=never",
            where=str(folder),
            got=", ".join(used),
            remedy="set run.resume=auto to resume, or another run.dir",
        )


def write_on_main(
    work: Callable[[], T], folder: RunFolder, world: World, while_waiting: WhileWaiting | None = None
) -> T:
    """Run `work`, which writes files of the run, on rank 0 and return its result on all; collective.

    Raises:
        CheckpointError: a file cannot be written.
    """

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


def _describe_loss_function(config: RunConfig, world: World) -> dict[str, str]:
    """Check a custom loss on every rank, and return its description; nothing for other losses. Collective.

    Raises:
        ConfigError: the function cannot be used for training, or ranks read different sources of it.
    """
    described = world.together(lambda: check_custom_loss(config.loss, world.device))
    if described is None:
        return {}
    digests = world.gather(find_function(config.loss.function).digest[:8])
    if len(set(digests)) > 1:
        raise ConfigError(
            "ranks have different sources of the loss function",
            where="loss.function",
            got=", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests)),
            remedy="copy the same module to every node",
        )
    return {"loss_function": described}


def describe_run(config: RunConfig, world: World) -> dict[str, Any]:
    """Return the content of environment.json; collective.

    Raises:
        ConfigError: the run has a loss function that cannot be used for training.
    """
    loss_function = _describe_loss_function(config, world)
    return world.on_main(lambda: describe_environment(world.size) | loss_function)


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


@contextlib.contextmanager
def open_world(config: RunConfig, console: Console, *, trains: bool = False) -> Iterator[World]:
    """Yield the world of this process's launch, set up as `config` says; collective.

    Args:
        config: of the run.
        console: of this rank.
        trains: whether there is an optimizer; without one, no kernel for it is compiled.
    """
    if config.reference.offload is Offload.nvme:
        load_async_io(console.say)
    if config.reference.quantization is not None:
        check_bitsandbytes(config.reference.quantization, "reference.quantization")
    if trains and config.optim.kind is OptimizerKind.adamw_8bit:
        check_bitsandbytes(config.optim.kind, "optim.kind", instead=OptimizerKind.adamw)
    parallelism = (
        config.parallelism if trains else replace(config.parallelism, offload_optimizer=Offload.none)
    )
    deepspeed_config = policy_config(parallelism, config.optim, config.model.dtype)
    stacks = RunFolder.of(config).rank_stacks(os.environ.get("RANK", "0"))
    reports = Reports(console.alarm, console.say, stacks)
    with (
        deterministic_kernels(config.trainer.deterministic),
        joined(deepspeed_config, config.parallelism.timeout_seconds, reports) as world,
    ):
        _seed(config.trainer.seed)
        yield with_sequence_groups(world, config.parallelism.sequence_parallel)


def _seed(seed: int) -> None:
    """Seed every generator whose state a checkpoint has; a user's loss may draw from any."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_flops(config: RunConfig, world: World) -> PeakFlops:
    """Return the peak of all devices, measured while all of them are busy; collective."""
    dtype = TORCH_DTYPES[config.model.dtype]
    is_cuda = world.device.type == "cuda"
    datasheet = datasheet_peak(torch.cuda.get_device_name(world.device), dtype) if is_cuda else None
    world.barrier()
    peaks = world.gather((matmul_peak(world.device, dtype), datasheet))
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()  # without those matrices
    sheets = [sheet for _, sheet in peaks if sheet is not None]
    return PeakFlops(sum(peak for peak, _ in peaks), sum(sheets) if len(sheets) == world.size else None)


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
