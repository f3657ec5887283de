"""Measure a reference model's memory inside a run."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def build_and_weigh(
    build: Callable[..., Any], memory: dict[str, int], *arguments: Any, **options: Any
) -> Any:
    """Return the result of `build`, a reference; add its weights and its peak, in bytes, to `memory`.

    A fill of the store restarts the measurement of peaks, so that its report has its peak.
    """
    before = _weights()
    _restart_peak()
    reference = build(*arguments, **options)
    memory["peak while made ready"] = max(peak(), reference.report.get("peak_memory_bytes", 0))
    memory["kept"] = _weights() - before
    _restart_peak()
    return reference


def _weights() -> int:
    """Return the bytes allocated on the GPU; without a GPU, of all tensors, including shards of ZeRO-3."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        # Else the first product would count: it allocates cuBLAS's workspace, which stays.
        torch.nn.functional.linear(*(torch.ones(8, 8, device="cuda") for _ in range(2)))
        return int(torch.cuda.memory_allocated())
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    tensors += [tensor.ds_tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _restart_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the peak in bytes since the last restart: allocated on the GPU, or the resident set."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


def peak_reserved() -> int:
    """Return the peak bytes of the GPU's allocator, including unused fragments; 0 without a GPU."""
    import torch

    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else 0
