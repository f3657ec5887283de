"""Apply the presets that the command line chooses after an experiment, not before it.

Hydra applies groups before experiments: with `+experiment=qwen7b_lora loss=simpo` alone, values that the
experiment sets for its own loss would replace those of the chosen preset.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

# A loss is one thing: an option that an experiment sets for its own loss means nothing to another one.
_WHOLE_SECTIONS = ("loss",)


def keep_chosen_presets(
    composed: DictConfig,
    overrides: Sequence[Override],
    folders: Iterable[Path],
    compose: Callable[[Sequence[str]], DictConfig],
) -> None:
    """Restore in `composed` the values of the command line's presets that an experiment replaced.

    A preset without values restores the defaults of its whole section.

    Args:
        composed: Hydra's composition of `overrides`; changed in place.
        overrides: of the command line, parsed. Values that they set win over presets.
        folders: the folders of groups, in the order in which Hydra searches them.
        compose: Hydra's composition of overrides.
    """
    if not any(override.key_or_group == "experiment" for override in overrides):
        return
    for group, choice in chosen_presets(overrides).items():
        file = next(
            (file for folder in folders if (file := folder / group / f"{choice}.yaml").is_file()), None
        )
        if file is None or group not in composed:
            continue
        preset = OmegaConf.load(file)
        keys = [str(key) for key in preset if key != "defaults"]
        whole = group in _WHOLE_SECTIONS or not keys
        prefixes = [group] if whole else [f"{group}.{key}" for key in keys]
        alone = compose(
            [
                str(override.input_line)
                for override in overrides
                if override.key_or_group == group or _is_below(override.key_or_group, prefixes)
            ]
        )
        for key in alone[group] if whole else keys:
            composed[group][key] = alone[group][key]


def chosen_presets(overrides: Iterable[Override]) -> dict[str, str]:
    """Return the last preset that the command line chooses of each group: `{"loss": "simpo"}`."""
    chosen = {}
    for override in overrides:
        value = override.value()
        if isinstance(value, str) and "." not in override.key_or_group:
            chosen[override.key_or_group] = value
    return chosen


def _is_below(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith((f"{prefix}.", f"{prefix}[")) for prefix in prefixes)
