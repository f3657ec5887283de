"""The run directory: its lock, where to resume from, and the files that every start and every end write."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import is_temporary, recover_folder, staged_folder, write_text
from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import to_yaml
from dpo_dist.config.schema import Resume, RunConfig
from dpo_dist.digests import text_digest
from dpo_dist.distributed.checkpoint import Checkpoint, check_same_processes, latest_checkpoint
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import WhileWaiting, World
from dpo_dist.errors import CheckpointError, Outcome
from dpo_dist.report.console import Console
from dpo_dist.report.environment import describe_environment
from dpo_dist.report.metrics_log import SUMMARY_NAME
from dpo_dist.report.page import METRICS_FOLDER, write_page
from dpo_dist.training.run_state import (
    RunState,
    check_identity,
    read_state,
    write_state,
)
from dpo_dist.training.startup import STATE_NAME

T = TypeVar("T")

CHECKPOINTS = "checkpoints"
MODEL = "model"


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins: from nothing, from a checkpoint, or after its last step.

    `finished` is the state of a run whose model is written.
    """

    checkpoint: Checkpoint | None = None
    finished: RunState | None = None


@contextlib.contextmanager
def locked(run_dir: Path, world: World, console: Console) -> Iterator[None]:
    """Keep a second start of the same run out of its folder until this one ends, however it ends. Collective.

    Raises:
        CheckpointError: another process is training there, or the folder cannot be made.
    """
    files: list[TextIO] = []
    warning = world.on_main(lambda: _lock(run_dir, files))
    if warning:
        console.say(warning)
    try:
        yield
    finally:
        for file in files:
            file.close()


def _lock(run_dir: Path, files: list[TextIO]) -> str:
    """Lock `run_dir`, with files that `files` keep open; returns a warning if only this host is locked."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        files.append((run_dir / ".lock").open("w"))
    except OSError as error:
        raise CheckpointError(
            "the run folder cannot be written",
            where=str(run_dir),
            got=str(error),
            remedy="mend its permissions, or set another run.dir",
        ) from error
    missing = _take_lock(files[0], run_dir)
    if not missing:
        return ""
    of_host = f"dpo_dist-{os.getuid()}-{text_digest(str(run_dir.resolve()))}.lock"
    files.append((Path(tempfile.gettempdir()) / of_host).open("w"))
    _take_lock(files[1], run_dir)
    return (
        f"warning: the file system of {run_dir} cannot lock files ({missing}): "
        "only this host keeps a second start of this run out, do not start it on another one"
    )


def _take_lock(file: TextIO, run_dir: Path) -> str:
    """Lock an open file; returns why that is not possible on its file system, if it is not.

    Raises:
        CheckpointError: another process has the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # EWOULDBLOCK, EAGAIN
        raise CheckpointError(
            "another process is training in this run folder",
            where=str(run_dir),
            remedy="wait for it, or set another run.dir",
        ) from None
    except OSError as error:  # ENOSYS, ENOLCK, ENOTSUP: Lustre and NFS without a lock service
        return str(error.strerror)
    return ""


def find_start(config: RunConfig, run_dir: Path, world: World) -> Start:
    """Return where to begin, as `run.resume` has it; collective.

    Raises:
        CheckpointError: `run.resume` cannot be kept, the folder belongs to another configuration, none of its
            checkpoints is whole, or they were written by other processes.
    """
    if config.run.resume is Resume.never:
        world.on_main(partial(_check_folder_unused, run_dir))
        return Start()
    state, has_model = world.on_main(partial(_look_at, run_dir))
    is_finished = state is not None and state.outcome in (Outcome.exported, Outcome.completed)
    if is_finished and has_model:
        return Start(finished=state)
    checkpoint = latest_checkpoint(run_dir / CHECKPOINTS, world)
    if checkpoint is None:
        _check_fresh_start(config.run.resume, run_dir, is_finished, has_model)
        return Start()
    check_identity(checkpoint.state, {"run_digest": run_digest(config)}, checkpoint.folder)
    check_same_processes(checkpoint, config.parallelism, world)
    return Start(checkpoint)


