"""Write a model or an adapter, with its tokenizer, as a folder that transformers or peft loads."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import staged_folder
from dpo_dist.errors import CheckpointError
from dpo_dist.model.adapter_weights import AdapterWeights, name_in_file, stack, write_adapter
from dpo_dist.model.adapters import TRAINED, adapted_layers
from dpo_dist.model.description import restore_description
from dpo_dist.model.saved_modules import trained_aliases
from dpo_dist.small_files import read_small

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
