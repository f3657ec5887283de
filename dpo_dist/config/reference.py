"""What `reference.mode=auto` is, and which options of `reference` a mode uses."""

from collections.abc import Collection
from dataclasses import replace

from dpo_dist.config.schema import ReferenceConfig, ReferenceMode, RunConfig

LOADED = (ReferenceMode.cached, ReferenceMode.live)
_STORED = (ReferenceMode.cached,)
MODES_USING = {
    "path": LOADED,
    "quantization": LOADED,
    "numerics": _STORED,
    "offload": LOADED,
    "nvme_path": LOADED,
    "rows_per_shard": _STORED,
}
"""Options of `reference` and the modes in which they have an effect.

`store` is not among them: like `data.cache` it names a folder, which scripts and saved configurations set for
runs of every mode.
"""

# They define the reference model; the other options only say how it is loaded and scored.
_DEFINING = ("path", "quantization", "numerics")


def resolve_reference(config: RunConfig, given: Collection[str] = ()) -> RunConfig:
    """Replace `auto` by `none`, `adapter` or `cached`, and reset options without effect.

    An experiment may set how its reference model is loaded, and the command line may choose a loss or a mode
    that loads none. Options that the command line sets (`given`) are kept, so that a rule refuses them.
    """
    reference = config.reference
    mode_given = not {"reference", "reference.mode"}.isdisjoint(given)
    follows = reference.mode is ReferenceMode.auto or (not mode_given and _is_overruled(config, given))
    mode = _needed_mode(config) if follows else reference.mode
    unused = []
    if follows or mode_given:
        unused += [opt for opt, modes in MODES_USING.items() if mode not in modes and opt not in _DEFINING]
    if follows and mode is ReferenceMode.none and _is_given("loss", given):
        unused += _DEFINING
    defaults = ReferenceConfig()
    reset = {option: getattr(defaults, option) for option in unused if f"reference.{option}" not in given}
    return replace(config, reference=replace(reference, mode=mode, **reset))


def _is_overruled(config: RunConfig, given: Collection[str]) -> bool:
    """Return whether the command line chooses a loss or a model that contradicts the experiment's mode."""
    mode = config.reference.mode
    if _is_given("loss", given):
        return (mode is ReferenceMode.none) is config.loss.needs_reference
    return mode is ReferenceMode.adapter and config.model.adapter is None and _is_given("model", given)


def _is_given(section: str, given: Collection[str]) -> bool:
    return any(key.partition(".")[0] == section for key in given)


def _needed_mode(config: RunConfig) -> ReferenceMode:
    if not config.loss.needs_reference:
        return ReferenceMode.none
    reference, model = config.reference, config.model
    base_is_reference = reference.path is None and reference.quantization is None
    if model.adapter is not None and base_is_reference:
        return ReferenceMode.adapter
    return ReferenceMode.cached
