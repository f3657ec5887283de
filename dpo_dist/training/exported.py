"""The checkpoint and the folder of an export; imports no torch, so that errors appear at once."""

from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.checkpoint_folders import best_checkpoints, checkpoint_folders, is_checkpoint
from dpo_dist.config.existing_run import existing_run
from dpo_dist.config.export_schema import ExportedWeights
from dpo_dist.config.load import changed_keys
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.model.folder import CONFIG_FILE, is_adapter, read_model_json

_KEY = "export.checkpoint"
_START = ("model.path", "model.revision")


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
    return [_find_member(name, run, config) for name in config.export.average]


def _find_member(name: str, run: RunFolder, config: RunConfig) -> Path:
    """Return the checkpoint of a run with this name, or the folder of another model."""
    folder = run.checkpoints / name
    if "/" not in name and is_checkpoint(folder):
        return folder
    folder = Path(name).expanduser()
    _check_start(folder, config)
    if not (is_checkpoint(folder) or is_adapter(folder) or (folder / CONFIG_FILE).is_file()):
        raise ConfigError(
            "a member of the average is neither a checkpoint nor a model",
            where="export.average",
            got=name,
            expected=", ".join(found.name for found in checkpoint_folders(run.checkpoints))
            or "the folder of a checkpoint, a model or an adapter",
            remedy="name a checkpoint of this run, or a folder",
        )
    return folder


def _check_start(folder: Path, config: RunConfig) -> None:
    """Check that a checkpoint of another run, or an adapter, started from what this run started from.

    Raises:
        ConfigError: it started from another model or adapter.
    """
    named: dict[str, str] = {}
    if is_checkpoint(folder):
        changed = changed_keys(RunFolder(folder.resolve().parents[1]).config, config)
        starts = [key for key in changed if key in _START or key.startswith("model.adapter")]
        named = {key: str(changed[key][0]) for key in starts}
    elif is_adapter(folder):
        base = str(read_model_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
        places = [Path(place).expanduser().resolve() for place in (base, config.model.path)]
        named = {"model.path": base} if base and places[0] != places[1] else {}
    if named:
        raise ConfigError(
            "a member of the average started from another model or adapter",
            where="export.average",
            got=f"{folder} with " + ", ".join(f"{key}={value}" for key, value in named.items()),
            expected=f"{config.model.path}, and the model.adapter of this run",
            remedy="average members of one start; if a folder has moved, correct base_model_name_or_path in "
            "adapter_config.json",
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


def _check_configuration(run: RunFolder, config: RunConfig) -> None:
    if changed := changed_keys(run.config, config):
        raise ConfigError(
            "an export has the configuration of its run",
            where=", ".join(changed),
            got=", ".join(str(new) for _, new in changed.values()),
            expected=", ".join(str(old) for old, _ in changed.values()),
            remedy="give run.dir and keys of export only",
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
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            "the folder to write exists",
            where="export.output",
            got=str(folder),
            remedy="name another folder, or delete this one",
        )
    return folder
