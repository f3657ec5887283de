"""Configurations from the words of a command, and their errors."""

import shlex
import tempfile
from pathlib import Path

import pytest

from dpo_dist.config.command_line import split_words
from dpo_dist.config.load import load_run_config, saved_config, to_yaml
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError

RUN = ["model.path=m", "data.train=[a.jsonl]"]


def configured(typed: str = "", *, verb: str = "", run: list[str] = RUN) -> RunConfig:
    arguments = split_words([*run, *shlex.split(typed)])
    return load_run_config(arguments.words, arguments.config_dir, verb=verb, mistakes=arguments.mistakes)


def written_and_read(config: RunConfig) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config))
        return saved_config(file)


def error_of(typed: str, *, verb: str = "", run: list[str] = RUN) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        configured(typed, verb=verb, run=run)
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    return caught.value
