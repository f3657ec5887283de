"""Modules that may compute with some of their parts only: lists of experts, compressors of keys."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from dpo_dist.model.layers import decoder_layers


def expert_blocks(causal_lm: nn.Module) -> list[nn.Module]:
    """Return the modules inside of layers that have a list of equal parts, such as one module per expert.

    Which parts compute depends on the tokens, so ranks may use different ones. Experts whose weights are
    stacked in one tensor, as in transformers' own models, are one part and not in a list. A module found
    here that always uses all its parts is no error: ZeRO-3 gathers its weights at once.
    """
    layers = set(decoder_layers(causal_lm))
    stacks = [module for module in causal_lm.modules() if isinstance(module, nn.ModuleList)]
    inside = {module for stack in stacks for layer in stack for module in layer.modules()}
    return [
        module
        for module in causal_lm.modules()
        if module in inside and module not in layers and any(map(_is_list_of_equals, module.children()))
    ]


def compressors(causal_lm: nn.Module) -> list[nn.Module]:
    """Return the modules that make one key of several tokens, as in DeepSeek-V4.

    A sequence of fewer tokens has no such key, and uses only some of their weights.
    """
    found = [name for name, module in causal_lm.named_modules() if hasattr(module, "compress_rate")]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return [causal_lm.get_submodule(name) for name in outer]


def _is_list_of_equals(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    is_one_kind = len({type(part) for part in module}) == 1
    return is_one_kind and any(True for _ in module.parameters())


def join_gradients(block: nn.Module) -> None:
    """Make the gradients of all weights of `block` ready at once, those of parts without tokens as zeros.

    ZeRO-1 and ZeRO-2 add up the gradients of the ranks in the order in which they are ready: if ranks use
    other parts, they would add up those of different weights.
    """
    block.forward = partial(_joined, _Block(block, block.forward))


class _Block(nn.Module):
    """A block as the only child of a module that computes as the block does."""

    def __init__(self, block: nn.Module, compute: Callable[..., Any]):
        super().__init__()
        self.block, self._compute = block, compute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._compute(*args, **kwargs)


def _joined(block: _Block, *args: Any, **kwargs: Any) -> Any:
    trained = {name: weight for name, weight in block.named_parameters() if weight.requires_grad}
    if not trained or not torch.is_grad_enabled():
        return block(*args, **kwargs)
    aliases = _Aliases.apply(*trained.values())  # type: ignore[no-untyped-call]
    output = functional_call(block, dict(zip(trained, aliases, strict=True)), args, kwargs)
    # If no trained weight is used, all of them get zeros; hooks of backward wait for the gradients of inputs.
    touched = [aliases[0], *(arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad)]
    touch = torch.stack([0.0 * tensor.flatten()[0].float() for tensor in touched]).sum()
    if isinstance(output, tuple):  # with what the router computed
        return (output[0] + touch.to(output[0].dtype), *output[1:])
    return output + touch.to(output.dtype)


class _Aliases(torch.autograd.Function):
    """Aliases of weights: backward has the gradients of all of them, zeros for unused ones."""

    @staticmethod
    def forward(_ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        return slopes
