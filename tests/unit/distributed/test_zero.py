"""The loss scale of fp16."""

from dpo_dist.distributed.deepspeed_config import START
from dpo_dist.distributed.zero import LossScale


def test_an_overflow_halves_the_loss_scale_and_a_thousand_updates_double_it() -> None:
    scale = LossScale().after(is_applied=True).after(is_applied=False)
    assert scale == LossScale(START / 2, applied=0)
    for _ in range(999):
        scale = scale.after(is_applied=True)
        assert scale.value == START / 2
    assert scale.after(is_applied=True) == LossScale(START, applied=0)
    assert LossScale(2.0).after(is_applied=False).after(is_applied=False) == LossScale(1.0)
