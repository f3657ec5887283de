"""Read and write the weights of a model folder one by one, with the names that they have in its files."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_dist.model.folder import weight_files

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
