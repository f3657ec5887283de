"""The options by which a user runs code that is not of this program, and a config.yaml that is read back.

A run directory is data: its config.yaml cannot open one of these doors for the command that reads it.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.secret_text import HIDDEN
from dpo_dist.small_files import read_small

_DOORS = {
    "model.trust_remote_code": "Python code of model folders is run",
    "loss.function": "Python code of the loss is run",
    "pairs.function": "Python code of the judge is run",
}
_CODE_OF_HYDRA = ("defaults", "hydra")
_MOST_BYTES = 2**24
_MOST_LEVELS = 50


def open_doors(config: RunConfig) -> list[str]:
    """Return a line for each option of `config` that runs code of others."""
    values = {
        "model.trust_remote_code": config.model.trust_remote_code,
        "loss.function": config.loss.function,
        "pairs.function": config.pairs.function,
    }
    return [f"warning: {key}={_written(value)}: {_DOORS[key]}" for key, value in values.items() if value]


def read_config(file: Path) -> str:
    """Return the text of a config.yaml.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or has more than 16 MiB, which take minutes to parse.
    """
    return read_small(file, _MOST_BYTES).decode()


def yaml_values(text: str) -> Any:
    """Return the values of a YAML text, of which none is named twice and few levels are nested.

    References (`*NAME`) of references can make a short text an endless value.

    Raises:
        ValueError, yaml.YAMLError: it has references, is nested deeper than any run writes, or is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has references (*NAME), which no run writes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise ValueError("its values are nested deeper than a run writes them")
    return yaml.safe_load(text)


def written_values(text: str) -> dict[str, Any]:
    """Return the values of a config.yaml, which has nothing to be evaluated.

    Raises:
        ValueError, yaml.YAMLError: as `yaml_values`, or it has no keys, interpolations or parts of Hydra.
    """
    content = yaml_values(text)
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


def check_places(
    content: Mapping[str, Any], made: Collection[str], given: Collection[str], file: Path
) -> None:
    """Check that the folders that a command makes were not chosen by a config.yaml that is read back.

    Args:
        content: of the file.
        made: the keys of these folders.
        given: the keys on the command line.
        file: for the error.

    Raises:
        ConfigError: one would be made outside of the working directory.
    """
    here = Path.cwd()
    for key, value in _leaves(content, ""):
        if key not in made or key in given or not isinstance(value, str):
            continue
        folder = Path(os.path.realpath(os.path.expanduser(value)))  # noqa: PTH111 (no error for an unknown user)
        if not folder.is_dir() and not folder.is_relative_to(here):
            raise ConfigError(
                "the configuration of this run names a folder that does not exist",
                where=f"{file}: {key}",
                got=value,
                expected="a folder that exists, or one below the working directory",
                remedy=f"add {key}=FOLDER to the command",
            )


def check_not_hidden(content: Mapping[str, Any], file: Path) -> None:
    """Check that the model of a config.yaml can be found: its path may have been hidden as a secret.

    Raises:
        ConfigError: it was.
    """
    for key, value in _leaves(content, ""):
        if key == "model.path" and HIDDEN in str(value):
            raise ConfigError(
                "the configuration of this run has no path of the model: a part of it was hidden as a secret",
                where=f"{file}: {key}",
                got=str(value),
                remedy="write the path into this file, or write the command of the run: model.path=... and "
                "its other keys",
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
