"""Configurations without Hydra's work of 50 ms for each."""

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from dpo_dist.config.keys import config_dir

_compose = hydra.compose
_composed: dict[str, DictConfig] = {}


def compose_once(name: str) -> DictConfig:
    """Compose as Hydra does, the same parts of shipped presets only once; not those of an own folder.

    The caller does not change what it gets.
    """
    path = GlobalHydra.instance().config_loader().get_search_path().get_path()
    if str(config_dir()) not in {one.path for one in path}:
        return _compose(name)
    stored = ConfigStore.instance()
    root = stored.load(f"{name}.yaml").node
    own = [entry for entry in root.defaults if isinstance(entry, str) and entry.startswith("dpo_dist/")]
    parts = [stored.load(f"{entry}.yaml").node for entry in own]
    if (key := str([root, *parts])) not in _composed:
        _composed[key] = _compose(name)
    return _composed[key]
