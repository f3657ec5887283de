"""Read and write the weights of a model folder one by one, with the names that they have in its files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_dist.model.folder import CONFIG_FILE, weight_files

_SHARD_BYTES = 5 * 10**9
_NAMES_OF_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_OF_ALL_PARTS = ("tie_word_embeddings",)
_DESCRIPTIONS = ("generation_config.json", "*processor_config.json", "*.py")


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


def copy_description(base: Path, folder: Path, dtype: torch.dtype | None, changes: dict[str, object]) -> None:
    """Copy the configuration of a base, beside other weights.

    Args:
        base: its folder.
        folder: of the result.
        dtype: of the result's weights, if it is another one.
        changes: values of keys of config.json, and of its part about text if it has one.
    """
    content = json.loads((base / CONFIG_FILE).read_bytes())
    content.pop("transformers_weights", None)  # names a file of the base
    if isinstance(text := content.get("text_config"), dict):
        content["text_config"] = text | changes
        changes = {key: value for key, value in changes.items() if key in content or key in _OF_ALL_PARTS}
    content |= changes
    if dtype is not None:
        content.pop("torch_dtype", None)
        content["dtype"] = _NAMES_OF_DTYPES[dtype]
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for file in (file for pattern in _DESCRIPTIONS for file in base.glob(pattern)):
        shutil.copyfile(file, folder / file.name)
