"""MLPs in tiles of tokens: the wide activations of a layer exist for one tile at a time.

The outputs of a gated MLP's matrices are several times as wide as a hidden state. A tile's are computed in
forward, dropped, and computed again in backward (arXiv:2506.13996). All tiles are computed in one forward of
the module, for which ZeRO-3 gathers its weights once, and the gradient of a weight is the sum over tiles,
added once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from dpo_dist.errors import ConfigError
from dpo_dist.model.layers import decoder_layers

KEY = "model.mlp_tile_tokens"
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
        where=KEY,
        got=f"{type(layer).__name__} with {found}",
        expected="an MLP in every layer that computes each token alone, without experts",
        remedy=f"set {KEY}=null",
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