def _look_at(run_dir: Path) -> tuple[RunState | None, bool]:
    recover_folder(run_dir / MODEL)
    return read_state(run_dir), (run_dir / MODEL).is_dir()


def _check_fresh_start(resume: Resume, run_dir: Path, is_finished: bool, has_model: bool) -> None:
    """Refuse to start afresh where a checkpoint is wanted, or where there is a result to lose."""
    if is_finished:
        raise CheckpointError(
            "this run is complete, but its model and its checkpoints are gone",
            where=str(run_dir),
            remedy=f"put {MODEL}/ back, or delete {STATE_NAME} to train again",
        )
    if has_model:
        raise CheckpointError(
            "there is a model in the run folder, but no checkpoint to resume from",
            where=str(run_dir / MODEL),
            remedy=f"move {MODEL}/ away to train again, or set another run.dir",
        )
    if resume is Resume.must:
        raise CheckpointError(
            "there is no checkpoint to resume from",
            where=str(run_dir / CHECKPOINTS),
            remedy="set run.resume=auto to start afresh",
        )


def write_on_main(work: Callable[[], T], run_dir: Path, world: World) -> T:
    """Do `work`, which writes files of the run, on rank 0 and return its result on all; collective.

    Raises:
        CheckpointError: a file cannot be written.
    """

    def guarded() -> T:
        try:
            return work()
        except OSError as error:
            raise CheckpointError(
                "a file of the run cannot be written",
                where=str(error.filename or run_dir),
                got=str(error),
                remedy="make room or mend the permissions; the same command goes on from what was committed",
            ) from error

    return world.on_main(guarded)


def mark_started(run_dir: Path, state: RunState, world: World) -> None:
    """Record that a run trains, and have nothing say any more how an earlier start ended; collective."""

    def work() -> None:
        write_state(run_dir, state)
        for left_over in run_dir.glob(f"{MODEL}.*"):
            if is_temporary(left_over):
                shutil.rmtree(left_over, ignore_errors=True)
        summary = run_dir / METRICS_FOLDER / SUMMARY_NAME
        if summary.exists():
            summary.unlink()
            write_page(run_dir)

    write_on_main(work, run_dir, world)


def _check_folder_unused(run_dir: Path) -> None:
    used = [name for name in (CHECKPOINTS, METRICS_FOLDER, MODEL) if (run_dir / name).exists()]
    if used:
        raise CheckpointError(
            "the run folder is in use and run.resume=never",
            where=str(run_dir),
            got=", ".join(used),
            remedy="set run.resume=auto to go on, or another run.dir",
        )


def describe_run(config: RunConfig, run_dir: Path, world: World) -> dict[str, Any]:
    """Write config.yaml and environment.json; returns what stands in the latter. Collective."""

    def write() -> dict[str, Any]:
        write_text(run_dir / "config.yaml", to_yaml(config))
        environment = describe_environment(world.size)
        write_text(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")
        return environment

    return write_on_main(write, run_dir, world)


def export_model(
    policy: PolicyEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    world: World,
    while_waiting: WhileWaiting | None = None,
) -> None:
    """Write the result as a folder that transformers loads; collective.

    Raises:
        CheckpointError: it cannot be written.
    """
    weights = policy.whole_weights()

    def write() -> None:
        try:
            with staged_folder(folder) as temporary:
                policy.causal_lm.save_pretrained(temporary, state_dict=weights, max_shard_size="5GB")
                tokenizer.save_pretrained(temporary)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "the trained model cannot be written",
                where=str(folder),
                got=str(error),
                remedy="make room; the last checkpoint is whole, the same command writes the model from it",
            ) from error

    world.on_main(write, while_waiting)


def reset_peak_memory(world: World) -> None:
    """Begin `peak_memory_bytes` anew, where the system lets it; not collective."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux only
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(world: World) -> int:
    """Of the largest rank: GPU memory where there is one, else the resident set; collective."""
    if world.device.type == "cuda":
        mine = torch.cuda.max_memory_allocated()
    else:
        import resource  # noqa: PLC0415  (POSIX only)

        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(world.gather(mine))
