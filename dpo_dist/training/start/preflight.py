"""The checks at a start: packages, files and folders, before torch is imported and processes join.

`FILE_CHECKS` has them in order, for a start as for `--check`, which adds those of `dry_run`.
"""

import contextlib
import importlib.util
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dpo_dist.config.losses import LOSS_FUNCTION, LossKind
from dpo_dist.config.run_folder import RunFolder, check_writable
from dpo_dist.config.schema import (
    FLASH_ATTN,
    FusedLayers,
    ParallelismConfig,
    ReferenceMode,
    Resume,
    RunConfig,
    TeacherMode,
)
from dpo_dist.data import DataSource
from dpo_dist.foundation.console import Console, open_console
from dpo_dist.foundation.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DpoDistError,
    ReferenceModelError,
    raise_all,
)
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


class _Start(NamedTuple):
    """What is checked: a run, whether it trains, and whether this process runs it, not a later launcher."""

    config: RunConfig
    trains: bool
    is_here: bool

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.config.run.path)


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
        # The log of rows exists from the moment before the first step.
        if is_new and os.environ.get("RANK", "0") == "0" and not folder.log_history.exists():
            with contextlib.suppress(ConfigError), locked(folder.lock, "trains", "wait for it"):
                shutil.rmtree(folder.path, ignore_errors=True)  # never the folder of another process
        raise


def check_start(config: RunConfig, *, trains: bool = False, starts: bool = False) -> None:
    """Check everything that needs no torch, network or other processes; only on the first node.

    `trains`: whether the run has an optimizer and may be resumed. `starts`: whether this process runs it, not
    a launcher that is called later. Raises one error with all faults.
    """
    if os.environ.get("RANK", "0") == os.environ.get("LOCAL_RANK", "0"):
        start = _Start(config, trains, starts or "WORLD_SIZE" in os.environ)
        make_all(partial(check, start) for check in FILE_CHECKS)


def make_all(checks: Iterable[Callable[[], Any]]) -> None:
    """Make several checks. Raises one error with all faults."""
    faults = list[DpoDistError]()
    for check in checks:
        try:
            check()
        except DpoDistError as fault:
            faults.append(fault)
    raise_all(faults)


def _checkpoint(start: _Start) -> None:
    if start.trains and start.config.run.resume is not Resume.never:
        check_newest_checkpoint(start.config.identity, start.run)


def _loss_function(start: _Start) -> None:
    if LossKind.custom in start.config.loss.kinds:
        find_function(start.config.loss.function, LOSS_FUNCTION)


def _packages(start: _Start) -> None:
    """Check the packages that values need: each with its key, and a value that does not need it."""
    config = start.config
    model = config.model
    needed: list[tuple[str, str, str | None, str]] = [
        ("bitsandbytes", "model.quantization", model.quantization, "null"),
        ("bitsandbytes", "reference.quantization", config.reference.quantization, "null"),
    ]
    if model.fused is FusedLayers.liger:
        needed.append(("liger-kernel", "model.fused", model.fused, "none"))
    if model.attention in FLASH_ATTN:
        needed.append((FLASH_ATTN[model.attention], "model.attention", model.attention, "auto"))
    faults = []
    for package, key, value, instead in needed:
        if value is not None and not is_installed(package):
            install = "build it, the folder hopper of FlashAttention's repository"
            if package in _EXTRAS:
                install = install_extra(_EXTRAS[package])
            message = f"{package} is not installed"
            remedy = f"{install}, or set {key}={instead}"
            faults.append(ConfigError(message, where=key, got=value, remedy=remedy))
    raise_all(faults)


def _trackers(start: _Start) -> None:
    trackers = start.config.tracking.to if start.trains else []
    # By their modules, which several packages may have: mlflow and mlflow-skinny.
    absent = [tracker for tracker in trackers if importlib.util.find_spec(tracker) is None]
    if absent:
        others = ",".join(tracker for tracker in trackers if tracker not in absent)
        raise ConfigError(
            f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed",
            where="tracking.to",
            got=", ".join(absent),
            remedy=f"pip install {' '.join(absent)}, or set {shlex.quote(f'tracking.to=[{others}]')}",
        )


def check_groups(parallelism: ParallelismConfig, processes: int, *, trains: bool) -> None:
    """Raise ConfigError if so many processes cannot be divided into groups."""
    faults = []
    for key in ("sequence_parallel", *["experts", "shard_size"] * trains):
        ranks = getattr(parallelism, key) or processes
        if processes % ranks:
            fault = ConfigError(
                "the processes cannot be divided into groups of this size",
                where=f"parallelism.{key}",
                got=f"{ranks}, with {pluralize(processes, 'process', 'processes')}",
                expected=f"a divisor of {processes}",
                remedy=f"set parallelism.{key} to such a divisor, or start a multiple of {ranks} processes",
            )
            faults.append(fault)
    raise_all(faults)


def _groups(start: _Start) -> None:
    """Check that the processes of this launch can be divided into groups."""
    if start.is_here:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        check_groups(start.config.parallelism, processes, trains=start.trains)


def _policy(start: _Start) -> None:
    """Check the policy in a local folder; one on the hub is checked when it is loaded."""
    model = start.config.model
    begin = None
    if model.adapter is not None and model.adapter.path is not None:
        adapter = local_model_folder(model.adapter.path, None, "model.adapter.path", accepts_adapter=True)
        begin = None if adapter is None else start_folder(model)
    policy = local_model_folder(model.path, model.revision)
    if policy is not None:
        check_weights(weight_files(policy), "model.path")
        check_tokenizer_files(tokenizer_folder(policy, begin))


def _reference(start: _Start) -> None:
    _scoring_model(start.config.reference.path, "reference.path")


def _teacher(start: _Start) -> None:
    teacher = start.config.teacher
    if teacher.digest is None:
        _scoring_model(teacher.path, "teacher.path")


def _scoring_model(path: str | None, key: str) -> None:
    folder = None if path is None else local_model_folder(path, None, key)
    if folder is not None:
        check_weights(weight_files(folder), key)


def _sources(start: _Start) -> None:
    data = start.config.data
    make_all(
        partial(DataSource(source, f"data.{name}").check, data)
        for name in ("train", "eval")
        for source in getattr(data, name)
    )


def _run_folder(start: _Start) -> None:
    if start.trains:
        _check_run_folder(start.run)


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


def _folders(start: _Start) -> None:
    """Check the folders to write."""
    config = start.config
    folders = {"run.dir": start.run.path}
    cache = Path(config.data.cache)
    if not any(cache.glob("*.arrow")):
        folders["data.cache"] = cache  # not one that is in use: it may be read-only if it has all data
    store = Path(config.reference.store)
    stores = config.reference.mode is ReferenceMode.cached
    stores |= config.loss.needs_teacher and config.teacher.mode is TeacherMode.cached
    if stores and not store.is_dir():
        folders["reference.store"] = store  # the same
    if stores and config.reference.behind:
        from dpo_dist.reference.published import open_place  # noqa: PLC0415  (slow)

        make_all(partial(open_place, place) for place in config.reference.behind)
    make_all(partial(check_writable, folder, key) for key, folder in folders.items())


FILE_CHECKS = (
    _checkpoint,
    _loss_function,
    _packages,
    _trackers,
    _groups,
    _policy,
    _reference,
    _teacher,
    _sources,
    _run_folder,
    _folders,
)
"""The checks that need no torch, in their order."""
