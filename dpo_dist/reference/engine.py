"""The reference model, loaded to score: sharded, offloaded where wanted, and freed when done."""

import logging
from dataclasses import replace
from pathlib import Path

from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.runtime import World
from dpo_dist.distributed.zero import FrozenEngine, fetching_layers_ahead, frozen_config, sharded_loading
from dpo_dist.model.load import load_packed

log = logging.getLogger(__name__)

# With h the hidden size, training keeps some 34 h bytes of activations for each token and layer
# (arXiv:2205.05198), or 2 h and one layer's 34 h with gradient checkpointing; scoring has one layer's only.
# At 28 layers four times the tokens then take a seventh of the memory; or 1.5 times with checkpointing, where
# gradients and optimizer states, which are not there yet, leave room for it.
_SCORING_TOKENS_FACTOR = 4


def scoring_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch that is only scored: `reference.micro_batch_tokens`, or by the trainer's."""
    return config.reference.micro_batch_tokens or _SCORING_TOKENS_FACTOR * config.trainer.micro_batch_tokens


def load_reference(folder: Path, config: RunConfig, world: World) -> FrozenEngine:
    """The reference model of `folder` as an engine of its own, in the policy's precision; collective."""
    log.info("loading the reference from %s", folder)
    deepspeed_config = frozen_config(config.reference.offload, config.model.dtype)
    model_config = replace(config.model, gradient_checkpointing="none", adapter=None)
    with sharded_loading(world, deepspeed_config):
        model = load_packed(folder, model_config, config.data.max_length, world.device)
    hidden_size = model.causal_lm.config.hidden_size
    return FrozenEngine(model, fetching_layers_ahead(deepspeed_config, hidden_size))
