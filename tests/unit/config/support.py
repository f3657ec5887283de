"""Configurations from a few values, without Hydra, and their errors."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from dpo_dist.config.load import resolve
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError


def configured(values: dict[str, Any]) -> RunConfig:
    config = OmegaConf.create({"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}})
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    return resolve(config)


def check_refused(values: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(values)
    assert caught.value.where == where
    assert caught.value.got
    assert caught.value.remedy
    assert caught.value.exit_code == 2
