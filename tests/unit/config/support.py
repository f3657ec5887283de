"""Configurations from the words of a command, and their errors."""

import shlex
from collections.abc import Sequence
from functools import cache
from unittest import mock

import hydra
import pytest
from omegaconf import DictConfig

from dpo_dist.config.command_line import divide
from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError

RUN = ["model.path=m", "data.train=[a.jsonl]"]
_compose = hydra.compose


@cache
def _composed(name: str, *choices: str) -> DictConfig:
    return _compose(name, list(choices))


def compose_once(name: str, choices: Sequence[str]) -> DictConfig:
    """Compose shipped presets as Hydra does, which takes 50 ms; the same ones only once."""
    return _composed(name, *choices)


def configured(typed: str = "", *, verb: str = "", run: list[str] = RUN) -> RunConfig:
    arguments = divide([*run, *shlex.split(typed)])
    with mock.patch.object(hydra, "compose", _compose if arguments.config_dir else compose_once):
        return load_run_config(arguments.words, arguments.config_dir, verb=verb, mistakes=arguments.mistakes)


def error_of(typed: str, *, verb: str = "", run: list[str] = RUN) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        configured(typed, verb=verb, run=run)
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    return caught.value
