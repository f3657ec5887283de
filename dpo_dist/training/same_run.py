"""Check that a run directory belongs to a configuration; imports no torch, so that errors appear at once."""

import json
from collections.abc import Mapping
from typing import Any

from dpo_dist.config.checkpoint_folders import STATE, checkpoint_folders
from dpo_dist.config.folder_schema import Resume
from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import changed_keys
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import CheckpointError
from dpo_dist.training.length import check_longer, former_length


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
        state = json.loads((newest / STATE).read_bytes())
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
