"""Refuse Python code that a model folder or its configuration names, unless the user asked to run it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_dist.errors import ConfigError
from dpo_dist.model.folder import CONFIG_FILE, read_model_json

TOKENIZER_CONFIG = "tokenizer_config.json"
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def own_code_error(folder: Path, key: str, file: str = CONFIG_FILE) -> ConfigError | None:
    """Return the error of a folder that transformers cannot load without the code that `file` names.

    Args:
        folder: of the model.
        key: the configuration key of the folder.
        file: the JSON file that transformers was reading.
    """
    try:
        named = read_model_json(folder / file).get("auto_map")
    except ConfigError:
        return None
    if not named:
        return None
    return ConfigError(
        "the model folder names Python code, which is not run",
        where=key,
        got=f"{folder / file}: auto_map {_first(named)}",
        expected="classes of transformers",
        remedy="name a model that transformers knows itself, or read the code first and then set "
        "model.trust_remote_code=true",
    )


def check_no_kernels(folder: Path, key: str) -> None:
    """Check that config.json names no kernel of the Hub, which transformers would download and run.

    Raises:
        ConfigError: it does.
    """
    for name, value in _values(read_model_json(folder / CONFIG_FILE)):
        if name in _IMPLEMENTATIONS and any("/" in str(part) for part in _parts(value)):
            raise ConfigError(
                "the model's config.json names code on the Hub, which is not run",
                where=key,
                got=f"{folder / CONFIG_FILE}: {name} {_first(value)}",
                expected="an implementation of transformers",
                remedy=f"remove {name} from config.json: model.attention selects the kernel",
            )


def _values(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name), inner
            yield from _values(inner)


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _first(value: Any) -> str:
    if isinstance(value, dict) and value:
        name, code = next(iter(value.items()))
        return f"{name}: {code}"
    return str(value)
