"""Modules whose weights ZeRO-3 gathers at once, its leaves, and whose gradients are ready at once."""

from deepspeed.utils import set_z3_leaf_module, set_z3_leaf_modules

from dpo_dist.model.experts import compressors, expert_blocks, join_gradients
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.layers import decoder_layers


def gather_at_once(model: PackedCausalLM) -> None:
    """Make ZeRO-3 gather the weights of some modules, its leaves, at once, and reduce their gradients so.

    Compiled layers and tiled MLPs, so that no hook is in compiled code or a tile. Modules that may compute
    with some of their parts only: a rank that skips a part would not gather it, and the others would wait.
    """
    for module in [*expert_blocks(model.causal_lm), *compressors(model.causal_lm), *model.tiled]:
        set_z3_leaf_module(module, True)
    if model.compiled:
        set_z3_leaf_modules(model, list({type(layer) for layer in decoder_layers(model.causal_lm)}))


def reduce_at_once(model: PackedCausalLM, stage: int) -> None:
    """Make the gradients of modules that may compute with some of their parts ready at once.

    ZeRO-3 (`stage`) does so for its leaves, but not where a leaf has no output at all, as a compressor may.
    """
    blocks = expert_blocks(model.causal_lm) if stage < 3 else []
    for block in [*blocks, *compressors(model.causal_lm)]:
        join_gradients(block)
