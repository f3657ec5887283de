"""The options by which a user runs code that is not of this program, and a config.yaml that is read back.

A run directory is data: its config.yaml cannot open one of these doors for the command that reads it.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError

_DOORS = {
    "model.trust_remote_code": "Python code of model folders is run",
    "loss.function": "Python code of the loss is run",
    "pairs.function": "Python code of the judge is run",
}
_CODE_OF_HYDRA = ("defaults", "hydra")


def open_doors(config: RunConfig) -> list[str]:
    """Return a line for each option of `config` that runs code of others."""
    values = {
        "model.trust_remote_code": config.model.trust_remote_code,
        "loss.function": config.loss.function,
        "pairs.function": config.pairs.function,
    }
    return [f"warning: {key}={_written(value)}: {_DOORS[key]}" for key, value in values.items() if value]


def written_values(text: str) -> dict[str, Any]:
    """Return the values of a config.yaml, which has nothing to be evaluated.

    Raises:
        ValueError, yaml.YAMLError: it has no keys, or references, interpolations or parts of Hydra.
    """
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise ValueError("it has references (*NAME), which no run writes")
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError("it has no keys")
    for name in _CODE_OF_HYDRA:
        if name in content:
            raise ValueError(f"it has the key {name}, which no run writes")
    for key, value in _leaves(content, ""):
        if "${" in f"{key}{value}":
            raise ValueError(f"{key or 'a key'} has an interpolation (${{...}}), which no run writes")
    return content


def check_doors(content: Mapping[str, Any], given: Collection[str], file: Path) -> None:
    """Check that a config.yaml opens no door that the command does not open itself.

    Args:
        content: of the file.
        given: the keys on the command line.
        file: for the error.

    Raises:
        ConfigError: it does.
    """
    for key, value in _leaves(content, ""):
        if value and key in _DOORS and key not in given:
            raise ConfigError(
                f"the configuration of this run asks to run code: {_DOORS[key]}",
                where=str(file),
                got=f"{key}={_written(value)}",
                expected="a run directory without code, or the option on the command line",
                remedy=f"add {key}={_written(value)} to the command if you trust this code",
            )


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _written(value: Any) -> str:
    return "true" if value is True else str(value)
