"""Load weights whole or sharded, whatever the policy's configuration."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers.integrations.deepspeed import HfDeepSpeedConfig, set_hf_deepspeed_config

from dpo_dist.distributed.world import World


def whole_loading(world: World) -> contextlib.AbstractContextManager[None]:
    """Make transformers load unsharded weights inside the block, whatever the policy's configuration."""
    return sharded_loading(world, {"zero_optimization": {"stage": 0}})


@contextlib.contextmanager
def sharded_loading(world: World, deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Make transformers shard weights by this configuration inside the block, not by the policy's."""
    inner = HfDeepSpeedConfig(deepspeed_config)  # a variable, as transformers keeps a weak reference
    try:
        yield
    finally:
        del inner
        set_hf_deepspeed_config(world.accelerator.state.deepspeed_plugin.dschf)
