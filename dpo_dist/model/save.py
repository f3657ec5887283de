"""Write a model or an adapter with its tokenizer as a folder that transformers or peft loads."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.model.adapter_weights import AdapterWeights, name_in_file, stack
from dpo_dist.model.architectures import is_noise
from dpo_dist.model.folder import CONFIG_FILE
from dpo_dist.model.lora import TRAINED, trained_aliases

_DTYPE_KEYS = ("dtype", "torch_dtype")
# How a model reads images and sounds.
_PROCESSORS = "*processor_config.json"
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "tekken*.json",
    "chat_template*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "tokenization_*.py",
)
_REMEDY = "free disk space, or name another folder; the model of a run is written by the same command"


def write_weights(
    folder: Path,
    causal_lm: Any,
    weights: dict[str, Tensor],
    description: Mapping[str, bytes] | None = None,
    changes: Mapping[str, object] | None = None,
) -> None:
    """Write weights by transformers name in files of at most 5 GB, and config.json with these `changes`."""
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    causal_lm.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
    if description is not None:
        restore_description(folder, description, dtype, changes or {})


def read_description(base: Path) -> dict[str, bytes]:
    """Return config.json, generation_config.json and the processors of images and sounds, by name."""
    files = [base / name for name in (CONFIG_FILE, GENERATION_CONFIG_NAME)]
    files += sorted(base.glob(_PROCESSORS))
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def restore_description(
    folder: Path, files: Mapping[str, bytes], dtype: torch.dtype, changes: Mapping[str, object]
) -> None:
    """Give a model folder that transformers wrote the description of its base, from `read_description`.

    Of a base that also reads images or sounds, and of which transformers wrote the text model only,
    config.json is the one of transformers with the base's dropout and noise, without files about images.
    """
    file = folder / CONFIG_FILE
    written, base = json.loads(file.read_bytes()), json.loads(files[CONFIG_FILE])
    kind = written["model_type"]
    # Code of the model's own may give it a type that config.json does not name.
    if base.get("model_type", kind) == kind:
        content = base | {"architectures": written["architectures"]}
        for name in files.keys() - {CONFIG_FILE, GENERATION_CONFIG_NAME}:
            (folder / name).write_bytes(files[name])
    else:  # options that the base lacks keep their defaults
        text = base.get("text_config") or {}
        content = {name: value for name, value in written.items() if not is_noise(name, value, kind)}
        content |= {name: text[name] for name in written if name not in content and name in text}
    write_description(file, content | changes, dtype)
    if GENERATION_CONFIG_NAME in files:
        (folder / GENERATION_CONFIG_NAME).write_bytes(files[GENERATION_CONFIG_NAME])
    else:  # transformers made one of config.json
        (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)


def write_description(file: Path, content: dict[str, Any], dtype: torch.dtype) -> None:
    """Write config.json; of the configurations of parts, the ones that name a precision get `dtype`, too."""
    content.pop("transformers_weights", None)  # names a file of the base
    name = str(dtype).removeprefix("torch.")
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        named = {key for key in _DTYPE_KEYS if key in part}
        if (part is content and not named) or any(part[key] != name for key in named):
            part.pop("torch_dtype", None)
            part["dtype"] = name
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, files: Mapping[str, bytes] | None
) -> None:
    """Write the files of a tokenizer from `read_tokenizer`; None: those that transformers writes."""
    if files is None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the library of tokenizers has no other class
            if "(os error " not in str(error):
                raise
            raise OSError(str(error)) from error
    else:
        write_files(folder, files)


def write_card(folder: Path, card: Callable[[], str] | None) -> None:
    """Write README.md, unless there is no card or it is empty."""
    if card is not None and (text := card()):
        (folder / "README.md").write_text(text, encoding="utf-8")


def read_tokenizer(source: Path) -> dict[str, bytes]:
    """Return the files of a tokenizer with its chat template, by name below the model folder `source`."""
    found = sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)})
    return {str(file.relative_to(source)): file.read_bytes() for file in found}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, by name below a folder that exists."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


def trained_update(
    causal_lm: Any, weights: Mapping[str, Tensor], below: AdapterWeights | None
) -> AdapterWeights:
    """Return the trained adapter of a model from its weights by name, with the adapter below it."""
    aliases = trained_aliases(causal_lm)
    own = {name_in_file(name): weight for name, weight in weights.items() if name not in aliases}
    for alias, name in aliases.items():
        own[name_in_file(alias)] = own[name_in_file(name)].clone()  # a file has no shared weights
    trained = AdapterWeights(causal_lm.peft_config[TRAINED], own)
    return trained if below is None else stack(trained, below)


@contextlib.contextmanager
def writing_errors(folder: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Raise a `CheckpointError` for a file of `folder` that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the trained model cannot be written", where=str(folder), got=str(error), remedy=remedy
        ) from error
