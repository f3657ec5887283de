"""What a start runs with: the content of environment.json, and what all ranks must have alike."""

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

from dpo_dist.config.named_code import named_functions
from dpo_dist.config.schema import METRICS_FUNCTION, RunConfig
from dpo_dist.distributed.processes.world import LIBRARIES, World, check_same_code
from dpo_dist.foundation.fields import as_written, plain_values
from dpo_dist.foundation.files import content_digest
from dpo_dist.foundation.text import without_secrets
from dpo_dist.foundation.types import dotted_items
from dpo_dist.foundation.user_code import find_function, user_function
from dpo_dist.model.numerics import RECURRENT_KERNELS
from dpo_dist.objective.losses import check_custom_loss
from dpo_dist.objective.metrics import CustomMetrics, custom_metrics

PACKAGES = (
    *("dpo-dist", "torch", "accelerate", "deepspeed", "transformers", "peft", "datasets", "wandb"),
    *("hydra-core", "flash-attn", "flash-attn-3", "liger-kernel", "triton", "bitsandbytes"),
    *RECURRENT_KERNELS,
)
"""This package, and the libraries on which results depend."""
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


def check_same_start(config: RunConfig, world: World) -> None:
    """Check that all ranks have one configuration, the same packages, and the same code; collective."""
    check_same_code(world, world.together(lambda: _shared_facts(config)))


def _shared_facts(config: RunConfig) -> dict[str, str]:
    """Return what all ranks of a run must have alike, by the names that an error shows.

    Imports the user's functions, with what they import.
    """
    values = plain_values(config)
    facts = {key: as_written(value) for key, value in dotted_items(values)}
    facts |= {f"version of {name}": version for name, version in package_versions().items()}
    facts.pop("version of wandb", None)  # only rank 0 uses it
    # The metadata are those of site-packages, also where Python finds a checkout before it.
    for name in sys.modules.keys() & LIBRARIES:
        facts[f"version of {name}"] = str(sys.modules[name].__version__)
    facts["version of python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    # A checkout may be at another commit of the same version.
    facts["source of dpo_dist"] = content_digest(sorted(_PACKAGE_FOLDER.rglob("*.py")))[:8]
    for function, key in named_functions(values).items():
        user_function(function, key)
        facts[f"source of {function}"] = find_function(function, key).digest[:8]
    return facts


def describe_run(config: RunConfig, world: World) -> tuple[dict[str, Any], CustomMetrics]:
    """Return the content of environment.json, and the metrics of the user's function; collective.

    The user's functions are tried here: if one raises an error on some ranks only, all ranks stop.
    """
    custom_loss = world.together(lambda: check_custom_loss(config.loss, world.device))
    custom = world.together(lambda: custom_metrics(config.metrics.function, config.loss, world.device))
    environment = world.on_main(lambda: describe_environment(world.size))
    if config.loss.function is not None:
        environment["loss_function"] = custom_loss
    if config.metrics.function is not None:
        function = find_function(config.metrics.function, METRICS_FUNCTION)
        environment["metrics_function"] = f"{', '.join(custom.names)} by {function}"
    return environment, custom


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return command, versions, git commit and hardware, without secrets and environment variables.

    `git_commit` and `git_changed_files`, the number of changed tracked files, describe the current folder;
    they are None outside a git checkout.
    """
    changes = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    gpus = list(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "command": _command(world_size),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": None if changes is None else len(changes.splitlines()),
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
