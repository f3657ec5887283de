"""The checks at a start: packages, files and folders, before torch is imported and processes join."""

import contextlib
import importlib.util
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from dpo_dist.config.losses import LOSS_FUNCTION, LossKind
from dpo_dist.config.run_folder import RunFolder, check_writable
from dpo_dist.config.schema import (
    FLASH_ATTN,
    FusedLayers,
    ModelConfig,
    OptimizerKind,
    ParallelismConfig,
    ParallelismKind,
    ReferenceMode,
    Resume,
    RunConfig,
    TeacherMode,
)
from dpo_dist.data import ChatTemplate, DataSource
from dpo_dist.foundation.console import Console, open_console
from dpo_dist.foundation.errors import CheckpointError, ConfigError, DataError, Lack, ReferenceModelError
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.installed import install_extra, is_installed
from dpo_dist.foundation.text import first_few, pluralize
from dpo_dist.foundation.user_code import find_function
from dpo_dist.model.files.folder import (
    CONFIG_FILE,
    check_tokenizer_files,
    check_weights,
    local_model_folder,
    start_folder,
    tokenizer_folder,
    weight_files,
)
from dpo_dist.training.start.run_state import check_newest_checkpoint

_EXTRAS = {"bitsandbytes": "quantization", "liger-kernel": "liger", "flash-attn": "flash-attn"}


@contextlib.contextmanager
def checked_console(config: RunConfig, *, trains: bool = False) -> Iterator[Console]:
    """Check a start and yield its console; if it fails before training, delete its new run directory."""
    folder = RunFolder(config.run.path)
    is_new = not folder.path.exists()
    check_start(config, trains=trains, starts=True)
    try:
        with open_console(folder.rank_log, config.console.style) as console:
            yield console
    except (ConfigError, DataError, ReferenceModelError, CheckpointError):
        # The file of rows exists from the moment before the first step.
        if is_new and os.environ.get("RANK", "0") == "0" and not folder.rows.exists():
            with contextlib.suppress(ConfigError), locked(folder.lock, "trains", "wait for it"):
                shutil.rmtree(folder.path, ignore_errors=True)  # never the folder of another process
        raise


def check_start(config: RunConfig, *, trains: bool = False, starts: bool = False) -> None:
    """Check everything that needs no torch, network or other processes; only on the first node.

    `trains`: whether the run has an optimizer and may be resumed. `starts`: whether this process runs it, not
    a launcher that is called later.
    """
    if os.environ.get("RANK", "0") != os.environ.get("LOCAL_RANK", "0"):
        return
    # The run, if it has a checkpoint, and the user's own loss.
    run = RunFolder(config.run.path)
    if trains and config.run.resume is not Resume.never:
        check_newest_checkpoint(config.identity, run)
    if LossKind.custom in config.loss.kinds:
        find_function(config.loss.function, LOSS_FUNCTION)
    # Packages.
    model = config.model
    for package, key, value, instead in _needed_packages(config, trains=trains):
        if not is_installed(package):
            install = "build it, the folder hopper of FlashAttention's repository"
            if package in _EXTRAS:
                install = install_extra(_EXTRAS[package])
            raise ConfigError(
                f"{package} is not installed",
                where=key,
                got=value,
                remedy=f"{install}, or set {key}={instead}",
                lacks=Lack.package,
            )
    trackers = config.tracking.to if trains else []
    # By their modules, which several packages may have: mlflow and mlflow-skinny.
    absent = [tracker for tracker in trackers if importlib.util.find_spec(tracker) is None]
    if absent:
        others = ",".join(tracker for tracker in trackers if tracker not in absent)
        raise ConfigError(
            f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed",
            where="tracking.to",
            got=", ".join(absent),
            remedy=f"pip install {' '.join(absent)}, or set {shlex.quote(f'tracking.to=[{others}]')}",
            lacks=Lack.package,
        )
    torch_version = version("torch")
    is_sharded = config.parallelism.kind is ParallelismKind.zero3
    is_old = tuple(map(int, torch_version.split(".")[:2])) < (2, 12)
    if trains and model.fused is FusedLayers.compile and is_sharded and is_old:
        raise ConfigError(
            "compiled layers lose gradients of sharded weights in torch before 2.12",
            where="model.fused",
            got=f"compile with parallelism=zero3 and torch {torch_version}",
            remedy="update torch, or set model.fused=none or parallelism=zero2",
            lacks=Lack.package,
        )
    if starts or "WORLD_SIZE" in os.environ:
        check_groups(config.parallelism, int(os.environ.get("WORLD_SIZE", "1")), trains=trains)
    _check_local_models(model, {"reference.path": config.reference.path, "teacher.path": config.teacher.path})
    # Data.
    for source in [*config.data.train, *config.data.eval]:
        DataSource(source).check(config.data)
    ChatTemplate.check_file(config.data.chat_template)
    # Folders to write.
    if trains:
        _check_run_folder(run)
    folders = {"run.dir": run.path}
    cache = Path(config.data.cache)
    store = Path(config.reference.store)
    if not any(cache.glob("*.arrow")):
        folders["data.cache"] = cache  # not one that is in use: it may be read-only if it has all data
    stores = config.reference.mode is ReferenceMode.cached
    stores |= config.loss.needs_teacher and config.teacher.mode is TeacherMode.cached
    if stores and not store.is_dir():
        folders["reference.store"] = store  # the same
    for key, folder in folders.items():
        check_writable(folder, key)


