"""DeepSpeed reads its configuration with the values meant."""

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpo_dist.config.schema import Dtype, Offload
from dpo_dist.distributed.zero import frozen_config, with_layer_prefetch


@pytest.mark.parametrize(
    ("hidden_size", "layer_parameters"),
    [(896, 15e6), (3584, 233e6), (8192, 855e6)],
    ids=["0.5B", "7B", "70B"],
)
def test_a_scored_model_can_prefetch_a_layer(hidden_size: int, layer_parameters: float) -> None:
    """Qwen2.5-0.5B and 7B, Llama-3-70B: DeepSpeed stops prefetching at `max_live_parameters`."""
    config = with_layer_prefetch(frozen_config(Offload.none, Dtype.bf16), hidden_size)
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert 0.8 * layer_parameters < zero.prefetch_bucket_size < 1.5 * layer_parameters
    assert zero.max_live_parameters > 2 * layer_parameters
    assert zero.param_persistence_threshold == 10 * hidden_size
    assert zero.stage == 3
