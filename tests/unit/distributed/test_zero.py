"""Settings and states that DeepSpeed's engines depend on: prefetch, loss scale, CPU Adam, 8-bit kernels."""

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpo_dist.distributed.zero import START, LossScale, communication


@pytest.mark.parametrize(
    ("hidden_size", "layer_parameters"),
    [(896, 15e6), (3584, 233e6), (8192, 855e6)],
    ids=["0.5B", "7B", "70B"],
)
def test_a_scored_model_can_prefetch_a_layer(hidden_size: int, layer_parameters: float) -> None:
    """Qwen2.5-0.5B and 7B, Llama-3-70B: DeepSpeed stops prefetching at `max_live_parameters`."""
    zero = DeepSpeedZeroConfig(stage=3, **communication(3, hidden_size, trains=False))
    assert 0.8 * layer_parameters < zero.prefetch_bucket_size < 1.5 * layer_parameters
    assert zero.max_live_parameters > 2 * layer_parameters
    assert zero.param_persistence_threshold == 10 * hidden_size


def test_an_overflow_halves_the_loss_scale_and_a_thousand_updates_double_it() -> None:
    scale = LossScale().after(is_applied=True).after(is_applied=False)
    assert scale == LossScale(START / 2, applied=0)
    for _ in range(999):
        scale = scale.after(is_applied=True)
        assert scale.value == START / 2
    assert scale.after(is_applied=True) == LossScale(START, applied=0)
    assert LossScale(2.0).after(is_applied=False).after(is_applied=False) == LossScale(1.0)
