"""The checkpoint and the folder of an export; imports no torch, so that errors appear at once."""

import os
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.keys import as_written
from dpo_dist.config.load import changed_keys
from dpo_dist.config.run_folder import RunFolder, best_checkpoints, checkpoint_folders, existing_run, step_of
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.verb_options import ExportedWeights
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import first_few
from dpo_dist.model.folder import CONFIG_FILE

_KEY = "export.checkpoint"


def find_members(config: RunConfig) -> list[Path]:
    """Return the model folders of `export.average`, whose weights are not checked.

    Raises:
        ConfigError: one is no model folder, or is named twice, or the configuration is not that of the run.
    """
    _check_configuration(existing_run(RunFolder.of(config).path), config)
    members = [Path(member.path).expanduser() for member in config.export.average]
    for folder in members:
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(
                "a member of the average is no model folder",
                where="export.average",
                got=str(folder),
                expected="folders of whole models, as `export` (with export.merge=true of an adapter) writes",
                remedy="export each checkpoint first, and name the folders",
            )
    if len({folder.resolve() for folder in members}) < len(members):
        raise ConfigError(
            "a member of the average is named twice",
            where="export.average",
            got=as_written(config.export.average),
            remedy="remove one of them, and give the other a weight: {path: FOLDER, weight: 2}",
        )
    return members


def _of_step(name: str, checkpoints: Sequence[Path]) -> Path | None:
    """Return the checkpoint of this name, with zeros before its number or without; None if there is none."""
    step = step_of(name)
    return next((folder for folder in checkpoints if step is not None and step_of(folder.name) == step), None)


def find_checkpoint(config: RunConfig) -> Path:
    """Return the folder of `export.checkpoint`, whose files are not checked.

    Raises:
        ConfigError: the run or the checkpoint does not exist, or the configuration is not that of the run.
    """
    run = existing_run(RunFolder.of(config).path)
    _check_configuration(run, config)
    found = checkpoint_folders(run.checkpoints)
    if not found:
        raise ConfigError(
            "this run has no checkpoint",
            where="run.dir",
            got=str(run),
            remedy=f"use its model {run.model}" if run.model.is_dir() else "train it until its first one",
        )
    named = config.export.checkpoint
    if named == "best":
        named = _best(run)
    folder = found[0] if named == "latest" else _of_step(named, found)
    if folder is None:
        raise ConfigError(
            "this run does not have this checkpoint",
            where=_KEY,
            got=named,
            expected=", ".join(other.name for other in found),
            remedy="name one of them",
        )
    return folder


def _check_configuration(run: RunFolder, config: RunConfig) -> None:
    if changed := changed_keys(run.config, config):
        raise ConfigError(
            "an export has the configuration of its run",
            where=first_few(list(changed), "other"),
            got=first_few([as_written(new) for _, new in changed.values()], "other"),
            expected=first_few([as_written(old) for old, _ in changed.values()], "other"),
            remedy="give run.dir and keys of export only: without model.path, others are those of the run",
        )


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


def find_output(config: RunConfig, sources: Sequence[Path]) -> Path:
    """Return the folder to write: by default named after the checkpoint, or `average`.

    Raises:
        ConfigError: it exists.
    """
    named, weights = config.export.output, config.export.weights
    own = "average" if config.export.average else sources[0].name
    own += (weights is ExportedWeights.ema) * "-ema" + config.export.merge * "-merged"
    folder = RunFolder.of(config).exported(own) if named is None else Path(named).expanduser()
    if os.path.lexists(folder):
        raise ConfigError(
            "the folder to write exists",
            where="export.output",
            got=str(folder),
            remedy="name another folder, or delete this one",
        )
    return folder
