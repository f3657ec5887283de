"""The loss scale of fp16 falls after every overflow and doubles after 1,000 updates without one."""

from dpo_dist.distributed.zero import START, LossScale


def test_an_overflow_halves_it_and_a_thousand_updates_double_it() -> None:
    scale = LossScale().after(is_applied=True).after(is_applied=False)
    assert scale == LossScale(START / 2, applied=0)
    for _ in range(999):
        scale = scale.after(is_applied=True)
        assert scale.value == START / 2
    assert scale.after(is_applied=True) == LossScale(START, applied=0)


def test_at_one_a_smaller_scale_does_not_help() -> None:
    scale = LossScale(2.0)
    assert scale.can_fall
    assert not scale.after(is_applied=False).can_fall
    assert scale.after(is_applied=False).after(is_applied=False) == LossScale(1.0)
