"""Write a model or an adapter with its tokenizer as a folder that transformers or peft loads."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.foundation.files import read_small, staged_folder
from dpo_dist.model.adapter_weights import AdapterWeights, name_in_file, stack, trained_aliases, write_adapter
from dpo_dist.model.folder import CONFIG_FILE, weight_files
from dpo_dist.model.lora import TRAINED, adapted_layers
from dpo_dist.model.supported import is_noise

_SHARD_BYTES = 5 * 10**9


def tensors_of(base: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the weight files of a model folder, one after the other, by their names there."""
    for file in weight_files(base):
        if file.suffix != ".json":
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  (the file is not iterable)
                    yield name, content.get_tensor(name)


class Shards:
    """Files of at most 5 GB, with an index if there are several, as transformers names them."""

    def __init__(self, folder: Path):
        self._folder, self._pending = folder, dict[str, Tensor]()
        self._names: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, weight: Tensor) -> None:
        """Add a weight; writes a file when it is full."""
        if self._pending and self._bytes + weight.nbytes > _SHARD_BYTES:
            self._flush()
        self._pending[name] = weight.contiguous()
        self._bytes += weight.nbytes

    def _flush(self) -> None:
        self._names.append(list(self._pending))
        save_file(self._pending, self._file(len(self._names)), {"format": "pt"})
        self._pending, self._total, self._bytes = {}, self._total + self._bytes, 0

    def _file(self, number: int) -> Path:
        return self._folder / f"model-{number:05d}.safetensors"

    def close(self) -> None:
        """Write the last file, give all their names, and write the index."""
        self._flush()
        count = len(self._names)
        if count == 1:
            self._file(1).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._file(number).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


_NAMES_OF_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_DTYPE_KEYS = ("dtype", "torch_dtype")
# How a model reads images and sounds.
_PROCESSORS = "*processor_config.json"
_OF_ALL_PARTS = ("tie_word_embeddings",)


def read_description(base: Path) -> dict[str, bytes]:
    """Return files of a model folder by name, as far as there are such.

    They are config.json, generation_config.json, and those that say how it reads images and sounds.
    """
    files = [base / name for name in (CONFIG_FILE, GENERATION_CONFIG_NAME)]
    files += sorted(base.glob(_PROCESSORS))
    return {file.name: read_small(file) for file in files if file.is_file()}


def restore_description(folder: Path, files: Mapping[str, bytes], dtype: torch.dtype) -> None:
    """Give a model folder that transformers wrote the description of its base.

    config.json differs from the base's in `dtype`, in `architectures` if they named no model of language, and
    in `transformers_weights`. Of a base that also reads images or sounds, and of which transformers wrote the
    text model only, it is the one of transformers with the base's dropout and noise; the files about images
    are not written.

    Args:
        folder: with config.json.
        files: from `read_description` of the base.
        dtype: of the written weights.
    """
    file = folder / CONFIG_FILE
    written, base = json.loads(file.read_bytes()), json.loads(files[CONFIG_FILE])
    # Code of the model's own may give it a type that config.json does not name.
    if base.get("model_type", written["model_type"]) == written["model_type"]:
        content = base | {"architectures": written["architectures"]}
        for name in files.keys() - {CONFIG_FILE, GENERATION_CONFIG_NAME}:
            (folder / name).write_bytes(files[name])
    else:
        content = _with_noise_of(base.get("text_config") or {}, written)
    _write(file, content, dtype)
    if GENERATION_CONFIG_NAME in files:
        (folder / GENERATION_CONFIG_NAME).write_bytes(files[GENERATION_CONFIG_NAME])
    else:  # transformers made one of config.json
        (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)


def copy_description(base: Path, folder: Path, dtype: torch.dtype | None, changes: dict[str, object]) -> None:
    """Copy the description of a base, beside other weights, with the code in its folder.

    Args:
        base: its folder.
        folder: of the result.
        dtype: of the result's weights, if it is another one.
        changes: values of keys of config.json, and of its part about text if it has one.
    """
    content = json.loads((base / CONFIG_FILE).read_bytes())
    if isinstance(text := content.get("text_config"), dict):
        content["text_config"] = text | changes
        changes = {key: value for key, value in changes.items() if key in content or key in _OF_ALL_PARTS}
    _write(folder / CONFIG_FILE, content | changes, dtype)
    for file in (
        file for pattern in (GENERATION_CONFIG_NAME, _PROCESSORS, "*.py") for file in base.glob(pattern)
    ):
        shutil.copyfile(file, folder / file.name)


