"""The MLP of a layer by tiles of tokens: what it computes inside exists for one tile at a time."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from dpo_dist.model.layers import decoder_layers, shared_weights

TILE_ROWS = 2048
"""Tokens of a tile: chosen so that products of a tile still fill a GPU."""


def tiled_mlps(causal_lm: Any) -> dict[nn.Module, nn.Module]:
    """Return the MLPs that can be computed by tiles, by their decoder layer.

    Experts and their routers stay whole, as do layers that share weights: ZeRO-3 gathers those module by
    module, and ranks have different numbers of tiles.
    """
    shared = shared_weights(causal_lm)
    found = {}
    for layer in decoder_layers(causal_lm):
        for child in layer.children():
            if _computes_rows(child) and shared.isdisjoint(child.parameters()):
                found[layer] = child
    return found


def _computes_rows(module: nn.Module) -> bool:
    """Return whether this is an MLP of linear layers, which computes each token by itself."""
    with_weights = [child for child in module.children() if next(child.parameters(), None) is not None]
    # An adapter's layers have the linear ones inside.
    own = [getattr(child, "base_layer", child) for child in with_weights]
    is_linear = all(isinstance(child, nn.Linear | Conv1D) for child in own)
    takes_one_tensor = len(inspect.signature(module.forward).parameters) == 1
    return type(module).__name__.endswith("MLP") and is_linear and takes_one_tensor


def tile_mlps(causal_lm: Any) -> None:
    """Make MLPs compute by tiles, in scoring and in checkpointed layers; after `checkpoint_layers`."""
    for layer, mlp in tiled_mlps(causal_lm).items():
        mlp.forward = partial(_by_tiles, layer, mlp, mlp.forward)


def _by_tiles(layer: Any, mlp: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    trains = torch.is_grad_enabled()
    if trains and not layer.gradient_checkpointing:
        return forward(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    kept = list[Any]()
    weights = list[nn.Parameter]()
    if trains:
        if not rows.requires_grad:  # before the first trained weight
            rows = rows.detach().requires_grad_()
        rows = _Kept.apply(rows, kept)  # type: ignore[no-untyped-call]
        weights = [weight for weight in mlp.parameters() if weight.requires_grad]
    out: Tensor = _Tiled.apply(rows, forward, kept, *weights)  # type: ignore[no-untyped-call]
    return out.view(hidden.shape)


class _Kept(torch.autograd.Function):
    """Keeps its input, which it returns, for the backward of `_Tiled`.

    Checkpointing computes a layer again until all is there that was kept for backward. This is kept before
    the MLP, so that an MLP at the end of a layer is not computed a third time.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kept: list[Any]) -> Tensor:
        ctx.save_for_backward(rows)
        kept.append(ctx)
        return rows.view_as(rows)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Tiled(torch.autograd.Function):
    """An MLP by tiles, each of which is computed again in backward.

    A micro-batch of one tile is, too: ZeRO-1 and ZeRO-2 reduce gradients in the order in which they become
    ready, which must be that of ranks with more tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, compute: Callable[[Tensor], Tensor], kept: list[Any], *weights: Tensor
    ) -> Tensor:
        ctx.compute = compute
        ctx.kept = kept
        ctx.weights = weights
        return torch.cat([compute(tile) for tile in torch.split(rows, TILE_ROWS)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        [keeper] = ctx.kept
        [rows] = keeper.saved_tensors
        of_rows = []
        sums: list[Tensor | None] = [None] * len(ctx.weights)
        for tile, of_tile in zip(torch.split(rows, TILE_ROWS), torch.split(gradient, TILE_ROWS), strict=True):
            with torch.enable_grad():
                leaf = tile.detach().requires_grad_()
                out = ctx.compute(leaf)
            of_leaf, *found = torch.autograd.grad(out, (leaf, *ctx.weights), of_tile, allow_unused=True)
            del out
            of_rows.append(of_leaf)
            for number, each in enumerate(found):
                if each is not None:  # added in float32: in bf16 each tile would round the sum again
                    total = sums[number]
                    sums[number] = each.float() if total is None else total.add_(each)
        of_weights = zip(sums, ctx.weights, strict=True)
        in_dtype = [None if total is None else total.to(weight.dtype) for total, weight in of_weights]
        return torch.cat(of_rows), None, None, *in_dtype
