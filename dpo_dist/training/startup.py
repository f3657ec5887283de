"""Checks of a run before torch is imported and processes join: packages, files, folders."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_dist.config.identity import plain, run_digest
from dpo_dist.config.load import changed_keys
from dpo_dist.config.losses import LossKind
from dpo_dist.config.run_folder import STATE, RunFolder, checkpoint_folders, is_checkpoint, without_model
from dpo_dist.config.schema import OptimizerKind, ReferenceMode, Resume, RunConfig
from dpo_dist.config.user_code import find_function
from dpo_dist.data.formats import check_first_formats
from dpo_dist.data.sources import check_has_evaluation_data, check_source
from dpo_dist.data.template import check_template_file
from dpo_dist.foundation.errors import CheckpointError, ConfigError, DataError, ReferenceModelError, dead_link
from dpo_dist.foundation.files import read_small, text_digest
from dpo_dist.foundation.process import check_groups
from dpo_dist.insight.console import Console, open_console
from dpo_dist.model.adapter_files import start_folder, tokenizer_folder
from dpo_dist.model.architectures import check_described
from dpo_dist.model.folder import (
    check_adapter,
    check_cached_offline,
    check_tokenizer_files,
    check_weights,
    is_adapter,
    local_model_folder,
    weight_files,
)
from dpo_dist.model.optional_packages import check_bitsandbytes, check_liger_kernel, check_tracker
from dpo_dist.training.schedule import check_longer, former_length

if TYPE_CHECKING:
    from dpo_dist.training.inputs import EvaluationInputs


def check_newest_checkpoint(config: RunConfig) -> None:
    """Check that the newest checkpoint in the run directory is of `config`, before processes join.

    A checkpoint that cannot be read is not checked here.

    Raises:
        CheckpointError: it is of another configuration.
    """
    folder = RunFolder.of(config)
    if config.run.resume is Resume.never:
        return
    try:
        newest, *_ = checkpoint_folders(folder.checkpoints)
        state = json.loads(read_small(newest / STATE))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(state, dict) and isinstance(state.get("run_digest"), str):
        check_configuration(state, config, folder)
        check_longer(state, config, folder)


def check_configuration(recorded: Mapping[str, Any], config: RunConfig, folder: RunFolder) -> None:
    """Check that the run directory belongs to `config`, or to a run that differs in its length only.

    Args:
        recorded: the state of a checkpoint, or the identity in the state file.
        config: of this start.
        folder: the run directory.

    Raises:
        CheckpointError: it belongs to another configuration; the error names the keys that differ.
    """
    digest, former = run_digest(config), recorded.get("run_digest")
    if former == digest or former_length(recorded, config, folder) is not None:
        return
    changed = changed_keys(folder.config, config)
    function = config.loss.function
    source = "" if function is None else f", which depends on the source of {function}"
    raise CheckpointError(
        "the run directory belongs to another configuration",
        where=str(folder.config if changed else folder),
        got=", ".join(f"{key}={new}" for key, (_, new) in changed.items()) or f"digest {digest}{source}",
        expected=", ".join(f"{key}={old}" for key, (old, _) in changed.items()) or f"digest {former}",
        remedy="remove run.dir, which gives every configuration its own run directory, or set another one",
    )


KEY = "evaluation.model"
Kind = StrEnum("Kind", ["model", "adapter", "checkpoint", "hub"])
"""`hub`: a model or an adapter, which only its files show."""


@dataclass(frozen=True)
class Evaluated:
    """A model to evaluate: its folder, or its name on the hub."""

    path: str
    kind: Kind

    def name(self, config: RunConfig, inputs: "EvaluationInputs") -> str:
        """Return a name for the results: another model, base, precision, reference or loss, other pairs or
        labels have another name.

        Example: `step-000100-1a2b3c4d`.
        """
        folder = Path(self.path)
        place = str(folder.resolve()) if folder.is_dir() else self.path
        reference = inputs.reference_files.digest if inputs.reference_files is not None else None
        data, model = inputs.eval_set, config.model
        precision = [str(model.dtype), None if model.quantization is None else str(model.quantization)]
        own = [place, inputs.policy_files.digest, precision, reference, plain(config.loss)]
        facts = [*own, data.fingerprint, list(data.source_labels)]
        stem = folder.resolve().name if folder.is_dir() else self.path.replace("/", "-")
        return f"{stem}-{text_digest(json.dumps(facts, sort_keys=True))[:8]}"


def find_evaluated(config: RunConfig) -> list[Evaluated]:
    """Return the models that `config` evaluates; needs no other process and no torch.

    Raises:
        ConfigError: there are no pairs, or a folder has no model.
    """
    check_has_evaluation_data(config.data, "evaluate models on")
    return [_find(model, RunFolder.of(config)) for model in config.evaluation.models]


def _find(named: str | None, run: RunFolder) -> Evaluated:
    folder = run.model if named is None else Path(named).expanduser()
    if named is None and not folder.is_dir():
        pairs = "its name depends on data.eval: name other pairs by evaluation.data"
        raise without_model(run, KEY, f"set run.dir to a complete run ({pairs})")
    path = str(folder) if folder.is_dir() else str(named)
    if is_checkpoint(folder):
        return Evaluated(path, Kind.checkpoint)
    if is_adapter(folder):
        check_adapter(folder, KEY)
        return Evaluated(path, Kind.adapter)
    is_local = local_model_folder(path, None, KEY) is not None
    return Evaluated(path, Kind.model if is_local else Kind.hub)


def check_start(config: RunConfig, *, trains: bool = False) -> None:
    """Check everything that needs no torch, network or other processes, and create the folders of the run.

    Only processes on the first node check.

    Args:
        config: of the run.
        trains: whether there is an optimizer, which may need a package.

    Raises:
        ConfigError: a package, model or folder is missing, or a folder cannot be written.
        DataError: a local source is missing.
    """
    if os.environ.get("RANK", "0") != os.environ.get("LOCAL_RANK", "0"):
        return
    if LossKind.custom in config.loss.kinds:
        find_function(config.loss.function)
    _check_packages(config, trains=trains)
    if "WORLD_SIZE" in os.environ:
        check_groups(int(os.environ["WORLD_SIZE"]), config.parallelism.sequence_parallel)
    _check_models(config)
    for source in [*config.data.train, *config.data.eval]:
        check_source(source)
        check_first_formats(source, config.data)
    check_template_file(config.data.chat_template)
    _check_run_dir(config)
    _check_links(RunFolder.of(config), trains=trains)
    for key, folder in _needed_folders(config).items():
        if key != "reference.store" or not folder.is_dir():
            # A read-only store is enough for a run whose log-probs are all in it.
            _check_folder(folder, key)


def with_evaluated_pairs(config: RunConfig) -> RunConfig:
    """Return `config` with only the pairs that `evaluate` reads, as its `data.eval`."""
    data = config.data
    if config.evaluation.data:
        data = replace(data, eval=config.evaluation.data, eval_share=0.0)
    return replace(config, data=replace(data, train=[]) if data.eval else data)


@contextlib.contextmanager
def started(config: RunConfig, *, trains: bool = False) -> Iterator[Console]:
    """Check the start, open the console, and remove the folders of a start that fails before its first step.

    Args and errors are those of `check_start`.
    """
    with without_traces(config):
        check_start(config, trains=trains)
        with open_console(RunFolder.of(config), config.console) as console:
            yield console


@contextlib.contextmanager
def without_traces(config: RunConfig, *, of_success: bool = False) -> Iterator[None]:
    """Remove the folders that a start made, if it ends with a user's error before its first step; on rank 0.

    Args:
        config: of the run.
        of_success: also remove it if the start ends without an error (`--check`).
    """
    folder, needed = RunFolder.of(config), _needed_folders(config).values()
    made = {path for each in needed for path in (each, *each.parents) if not _exists(path)}

    def remove() -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        if folder.path in made and not _exists(folder.checkpoints):
            shutil.rmtree(folder.path, ignore_errors=True)
        for path in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()

    try:
        yield
    except (ConfigError, DataError, ReferenceModelError, CheckpointError):
        remove()
        raise
    if of_success:
        remove()


def _needed_folders(config: RunConfig) -> dict[str, Path]:
    folders = {"run.dir": RunFolder.of(config).path, "data.cache": Path(config.data.cache)}
    if config.reference.mode is ReferenceMode.cached:
        folders["reference.store"] = Path(config.reference.store)
    if config.reference.nvme_path is not None:
        folders["reference.nvme_path"] = Path(config.reference.nvme_path)
    return folders


def _check_run_dir(config: RunConfig) -> None:
    """Refuse a run directory that is a model's folder or that contains other runs."""
    run_dir = _real(str(RunFolder.of(config)))
    start = None if config.model.adapter is None else config.model.adapter.path
    models = [path for path in (config.model.path, config.reference.path, start) if path is not None]
    fault = ""
    if run_dir == run_dir.parent:
        fault = "the root of the file system"
    elif any(_real(path) == run_dir for path in models):
        fault = "the folder of a model"
    elif _contains_runs(run_dir):
        fault = "a folder that contains other runs"
    if fault:
        raise ConfigError(
            f"run.dir is {fault}",
            where="run.dir",
            got=str(run_dir),
            expected="a folder for this run alone",
            remedy="set run.dir to a new folder, or run.root to the parent folder of all runs",
        )


