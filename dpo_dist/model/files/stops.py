"""The tokens that end a response, and generation_config.json, by which others stop at them."""

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from dpo_dist.config.schema import DataConfig
from dpo_dist.data.records import Tokenizer
from dpo_dist.data.text.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.folder import CONFIG_FILE, is_adapter, read_model_json

_STOPS = "eos_token_id"


def find_stop_ids(tokenizer: Tokenizer, data: DataConfig, folder: Path, key: str) -> frozenset[int]:
    """Return every token that ends a response, by training or the model's folder. Raises ConfigError."""
    stop_ids = frozenset({*given_stops(folder), *trained_stops(tokenizer, data)})
    if not stop_ids:
        raise ConfigError(
            "the tokenizer has no token that ends a response",
            where=key,
            got=str(folder),
            remedy="set eos_token in tokenizer_config.json",
        )
    return stop_ids


def trained_stops(tokenizer: Tokenizer, data: DataConfig) -> list[int]:
    """Return the tokens with which training ends texts, and turns if a template writes them."""
    ends = {tokenizer.eos_token}
    with contextlib.suppress(ConfigError):  # the template cannot be used for training
        ends |= tokenizer_facts(tokenizer, data).stops
    ids = {tokenizer.convert_tokens_to_ids(end) for end in ends - {None}}
    return sorted(ids - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id}))


def given_stops(folder: Path) -> list[int]:
    """Return the tokens at which transformers and vLLM stop by the files of a model folder."""
    given: Any = _read_settings(folder).get(_STOPS)
    return given if isinstance(given, list) else [] if given is None else [given]


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of generation_config.json; without it, what transformers reads from config.json."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        return read_model_json(folder / GENERATION_CONFIG_NAME)
    if not (folder / CONFIG_FILE).is_file():
        return {}
    return dict(GenerationConfig.from_model_config(read_model_json(folder / CONFIG_FILE)).to_diff_dict())


def write_stops(folder: Path, base: Path, stops: Collection[int]) -> None:
    """Add `stops` to those of the base in the generation_config.json of a written folder.

    The other settings are the base's. Nothing is written if it stops at them, but into an adapter's folder:
    its card says how to use the file there.
    """
    settings, given = _read_settings(base), given_stops(base)
    if set(stops) <= set(given) and not is_adapter(folder):
        return
    settings.pop("_from_model_config", None)  # older transformers would read config.json in its place
    content = settings | {_STOPS: list(dict.fromkeys([*given, *stops]))}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")


def stop_notes(tokenizer: Tokenizer, data: DataConfig, folder: Path) -> list[str]:
    """Return a line if a base does not stop where training ends its turns or texts."""
    given = given_stops(folder)
    missing = [stop for stop in trained_stops(tokenizer, data) if stop not in given]

    def named(ids: Collection[int]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(each)} ({each})" for each in ids) or "no token"

    if not missing:
        return []
    return [
        f"the base itself stops at {named(given)}, but training ends turns or texts with {named(missing)}: "
        "generation_config.json of the written model has both (for an adapter see its README.md)"
    ]
