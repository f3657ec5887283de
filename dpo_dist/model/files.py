"""Find the files of a model folder that transformers loads; imports neither it nor torch."""

import json
import re
from pathlib import Path

from dpo_dist.errors import ConfigError

CONFIG_FILE = "config.json"

ADAPTER_FILE = "adapter_config.json"
_WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DISTRIBUTED_SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads from a model folder, none of those it passes over.

    It loads the file that `transformers_weights` of config.json names, else the first of model.safetensors,
    model.safetensors.index.json, pytorch_model.bin and pytorch_model.bin.index.json, with all files that an
    index names. A folder of distributed shards is loaded as a whole.

    Returns:
        The files, an index before its shards; empty if the folder has no weights. A shard may be missing.

    Raises:
        ConfigError: config.json or an index cannot be read.
    """
    if any(_DISTRIBUTED_SHARD.fullmatch(file.name) for file in folder.glob("*.safetensors")):
        return sorted(folder.glob("*.safetensors"))
    named = read_model_json(folder / CONFIG_FILE).get("transformers_weights")
    for name in _WEIGHT_NAMES if named is None else (str(named),):
        file = folder / name
        if file.is_file():
            return [file, *(_shards(file) if name.endswith(".index.json") else [])]
    return []


def _shards(index: Path) -> list[Path]:
    weight_map = read_model_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError("the index of the model's weights has no weight_map", where=str(index))
    return [index.parent / name for name in sorted(set(map(str, weight_map.values())))]


def check_no_adapter(folder: Path, key: str) -> None:
    """Refuse an adapter beside full weights, which transformers would apply unasked.

    Raises:
        ConfigError: the folder has an adapter_config.json.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            "the model folder holds an adapter beside full weights",
            where=key,
            got=str(folder / ADAPTER_FILE),
            expected="full weights only: transformers would apply the adapter to them",
            remedy="merge the adapter into the weights, or move its files to another folder",
        )


def read_model_json(file: Path) -> dict[str, object]:
    """Return the object in a JSON file of a model folder.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError("a file of the model cannot be read", where=str(file), got=str(error)) from error
    if not isinstance(content, dict):
        raise ConfigError("a file of the model cannot be read", where=str(file), got="no JSON object")
    return content
