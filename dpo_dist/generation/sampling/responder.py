"""A model that responds to prompts: its files, tokenizer and weights, with an adapter or without."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dpo_dist.config.data_schema import DataConfig
from dpo_dist.config.schema import ModelConfig, RunConfig
from dpo_dist.data.build_dataset import tokenizer_digest
from dpo_dist.data.tokenization.tokenizer import tokenizer_facts
from dpo_dist.digests import content_digest, text_digest
from dpo_dist.errors import ConfigError
from dpo_dist.model.folder import (
    CONFIG_FILE,
    description_folder,
    has_tokenizer,
    model_folder,
    read_model_json,
)
from dpo_dist.model.load import load_config, load_tokenizer, load_weights
from dpo_dist.model.safe_weights import check_adapter
from dpo_dist.reference.digest import digest_model

_ADAPTER_CONFIG = "adapter_config.json"
KEY = "pairs.models"
"""The configuration key that errors name, unless a caller has another."""


@dataclass(frozen=True)
class ModelSource:
    """The files of a model that responds.

    Attributes:
        name: as configured.
        folder: of the model, or of the base of an adapter.
        adapter: folder of an adapter, or None.
        revision: of a hub model, or None.
        digest: of all files that determine its responses, tokenizer included.
    """

    name: str
    folder: Path
    adapter: Path | None
    revision: str | None
    digest: str

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder if it has a tokenizer, else that of the model."""
        return self.adapter if self.adapter is not None and has_tokenizer(self.adapter) else self.folder

    def described(self) -> dict[str, Any]:
        """Return the facts for provenance."""
        return {"name": self.name, "revision": self.revision, "digest": self.digest}


def find_model(name: str, config: RunConfig, key: str = KEY) -> ModelSource:
    """Return the files of a model; downloads a hub model.

    Args:
        name: a folder, that of an adapter too, or a hub name; `model.revision` counts for `model.path` only.
        config: of the run.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: the model or the base of an adapter does not exist, or is incomplete.
    """
    source = _located(name, config, model_folder, key)
    store = Path(config.reference.store)
    files = digest_model(source.folder, store, remote_code=config.model.trust_remote_code)
    added = [] if source.adapter is None else sorted(source.adapter.glob("adapter_*"))
    parts = [files.digest, content_digest(added), tokenizer_digest(source.tokenizer_folder)]
    parts += [f"ends with {token}" for token in sorted(_given_stops(source.folder))]
    return replace(source, digest=text_digest(" ".join(parts)))


def find_description(name: str, config: RunConfig, key: str = KEY) -> ModelSource:
    """Return the same as `find_model`, without a digest, and without downloading weights from the hub."""
    return _located(name, config, description_folder, key)


def _located(
    name: str, config: RunConfig, find: Callable[[str, str | None, str], Path], key: str
) -> ModelSource:
    revision = config.model.revision if name == config.model.path else None
    adapter = _adapter_folder(name)
    if adapter is not None:
        check_adapter(adapter, key)
    base, base_revision = (name, revision) if adapter is None else _base_of(adapter)
    return ModelSource(name, find(base, base_revision, key), adapter, revision, "")


def _adapter_folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    has_adapter = (folder / _ADAPTER_CONFIG).is_file() and not (folder / CONFIG_FILE).is_file()
    return folder if has_adapter else None


def _base_of(adapter: Path) -> tuple[str, str | None]:
    content = read_model_json(adapter / _ADAPTER_CONFIG)
    base, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            "the adapter does not name its base model",
            where=str(adapter / _ADAPTER_CONFIG),
            expected="base_model_name_or_path",
            remedy="write the folder or hub name of the base model there",
        )
    is_local = Path(base).expanduser().is_dir()
    return base, None if is_local or not isinstance(revision, str) else revision


@dataclass(frozen=True, eq=False)
class Responder:
    """A model as it is asked for responses.

    Attributes:
        source: its files.
        tokenizer: its own.
        data: the limits and the template by which prompts are rendered, as in training.
        stop_ids: tokens that end a response.
        longest: most tokens of a prompt and its response; None: no limit is known.
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    stop_ids: frozenset[int]
    longest: int | None


def open_responder(source: ModelSource, config: RunConfig, key: str = KEY) -> Responder:
    """Return a model's tokenizer and the tokens that end its responses, without weights.

    Raises:
        ConfigError: it has no tokenizer, or no token ends a response.
    """
    tokenizer = load_tokenizer(source.tokenizer_folder, config.model)
    stop_ids = find_stop_ids(tokenizer, config.data, source.folder, key)
    model_config = load_config(source.folder, config.model).get_text_config()
    longest = getattr(model_config, "max_position_embeddings", None)
    return Responder(source, tokenizer, config.data, stop_ids, longest)


def find_stop_ids(
    tokenizer: PreTrainedTokenizerBase, data: DataConfig, folder: Path | None = None, key: str = KEY
) -> frozenset[int]:
    """Return every token that ends a response: of the chat template, the tokenizer and the model's folder.

    Raises:
        ConfigError: there is none.
    """
    stops: set[int | None] = {tokenizer.eos_token_id}
    facts = tokenizer_facts(tokenizer, data)
    if facts.chat is not None:
        stops.add(tokenizer.convert_tokens_to_ids(facts.end_of_turn))
    if folder is not None:
        stops |= _given_stops(folder)
    found = frozenset(stop for stop in stops if stop is not None and stop != tokenizer.unk_token_id)
    if not found:
        raise ConfigError(
            "the tokenizer has no token that ends a response",
            where=key,
            got=str(folder),
            remedy="set eos_token in tokenizer_config.json",
        )
    return found


def _given_stops(folder: Path) -> set[int]:
    """Return the tokens that end a response by the generation_config.json of a model folder."""
    if not (folder / "generation_config.json").is_file():
        return set()
    given = GenerationConfig.from_pretrained(folder).eos_token_id
    return set() if given is None else set(given) if isinstance(given, list) else {given}


def load_responder(source: ModelSource, config: ModelConfig, device: torch.device) -> Any:
    """Return the weights of a model that responds, whole on `device` and in evaluation mode.

    Raises:
        ConfigError: they cannot be loaded.
    """
    model_config = load_config(source.folder, config)
    causal_lm = load_weights(source.folder, model_config, config, device, key=KEY)
    if source.adapter is not None:
        try:
            causal_lm = PeftModel.from_pretrained(causal_lm, str(source.adapter))
        except Exception as fault:  # peft can raise anything
            raise ConfigError(
                "the adapter cannot be loaded on its base model",
                where=KEY,
                got=f"{source.adapter}: {(str(fault).splitlines() or [''])[0][:200]}",
                remedy="check base_model_name_or_path in its adapter_config.json",
            ) from fault
    return causal_lm.eval()
