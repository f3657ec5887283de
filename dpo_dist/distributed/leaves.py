"""Modules whose weights ZeRO-3 gathers at once, its leaves, and whose gradients are ready at once."""

from deepspeed.utils import set_z3_leaf_module, set_z3_leaf_modules

from dpo_dist.model.experts import expert_blocks, join_gradients
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.layers import decoder_layers


def gather_at_once(model: PackedCausalLM) -> None:
    """Make ZeRO-3 gather the weights of some modules, its leaves, at once, and reduce their gradients so.

    Compiled layers and tiled MLPs, so that no hook is in compiled code or a tile. Blocks with a list of
    experts: a rank whose tokens visit no part of an expert would not gather it, and the others would wait.
    """
    for module in [*expert_blocks(model.causal_lm), *model.tiled]:
        set_z3_leaf_module(module, True)
    if model.compiled:
        set_z3_leaf_modules(model, list({type(layer) for layer in decoder_layers(model)}))


def reduce_at_once(model: PackedCausalLM) -> None:
    """Make gradients of blocks with a list of experts ready at once, for the stages of ZeRO other than 3."""
    for block in expert_blocks(model.causal_lm):
        join_gradients(block)