def _with_noise_of(base: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Return `written` with the base's dropout and noise; options that the base lacks keep their defaults."""
    kind = str(written.get("model_type"))
    kept = {name: value for name, value in written.items() if not is_noise(name, value, kind)}
    return kept | {name: base[name] for name in written if name not in kept and name in base}


def _write(file: Path, content: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Write config.json; of the configurations of parts, the ones that name a precision get `dtype`, too."""
    content.pop("transformers_weights", None)  # names a file of the base
    if dtype is not None:
        name = _NAMES_OF_DTYPES[dtype]
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            if part is content or any(key in part for key in _DTYPE_KEYS):
                _set_dtype(part, name)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_dtype(part: dict[str, Any], name: str) -> None:
    if all(part.get(key, name) == name for key in _DTYPE_KEYS) and any(key in part for key in _DTYPE_KEYS):
        return
    part.pop("torch_dtype", None)
    part["dtype"] = name


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
# In the errors of the library of tokenizers, which all have the class Exception.
_OF_SYSTEM = "(os error "
_REMEDY = "free disk space, or name another folder"


def write_model_folder(
    folder: Path,
    causal_lm: Any,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: Callable[[], str] | None = None,
    remedy: str = _REMEDY,
    parts: Sequence[tuple[float, AdapterWeights]] = (),
    tokenizer_files: Mapping[str, bytes] | None = None,
    description: Mapping[str, bytes] | None = None,
) -> None:
    """Write `folder`, which appears whole or not at all; an older one is replaced.

    Args:
        folder: its final name.
        causal_lm: the transformers model; its tensors are not used.
        weights: trained weights by transformers name; taken out while they are written.
        tokenizer: written beside them.
        card: returns the content of README.md; None or "": there is none.
        remedy: of a full disk.
        parts: adapters that are part of the model beside the trained one, with coefficients; all become one
            adapter.
        tokenizer_files: from `read_tokenizer`; None: transformers writes new ones.
        description: from `read_description` of the base; None: transformers writes a new one.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing_errors(folder, remedy), staged_folder(folder) as temporary:
        if adapted_layers(causal_lm):
            dtype = next(iter(weights.values())).dtype
            config, update = trained_update(causal_lm, weights, weights.pop, parts)
            write_adapter(temporary, config, {name: weight.to(dtype) for name, weight in update.items()})
        else:
            write_weights(temporary, causal_lm, weights, description)
        write_tokenizer(temporary, tokenizer, tokenizer_files)
        write_card(temporary, card)


def write_weights(
    folder: Path,
    causal_lm: Any,
    weights: dict[str, Tensor],
    description: Mapping[str, bytes] | None = None,
) -> None:
    """Write the weights of a model in files of at most 5 GB, and its configuration.

    Args:
        folder: that exists.
        causal_lm: the transformers model; its tensors are not used.
        weights: by transformers name; taken out while they are written.
        description: as in `write_model_folder`.
    """
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    causal_lm.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
    if description is not None:
        restore_description(folder, description, dtype)


def write_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, files: Mapping[str, bytes] | None
) -> None:
    """Write the files of a tokenizer from `read_tokenizer`; None: those of `tokenizer`."""
    if files is None:
        save_tokenizer(tokenizer, folder)
    else:
        _write_files(folder, files)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a tokenizer as transformers does.

    Raises:
        OSError: they cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if _OF_SYSTEM not in str(error):
            raise
        raise OSError(str(error)) from error


def write_card(folder: Path, card: Callable[[], str] | None) -> None:
    """Write README.md, unless there is no card or it is empty."""
    if card is not None and (text := card()):
        (folder / "README.md").write_text(text, encoding="utf-8")


def read_tokenizer(source: Path) -> dict[str, bytes]:
    """Return the files of a tokenizer with its chat template, by name below their folder.

    Args:
        source: a model folder, or a snapshot of the hub, whose files are links.
    """
    found = sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)})
    return {str(file.relative_to(source)): read_small(file) for file in found}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer with its chat template, byte by byte.

    Args:
        source: as of `read_tokenizer`.
        folder: that exists.
    """
    _write_files(folder, read_tokenizer(source))


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


def trained_update(
    causal_lm: Any,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    parts: Sequence[tuple[float, AdapterWeights]],
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the trained adapter of a model, with the other `parts` of the model.

    Args:
        causal_lm: with its adapter; its tensors are not used.
        names: of the trained weights in the model.
        read: returns a trained weight.
        parts: as in `write_model_folder`.
    """
    aliases = trained_aliases(causal_lm)
    own = [name for name in names if name not in aliases]
    trained = AdapterWeights.of_model(causal_lm.peft_config[TRAINED], own, read)
    saved = {name: below.read(name) for _, below in parts for name in below.saved}
    saved |= {name: trained.read(name) for name in trained.saved}
    for alias, name in aliases.items():
        saved[name_in_file(alias)] = saved[name_in_file(name)].clone()  # a file has no shared weights
    if parts:
        config, weights = stack([(1.0, trained), *parts])
        return config, weights | saved
    low_rank = sorted(trained.names - saved.keys())
    return trained.config, {name: trained.read(name) for name in low_rank} | saved


@contextlib.contextmanager
def writing_errors(folder: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Raise a `CheckpointError` for a file of `folder` that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the trained model cannot be written", where=str(folder), got=str(error), remedy=remedy
        ) from error
