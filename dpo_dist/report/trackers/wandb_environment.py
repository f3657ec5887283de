"""The variables of the environment that W&B's users set, where the configuration leaves a value unset."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from dpo_dist.config.schema import RunConfig
from dpo_dist.config.tracking_schema import DEFAULT_PROJECT, TrackingConfig, WandbMode

_MODES = {
    "online": WandbMode.online,
    "run": WandbMode.online,
    "offline": WandbMode.offline,
    "dryrun": WandbMode.offline,
    "disabled": WandbMode.off,
}
"""Values of WANDB_MODE, the older two too."""


def wanted_mode(config: RunConfig) -> WandbMode:
    """Return `tracking.wandb`; if it is `auto`, the mode of WANDB_MODE if that is set."""
    wanted = config.tracking.wandb
    return _MODES.get(_value("WANDB_MODE"), wanted) if wanted is WandbMode.auto else wanted


def run_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """Return arguments of `wandb.init`; wandb reads the variable of an argument that is None.

    Args:
        config: of the run.
        name: of the run, unless WANDB_NAME is set.
    """
    tracking = config.tracking
    return {
        "project": tracking.project or _value("WANDB_PROJECT") or DEFAULT_PROJECT,
        "entity": tracking.entity,
        "group": tracking.group,
        "tags": tracking.tags or None,
        "notes": notes_of(tracking),
        "name": _value("WANDB_NAME") or name,
    }


def notes_of(tracking: TrackingConfig) -> str | None:
    """Return the user's notes about the run."""
    return tracking.notes or _value("WANDB_NOTES") or None


def warn_of_unused(config: RunConfig, warn: Callable[[str], None]) -> None:
    """Name the variables that this run does not use, with the reason."""
    tracking = config.tracking
    chosen: Mapping[str, tuple[str, str]] = {
        "WANDB_PROJECT": ("tracking.project", tracking.project or ""),
        "WANDB_ENTITY": ("tracking.entity", tracking.entity or ""),
        "WANDB_RUN_GROUP": ("tracking.group", tracking.group or ""),
        "WANDB_TAGS": ("tracking.tags", ",".join(tracking.tags)),
        "WANDB_NOTES": ("tracking.notes", tracking.notes or ""),
    }
    for variable, (key, value) in chosen.items():
        if value and _value(variable) not in ("", value):
            warn(f"{variable} is not used: {key} is set")
    mode = _value("WANDB_MODE")
    if mode and mode not in _MODES:
        warn(f"WANDB_MODE={mode} is not used: it is not online, offline or disabled")
    elif mode and tracking.wandb not in (WandbMode.auto, _MODES[mode]):
        warn(f"WANDB_MODE={mode} is not used: tracking.wandb is {tracking.wandb}")
    if _value("WANDB_DIR"):
        warn("WANDB_DIR is not used: the files of wandb are in the run directory")


def _value(variable: str) -> str:
    """Return a variable of the environment; an empty text if it is not set."""
    return os.environ.get(variable, "").strip()
