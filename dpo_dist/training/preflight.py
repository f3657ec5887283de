"""Checks of a run before torch is imported and processes join: packages, files, folders."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from dpo_dist.config.losses import LossKind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import OptimizerKind, ParallelismKind, ReferenceMode, RunConfig
from dpo_dist.config.user_code import find_function
from dpo_dist.data.formats import check_source
from dpo_dist.data.template import check_template_file
from dpo_dist.foundation.errors import CheckpointError, ConfigError, DataError, ReferenceModelError
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.text import counted
from dpo_dist.insight.console import Console, open_console, print_text, warnings_off
from dpo_dist.model.folder import (
    check_cached_offline,
    check_tokenizer_files,
    check_weights,
    local_model_folder,
    start_folder,
    tokenizer_folder,
    weight_files,
)
from dpo_dist.training.targets import Evaluated

# The extra that installs a package, if it has another name.
_EXTRAS = {"bitsandbytes": "quantization", "liger-kernel": "liger"}


@contextlib.contextmanager
def started(config: RunConfig, *, trains: bool = False) -> Iterator[Console]:
    """Check the start and open the console; a start that fails before its first step leaves no folders."""
    with without_traces(config):
        check_start(config, trains=trains)
        with open_console(RunFolder.of(config), config.console) as console:
            yield console


def check_only(config: RunConfig, models: Sequence[Evaluated] = (), *, trains: bool = False) -> None:
    """Check what a run, or an evaluation of `models`, needs before it uses a GPU; write nothing."""
    with without_traces(config, of_success=True):
        check_start(config, trains=trains)
        with warnings_off():
            from dpo_dist.training.inputs import rehearse  # noqa: PLC0415  (slow)

            print_text("check", rehearse(config, models, trains=trains), config.console)


def check_start(config: RunConfig, *, trains: bool = False) -> None:
    """Check everything that needs no torch, network or other processes, and create the folders of the run.

    Only processes on the first node check. `trains`: whether there is an optimizer, which may need a package.
    """
    if os.environ.get("RANK", "0") != os.environ.get("LOCAL_RANK", "0"):
        return
    if LossKind.custom in config.loss.kinds:
        find_function(config.loss.function)
    _check_packages(config, trains=trains)
    processes, ranks = int(os.environ.get("WORLD_SIZE", "1")), config.parallelism.sequence_parallel
    if processes % ranks and "WORLD_SIZE" in os.environ:  # `--check` may be alone
        raise ConfigError(
            "the processes cannot be divided into groups of this size",
            where="parallelism.sequence_parallel",
            got=f"{ranks}, with {counted(processes, 'process', 'processes')}",
            expected=f"a divisor of {processes}",
            remedy=f"set it to one, or start a multiple of {ranks} processes",
        )
    _check_models(config)
    for source in [*config.data.train, *config.data.eval]:
        check_source(source, config.data)
    check_template_file(config.data.chat_template)
    _check_run_dir(config)
    for key, folder in _needed_folders(config).items():
        if key != "reference.store" or not folder.is_dir():
            # A read-only store is enough for a run whose log-probs are all in it.
            _check_folder(folder, key)


@contextlib.contextmanager
def without_traces(config: RunConfig, *, of_success: bool = False) -> Iterator[None]:
    """Remove the folders that a start made, if it ends with a user's error before its first step; on rank 0.

    `of_success`: also remove them if the start ends without an error (`--check`).
    """
    folder, needed = RunFolder.of(config), _needed_folders(config).values()
    # os.path, as Path.exists raises for a name that is too long
    made = [path for each in needed for path in (each, *each.parents) if not os.path.exists(path)]  # noqa: PTH110
    has_ended = of_success
    try:
        yield
    except (ConfigError, DataError, ReferenceModelError, CheckpointError):
        has_ended = True
        raise
    finally:
        if has_ended and os.environ.get("RANK", "0") == "0":
            if folder.path in made and not os.path.exists(folder.checkpoints):  # noqa: PTH110
                with contextlib.suppress(ConfigError, OSError), locked(folder.lock, "trains", "wait for it"):
                    shutil.rmtree(folder.path, ignore_errors=True)  # not that of another process
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def _needed_folders(config: RunConfig) -> dict[str, Path]:
    folders = {"run.dir": RunFolder.of(config).path, "data.cache": Path(config.data.cache)}
    if config.reference.mode is ReferenceMode.cached:
        folders["reference.store"] = Path(config.reference.store)
    if config.reference.nvme_path is not None:
        folders["reference.nvme_path"] = Path(config.reference.nvme_path)
    return folders


def _check_run_dir(config: RunConfig) -> None:
    """Refuse a run directory that is a model's folder or that contains other runs."""
    run_dir = Path(os.path.realpath(RunFolder.of(config).path))
    start = None if config.model.adapter is None else config.model.adapter.path
    models = [path for path in (config.model.path, config.reference.path, start) if path is not None]
    fault = ""
    if run_dir == run_dir.parent:
        fault = "the root of the file system"
    elif run_dir in [Path(os.path.realpath(Path(path).expanduser())) for path in models]:
        fault = "the folder of a model"
    elif os.path.isdir(run_dir) and any(run_dir.glob(f"*/{RunFolder(run_dir).state.name}")):  # noqa: PTH112
        fault = "a folder that contains other runs"
    if fault:
        raise ConfigError(
            f"run.dir is {fault}",
            where="run.dir",
            got=str(run_dir),
            expected="a folder for this run alone",
            remedy="set run.dir to a new folder, or run.root to the parent folder of all runs",
        )


