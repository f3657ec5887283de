"""The tokens that end a response: from the chat template, and from and to generation_config.json."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dpo_dist.data import DataConfig, final_tokens, trained_stops
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.types import Tokenizer
from dpo_dist.model.files.folder import CONFIG_FILE, GENERATION_CONFIG, is_adapter, read_model_json

_STOPS = "eos_token_id"


def find_stop_ids(tokenizer: Tokenizer, data: DataConfig, folder: Path, key: str) -> frozenset[int]:
    """Return the ids of tokens that end a response in training or by the model's folder; an error if none."""
    stop_ids = frozenset({*folder_stops(folder), *trained_stops(tokenizer, data)})
    if not stop_ids:
        raise ConfigError(
            "neither the tokenizer nor the model's folder names a token that ends a response",
            where=key,
            got=str(folder),
            remedy="set eos_token in tokenizer_config.json",
        )
    return stop_ids


def padding_token(tokenizer: Tokenizer, data: DataConfig) -> str:
    """Return the token that pads rows of a reward model: the tokenizer's own, if it ends no text.

    transformers reads the score at the last token that is not this one. Raises ConfigError: there is none.
    """
    ends = final_tokens(tokenizer, data)
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    candidates = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *added]
    token = next((str(each) for each in candidates if each and str(each) not in ends), None)
    if token is None:
        raise ConfigError(
            "every special token of the tokenizer ends texts, so that none can pad rows of a reward model",
            where="model.path",
            got=", ".join(map(str, added)),
            expected="a pad_token that ends no text: a score is read at the last token that is not padding",
            remedy="set pad_token in tokenizer_config.json to a token that your data do not have",
        )
    return token


def set_padding(model_config: Any, token_id: int) -> None:
    """Write the padding token where a reward model's class reads it."""
    model_config.pad_token_id = token_id
    model_config.get_text_config().pad_token_id = token_id


def folder_stops(folder: Path) -> list[int]:
    """Return the ids of the tokens at which transformers and vLLM stop, from a model folder's files."""
    ids: Any = _read_settings(folder).get(_STOPS)
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return generation_config.json; without it, the settings that transformers finds in config.json."""
    if (folder / GENERATION_CONFIG).is_file():
        return read_model_json(folder / GENERATION_CONFIG)
    if not (folder / CONFIG_FILE).is_file():
        return {}
    return dict(GenerationConfig.from_model_config(read_model_json(folder / CONFIG_FILE)).to_diff_dict())


def write_stops(folder: Path, base: Path, stops: Collection[int]) -> None:
    """Write generation_config.json with the base's settings, and `stops` added to the base's stop tokens.

    If the base already stops at all of them, nothing is written, except to an adapter's folder, where the
    card tells how to use the file.
    """
    settings = _read_settings(base)
    base_stops = folder_stops(base)
    if set(stops) <= set(base_stops) and not is_adapter(folder):
        return
    settings.pop("_from_model_config", None)  # with it, older transformers read config.json instead
    content = settings | {_STOPS: list(dict.fromkeys([*base_stops, *stops]))}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")


def stop_notes(tokenizer: Tokenizer, data: DataConfig, folder: Path) -> list[str]:
    """Return a note if the base does not stop at every token that ends turns or texts in training."""
    base_stops = folder_stops(folder)
    missing = [stop for stop in trained_stops(tokenizer, data) if stop not in base_stops]

    def describe(ids: Collection[int]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(each)} ({each})" for each in ids) or "no token"

    if not missing:
        return []
    return [
        f"the base itself stops at {describe(base_stops)}, but training ends turns or texts with "
        f"{describe(missing)}: "
        "generation_config.json of the written model has both (for an adapter see its README.md)"
    ]
