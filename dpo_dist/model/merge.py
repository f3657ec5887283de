"""Write a base model with the updates of adapters added to its weights, one weight after the other.

Tensors keep the names that they have in the base's own files, so that a loader of the base reads the result.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dpo_dist.errors import ConfigError
from dpo_dist.model.adapter_weights import AdapterWeights
from dpo_dist.model.folder import CONFIG_FILE, weight_files

_SHARD_BYTES = 5 * 10**9
_NAMES_OF_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_DESCRIPTIONS = ("generation_config.json", "*.py")


def write_merged(
    folder: Path,
    base: Path,
    members: Sequence[tuple[float, AdapterWeights]],
    rename: Callable[[str], str],
    dtype: torch.dtype | None,
) -> None:
    """Write the weights and the configuration of a base with adapters merged into it.

    Sums are in float32. Memory is that of one file of the result (5 GB) and of a few float32 weights.

    Args:
        folder: that exists.
        base: folder of the base, in safetensors.
        members: adapters with coefficients whose sum is 1; the result is the average of the merged models.
        rename: returns the name in a transformers model of a name in the base's files.
        dtype: of the written floating-point weights; None: of each in the base's files.

    Raises:
        ConfigError: an adapter has a layer that the base's files do not.
        OSError, SafetensorError: a file cannot be read or written.
    """
    wanted = {f"{layer}.weight" for _, member in members for layer in member.layers}
    shards = _Shards(folder)
    for name, weight in _tensors(base):
        renamed = rename(name)
        if renamed in wanted:
            wanted.discard(renamed)
            layer = renamed.removesuffix(".weight")
            shards.add(name, average_layer(layer, weight, members).to(dtype or weight.dtype))
        else:
            shards.add(name, weight.to(dtype) if dtype and weight.is_floating_point() else weight)
    if wanted:
        raise ConfigError(
            "the adapter has layers that the files of its base do not",
            where="export.merge",
            got=f"{sorted(wanted)[0]} ({len(wanted)} in all), not in {base}",
            remedy="export the adapter itself (export.merge=false), and merge it by peft",
        )
    shards.close()
    _copy_description(base, folder, dtype)


def names_in_model(causal_lm: Any) -> Callable[[str], str]:
    """Return the function from a name in the files of a model to that in its transformers model.

    Args:
        causal_lm: without an adapter; its tensors are not used.
    """
    mapping = get_model_conversion_mapping(causal_lm)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names, prefix = causal_lm.state_dict(), causal_lm.base_model_prefix

    def rename(name: str) -> str:
        renamed, _ = rename_source_key(
            name, renamings, converters, base_model_prefix=prefix, meta_state_dict=names
        )
        return str(renamed)

    return rename


def read_named(folder: Path, wanted: Collection[str], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Return tensors of a model folder by their names in its transformers model, as far as they exist.

    Args:
        folder: in safetensors.
        wanted: names in the transformers model.
        rename: as in `write_merged`.
    """
    found = {}
    for file in weight_files(folder):
        if file.suffix != ".json":
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  (the file is not iterable)
                    if (renamed := rename(name)) in wanted:
                        found[renamed] = content.get_tensor(name)
    return found


def average_layer(layer: str, weight: Tensor, members: Sequence[tuple[float, AdapterWeights]]) -> Tensor:
    """Return the float32 average of a layer's weight with each adapter merged into it."""
    average = torch.zeros_like(weight, dtype=torch.float32)
    for coefficient, member in members:
        average += coefficient * (member.merged(layer, weight) if layer in member.layers else weight.float())
    return average


def _tensors(base: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(base):
        if file.suffix != ".json":
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  (the file is not iterable)
                    yield name, content.get_tensor(name)


class _Shards:
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


def _copy_description(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy the configuration of the base; with another precision only its name changes."""
    content = json.loads((base / CONFIG_FILE).read_bytes())
    content.pop("transformers_weights", None)  # names a file of the base
    if dtype is not None:
        content.pop("torch_dtype", None)
        content["dtype"] = _NAMES_OF_DTYPES[dtype]
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for file in (file for pattern in _DESCRIPTIONS for file in base.glob(pattern)):
        shutil.copyfile(file, folder / file.name)