def _needed_packages(config: RunConfig, *, trains: bool) -> Iterator[tuple[str, str, str, str]]:
    """Yield a package that is needed, the key, its value that needs it, and a value that does not."""
    model = config.model
    if model.quantization is not None:
        yield "bitsandbytes", "model.quantization", model.quantization, "null"
    if config.reference.quantization is not None:
        yield "bitsandbytes", "reference.quantization", config.reference.quantization, "null"
    if trains and config.optim.kind is OptimizerKind.adamw_8bit:
        yield "bitsandbytes", "optim.kind", config.optim.kind, OptimizerKind.adamw
    if model.fused is FusedLayers.liger:
        yield "liger-kernel", "model.fused", model.fused, "none"
    if model.attention in FLASH_ATTN:
        yield FLASH_ATTN[model.attention], "model.attention", model.attention, "auto"


def _check_run_folder(run: RunFolder) -> None:
    """Raise ConfigError if a new run's directory holds other things: it is /, the home, or a folder of runs.

    Not one with other files of the user's own: a launcher may have put its logs there.
    """
    is_begun = run.lock.exists() or run.state.exists()
    foreign = [run.path / CONFIG_FILE]  # a model's
    if not is_begun:
        foreign.append(run.config)  # a user's
    there = [str(file) for file in foreign if file.is_file()]
    message = "run.dir has files that no run has written"
    remedy = "set run.dir to a new folder"
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111 (no error if a user has no home)
    folder = Path(os.path.realpath(run.path.expanduser()))  # raises no error for a link to itself
    is_above = not is_begun and (folder in Path.cwd().resolve().parents or folder in (home, *home.parents))
    if is_above:
        there = [str(run)]
        message = "run.dir is a folder of other things"
        remedy = "remove run.dir, or name a new folder: run.dir=output/my_run"
    elif not is_begun:
        there += [str(state.parent) for state in sorted(run.path.glob(f"*/{run.state.name}"))]
    if not there:
        return
    raise ConfigError(
        message,
        where="run.dir",
        got=first_few(there),
        expected="an empty folder, or one that only this run uses",
        remedy=remedy,
    )


def check_groups(parallelism: ParallelismConfig, processes: int, *, trains: bool) -> None:
    """Raise ConfigError if so many processes cannot be divided into groups."""
    for key in ("sequence_parallel", *["experts", "shard_size"] * trains):
        ranks = getattr(parallelism, key) or processes
        if processes % ranks:
            raise ConfigError(
                "the processes cannot be divided into groups of this size",
                where=f"parallelism.{key}",
                got=f"{ranks}, with {pluralize(processes, 'process', 'processes')}",
                expected=f"a divisor of {processes}",
                remedy=f"set parallelism.{key} to such a divisor, or start a multiple of {ranks} processes",
            )


def _check_local_models(model: ModelConfig, others: Mapping[str, str | None]) -> None:
    """Check models in local folders; those on the hub are checked when they are loaded.

    `others`: the paths of models that only score, by key.
    """
    start = None
    if model.adapter is not None and model.adapter.path is not None:
        adapter = local_model_folder(model.adapter.path, None, "model.adapter.path", accepts_adapter=True)
        start = None if adapter is None else start_folder(model)
    policy = local_model_folder(model.path, model.revision)
    if policy is not None:
        check_weights(weight_files(policy), "model.path")
        check_tokenizer_files(tokenizer_folder(policy, start))
    for key, path in others.items():
        other = None if path is None else local_model_folder(path, None, key)
        if other is not None:
            check_weights(weight_files(other), key)
