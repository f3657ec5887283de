"""The checkpoint and the folder of an export; imports no torch, so that errors appear at once."""

import os
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.identity import plain
from dpo_dist.config.keys import as_written
from dpo_dist.config.load import changed_keys, from_yaml
from dpo_dist.config.run_folder import (
    RunFolder,
    best_checkpoints,
    checkpoint_folders,
    existing_run,
    is_checkpoint,
    step_of,
)
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.user_code import read_config
from dpo_dist.config.verb_options import ExportedWeights
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.text import first_few
from dpo_dist.model.folder import CONFIG_FILE, is_adapter

_KEY = "export.checkpoint"


def find_sources(config: RunConfig) -> list[Path]:
    """Return the folders to export: that of `export.checkpoint`, or those of `export.average`.

    Their files are not checked.

    Raises:
        ConfigError: one does not exist, or the configuration is not that of the run.
    """
    if not config.export.average:
        return [find_checkpoint(config)]
    run = existing_run(RunFolder.of(config).path)
    _check_configuration(run, config)
    sources = [_find_member(name, run) for name in config.export.average]
    _check_each_once(sources, config)
    for folder in sources:
        if folder.parent != run.checkpoints:
            _check_member(folder, config)
    return sources


def _find_member(name: str, run: RunFolder) -> Path:
    """Return the checkpoint of a run with this name, damaged or not, or the folder of another model."""
    own = checkpoint_folders(run.checkpoints)
    if (of_run := _of_step(name, own)) is not None:
        return of_run
    folder = Path(name).expanduser()
    if not (is_checkpoint(folder) or is_adapter(folder) or (folder / CONFIG_FILE).is_file()):
        raise ConfigError(
            "a member of the average is neither a checkpoint nor a model",
            where="export.average",
            got=name,
            expected=", ".join(found.name for found in own)
            or "the folder of a checkpoint, a model or an adapter",
            remedy="name a checkpoint of this run, or a folder",
        )
    return folder


def _of_step(name: str, checkpoints: Sequence[Path]) -> Path | None:
    """Return the checkpoint of this name, with zeros before its number or without; None if there is none."""
    step = step_of(name)
    return next((folder for folder in checkpoints if step is not None and step_of(folder.name) == step), None)


def _check_each_once(sources: Sequence[Path], config: RunConfig) -> None:
    """Check that no folder is named twice, in two ways.

    Raises:
        ConfigError: one is.
    """
    for number, folder in enumerate(sources):
        if any(folder.resolve() == other.resolve() for other in sources[:number]):
            raise ConfigError(
                "a member of the average is named twice",
                where="export.average",
                got=as_written(config.export.average),
                expected=f"{folder} once",
                remedy="remove one of its names; export.average_weights gives members different weights",
            )


def _check_member(folder: Path, config: RunConfig) -> None:
    """Check that a checkpoint of another run is of the same kind of adapter, which its files do not say.

    Raises:
        ConfigError: it is not, or its run cannot be read.
    """
    other = RunFolder(folder.resolve().parents[1])
    if config.model.adapter is None or not is_checkpoint(folder):
        return
    try:
        adapter = from_yaml(read_config(other.config)).model.adapter
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(
            "the run of a member of the average cannot be read",
            where="export.average",
            got=f"{folder}: {first_line(error)}",
            remedy="name a checkpoint in the directory of its run, or a folder that export wrote from it",
        ) from error
    if plain(adapter) != plain(config.model.adapter):
        raise ConfigError(
            "a member of the average is a checkpoint of another kind of adapter",
            where="export.average",
            got=f"{folder}: {as_written(adapter)}",
            expected=as_written(config.model.adapter),
            remedy=f"name the folder that python -m dpo_dist.export run.dir={other} writes",
        )


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
    """Return the folder to write: by default named after the checkpoint, or `average`, and `-merged`.

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
