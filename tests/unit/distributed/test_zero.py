"""Settings and states that DeepSpeed's engines depend on: prefetch, loss scale, CPU Adam, 8-bit kernels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dpo_dist.config.schema import Dtype, Offload
from dpo_dist.distributed.slices import _restore_powers
from dpo_dist.distributed.zero import START, LossScale, _check_lengths, frozen_config, with_layer_prefetch
from dpo_dist.foundation.errors import ConfigError
from tests.support.cpu_adam import Powers


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


def test_an_overflow_halves_the_loss_scale_and_a_thousand_updates_double_it() -> None:
    scale = LossScale().after(is_applied=True).after(is_applied=False)
    assert scale == LossScale(START / 2, applied=0)
    for _ in range(999):
        scale = scale.after(is_applied=True)
        assert scale.value == START / 2
    assert scale.after(is_applied=True) == LossScale(START, applied=0)
    lowest = LossScale(2.0).after(is_applied=False)
    assert not lowest.can_fall
    assert lowest.after(is_applied=False) == LossScale(1.0)


BETAS = (0.9, 0.999)


def updated(powers: Powers, steps: range) -> list[float]:
    for step in steps:
        powers.adam_update(0, step, 0.0, *BETAS)
    return powers.powers.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("done", [0, 1, 2, 50, 3000])
@pytest.mark.parametrize("before", [0, 3])
def test_the_powers_of_the_betas_are_those_of_an_uninterrupted_run(done: int, before: int) -> None:
    wanted, restored, jumping = Powers(), Powers(), Powers()
    updated(restored, range(1, before + 1))
    adam: Any = SimpleNamespace(param_groups=[{"betas": BETAS}], opt_id=0, ds_opt_adam=restored)
    _restore_powers(adam, done)
    steady = updated(wanted, range(1, done + 3))
    assert updated(restored, range(done + 1, done + 3)) == steady
    if done == 50:
        assert updated(jumping, range(51, 53)) != steady, "plain powers differ"


def test_tensors_that_eight_bit_kernels_cannot_number_are_refused() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    optimizer = optim.AdamW8bit([torch.nn.Parameter(torch.zeros(8))])
    too_long = torch.empty(2**31, device="meta")
    _check_lengths(optimizer, [torch.empty(2**31 - 1, device="meta")])
    _check_lengths(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), [too_long])
    with pytest.raises(ConfigError, match="31 bits"):
        _check_lengths(optimizer, [too_long])
