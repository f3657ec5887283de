"""Write a model or an adapter with its tokenizer as a folder that transformers or peft loads."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.model.adapter_files import LORA_WEIGHTS, PEFT_PREFIX
from dpo_dist.model.architectures import is_noise
from dpo_dist.model.folder import ADAPTER_WEIGHTS, CONFIG_FILE
from dpo_dist.model.lora import TRAINED

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
_NAME_OF_ADAPTER = re.compile(r"(\.modules_to_save)?\.default(?=\.|$)")
_REMEDY = "free disk space, or name another folder; the model of a run is written by the same command"


def write_weights(
    folder: Path,
    causal_lm: Any,
    weights: dict[str, Tensor],
    base: Path | None = None,
    changes: Mapping[str, object] | None = None,
) -> None:
    """Write weights by transformers name in files of at most 5 GB, and a config.json.

    It is that of the model folder `base`, if there is one, with `changes`.
    """
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    causal_lm.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
    if base is not None:
        _restore_description(folder, base, dtype, changes or {})


def _restore_description(folder: Path, base: Path, dtype: torch.dtype, changes: Mapping[str, object]) -> None:
    """Give a model folder that transformers wrote the description of its base.

    Of a base that also reads images or sounds, and of which transformers wrote the text model only,
    config.json is the one of transformers with the base's dropout and noise, without files about images.
    """
    file, generation = folder / CONFIG_FILE, folder / GENERATION_CONFIG_NAME
    written, own = json.loads(file.read_bytes()), json.loads((base / CONFIG_FILE).read_bytes())
    kind = written["model_type"]
    # Code of the model's own may give it a type that config.json does not name.
    if own.get("model_type", kind) == kind:
        content = own | {"architectures": written["architectures"]}
        _copy_files(base, folder, _PROCESSORS)
    else:  # options that the base lacks keep their defaults
        text = own.get("text_config") or {}
        content = {name: value for name, value in written.items() if not is_noise(name, value, kind)}
        content |= {name: text[name] for name in written if name not in content and name in text}
    write_description(file, content | changes, dtype)
    generation.unlink(missing_ok=True)  # transformers made one of config.json
    _copy_files(base, folder, GENERATION_CONFIG_NAME)


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


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the files of a tokenizer with its chat template."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the library of tokenizers has no other class
        if "(os error " not in str(error):
            raise
        raise OSError(str(error)) from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer with its chat template from the model folder `source`."""
    _copy_files(source, folder, *_TOKENIZER_FILES)


def _copy_files(source: Path, folder: Path, *patterns: str) -> None:
    for file in {file for pattern in patterns for file in source.glob(pattern)}:
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def write_adapter(folder: Path, causal_lm: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write the trained adapter of a model from its weights by name, as peft reads it.

    A weight of several names is in `weights` by the first, and in the file by each.
    """
    first: dict[nn.Parameter, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, weight in causal_lm.named_parameters(remove_duplicate=False):
        if weight.requires_grad:
            known = first.setdefault(weight, name)
            tensors[_name_in_file(name)] = weights[known].to(dtype, copy=name != known).contiguous()
    saved = sorted({name.rpartition(".")[0] for name in tensors if not name.endswith(LORA_WEIGHTS)})
    config = copy(causal_lm.peft_config[TRAINED])
    config.inference_mode, config.modules_to_save = True, saved or None
    config.save_pretrained(folder)
    prefixed = {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
    save_file(prefixed, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def _name_in_file(name: str) -> str:
    """Return the name in peft's files of a weight of a model: without the adapter's name."""
    short = _NAME_OF_ADAPTER.sub("", name)
    return short.removesuffix(".weight") if ".lora_magnitude_vector" in short else short


@contextlib.contextmanager
def writing_errors(folder: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Raise a `CheckpointError` for a file of `folder` that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the trained model cannot be written", where=str(folder), got=str(error), remedy=remedy
        ) from error
