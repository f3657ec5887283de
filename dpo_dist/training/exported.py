"""The checkpoint and the folder of an export; imports no torch, so that errors appear at once."""

from pathlib import Path

from dpo_dist.config.checkpoint_folders import best_checkpoints, checkpoint_folders, is_checkpoint
from dpo_dist.config.existing_run import existing_run
from dpo_dist.config.export_schema import ExportedWeights
from dpo_dist.config.load import changed_keys
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError

_KEY = "export.checkpoint"


def find_checkpoint(config: RunConfig) -> Path:
    """Return the folder of `export.checkpoint`, whose files are not checked.

    Raises:
        ConfigError: the run or the checkpoint does not exist, or the configuration is not that of the run.
    """
    run = existing_run(RunFolder.of(config).path)
    if changed := changed_keys(run.config, config):
        raise ConfigError(
            "an export has the configuration of its run",
            where=", ".join(changed),
            got=", ".join(str(new) for _, new in changed.values()),
            expected=", ".join(str(old) for old, _ in changed.values()),
            remedy="give run.dir and keys of export only",
        )
    found = checkpoint_folders(run.checkpoints)
    if not found:
        raise ConfigError(
            "this run has no checkpoint",
            where="run.dir",
            got=str(run),
            remedy=f"use its model {run.model}" if run.model.is_dir() else "train it until its first one",
        )
    named = config.export.checkpoint
    folder = found[0] if named == "latest" else run.checkpoints / (_best(run) if named == "best" else named)
    if not is_checkpoint(folder):
        raise ConfigError(
            "this run does not have this checkpoint",
            where=_KEY,
            got=named,
            expected=", ".join(folder.name for folder in found),
            remedy="name one of them",
        )
    return folder


def _best(run: RunFolder) -> str:
    """Return the name of the best checkpoint.

    Raises:
        ConfigError: the run has none.
    """
    for name in best_checkpoints(run.checkpoints):
        return name
    raise ConfigError(
        "this run has no best checkpoint",
        where=_KEY,
        got="best",
        expected="a run with trainer.keep_best, after its first evaluation",
        remedy=f"set {_KEY}=latest, or name one of {run.checkpoints}",
    )


def find_output(config: RunConfig, checkpoint: Path) -> Path:
    """Return the folder to write.

    Raises:
        ConfigError: it exists.
    """
    named, weights = config.export.output, config.export.weights
    name = checkpoint.name + (f"-{weights}" if weights is ExportedWeights.ema else "")
    folder = RunFolder.of(config).exported(name) if named is None else Path(named).expanduser()
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            "the folder to write exists",
            where="export.output",
            got=str(folder),
            remedy="name another folder, or delete this one",
        )
    return folder
