"""Say which work exhausted the memory of a GPU, and what to lower."""

import contextlib
from collections.abc import Iterator

import torch

from dpo_dist.data.packing import PackedBatch
from dpo_dist.errors import DeviceMemoryError

_FEWER_BYTES = "set model.gradient_checkpointing=full, use more GPUs, or set parallelism=zero3_offload"


def policy_remedy(batch: PackedBatch | None = None) -> str:
    """Return what to lower if the policy runs out of memory at `batch`, or in its optimizer step."""
    if batch is None:
        return "use more GPUs, or set parallelism=zero3_offload"
    if len(batch.layout) == 1:
        return f"lower data.max_length, as this is a single pair; {_FEWER_BYTES}"
    return f"lower trainer.micro_batch_tokens, which does not change the result; {_FEWER_BYTES}"


def reference_remedy() -> str:
    """Return what to lower if the reference runs out of memory."""
    return "lower reference.micro_batch_tokens, or set reference.offload=cpu"


def described(batch: PackedBatch) -> str:
    """Return the size of a micro-batch in words."""
    longest = max(sum(lengths) for lengths in batch.layout)
    return f"{len(batch.input_ids)} tokens in {len(batch.layout)} pairs, the longest of {longest}"


@contextlib.contextmanager
def explained(work: str, remedy: str) -> Iterator[None]:
    """Raise a `DeviceMemoryError` about `work` if it runs out of GPU memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, work, remedy) from error


def out_of_memory(error: torch.OutOfMemoryError, work: str = "", remedy: str = "") -> DeviceMemoryError:
    """Return `error` as one for the user."""
    return DeviceMemoryError(
        "a GPU has no memory left",
        where=work,
        got=(str(error).splitlines() or [""])[0][:300],
        remedy=remedy or f"lower trainer.micro_batch_tokens; {_FEWER_BYTES}",
    )
