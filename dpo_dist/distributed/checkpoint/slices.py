"""This rank's slices of weights and optimizer states: find them, copy them to host memory, write them.

Not DeepSpeed's own checkpoints: these are pickles, and those of ZeRO can be loaded by as many ranks as wrote
them only. A slice is a named range of a weight in a safetensors file, which any number of ranks can read.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

from dpo_dist.distributed.adamw_bf16 import STEP, AdamWBF16
from dpo_dist.distributed.deepspeed_internals import (
    flat_masters,
    inner_optimizer,
    restore_powers,
    shard_of,
    shard_range,
)
from dpo_dist.distributed.memory import available_memory, return_host_memory
from dpo_dist.distributed.processes.world import World
from dpo_dist.foundation.files import safetensors_header
from dpo_dist.model.library_internals import whole_shape

SHARDS = "engine"  # the folder of the policy's slices in a checkpoint
WEIGHT = "weight"  # the part that is the weight itself, for a trained one its master weight
EMA = "ema"  # the part that is the moving average of the weight
# Size at which a rank begins another file. A GPU's tensors need this much host memory at a time.
_FILE_BYTES = 2**28
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Digests of a checkpoint's files, by name relative to its folder, as in the manifest. The code never lists a
# directory: on a network file system a listing may lack files that another node just wrote.
Entries = dict[str, str]


@dataclass(frozen=True)
class Slice:
    """A range of the elements of one flattened weight.

    `parts` are the weight and its optimizer states by name: views, flat and of equal length.
    """

    name: str
    shape: tuple[int, ...]  # of the whole weight
    start: int  # index of the first element of the range
    parts: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Return the size of the parts."""
        return sum(tensor.nbytes for tensor in self.parts.values())


@dataclass(frozen=True)
class ModelSlices:
    """This rank's slices of a model after `step` updates; `folder` is their folder in a checkpoint."""

    folder: str
    slices: Sequence[Slice]
    step: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors of all slices, in their order."""
        return [tensor for piece in self.slices for tensor in piece.parts.values()]

    @property
    def bytes(self) -> int:
        """Return the size of the slices."""
        return sum(piece.bytes for piece in self.slices)


class SlicedWeights(Protocol):
    """Weights that training changes, saved in slices: the policy, and a reference updated from it."""

    def shards(self) -> ModelSlices:
        """Return this rank's slices, as views; not collective."""
        ...

    def load_shards(self, folder: Path) -> None:
        """Load the shards from a checkpoint that any number of ranks wrote; collective."""
        ...


class OptimizerSlices:
    """This rank's slices of the weights that a DeepSpeed engine trains, with their optimizer states.

    `names` has the names of the trained weights, `averages` the moving averages of the `masters`, if any.
    """

    def __init__(
        self,
        engine: Any,
        names: Mapping[nn.Parameter, str],
        averages: Mapping[Tensor, Tensor] = MappingProxyType({}),
    ):
        self._engine = engine
        self._inner = inner_optimizer(engine)
        self._names = names
        self._averages = averages

    def __iter__(self) -> Iterator[Slice]:
        """Yield the slices; optimizer states exist after the first step, or `create_states`."""
        for flat, ranges in flat_masters(self._engine):
            # States of the flat tensor's shape, such as moments, are cut as the weights in it are.
            tensors = {WEIGHT: flat.detach()}
            for name, state in self._inner.state[flat].items():
                if isinstance(state, Tensor) and state.shape == flat.shape:
                    tensors[name] = state
            if flat in self._averages:
                tensors[EMA] = self._averages[flat]
            for weight, start, start_in_weight, length in ranges:
                parts = {part: tensor.narrow(0, start, length) for part, tensor in tensors.items()}
                yield Slice(self._names[weight], whole_shape(weight), start_in_weight, parts)

    def masters(self) -> list[Tensor]:
        """Return the flat tensors that the optimizer updates, with padding; not copies."""
        return [flat for flat, _ in flat_masters(self._engine)]

    @property
    def step(self) -> int:
        """Return the number of updates in the optimizer states."""
        return max((int(self._inner.state[flat].get(STEP, 0)) for flat in self.masters()), default=0)

    def create_states(self, parts: Sequence[str], step: int) -> None:
        """Create missing optimizer states, to be filled with the states after `step` updates."""
        inner = self._inner
        names = [part for part in parts if part not in (WEIGHT, EMA)]
        is_cpu_adam = isinstance(inner, DeepSpeedCPUAdam)
        counts = is_cpu_adam or isinstance(inner, AdamWBF16)
        for flat in self.masters() if names else []:
            states = inner.state[flat]
            for name in names:
                states.setdefault(name, torch.zeros_like(flat, requires_grad=False))
            states[STEP] = step if counts else torch.tensor(float(step), device=flat.device)
        if is_cpu_adam and names:
            restore_powers(inner, step)


