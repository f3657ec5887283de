"""Copies of a rank's slices in host memory, so that a checkpoint is written while training changes them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_dist.distributed.host_memory import available_memory
from dpo_dist.distributed.slices import ModelSlices, Slice
from dpo_dist.distributed.world import World

_ALIGNED_BYTES = 64


class HostCopy:
    """Memory of this rank for copies of its slices: allocated once, pinned if `device` is a GPU."""

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self._buffer, self._is_pinned = torch.empty(0, dtype=torch.uint8), False

    def has_room(self, models: Sequence[ModelSlices], world: World) -> bool:
        """Return whether every host has memory for the copies of all its ranks; collective."""
        missing = max(0, _copy_bytes(models) - self._buffer.nbytes)
        ranks = world.gather((world.host, missing, available_memory() if missing else 0))
        needed: dict[str, int] = {}
        for host, of_rank, _ in ranks:
            needed[host] = needed.get(host, 0) + of_rank
        return all(not of_rank or needed[host] <= available for host, of_rank, available in ranks)

    def reserve(self, models: Sequence[ModelSlices]) -> None:
        """Have room for a copy of any one of the models, so that none of them needs more memory."""
        self._reserve(max((_copy_bytes([model]) for model in models), default=0))

    def of(self, models: Sequence[ModelSlices]) -> list[ModelSlices]:
        """Return the same slices in host memory, valid until the next call."""
        self._reserve(_copy_bytes(models))
        places = self._places(models)
        copied = [
            replace(model, slices=[replace(own, parts=_copied(own, places)) for own in model.slices])
            for model in models
        ]
        if self.is_cuda:
            torch.cuda.synchronize()
        return copied

    def _places(self, models: Sequence[ModelSlices]) -> Iterator[Tensor]:
        """Yield the place in the buffer of every tensor of the slices, in their order."""
        start = 0
        for tensor in _tensors(models):
            yield self._buffer[start : start + tensor.nbytes].view(tensor.dtype)
            start += _aligned(tensor.nbytes)

    def _reserve(self, count: int) -> None:
        """Allocate `count` bytes; PyTorch's allocator of pinned memory would round them up to 2^n."""
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


def _copied(own: Slice, places: Iterator[Tensor]) -> dict[str, Tensor]:
    return {part: next(places).copy_(tensor, non_blocking=True) for part, tensor in own.parts.items()}


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """Clear the error of a call of CUDA, which the next kernel would otherwise raise."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _tensors(models: Sequence[ModelSlices]) -> Iterator[Tensor]:
    for model in models:
        for own in model.slices:
            yield from own.parts.values()


def _copy_bytes(models: Sequence[ModelSlices]) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in _tensors(models))


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED_BYTES) * _ALIGNED_BYTES
