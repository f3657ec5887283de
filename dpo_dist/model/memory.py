"""Memory of activations: kept in host memory, or one tile of an MLP at a time."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.layers import decoder_layers

_OFFLOAD_KEY = "model.activation_offload"


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
            where=_OFFLOAD_KEY,
            got=f"true on {device.type}",
            expected="a GPU",
            remedy=f"set {_OFFLOAD_KEY}=false",
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


_TILES_KEY = "model.mlp_tile_tokens"
_TRIED_TOKENS = 4
# Relative to the largest value: bf16 products of other shapes are rounded differently.
_ROUNDING = 0.05

Tokenwise = Callable[[Tensor], Tensor]
"""A function that computes every token of [..., tokens, hidden] alone."""


def tile_mlps(causal_lm: Any, tile_tokens: int, device: torch.device, dtype: torch.dtype) -> list[nn.Module]:
    """Make the MLP of every decoder layer compute in tiles of tokens, and return these MLPs.

    Args:
        causal_lm: a transformers model, sharded or not.
        tile_tokens: tokens of a tile.
        device: of the forward.
        dtype: of the activations.

    Raises:
        ConfigError: a layer has no MLP that computes every token alone, as with experts.
    """
    width = causal_lm.config.get_text_config().hidden_size
    mlps = [_mlp(layer, width, device, dtype) for layer in decoder_layers(causal_lm)]
    for mlp in mlps:
        mlp.forward = partial(_forward, mlp, mlp.forward, tile_tokens)
    return mlps


def check_mlps(causal_lm: Any) -> None:
    """Check the modules of the MLPs of a model; `tile_mlps` also tries them.

    Args:
        causal_lm: a transformers model; its tensors are not used.

    Raises:
        ConfigError: a layer has no MLP of matrices that maps a hidden state to one.
    """
    width = causal_lm.config.get_text_config().hidden_size
    for layer in decoder_layers(causal_lm):
        mlp = _mlp_of(layer)
        if mlp is None or not _has_only_matrices(mlp) or not _maps_hidden_states(mlp, width):
            raise _not_tokenwise(layer, mlp)


def _mlp(layer: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the MLP of a layer, which is a module `mlp` of matrices and functions without weights."""
    mlp = _mlp_of(layer)
    if mlp is None or not _has_only_matrices(mlp) or not _is_tokenwise(mlp, width, device, dtype):
        raise _not_tokenwise(layer, mlp)
    return mlp


def _mlp_of(layer: nn.Module) -> nn.Module | None:
    return dict(layer.named_children()).get("mlp")


def _not_tokenwise(layer: nn.Module, mlp: nn.Module | None) -> ConfigError:
    found = "no module `mlp`" if mlp is None else f"{type(mlp).__name__}, which is not one"
    return ConfigError(
        "a layer of this architecture has no MLP that can be computed in tiles of tokens",
        where=_TILES_KEY,
        got=f"{type(layer).__name__} with {found}",
        expected="an MLP in every layer that computes each token alone, without experts",
        remedy=f"set {_TILES_KEY}=null",
    )


def _maps_hidden_states(mlp: nn.Module, width: int) -> bool:
    """Return whether an MLP on the meta device has one argument and one result, [..., tokens, width]."""
    weight = next(mlp.parameters())
    if not weight.is_meta:
        return True
    try:
        with torch.no_grad():
            whole = mlp(torch.empty(1, _TRIED_TOKENS, width, device="meta", dtype=weight.dtype))
    except NotImplementedError:  # an operation without a computation of shapes
        return True
    except (TypeError, RuntimeError):
        return False
    return isinstance(whole, Tensor) and whole.shape == (1, _TRIED_TOKENS, width)


def _has_only_matrices(mlp: nn.Module) -> bool:
    """Return whether all weights are matrices or biases of parts: experts are lists, or tensors of them."""
    parts = list(mlp.modules())[1:]
    own, weights = list(mlp.parameters(recurse=False)), list(mlp.parameters())
    has_lists = any(isinstance(part, nn.ModuleList | nn.ParameterList) for part in parts)
    return bool(weights) and not own and not has_lists and all(len(_shape(weight)) <= 2 for weight in weights)


def _shape(weight: nn.Parameter) -> Sequence[int]:
    """Return the shape of a weight that ZeRO-3 may have sharded."""
    shape: Sequence[int] = getattr(weight, "ds_shape", weight.shape)
    return shape


def _is_tokenwise(mlp: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether some random tokens give the same in two halves: none depends on earlier or later ones.

    Weights that ZeRO-3 has sharded are replaced by random ones for it: only the code is examined.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    named = dict(mlp.named_parameters())
    sharded = {
        name: random(*_shape(weight)) / _shape(weight)[-1] ** 0.5
        for name, weight in named.items()
        if hasattr(weight, "ds_shape")
    }
    hidden = random(1, _TRIED_TOKENS, width)
    with torch.no_grad():
        try:
            whole = functional_call(mlp, sharded, (hidden,))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError):  # its forward has other arguments, or inputs of another width
            return False
        if not isinstance(whole, Tensor) or whole.shape != hidden.shape:
            return False
        halves = [functional_call(mlp, sharded, (half,)) for half in hidden.chunk(2, dim=1)]
    difference = (whole - torch.cat(halves, dim=1)).abs().max()
    return bool(difference <= _ROUNDING * whole.abs().max())


def _forward(mlp: nn.Module, whole: Tokenwise, tile_tokens: int, hidden: Tensor) -> Tensor:
    trained = [weight for weight in mlp.parameters() if weight.requires_grad]  # those of an adapter, too
    if hidden.shape[-2] <= tile_tokens and not (trained and torch.is_grad_enabled()):
        return whole(hidden)
    # One tile is computed as several are: ZeRO-2 adds up the gradients of the ranks in the order in which
    # they are ready, so ranks with more and with fewer tokens need the same order.
    tiled: Tensor = _Tiles.apply(hidden, whole, tile_tokens, *trained)  # type: ignore[no-untyped-call]
    return tiled


class _Tiles(torch.autograd.Function):
    """Tiles of a token-wise function, whose activations are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, whole: Tokenwise, tile_tokens: int, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        # Not saved as tensors: under ZeRO-3 their data are gathered again for backward.
        ctx.whole, ctx.tile_tokens, ctx.weights = whole, tile_tokens, weights
        return torch.cat([whole(tile) for tile in torch.split(hidden, tile_tokens, dim=-2)], dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        wants_hidden = ctx.needs_input_grad[0]
        of_hidden: list[Tensor] = []
        of_weights: list[Tensor | None] = [None] * len(ctx.weights)
        for own, slope in zip(
            *(torch.split(t, ctx.tile_tokens, dim=-2) for t in (hidden, slopes)), strict=True
        ):
            with torch.enable_grad():
                tile = own.detach().requires_grad_(wants_hidden)
                output = ctx.whole(tile)
            inputs = [tile, *ctx.weights] if wants_hidden else list(ctx.weights)
            gradients = list(torch.autograd.grad(output, inputs, slope, allow_unused=True))
            if wants_hidden:
                of_hidden.append(gradients.pop(0))
            of_weights = [_added(total, part) for total, part in zip(of_weights, gradients, strict=True)]
        return (
            torch.cat(of_hidden, dim=-2) if wants_hidden else None,
            None,
            None,
            *(
                None if total is None else total.to(weight.dtype)
                for total, weight in zip(of_weights, ctx.weights, strict=True)
            ),
        )


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Return the sum in float32: in bf16 every tile would round it again."""
    if part is None or total is None:
        return total if part is None else part.float()
    return total.add_(part)