def weight_slices(weights: Mapping[str, Any]) -> Iterator[Slice]:
    """Yield this rank's slices of ZeRO-3 weights that no optimizer trains."""
    for name, weight in weights.items():
        first, length = shard_range(weight)
        if length:
            shard = shard_of(weight)
            assert shard is not None, "ZeRO-3 shards these weights"
            part = shard.detach().view(-1)[:length]
            yield Slice(name, whole_shape(weight), first, {WEIGHT: part})


class HostCopy:
    """Host memory for copies of this rank's slices: allocated once, pinned if `device` is a GPU."""

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def has_room(self, models: Sequence[ModelSlices], world: World) -> bool:
        """Return whether every host has memory for the copies of all ranks on it; collective."""
        missing = max(0, self._bytes(models) - self._buffer.nbytes)
        ranks = world.gather((world.host, missing, available_memory() if missing else 0))
        needed = Counter[str]()
        for host, of_rank, _ in ranks:
            needed[host] += of_rank
        return all(not of_rank or needed[host] <= available for host, of_rank, available in ranks)

    def _bytes(self, models: Sequence[ModelSlices]) -> int:
        tensors = itertools.chain(*(model.tensors for model in models))
        return sum(_aligned(tensor.nbytes) for tensor in tensors)

    def fill(self, models: Sequence[ModelSlices]) -> list[ModelSlices]:
        """Copy the slices of `models` to host memory and return the copies, valid until the next call."""
        count = self._bytes(models)
        if count > self._buffer.nbytes:
            self.close()
            self._buffer = torch.empty(count, dtype=torch.uint8)
            if self.is_cuda:  # PyTorch's own pinned memory is rounded up to a power of two
                torch.cuda.check_error(_runtime().cudaHostRegister(self._buffer.data_ptr(), count, 0))
        copied = []
        start = 0
        for model in models:
            slices = []
            for piece in model.slices:
                parts = {}
                for part, tensor in piece.parts.items():
                    place = self._buffer[start : start + tensor.nbytes].view(tensor.dtype)
                    parts[part] = place.copy_(tensor, non_blocking=True)
                    start += _aligned(tensor.nbytes)
                slices.append(replace(piece, parts=parts))
            copied.append(replace(model, slices=slices))
        if self.is_cuda:
            torch.cuda.synchronize()
        return copied

    def close(self) -> None:
        """Release the memory; nothing may read the copies any more."""
        if self.is_cuda and self._buffer.nbytes:
            _runtime().cudaHostUnregister(self._buffer.data_ptr())  # unchecked: fails after a device error
        self._buffer = torch.empty(0, dtype=torch.uint8)
        return_host_memory()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _aligned(count: int) -> int:
    return -(-count // 64) * 64


def write_slices(model: ModelSlices, checkpoint: Path, rank: int, copy: HostCopy | None = None) -> Entries:
    """Write this rank's slices of a model and return the digests of its files; nothing may change the slices.

    A GPU's tensors are first copied by `copy`, a file at a time, with one wait per file.
    """
    (checkpoint / model.folder).mkdir(exist_ok=True)
    entries: Entries = {}
    ends = itertools.accumulate(piece.bytes for piece in model.slices)
    files = itertools.groupby(zip(model.slices, ends, strict=True), lambda pair: pair[1] // _FILE_BYTES)
    for number, (_, group) in enumerate(files):
        slices: Sequence[Slice] = [piece for piece, _ in group]
        if copy is not None and copy.is_cuda:
            slices = copy.fill([replace(model, slices=slices)])[0].slices
        tensors: dict[str, Tensor] = {}
        ranges = {}
        for piece in slices:
            tensors |= {f"{part}/{piece.name}": tensor for part, tensor in piece.parts.items()}
            ranges[piece.name] = [piece.start, *piece.shape]
        name = f"{model.folder}/rank-{rank:05d}-{number:05d}.safetensors"
        metadata = {"ranges": json.dumps(ranges), "step": str(model.step)}
        entries[name] = write_tensors(checkpoint / name, tensors, metadata)
    return entries


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Write a safetensors file to disk without copying its tensors, and return its digest.

    The library's own writer gives no digest of what it writes: the file would have to be read again.
    """
    # Larger elements first, so that each tensor begins at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    shapes = {name: (_DTYPES[tensor.dtype], tensor.shape) for name, tensor in ordered}
    parts: list[bytes | memoryview] = [safetensors_header(shapes, metadata)]
    parts += [tensor.detach().reshape(-1).view(torch.uint8).numpy().data for _, tensor in ordered]
    digest = hashlib.blake2b(digest_size=16)
    with file.open("wb") as opened:
        for part in parts:
            opened.write(part)
            digest.update(part)
        opened.flush()
        os.fsync(opened.fileno())  # only the node that wrote the file can flush it
    return digest.hexdigest()
