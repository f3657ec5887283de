"""Configurations without Hydra's work of 50 ms for each."""

from collections.abc import Sequence
from functools import cache

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from dpo_dist.config.load import config_dir

_compose = hydra.compose


@cache
def _composed(name: str, *choices: str) -> DictConfig:
    return _compose(name, list(choices))


def compose_once(name: str, choices: Sequence[str] = ()) -> DictConfig:
    """Compose as Hydra does, the same choices of shipped presets only once; not those of an own folder."""
    searched = {one.path for one in GlobalHydra.instance().config_loader().get_search_path().get_path()}
    has_only_shipped = str(config_dir()) in searched
    return _composed(name, *choices) if has_only_shipped else _compose(name, list(choices))


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tests in one process."""
    monkeypatch.setattr(hydra, "compose", compose_once)
