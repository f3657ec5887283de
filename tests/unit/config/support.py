"""A configuration from a few values, without Hydra."""

from typing import Any

from omegaconf import OmegaConf

from dpo_dist.config.load import resolve
from dpo_dist.config.schema import RunConfig


def configured(values: dict[str, Any]) -> RunConfig:
    config = OmegaConf.create({"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}})
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    return resolve(config)
