"""What can be known about a run before torch is imported and processes join: packages, files, folders."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.data.sources import check_source
from dpo_dist.errors import ConfigError, DataError
from dpo_dist.model.folder import check_tokenizer_files, local_model_folder
from dpo_dist.model.optional_packages import check_bitsandbytes, check_liger_kernel

STATE_NAME = "run_state.json"
# A run folder before its first step: nothing that anybody would miss.
_BEFORE_THE_FIRST_STEP = frozenset({"logs", ".lock", "config.yaml", "environment.json", STATE_NAME})
# Processes of one start begin within this time of each other.
_START_SECONDS = 60.0


def check_start(config: RunConfig) -> None:
    """Refuse what cannot run, as far as that is known without torch, a network or other processes.

    Makes the folders that the run needs. Processes on other nodes than the first one's leave it to that.

    Raises:
        ConfigError: a package, model or folder is missing, or a folder cannot be written.
        DataError: a local source is missing.
    """
    if os.environ.get("RANK", "0") != os.environ.get("LOCAL_RANK", "0"):
        return
    _check_packages(config)
    _check_models(config)
    for source in [*config.data.train, *config.data.eval]:
        check_source(source)
    _check_run_dir(config)
    for key, folder in _needed_folders(config).items():
        if key != "reference.store" or not folder.is_dir():
            # A store that can only be read serves runs that it lacks nothing for.
            _check_folder(folder, key)


@contextlib.contextmanager
def without_traces(config: RunConfig, *, of_success: bool = False) -> Iterator[None]:
    """Remove the folders of a start that ends with a user's error before its first step; on the first rank.

    Args:
        config: names the folders.
        of_success: remove them where it ends well, too.
    """
    began, run_dir = time.time(), Path(str(config.run.dir))
    # Of another start, which may be at work: this one's first rank has not opened its log yet.
    is_used = (run_dir / "logs" / "rank-0.log").exists()
    missing = [
        path
        for folder in _needed_folders(config).values()
        for path in (folder, *folder.parents)
        if not path.exists()
    ]
    try:
        yield
    except (ConfigError, DataError):
        _remove_traces(run_dir, is_used, missing, began)
        raise
    if of_success:
        _remove_traces(run_dir, is_used, missing, began)


def _remove_traces(run_dir: Path, is_used: bool, missing: list[Path], began: float) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if not is_used and run_dir.is_dir() and _is_of_this_start(run_dir, began):
        shutil.rmtree(run_dir, ignore_errors=True)
    for folder in sorted(missing, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _is_of_this_start(run_dir: Path, began: float) -> bool:
    """Whether all that is in the folder was written by this start, before a first step."""
    if not {entry.name for entry in run_dir.iterdir()} <= _BEFORE_THE_FIRST_STEP or _is_locked(run_dir):
        return False
    files = [file for file in run_dir.rglob("*") if file.is_file()]
    return bool(files) and all(file.stat().st_ctime > began - _START_SECONDS for file in files)


def _is_locked(run_dir: Path) -> bool:
    """Whether another start is at work in the folder, as far as its file system can lock files."""
    try:
        with (run_dir / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _needed_folders(config: RunConfig) -> dict[str, Path]:
    folders = {"run.dir": Path(str(config.run.dir)), "data.cache": Path(config.data.cache)}
    if config.reference.mode is ReferenceMode.cached:
        folders["reference.store"] = Path(config.reference.store)
    if config.reference.nvme_path is not None:
        folders["reference.nvme_path"] = Path(config.reference.nvme_path)
    return folders


def _check_run_dir(config: RunConfig) -> None:
    """A run has a folder of its own: not a model's, and not the one in which other runs have theirs."""
    run_dir = Path(str(config.run.dir)).expanduser().resolve()
    models = [path for path in (config.model.path, config.reference.path) if path is not None]
    what = ""
    if run_dir == run_dir.parent:
        what = "the root of the file system"
    elif any(Path(path).expanduser().resolve() == run_dir for path in models):
        what = "the folder of a model"
    elif next(run_dir.glob(f"*/{STATE_NAME}"), None) is not None:
        what = "a folder that has other runs in it"
    if what:
        raise ConfigError(
            f"run.dir is {what}",
            where="run.dir",
            got=str(run_dir),
            expected="a folder of this run's own",
            remedy="set run.dir to a new folder, or run.root to the folder in which runs get theirs",
        )


def _check_folder(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as fault:
        is_file = folder.exists() and not folder.is_dir()
        raise ConfigError(
            f"{key} is a file" if is_file else f"nothing can be written to {key}",
            where=key,
            got=f"{folder}: {fault.strerror or fault}",
            expected="a folder that exists or can be made, with room and permission to write",
            remedy=f"set {key} to another folder, or make this one writable",
        ) from None


def _check_packages(config: RunConfig) -> None:
    if config.model.quantization is not None:
        check_bitsandbytes(config.model.quantization, "model.quantization")
    if config.reference.quantization is not None:
        check_bitsandbytes(config.reference.quantization, "reference.quantization")
    if config.model.liger:
        check_liger_kernel()


def _check_models(config: RunConfig) -> None:
    policy = local_model_folder(config.model.path, config.model.revision, "model.path")
    if policy is not None:
        check_tokenizer_files(policy)
    if config.reference.path is not None:
        local_model_folder(config.reference.path, config.reference.revision, "reference.path")
