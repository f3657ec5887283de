"""A run directory that a command names: it must exist, and have a model if that is used."""

from difflib import SequenceMatcher
from pathlib import Path

from dpo_dist.config.checkpoint_folders import checkpoint_folders
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.errors import ConfigError

_MOST_SUGGESTED = 3


def existing_run(path: Path) -> RunFolder:
    """Return the run directory at `path`, whose run may still be training.

    Raises:
        ConfigError: `path` is none.
    """
    folder = RunFolder(path)
    if any(file.is_file() for file in (folder.config, folder.log_history, folder.metrics_table)):
        return folder
    above = path if path.is_dir() else path.parent
    runs = sorted(file.parent for file in above.glob("*/config.yaml"))
    runs = sorted(runs, key=lambda run: -SequenceMatcher(None, run.name, path.name).ratio())[:_MOST_SUGGESTED]
    found = "a file" if path.is_file() else "a folder without a run's files"
    raise ConfigError(
        "this is no run directory",
        where=str(path),
        got=found if path.exists() else "no such folder",
        expected="a folder with config.yaml, which a run writes before its first step",
        remedy=f"name one run, such as {' or '.join(map(str, runs))}"
        if runs
        else "name the run.dir of a run",
    )


def without_model(run: RunFolder, key: str, remedy: str) -> ConfigError:
    """Return the error of a run directory without a trained model.

    Args:
        run: the run.
        key: that names it.
        remedy: another one than to name its newest checkpoint.
    """
    checkpoints = checkpoint_folders(run.checkpoints)
    named = f"its checkpoint {checkpoints[0]}" if checkpoints else "another model"
    return ConfigError(
        "this run directory has no model",
        where=key,
        got=str(run.path),
        expected=f"{run.model}, which a run writes when it completes",
        remedy=f"{remedy}, or name {named}",
    )
