"""The reference model, loaded to score: sharded, offloaded where wanted, and freed when done."""

import logging
from dataclasses import replace
from pathlib import Path

from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.runtime import World
from dpo_dist.distributed.zero import FrozenEngine, frozen_config, sharded_loading
from dpo_dist.model.load import load_packed

log = logging.getLogger(__name__)


def load_reference(folder: Path, config: RunConfig, world: World) -> FrozenEngine:
    """The reference model of `folder` as an engine of its own, in the policy's precision; collective."""
    log.info("loading the reference from %s", folder)
    deepspeed_config = frozen_config(config.reference.offload, config.model.dtype)
    model_config = replace(config.model, gradient_checkpointing="none")
    with sharded_loading(world, deepspeed_config):
        model = load_packed(folder, model_config, config.data.max_length, world.device)
    return FrozenEngine(model, deepspeed_config)
