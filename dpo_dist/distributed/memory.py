"""Free memory, peak memory and out-of-memory errors of device and host."""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dpo_dist.foundation.errors import DeviceMemoryError

_KEPT_FREE = 0.1  # share of host memory, and of a cgroup's limit
_ROOT = Path("/sys/fs/cgroup")
_PROCESS_CGROUPS = Path("/proc/self/cgroup")
_CONTROLLERS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Names by controller in `_PROCESS_CGROUPS` (cgroups 2, 1): folder, limit, use, file cache within use."""


def available_memory(root: Path = _ROOT, process_cgroups: Path = _PROCESS_CGROUPS) -> int:
    """Return the free bytes of host memory within this process's cgroup limits, less a tenth of the total."""
    memory = psutil.virtual_memory()
    free = [memory.available - _KEPT_FREE * memory.total]
    lines = process_cgroups.read_text().splitlines() if process_cgroups.exists() else []
    for _, controller, path in (line.split(":", 2) for line in lines):
        if controller not in _CONTROLLERS:
            continue
        folder, limit, use, cache = _CONTROLLERS[controller]
        inner = root / folder / path.lstrip("/")
        # In a container `path` may be that of the host; then only the parents that exist have limits.
        for group in (inner, *(parent for parent in inner.parents if parent.is_relative_to(root / folder))):
            with contextlib.suppress(OSError, ValueError, KeyError):  # the limit "max" is no number
                most = int((group / limit).read_text())
                statistics = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                used = int((group / use).read_text()) - int(statistics[cache])
                free.append(most - used - _KEPT_FREE * most)
    return max(0, int(min(free)))


def free_memory(device: torch.device, processes: int) -> int:
    """Return the bytes that this process can still use on its GPU; on CPUs, a share of host memory."""
    if device.type != "cuda":
        return available_memory() // processes
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


REFERENCE_REMEDY = "lower trainer.micro_batch_tokens, or set reference.offload=cpu"
_POLICY_REMEDY = (
    "lower trainer.micro_batch_tokens, which does not change the result, or data.max_length where a "
    "micro-batch is a single pair; set model.gradient_checkpointing=full, use more GPUs (in groups of "
    "parallelism.sequence_parallel), or set parallelism=zero3_offload"
)


def wait_for_device() -> None:
    """Wait until the device is idle, before memory is released that a stream may still use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def return_memory() -> None:
    """Release unused memory: on the device, pinned memory of the host, and free pages of the heap."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # else glibc keeps most pages
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_host_memory()


def return_host_memory() -> None:
    """Release unused pinned memory of the host."""
    if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):  # not in every version
        torch.accelerator.empty_host_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """Return this process's peak memory in bytes: allocated on the GPU, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def explain_out_of_memory(work: str, remedy: str = _POLICY_REMEDY) -> Iterator[None]:
    """If GPU memory runs out inside the block, raise a `DeviceMemoryError` that names `work`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, work, remedy) from error


def out_of_memory(
    error: torch.OutOfMemoryError, work: str = "", remedy: str = _POLICY_REMEDY
) -> DeviceMemoryError:
    """Return PyTorch's error as a `DeviceMemoryError` with a remedy."""
    got = str(error).partition("\n")[0].partition(" If reserved")[0]  # without PyTorch's advice
    return DeviceMemoryError("GPU memory is exhausted", where=work, got=got, remedy=remedy)


def empty(value: Any) -> None:
    """Release the storage of every tensor in nested lists, tuples and dictionaries.

    Without this, a freed engine keeps its memory: DeepSpeed's lists and caches refer to its tensors until the
    process ends.
    """
    if isinstance(value, Tensor):
        value.data = value.new_empty(0)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            empty(item)