def _check_folder(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as fault:
        is_file = os.path.isfile(folder)  # noqa: PTH113 (as above)
        raise ConfigError(
            f"{key} is a file" if is_file else f"{key} cannot be written",
            where=key,
            got=f"{folder}: {fault.strerror or fault}",
            expected="a folder that exists or can be created, with free space and write permission",
            remedy=f"set {key} to another folder, or make this one writable",
        ) from None


def _check_packages(config: RunConfig, *, trains: bool) -> None:
    model, is_8bit = config.model, trains and config.optim.kind is OptimizerKind.adamw_8bit
    needed = [
        # package, key, value that needs it, value that does not
        ("bitsandbytes", "model.quantization", model.quantization, "null"),
        ("bitsandbytes", "reference.quantization", config.reference.quantization, "null"),
        ("bitsandbytes", "optim.kind", config.optim.kind if is_8bit else None, OptimizerKind.adamw),
        ("liger-kernel", "model.liger", "true" if model.liger else None, "false"),
        *((tracker, "tracking.also", tracker, "[]") for tracker in config.tracking.also),
    ]
    for package, key, value, instead in needed:
        if value is not None and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise ConfigError(
                f"{package} is not installed",
                where=key,
                got=value,
                remedy=f"pip install 'dpo-dist[{_EXTRAS.get(package, package)}]', or set {key}={instead}",
            )
    torch_version, is_sharded = version("torch"), config.parallelism.kind is ParallelismKind.zero3
    is_old = tuple(map(int, torch_version.split(".")[:2])) < (2, 12)
    if trains and model.compile and is_sharded and is_old:
        raise ConfigError(
            "compiled layers lose gradients of sharded weights in torch before 2.12",
            where="model.compile",
            got=f"true with parallelism=zero3 and torch {torch_version}",
            remedy="update torch, or set parallelism=zero2 or model.compile=false",
        )


def _check_models(config: RunConfig) -> None:
    policy = _described_model(config.model.path, config.model.revision, "model.path")
    start, adapter = None, config.model.adapter
    if adapter is not None and adapter.path is not None:
        if Path(adapter.path).expanduser().is_dir():
            start = start_folder(config.model)
        else:
            local_model_folder(adapter.path, None, "model.adapter.path")  # raises for a missing one
            check_cached_offline(adapter.path, "model.adapter.path")
    if policy is not None:
        check_tokenizer_files(tokenizer_folder(policy, start))
    if config.reference.path is not None:
        _described_model(config.reference.path, None, "reference.path")


def _described_model(path: str, revision: str | None, key: str) -> Path | None:
    """Return the folder of a local model after the checks of its files; None for a model on the Hub."""
    folder = local_model_folder(path, revision, key)
    if folder is None:
        check_cached_offline(path, key)
    else:
        check_weights(weight_files(folder), key)
    return folder
