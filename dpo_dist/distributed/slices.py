"""Slices of weights and optimizer states, their copies and files: read on any number of ranks."""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dpo_dist.distributed.manifest import FileEntry, read_manifest, write_file
from dpo_dist.distributed.memory import available_memory
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import CheckpointError, first_line

WEIGHT = "weight"
"""The part of a slice that is the weight itself, for a trained one its float32 master weight."""
EMA = "ema"
"""The part of a slice that is the moving average of the weight."""
_STEP = "step"


@dataclass(frozen=True)
class Slice:
    """A range of the elements of one flattened weight.

    Attributes:
        name: of the weight.
        shape: of the whole weight.
        start: index of the first element of the range.
        parts: weight and optimizer states by name, flat tensors of equal length; views. Without a weight:
            tensors of any length, which no other rank can read.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class ModelSlices:
    """This rank's slices of one model, as a checkpoint has them.

    Attributes:
        folder: name of their folder in a checkpoint.
        slices: of every weight that changes.
        step: number of updates of the optimizer.
    """

    folder: str
    slices: Sequence[Slice]
    step: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors of all slices, in their order."""
        return [tensor for own in self.slices for tensor in own.parts.values()]

    @property
    def bytes(self) -> int:
        """Return the size of the slices."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Sharded(Protocol):
    """Weights that training changes, saved in slices: the policy, and a reference updated from it."""

    def shards(self) -> ModelSlices:
        """Return this rank's slices, as views; not collective."""
        ...

    def load_shards(self, folder: Path) -> None:
        """Read what a checkpoint has of `shards`, of any number of ranks; collective."""
        ...


_Range = tuple[nn.Parameter, int, int, int]
"""Of a weight in a flat tensor: the weight, start in the tensor, start in the weight, length."""
_Flat = tuple[Tensor, list[_Range]]
"""A flat tensor of master weights, this rank's part of a group of weights, with their ranges."""


