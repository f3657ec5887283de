"""Modules of a model that may compute with some of their parts only: lists of experts."""

from torch import nn

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


def _is_list_of_equals(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    is_one_kind = len({type(part) for part in module}) == 1
    return is_one_kind and any(True for _ in module.parameters())
