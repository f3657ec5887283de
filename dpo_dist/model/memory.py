"""Memory of activations: kept in host memory, or one tile of an MLP at a time."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.layers import decoder_layers

_OFFLOAD_KEY = "model.activation_offload"


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


def offload_inputs(causal_lm: nn.Module) -> None:
    """Make checkpointed layers keep their input in host memory.

    Args:
        causal_lm: a transformers model, after `checkpoint_layers`.
    """
    layers: list[Any] = decoder_layers(causal_lm)
    for layer in layers:
        checkpoint = layer._gradient_checkpointing_func  # of layers that keep their activations: not called
        layer._gradient_checkpointing_func = partial(_checkpointed, checkpoint)


def _checkpointed(checkpoint: Callable[..., Any], *arguments: Any) -> Any:
    # The checkpoint saves its tensor arguments under these hooks, and what its layer saves under its own.
    with save_on_cpu(pin_memory=True):
        return checkpoint(*arguments)


_TILES_KEY = "model.mlp_tile_tokens"

Tokenwise = Callable[[Tensor], Tensor]
"""A function that computes every token of [..., tokens, hidden] alone."""


def tile_mlps(causal_lm: Any, tile_tokens: int) -> list[nn.Module]:
    """Make the MLP of every decoder layer compute in tiles of tokens, and return these MLPs.

    Args:
        causal_lm: a transformers model, sharded or not; its tensors are not used.
        tile_tokens: tokens of a tile.

    Raises:
        ConfigError: a layer has no MLP of matrices, as with experts.
    """
    mlps = find_mlps(causal_lm)
    for mlp in mlps:
        mlp.forward = partial(_forward, mlp, mlp.forward, tile_tokens)
    return mlps


def find_mlps(causal_lm: Any) -> list[nn.Module]:
    """Return the MLP of each decoder layer: a module `mlp` of matrices, which computes each token alone.

    Raises:
        ConfigError: a layer has none, as with experts.
    """
    mlps = []
    for layer in decoder_layers(causal_lm):
        mlp = dict(layer.named_children()).get("mlp")
        if mlp is None or not _has_only_matrices(mlp) or not _has_one_input(mlp):
            found = "no module `mlp`" if mlp is None else f"{type(mlp).__name__}, which is not one"
            raise ConfigError(
                "a layer of this architecture has no MLP that can be computed in tiles of tokens",
                where=_TILES_KEY,
                got=f"{type(layer).__name__} with {found}",
                expected="an MLP in every layer that computes each token alone, without experts",
                remedy=f"set {_TILES_KEY}=null",
            )
        mlps.append(mlp)
    return mlps


def _has_one_input(mlp: nn.Module) -> bool:
    parameters = inspect.signature(mlp.forward).parameters.values()
    return len([one for one in parameters if one.default is one.empty]) == 1


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