class OptimizerSlices:
    """This rank's slices of the weights that a DeepSpeed engine trains, with their optimizer states.

    `names` are those of the trained weights; `averages` those of the `masters`, if there are any.
    """

    def __init__(
        self,
        engine: Any,
        names: Mapping[nn.Parameter, str],
        rank: int,
        averages: Mapping[Tensor, Tensor] = MappingProxyType({}),
    ):
        self._optimizer, self._inner = engine.optimizer, engine.optimizer.optimizer
        self._names, self._rank, self._averages = names, rank, averages

    def __iter__(self) -> Iterator[Slice]:
        """Yield the slices; optimizer states exist after the first step, or `create_states`."""
        eight_bit = is_eight_bit(self._inner)
        for flat, ranges in self._flats():
            tensors = {WEIGHT: flat.detach()}
            if not eight_bit:
                tensors |= {k: v for k, v in _tensor_states(self._inner, flat) if v.shape == flat.shape}
            if flat in self._averages:
                tensors[EMA] = self._averages[flat]
            for weight, start, start_in_weight, length in ranges:
                parts = {part: tensor.narrow(0, start, length) for part, tensor in tensors.items()}
                yield Slice(self._names[weight], _whole_shape(weight), start_in_weight, parts)
        if eight_bit:  # codes, codebooks and scales of blocks of this rank's flat tensors
            cut = f"{type(self._optimizer).__name__} {self._rank} of {dist.get_world_size()}"
            for number, (flat, _) in enumerate(self._flats()):
                if states := dict(_tensor_states(self._inner, flat)):
                    yield Slice(f"{cut}, group {number}", (), 0, states)

    def masters(self) -> list[Tensor]:
        """Return the flat float32 tensors that the optimizer updates, with padding; not copies."""
        return [flat for flat, _ in self._flats()]

    @property
    def step(self) -> int:
        """Return the number of updates that the optimizer states are of."""
        return max((int(self._inner.state[flat].get(_STEP, 0)) for flat in self.masters()), default=0)

    def create_states(self, parts: Sequence[str], step: int) -> None:
        """Create optimizer states that do not exist yet, to be filled, after `step` updates."""
        inner, names = self._inner, [part for part in parts if part not in (WEIGHT, EMA)]
        if is_eight_bit(inner):
            for flat in self.masters() if step else []:
                _create_eight_bit_states(inner, flat, step)
            return
        is_cpu_adam = isinstance(inner, DeepSpeedCPUAdam)
        for flat in self.masters() if names else []:
            states = inner.state[flat]
            for name in names:
                states.setdefault(name, torch.zeros_like(flat, requires_grad=False))
            states[_STEP] = step if is_cpu_adam else torch.tensor(float(step), device=flat.device)
        if is_cpu_adam and names:
            _restore_powers(inner, step)

    def write_to_model(self) -> None:
        """Set the model's weights to the master weights; collective."""
        if not isinstance(self._optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._optimizer.checkpoint_event_epilogue()

    def _flats(self) -> list[_Flat]:
        optimizer = self._optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            groups = [_ranges_of_stage_3(weights, self._rank) for weights in optimizer.fp16_groups]
            tensors = optimizer.fp32_partitioned_groups_flat
        elif isinstance(optimizer, BF16_Optimizer):
            groups = [_ranges_of_mapping(weights) for weights in optimizer.bf16_groups]
            tensors = optimizer.fp32_groups_flat_partition
        else:
            groups = [_ranges_of_mapping(weights) for weights in optimizer.bit16_groups]
            tensors = optimizer.single_partition_of_fp32_groups
        return list(zip(tensors, groups, strict=True))


def _tensor_states(optimizer: Any, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    states: dict[str, Any] = optimizer.state[flat]
    return ((name, state) for name, state in states.items() if isinstance(state, Tensor))


def is_eight_bit(optimizer: object) -> bool:
    """Return whether an optimizer is one of bitsandbytes."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def _create_eight_bit_states(optimizer: Any, master: Tensor, step: int) -> None:
    """Create the states of a master tensor if there are none, and set the number of updates.

    ZeRO-3 puts a master tensor into its parameter group for the time of an update only, as is done here.
    """
    if not optimizer.state[master]:
        group = optimizer.param_groups[0]
        params, group["params"] = group["params"], [master]
        optimizer.init_state(group, master, 0, 0)
        group["params"] = params
    optimizer.state[master]["step"] = step


def _restore_powers(adam: Any, step: int) -> None:
    """Give DeepSpeed's CPU Adam the powers of its betas that it has after `step` updates.

    It multiplies them in float32 with every update and has no other access to them. After any other number of
    updates than the next one it computes the power anew, which is rounded differently.
    """
    beta1, beta2 = adam.param_groups[0]["betas"]
    dummies = [torch.zeros(1) for _ in range(4)]
    for number in range(step + 1):  # 0 starts anew
        adam.ds_opt_adam.adam_update(adam.opt_id, number, 0.0, beta1, beta2, 1.0, 0.0, True, *dummies)


def frozen_slices(weights: Mapping[str, Any], rank: int) -> Iterator[Slice]:
    """Yield this rank's slices of weights that ZeRO-3 shards and no optimizer trains."""
    for name, weight in weights.items():
        first, length = own_range(weight, rank)
        if length:
            part = weight.ds_tensor.detach().view(-1)[:length]
            yield Slice(name, _whole_shape(weight), first, {WEIGHT: part})


def own_range(weight: Any, rank: int) -> tuple[int, int]:
    """Return first element and length of a rank's slice of a weight that ZeRO-3 shards."""
    size = weight.partition_numel()
    first = min(rank * size, weight.ds_numel)
    return first, min(size, weight.ds_numel - first)


def _ranges_of_mapping(weights: Sequence[Any]) -> list[_Range]:
    """Stages 1 and 2 cut all weights together, laid end to end, into one slice for each rank."""
    ranges = []
    for weight in weights:
        if weight._hp_mapping is not None:  # None: no element of it is in this rank's slice
            master, own = weight._hp_mapping.hp_fragment_address, weight._hp_mapping.lp_fragment_address
            ranges.append((weight, master.start, own.start, own.numel))
    return ranges


def _ranges_of_stage_3(weights: Sequence[Any], rank: int) -> list[_Range]:
    """Stage 3 cuts each weight into slices of equal length, of which the last ones may be padded."""
    ranges, start = [], 0
    for weight in weights:
        first, length = own_range(weight, rank)
        if length:
            ranges.append((weight, start, first, length))
        start += weight.partition_numel()
    return ranges


def _whole_shape(weight: Any) -> tuple[int, ...]:
    return tuple(getattr(weight, "ds_shape", weight.shape))


_ALIGNED_BYTES = 64


class HostCopy:
    """Memory of this rank for copies of its slices: allocated once, pinned if `device` is a GPU."""

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self._buffer, self._is_pinned = torch.empty(0, dtype=torch.uint8), False

    def has_room(self, models: Sequence[ModelSlices], world: World) -> bool:
        """Return whether every host has memory for the copies of all its ranks; collective."""
        missing = max(0, sum(map(_copy_bytes, models)) - self._buffer.nbytes)
        ranks = world.gather((world.host, missing, available_memory() if missing else 0))
        needed = Counter[str]()
        for host, of_rank, _ in ranks:
            needed[host] += of_rank
        return all(not of_rank or needed[host] <= available for host, of_rank, available in ranks)

    def of(self, models: Sequence[ModelSlices]) -> list[ModelSlices]:
        """Return the same slices in host memory, valid until the next call."""
        self._reserve(sum(map(_copy_bytes, models)))
        copied, start = [], 0
        for model in models:
            slices = []
            for own in model.slices:
                parts = {}
                for part, tensor in own.parts.items():
                    place = self._buffer[start : start + tensor.nbytes].view(tensor.dtype)
                    parts[part] = place.copy_(tensor, non_blocking=True)
                    start += _aligned(tensor.nbytes)
                slices.append(replace(own, parts=parts))
            copied.append(replace(model, slices=slices))
        if self.is_cuda:
            torch.cuda.synchronize()
        return copied

    def _reserve(self, count: int) -> None:
        """Have room for `count` bytes; PyTorch's allocator of pinned memory would round them up to 2^n."""
        if count <= self._buffer.nbytes:
            return
        self.close()
        self._buffer = torch.empty(count, dtype=torch.uint8)
        if self.is_cuda:
            self._is_pinned = not int(_cuda().cudaHostRegister(self._buffer.data_ptr(), count, 0))
            if not self._is_pinned:  # copies are slower
                _forget_error()

    def close(self) -> None:
        """Release the memory, as soon as nothing reads the copies any more.

        Another run of this process may get the same addresses, which must not count as pinned then.
        """
        if self._is_pinned:
            _cuda().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._is_pinned = torch.empty(0, dtype=torch.uint8), False


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """Clear the error of a call of CUDA, which the next kernel would otherwise raise."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _copy_bytes(model: ModelSlices) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in model.tensors)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED_BYTES) * _ALIGNED_BYTES


_FILE_BYTES = 2**28
"""Size at which a rank begins another file: about three times as much host memory is used at a time."""


def write_slices(
    model: ModelSlices, checkpoint: Path, rank: int, copy: HostCopy | None = None
) -> dict[str, FileEntry]:
    """Write this rank's slices of a model, which nothing changes meanwhile; return its files by name.

    Tensors of a GPU go through `copy`, a file at a time: one wait for all of them.
    """
    (checkpoint / model.folder).mkdir(exist_ok=True)
    entries = {}
    for number, batch in enumerate(_batches(model.slices)):
        slices: Sequence[Slice] = batch
        if copy is not None and copy.is_cuda:
            slices = copy.of([replace(model, slices=batch)])[0].slices
        tensors = {f"{part}/{own.name}": tensor for own in slices for part, tensor in own.parts.items()}
        ranges = {own.name: [own.start, *own.shape] for own in slices if WEIGHT in own.parts}
        content = save(tensors, {"ranges": json.dumps(ranges), "step": str(model.step)})
        name = f"{model.folder}/rank-{rank:05d}-{number:05d}.safetensors"
        entries[name] = write_file(checkpoint / name, content)
    return entries


def _batches(slices: Iterable[Slice]) -> Iterator[list[Slice]]:
    batch: list[Slice] = []
    size = 0
    for own in slices:
        batch.append(own)
        size += sum(tensor.nbytes for tensor in own.parts.values())
        if size >= _FILE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_SavedRange = tuple[int, int, str]
"""Start and end of a range of one weight's elements, and its file."""


@dataclass(frozen=True)
class SavedSlices:
    """The slices of one model in a checkpoint.

    Attributes:
        folder: the checkpoint.
        shapes: of the whole weights, by name.
        parts: names of the weight and of the optimizer states.
        step: number of updates of the optimizer.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    parts: Sequence[str]
    step: int
    _ranges: dict[str, list[_SavedRange]]
    _private: dict[str, str]

    @classmethod
    def find(cls, folder: Path, name: str) -> "SavedSlices":
        """Return the slices below `folder / name`, from the headers of their files."""
        shapes: dict[str, tuple[int, ...]] = {}
        ranges: dict[str, list[_SavedRange]] = {}
        private: dict[str, str] = {}
        parts: dict[str, None] = {}
        step = 0
        with _reading_errors(folder):
            files = [file for file in read_manifest(folder) if Path(file).match(f"{name}/*.safetensors")]
            if not files:
                raise ValueError(f"it has no {name}/*.safetensors")
            for file in sorted(files):
                with safe_open(folder / file, "pt") as opened:
                    header = opened.metadata()
                    starts, step = json.loads(header["ranges"]), int(header["step"])
                    for key in opened.keys():  # noqa: SIM118  (the file is not iterable)
                        part, _, weight = key.partition("/")
                        if weight not in starts:
                            private[key] = file
                            continue
                        parts[part] = None
                        if part == WEIGHT:
                            start, *shape = starts[weight]
                            end = start + opened.get_slice(key).get_shape()[0]
                            shapes[weight] = tuple(shape)
                            ranges.setdefault(weight, []).append((start, end, file))
        return cls(folder, shapes, list(parts), step, {w: sorted(r) for w, r in ranges.items()}, private)

    def load_into(self, slices: Iterable[Slice]) -> None:
        """Fill the parts of `slices`, of which no other rank needs to have the same ranges."""
        with _reading_errors(self.folder), contextlib.ExitStack() as stack:

            @functools.cache
            def opened(file: str) -> Any:
                return stack.enter_context(safe_open(self.folder / file, "pt"))

            for own in slices:
                is_shared = WEIGHT in own.parts
                if is_shared and self.shapes.get(own.name) != own.shape:
                    raise ValueError(f"{own.name} is missing or has another shape")
                for part, target in own.parts.items():
                    key = f"{part}/{own.name}"
                    if not is_shared:
                        target.copy_(opened(self._file_of_private(key)).get_tensor(key))
                        continue
                    for start, stop, file in self._ranges[own.name]:
                        first, last = max(own.start, start), min(own.start + target.numel(), stop)
                        if first < last:
                            saved = opened(file).get_slice(key)[first - start : last - start]
                            target[first - own.start : last - own.start].copy_(saved)

    def _file_of_private(self, key: str) -> str:
        if key not in self._private:
            raise CheckpointError(
                "the 8-bit optimizer states of a checkpoint are those of each process that wrote it",
                where=str(self.folder),
                got=f"no {key}",
                remedy="start as many processes with the parallelism that wrote it; optim.kind=adamw "
                "continues on any number",
            )
        return self._private[key]

    def whole(self, name: str, part: str = WEIGHT) -> Tensor:
        """Return a whole weight or optimizer state in host memory, float32 for a trained weight."""
        with _reading_errors(self.folder):
            pieces = []
            for _, _, file in self._ranges[name]:
                with safe_open(self.folder / file, "pt") as opened:
                    pieces.append(opened.get_tensor(f"{part}/{name}"))
            return torch.cat(pieces).view(self.shapes[name])


@contextlib.contextmanager
def _reading_errors(folder: Path) -> Iterator[None]:
    """Raise a `CheckpointError` for a file that cannot be read or is not of a checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            "the weights of the checkpoint cannot be read",
            where=str(folder),
            got=first_line(error),
            remedy="restore its files, or name another checkpoint",
        ) from error
