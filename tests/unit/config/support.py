"""Configurations from a few values, without a command line, and their errors."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from dpo_dist.config.load import from_yaml
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError


def configured(values: dict[str, Any]) -> RunConfig:
    config = OmegaConf.create({"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}})
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    return from_yaml(OmegaConf.to_yaml(config))


def check_refused(values: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(values)
    assert where in (
        caught.value.where,
        *(line.strip().partition(" (")[0] for line in caught.value.remedy.splitlines()),
    )
    assert caught.value.remedy
    assert caught.value.exit_code == 2
