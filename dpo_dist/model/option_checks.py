"""Checks of options against the model and the device, before weights are read."""

from typing import Any

import torch

from dpo_dist.config.adapter_schema import AdapterConfig
from dpo_dist.config.schema import ModelConfig
from dpo_dist.data.arrangement import Arrangement
from dpo_dist.model.activation_offload import check_offload
from dpo_dist.model.adapters import target_layers
from dpo_dist.model.architectures import recorded_arrangement
from dpo_dist.model.attention_backend import heads_of_layers
from dpo_dist.model.layers import check_compiler, check_liger, checkpoint_layers
from dpo_dist.model.numerics import check_precision
from dpo_dist.model.peft_targets import check_adaptable
from dpo_dist.model.saved_modules import find_modules
from dpo_dist.model.sequence_parallel import cannot_be_shared, check_heads
from dpo_dist.model.tiled_mlp import check_mlps


def check_device(config: ModelConfig, model_type: str, device: torch.device) -> None:
    """Check that options of the model have an effect on `device`, and can run there.

    Raises:
        ConfigError: one has none, or cannot.
    """
    check_precision(config.dtype, device)
    if config.liger:
        check_liger(model_type, device)
    if config.compile:
        check_compiler(device)
    if config.activation_offload:
        check_offload(device)


def check_shared_tokens(model_config: Any, ranks: int) -> None:
    """Check that `ranks` ranks can share the tokens of a micro-batch, as far as config.json says.

    Raises:
        ConfigError: its heads cannot be divided, or its architecture cannot be packed.
    """
    text = model_config.get_text_config()
    for heads in heads_of_layers(text):
        check_heads(heads, ranks)
    if ranks > 1 and recorded_arrangement(text.model_type) is not Arrangement.packed:
        raise cannot_be_shared(text.model_type, ranks)


def check_modules(causal_lm: Any, config: ModelConfig, adapter: AdapterConfig | None) -> None:
    """Check that a model has the modules to which options apply.

    Args:
        causal_lm: without an adapter, of which no tensor is used; its layers may be set to be checkpointed.
        config: of the model.
        adapter: that is trained.

    Raises:
        ConfigError: it has no such modules.
    """
    checkpoint_layers(causal_lm, config.gradient_checkpointing)
    if config.mlp_tile_tokens is not None:
        check_mlps(causal_lm)
    if adapter is not None:
        targets = target_layers(causal_lm, adapter)
        if not adapter.continues:
            check_adaptable(causal_lm, targets)
        find_modules(causal_lm, adapter.modules_to_save or [])
