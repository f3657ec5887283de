"""Files of a checkpoint's slices: each rank writes its own; any number of ranks reads what it needs of all.

Every file is in the format of safetensors, from which no code can be run.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_dist.distributed.checkpoint_manifest import read_manifest
from dpo_dist.distributed.host_copy import HostCopy
from dpo_dist.distributed.slices import WEIGHT, ModelSlices, Slice
from dpo_dist.errors import CheckpointError, first_line

_FILE_BYTES = 2**30
"""Size at which a rank begins another file: so much host memory is used at a time."""
_MOST = 2**48
"""More than any number of elements or updates."""


def write_slices(
    model: ModelSlices,
    checkpoint: Path,
    rank: int,
    staging: HostCopy | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[Path]:
    """Write this rank's slices of a model and return their files.

    Args:
        model: with tensors that nothing changes meanwhile.
        checkpoint: the folder of the checkpoint.
        rank: of this process.
        staging: memory through which the tensors of a GPU go, a file at a time.
        is_wanted: asked before every file; False ends the writing.

    Raises:
        OSError: a file cannot be written.
    """
    folder = checkpoint / model.folder
    folder.mkdir(exist_ok=True)
    files: list[Path] = []
    batches = [replace(model, slices=batch) for batch in _batches(model.slices)]
    if not any(tensor.is_cuda for own in model.slices for tensor in own.parts.values()):
        staging = None
    if staging is not None:
        staging.reserve(batches)
    for batch in batches:
        if not is_wanted():
            break
        files.append(folder / f"rank-{rank:05d}-{len(files):05d}.safetensors")
        # One wait for the tensors of a file, not one for each of them.
        slices = batch.slices if staging is None else staging.of([batch])[0].slices
        tensors = {f"{part}/{own.name}": tensor for own in slices for part, tensor in own.parts.items()}
        ranges = {own.name: [own.start, *own.shape] for own in slices}
        try:
            save_file(tensors, files[-1], {"ranges": json.dumps(ranges), "step": str(model.step)})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return files


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


@dataclass(frozen=True)
class _Range:
    """A range of one weight's elements, and its file."""

    start: int
    end: int
    file: str


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
    _ranges: dict[str, list[_Range]]

    @classmethod
    def find(cls, folder: Path, name: str) -> "SavedSlices":
        """Return the slices below `folder / name`, from the headers of their files.

        Raises:
            CheckpointError: a file cannot be read, or the ranges of a weight are not the whole weight.
        """
        found = cls(folder, {}, [], 0, {})
        with _reading_errors(folder):
            files = [
                file for file in sorted(read_manifest(folder)) if Path(file).match(f"{name}/*.safetensors")
            ]
            if not files:
                raise ValueError(f"it has no {name}/*.safetensors: another version of the program wrote it")
            parts: dict[str, None] = {}
            steps = [found._add(file, parts) for file in files]
            found._check_complete()
        return cls(folder, found.shapes, list(parts), max(steps), found._ranges)

    def _add(self, file: str, parts: dict[str, None]) -> int:
        """Add the ranges of a file and return its number of updates."""
        with safe_open(self.folder / file, "pt") as opened:
            header = opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118  (the file is not iterable)
                part, _, name = key.partition("/")
                parts[part] = None
                if part == WEIGHT:
                    length = opened.get_slice(key).get_shape()[0]
                    start, *shape = json.loads(header["ranges"])[name]
                    if min(start, *shape, 0) < 0 or max(start, *shape, 0) > _MOST:
                        raise ValueError(f"{name} has a forged range")
                    self.shapes[name] = tuple(shape)
                    self._ranges.setdefault(name, []).append(_Range(start, start + length, file))
        if not 0 <= (step := int(header["step"])) <= _MOST:
            raise ValueError("it has a forged number of updates")
        return step

    def _check_complete(self) -> None:
        for name, ranges in self._ranges.items():
            ranges.sort(key=lambda range_: range_.start)
            end = 0
            for range_ in ranges:
                if range_.start != end:
                    raise ValueError(f"elements of {name} are missing, or are there twice")
                end = range_.end
            if end != torch.Size(self.shapes[name]).numel():
                raise ValueError(f"elements of {name} are missing")

    def load_into(self, slices: Iterable[Slice]) -> None:
        """Fill the parts of `slices`, of which no other rank needs to have the same ranges.

        Raises:
            CheckpointError: a file cannot be read, or has no such weight.
        """
        with _reading_errors(self.folder), contextlib.ExitStack() as stack:
            opened: dict[str, Any] = {}
            for own in slices:
                if self.shapes.get(own.name) != own.shape:
                    raise ValueError(f"{own.name} is missing or has another shape")
                for part, tensor in own.parts.items():
                    self._fill(tensor, f"{part}/{own.name}", own, opened, stack)

    def _fill(
        self, target: Tensor, key: str, own: Slice, opened: dict[str, Any], stack: contextlib.ExitStack
    ) -> None:
        end = own.start + target.numel()
        for range_ in self._ranges[own.name]:
            first, last = max(own.start, range_.start), min(end, range_.end)
            if first < last:
                if range_.file not in opened:
                    opened[range_.file] = stack.enter_context(safe_open(self.folder / range_.file, "pt"))
                saved = opened[range_.file].get_slice(key)[first - range_.start : last - range_.start]
                target[first - own.start : last - own.start].copy_(saved)

    def whole(self, name: str, part: str = WEIGHT) -> Tensor:
        """Return a whole weight or optimizer state in host memory, float32 for a trained weight.

        Raises:
            CheckpointError: it cannot be read.
        """
        with _reading_errors(self.folder):
            pieces = []
            for range_ in self._ranges[name]:
                with safe_open(self.folder / range_.file, "pt") as opened:
                    pieces.append(opened.get_tensor(f"{part}/{name}"))
            return torch.cat(pieces).view(self.shapes[name])


@contextlib.contextmanager
def _reading_errors(folder: Path) -> Iterator[None]:
    """Raise a `CheckpointError` for a file that cannot be read or is not of a checkpoint."""
    try:
        yield
    except (
        OSError,
        SafetensorError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            "the weights of the checkpoint cannot be read",
            where=str(folder),
            got=first_line(error),
            remedy="restore its files, or name another checkpoint",
        ) from error
