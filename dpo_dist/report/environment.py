"""Software and hardware of a run: environment.json."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from dpo_dist.secret_text import without_secrets

_PACKAGES = (
    "dpo-dist",
    "torch",
    "accelerate",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "wandb",
    "hydra-core",
    "flash-attn",
    "liger-kernel",
)
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return command, versions, git commit and hardware, without secrets.

    Environment variables can be secret, so there are none. `git_commit` and `git_changed_files`, the number
    of tracked files that differ from it, are of the current folder; null outside a git checkout.
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
    """Return the versions of this program and of the libraries that decide its results."""
    return {name: version for name in _PACKAGES if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    """Return the output of git in the current folder; None outside a checkout."""
    try:
        result = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
