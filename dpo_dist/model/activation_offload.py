"""Keep the inputs of checkpointed layers in host memory between forward and backward.

With gradient checkpointing these inputs, [tokens, hidden] of every layer, are what a long sequence keeps on
the device. They are copied to pinned memory while the layer computes, and read back while the layer after it
computes its backward.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dpo_dist.errors import ConfigError
from dpo_dist.model.layers import decoder_layers

KEY = "model.activation_offload"


class Elsewhere(Protocol):
    """Another memory for tensors that backward needs."""

    def put(self, tensor: Tensor) -> Any:
        """Return what `get` needs to return an equal tensor; no tensor itself."""
        ...

    def get(self, copy: Any) -> Tensor:
        """Return an equal tensor on the device."""
        ...


def check_offload(device: torch.device) -> None:
    """Check that activations are in another memory than the host's.

    Raises:
        ConfigError: they are not.
    """
    if device.type != "cuda":
        raise ConfigError(
            "activations are in host memory already, so there is nothing to move",
            where=KEY,
            got=f"true on {device.type}",
            expected="a GPU",
            remedy=f"set {KEY}=false",
        )


def offload_inputs(causal_lm: nn.Module, elsewhere: Elsewhere) -> None:
    """Make checkpointed layers keep their input `elsewhere`.

    Args:
        causal_lm: a transformers model, after `checkpoint_layers`.
        elsewhere: the memory.
    """
    layers: list[Any] = decoder_layers(causal_lm)
    for layer in layers:
        checkpoint = layer._gradient_checkpointing_func  # of layers that keep their activations: not called
        layer._gradient_checkpointing_func = partial(_checkpointed, checkpoint, elsewhere)


def _checkpointed(checkpoint: Callable[..., Any], elsewhere: Elsewhere, *arguments: Any) -> Any:
    # The checkpoint saves its tensor arguments under these hooks, and what its layer saves under its own.
    with saved_tensors_hooks(partial(_put, elsewhere), partial(_get, elsewhere)):
        return checkpoint(*arguments)


def _put(elsewhere: Elsewhere, tensor: Tensor) -> Any:
    return elsewhere.put(tensor) if tensor.numel() else tensor  # the checkpoint saves an empty one, too


def _get(elsewhere: Elsewhere, kept: Any) -> Tensor:
    return kept if isinstance(kept, Tensor) else elsewhere.get(kept)


class PinnedMemory(Elsewhere):
    """Pinned memory of the host, with copies on a CUDA stream of their own."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._newest: weakref.ref[_Copy] | None = None

    def put(self, tensor: Tensor) -> "_Copy":
        """Start the copy to the host."""
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            on_host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            on_host.copy_(tensor, non_blocking=True)
        # The allocator may reuse the memory of `tensor` only after the copy.
        tensor.record_stream(self._stream)
        copy = _Copy(on_host, tensor.device, self._newest)
        self._newest = weakref.ref(copy)
        return copy

    def get(self, copy: "_Copy") -> Tensor:
        """Return the tensor, and start the copy of the one before it, which backward needs next."""
        tensor = self._fetched(copy)
        before = None if copy.before is None else copy.before()
        if before is not None:
            before.fetched = self._fetched(before)
        copy.fetched = None
        current = torch.cuda.current_stream(copy.device)
        current.wait_event(copy.arrived)
        tensor.record_stream(current)
        return tensor

    def _fetched(self, copy: "_Copy") -> Tensor:
        if copy.fetched is not None:
            return copy.fetched
        with torch.cuda.stream(self._stream):
            tensor = copy.on_host.to(copy.device, non_blocking=True)
        copy.arrived = self._stream.record_event()
        return tensor


@dataclass(eq=False)
class _Copy:
    """A tensor in pinned memory.

    Attributes:
        on_host: complete as soon as the stream has reached it.
        device: of the tensor.
        before: the copy made before this one, if a graph still needs it.
        fetched: the tensor on the device, if its copy has been started early.
        arrived: reached when the tensor on the device is complete.
    """

    on_host: Tensor
    device: torch.device
    before: "weakref.ref[_Copy] | None"
    fetched: Tensor | None = None
    arrived: Any = None
