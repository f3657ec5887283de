"""Write a base model with the updates of adapters added to its weights, one weight after the other.

Tensors keep the names that they have in the base's own files, so that a loader of the base reads the result.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.adapter_weights import AdapterWeights
from dpo_dist.model.folder import weight_files
from dpo_dist.model.save import Shards, copy_description, tensors_of


def write_merged(
    folder: Path,
    base: Path,
    members: Sequence[tuple[float, AdapterWeights]],
    rename: Callable[[str], str],
    dtype: torch.dtype | None,
    shared: Sequence[str] = (),
    exact: Collection[str] = (),
) -> None:
    """Write the weights and the configuration of a base with adapters merged into it.

    Sums are in float32. Memory is that of one file of the result (5 GB) and of a few float32 weights.

    Args:
        folder: that exists.
        base: folder of the base, in safetensors.
        members: adapters with coefficients whose sum is 1; the result is the average of the merged models.
        rename: returns the name in a transformers model of a name in the base's files.
        dtype: of the written floating-point weights; None: of each in the base's files.
        shared: names of the weights of embeddings and output layer, if they are one weight in the base. They
            are two in the result if an adapter has two different ones.
        exact: names in the transformers model of tensors that keep the precision of the base's files.

    Raises:
        ConfigError: an adapter has a layer that the base's files do not.
        OSError, SafetensorError: a file cannot be read or written.
    """
    wanted = {f"{layer}.weight" for _, member in members for layer in member.layers}
    wanted |= {name for _, member in members for name in member.saved}
    changed, separate = frozenset(wanted), gives_two(members, shared)
    wanted -= set(shared[1:])  # written where the embeddings are
    shards = Shards(folder)
    for name, weight in tensors_of(base):
        renamed = rename(name)
        wanted.discard(renamed)
        written = {name: renamed}
        if separate and renamed in shared:
            written = {name: renamed, shared[1]: shared[1]} if renamed == shared[0] else {}
        for in_file, in_model in written.items():
            if in_model in changed:
                shards.add(in_file, average_merged(in_model, weight, members).to(dtype or weight.dtype))
            else:
                is_rounded = dtype and weight.is_floating_point() and in_model not in exact
                shards.add(in_file, weight.to(dtype) if is_rounded else weight)
    if wanted:
        raise ConfigError(
            "the adapter has layers that the files of its base do not",
            where="export.merge",
            got=f"{sorted(wanted)[0]} ({len(wanted)} in all), not in {base}",
            remedy="export the adapter itself (export.merge=false), and merge it by peft",
        )
    shards.close()
    copy_description(base, folder, dtype, {"tie_word_embeddings": False} if separate else {})


def gives_two(members: Sequence[tuple[float, AdapterWeights]], shared: Sequence[str]) -> bool:
    """Return whether an adapter has different weights for those that the base shares."""
    own = [[member.read(name) for name in shared if name in member.names] for _, member in members]
    return any(not torch.equal(tables[0], other) for tables in own for other in tables[1:])


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


def average_merged(name: str, weight: Tensor, members: Sequence[tuple[float, AdapterWeights]]) -> Tensor:
    """Return float32, the average of a weight of the base with each adapter merged into it.

    Args:
        name: of the weight in the model.
        weight: the base's.
        members: adapters with coefficients whose sum is 1.
    """
    layer = name.removesuffix(".weight")
    average = torch.zeros_like(weight, dtype=torch.float32)
    for coefficient, member in members:
        if name in member.names:
            merged = member.read(name).float()
        else:
            merged = member.merged(layer, weight) if layer in member.layers else weight.float()
        average += coefficient * merged
    return average


def average_saved(members: Sequence[tuple[float, AdapterWeights]]) -> dict[str, Tensor]:
    """Return the float32 averages of the weights that adapters have in full, by name in their files.

    Raises:
        ConfigError: an adapter lacks one of another.
    """
    names = sorted({name for _, member in members for name in member.saved})
    if lacking := [name for name in names if any(name not in member.names for _, member in members)]:
        raise ConfigError(
            "not all members of the average have the same modules in full",
            where="export.average, export.merge",
            got=f"{lacking[0]} ({len(lacking)} in all) in some of them only, false",
            remedy="set export.merge=true: the merged models are averaged",
        )
    averages: dict[str, Tensor] = {}
    for name in names:
        for coefficient, member in members:
            part = coefficient * member.read(name).float()
            averages[name] = averages[name] + part if name in averages else part
    return averages