def _check_links(folder: RunFolder, *, trains: bool) -> None:
    """Refuse links to nothing where this start will write."""
    trained = (folder.checkpoints, folder.metrics, folder.samples, folder.model, folder.wandb_id.parent)
    for path in (folder.logs, folder.evaluation.path, *(trained if trains else ())):
        if link := dead_link(path):
            raise ConfigError(
                "a folder of the run is a link that leads nowhere",
                where=str(path),
                got=link,
                remedy="mount its disk, or make the folder that it names; or delete the link",
            )


def _real(path: str) -> Path:
    """Return a path without links; links in a circle stay."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _contains_runs(folder: Path) -> bool:
    try:
        return next(folder.glob(f"*/{RunFolder(folder).state.name}"), None) is not None
    except OSError:  # `_check_folder` reports it
        return False


def _exists(path: Path) -> bool:
    """Return whether there is a path; False for a name that is too long, unlike `Path.exists`."""
    return os.path.exists(path)  # noqa: PTH110


def _check_folder(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as fault:
        is_file = _exists(folder) and not folder.is_dir()
        raise ConfigError(
            f"{key} is a file" if is_file else f"{key} cannot be written",
            where=key,
            got=f"{folder}: {fault.strerror or fault}",
            expected="a folder that exists or can be created, with free space and write permission",
            remedy=f"set {key} to another folder, or make this one writable",
        ) from None


def _check_packages(config: RunConfig, *, trains: bool) -> None:
    if config.model.quantization is not None:
        check_bitsandbytes(config.model.quantization, "model.quantization")
    if config.reference.quantization is not None:
        check_bitsandbytes(config.reference.quantization, "reference.quantization")
    if trains and config.optim.kind is OptimizerKind.adamw_8bit:
        check_bitsandbytes(config.optim.kind, "optim.kind", instead=OptimizerKind.adamw)
    if config.model.liger:
        check_liger_kernel()
    for tracker in config.tracking.also:
        check_tracker(tracker)


def _check_models(config: RunConfig) -> None:
    policy = _described_model(config.model.path, config.model.revision, "model.path")
    start = _local_start_adapter(config)
    if policy is not None:
        check_tokenizer_files(tokenizer_folder(policy, start))
    if config.reference.path is not None:
        _described_model(config.reference.path, None, "reference.path")


def _local_start_adapter(config: RunConfig) -> Path | None:
    """Return the folder of the adapter that the policy starts from, checked; None if it is not local."""
    adapter = config.model.adapter
    if adapter is None or adapter.path is None:
        return None
    if not Path(adapter.path).expanduser().is_dir():
        local_model_folder(adapter.path, None, "model.adapter.path")  # raises for a missing one
        check_cached_offline(adapter.path, "model.adapter.path")
        return None
    return start_folder(config.model)


def _described_model(path: str, revision: str | None, key: str) -> Path | None:
    """Return the folder of a local model after the checks of its files; None for a model on the Hub."""
    folder = local_model_folder(path, revision, key)
    if folder is None:
        check_cached_offline(path, key)
    else:
        check_described(folder, key)
        check_weights(weight_files(folder), key)
    return folder
