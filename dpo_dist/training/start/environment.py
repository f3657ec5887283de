"""The content of environment.json: command, versions, git commit, hardware, and the user's own functions."""

import contextlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from dpo_dist.config.user_code import LOSS_FUNCTION, METRICS_FUNCTION, find_function
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import without_secrets
from dpo_dist.model.numerics import RECURRENT_KERNELS
from dpo_dist.objective.losses import check_custom_loss
from dpo_dist.objective.metrics import CustomMetrics, custom_metrics
from dpo_dist.training.start.open_run import Run

PACKAGES = (
    *("dpo-dist", "torch", "accelerate", "deepspeed", "transformers", "peft", "datasets", "wandb"),
    *("hydra-core", "flash-attn", "flash-attn-3", "liger-kernel", "triton", "bitsandbytes"),
    *RECURRENT_KERNELS,
)
"""This package, and the libraries on which results depend."""
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


def describe_run(run: Run) -> tuple[dict[str, Any], CustomMetrics]:
    """Return the content of environment.json, and the metrics of the user's function; collective.

    The user's functions are tried here: if one raises an error on some ranks only, all ranks stop.
    """
    config, world = run.config, run.world
    custom_loss = world.together(lambda: check_custom_loss(config.loss, world.device))
    custom = world.together(lambda: custom_metrics(config.metrics.function, config.loss, world.device))
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
        described = custom_loss if key == LOSS_FUNCTION else f"{', '.join(custom.names)} by {function}"
        environment[key.replace(".", "_")] = described
    return environment, custom


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return command, versions, git commit and hardware, without secrets and environment variables.

    `git_commit` and `git_changed_files`, the number of changed tracked files, describe the current folder;
    they are None outside a git checkout.
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
    """Return the command line for a shell, without secrets; None if another program imports the package."""
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
