"""Software and hardware of a run: environment.json."""

import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import psutil
import torch

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


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return versions, git commit and hardware; no environment variables, because they can be secret."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "git_commit": _git_commit(),
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


def _git_commit() -> str | None:
    """Return the commit of the current folder; None outside a git checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
