"""A preset chosen on the command line must count (law L5).

Hydra applies groups before experiments: `+experiment=qwen7b loss=simpo` composes without a word where the
experiment sets `loss.kind` itself, and trains another loss than was asked for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dpo_dist.errors import ConfigError


def demand_presets_kept(composed: DictConfig, overrides: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse a preset of `overrides` of which an experiment replaced a value.

    Args:
        composed: what Hydra composed from `overrides`.
        overrides: as written on the command line.
        folders: where the groups lie, in the order in which Hydra searches them.

    Raises:
        ConfigError: a value of a chosen preset is gone, and no override replaced it.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    set_by_hand = {override.key_or_group for override in parsed}
    for override in parsed:
        group, name = override.key_or_group, override.value()
        preset = next(
            (file for folder in folders if (file := folder / group / f"{name}.yaml").is_file()), None
        )
        if preset is None or group not in composed:
            continue
        values = _values(composed[group])
        for key, wanted in _values(OmegaConf.load(preset)).items():
            if key in values and values[key] != wanted and f"{group}.{key}" not in set_by_hand:
                raise ConfigError(
                    f"{group}={name} is chosen, but the experiment sets {group}.{key} after it",
                    where=f"{group}.{key}",
                    got=str(values[key]),
                    expected=str(wanted),
                    remedy=f"say which one counts: add {group}.{key}=... to the command line",
                )


def _values(config: Any) -> dict[Any, Any]:
    content = OmegaConf.to_container(config)
    return content if isinstance(content, dict) else {}
