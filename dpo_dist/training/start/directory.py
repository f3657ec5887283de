"""The run directory at a start: its lock, where to resume, room on its disk, and the first files."""

import contextlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from dpo_dist.config.load import to_yaml
from dpo_dist.config.run_folder import RunFolder, checkpoint_folders
from dpo_dist.config.schema import Resume
from dpo_dist.config.user_code import LOSS_FUNCTION, METRICS_FUNCTION, find_function
from dpo_dist.distributed.checkpoint.saver import Checkpoint, latest_checkpoint, remove_unfinished
from dpo_dist.foundation.errors import ConfigError, warn_on_bug
from dpo_dist.foundation.files import collect_abandoned, locked, recover_folder, write_text
from dpo_dist.foundation.text import size, without_secrets
from dpo_dist.model.files.load import TORCH_DTYPES
from dpo_dist.objective.losses import check_custom_loss
from dpo_dist.objective.metrics import custom_metrics
from dpo_dist.training.start.context import Run
from dpo_dist.training.start.footprint import state_bytes
from dpo_dist.training.start.preflight import IS_TRAINING
from dpo_dist.training.start.resume import (
    RunState,
    check_configuration,
    check_fresh_start,
    find_finished,
    write_state,
)

PACKAGES = (
    *("dpo-dist", "torch", "accelerate", "deepspeed", "transformers", "peft", "datasets", "wandb"),
    *("hydra-core", "flash-attn", "flash-attn-3", "liger-kernel", "triton"),
)
"""This program, and the libraries that decide its results."""
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def lock_directory(run: Run) -> Iterator[None]:
    """Lock the run directory until this start ends, and remove what a killed one was writing. Collective."""
    folder, world = run.folder, run.world
    with contextlib.ExitStack() as lock:
        world.on_main(lambda: lock.enter_context(locked(folder.lock, IS_TRAINING)))
        for written in (folder.path, folder.metrics, folder.samples, folder.logs, folder.wandb_id.parent):
            world.on_main(partial(collect_abandoned, written))
        world.on_main(partial(remove_unfinished, folder.checkpoints))
        yield


def find_start(run: Run) -> Checkpoint | RunState | None:
    """Return the checkpoint to continue from, or the state of a run whose model is written; collective."""
    identity, folder, world, resume = run.config.identity, run.folder, run.world, run.config.run.resume
    checkpoint = None
    if resume is not Resume.never:
        world.on_main(partial(recover_folder, folder.model))
        if finished := world.on_main(partial(find_finished, identity, folder)):
            return finished
        checkpoint = latest_checkpoint(folder.checkpoints, world)
    if checkpoint is None:
        world.on_main(partial(check_fresh_start, resume, folder))
    else:
        world.on_main(partial(check_configuration, checkpoint.state, identity, folder))
    return checkpoint


def describe_run(run: Run) -> dict[str, Any]:
    """Return the content of environment.json; collective."""
    config, world = run.config, run.world
    custom_loss = world.together(lambda: check_custom_loss(config.loss, world.device))
    names = world.together(lambda: custom_metrics(config.metrics.function, config.loss, world.device)).names
    environment = world.on_main(lambda: describe_environment(world.size))
    for key, written in ((LOSS_FUNCTION, config.loss.function), (METRICS_FUNCTION, config.metrics.function)):
        if written is None:
            continue
        function = find_function(written, key)
        digests = world.gather(function.digest[:8])
        if len(set(digests)) > 1:
            raise ConfigError(
                f"ranks have different sources of {key}",
                where=key,
                got=", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests)),
                remedy="copy the same module to every node",
            )
        described = custom_loss if key == LOSS_FUNCTION else f"{', '.join(names)} by {function}"
        environment[key.replace(".", "_")] = described
    return environment


def check_disk_room(run: Run, weights: int, done: int, steps: int) -> None:
    """Check that the disk has room for the checkpoints and the model of a run of `steps`.

    Not of an adapter, which is small, and not on a file system that reports no size. `done`: steps before
    this start.
    """
    config, folder, trainer = run.config, run.folder, run.config.trainer
    disk = shutil.disk_usage(folder.path)
    if config.model.adapter is not None or not disk.total:
        return
    checkpoint, model = (
        int(state_bytes(config.optim, trainer) * weights),
        TORCH_DTYPES[config.model.dtype].itemsize * weights,
    )
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


def mark_started(
    run: Run, environment: dict[str, Any], state: RunState, write_page: Callable[[RunFolder], object]
) -> None:
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


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return command, versions, git commit and hardware, without secrets and environment variables.

    `git_commit` and `git_changed_files`, the number of tracked files that differ from it, are of the current
    folder; null outside a git checkout.
    """
    changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "command": _command(world_size),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": None if changed is None else len(changed.splitlines()),
        "world_size": world_size,
        "cpus": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def package_versions() -> dict[str, str]:
    """Return the version of each of `PACKAGES` that is installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _command(world_size: int) -> str | None:
    """Return the command line for a shell, without secrets; None if another program uses this package."""
    program = Path(sys.argv[0])
    if program.resolve().parent != _PACKAGE_FOLDER:
        return None
    launcher = ["python"]
    if world_size > 1:
        launcher = ["accelerate", "launch", "--num_processes", str(world_size)]
    command = [*launcher, "-m", f"{_PACKAGE_FOLDER.name}.{program.stem}", *sys.argv[1:]]
    return str(without_secrets(shlex.join(command)))


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
