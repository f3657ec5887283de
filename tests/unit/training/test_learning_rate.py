"""The learning rate is a function of the step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import TrainingArguments
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_polynomial_decay_schedule_with_warmup,
)

from dpo_dist.config.schema import LearningRateSchedule, OptimConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.loop import check_warmup, learning_rate

FLOOR = 0.2
FLOORS = {LearningRateSchedule.linear: FLOOR, LearningRateSchedule.cosine: FLOOR}


def of_transformers(schedule: LearningRateSchedule, floor: float, warmup: int, steps: int) -> list[float]:
    """Return the rates of the first `steps` + 1 steps by the schedule of transformers."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=8.0)
    match schedule:
        case LearningRateSchedule.constant | LearningRateSchedule.constant_with_warmup:
            made = get_constant_schedule_with_warmup(optimizer, warmup)
        case LearningRateSchedule.inverse_sqrt:
            made = get_inverse_sqrt_schedule(optimizer, warmup)
        case LearningRateSchedule.linear:
            made = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=8.0 * floor)
        case LearningRateSchedule.cosine:
            made = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=floor)
    found = []
    for _ in range(steps + 1):
        found += made.get_last_lr()
        optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize("schedule", LearningRateSchedule)
@pytest.mark.parametrize("with_floor", [False, True])
@given(steps=st.integers(1, 60), ratio=st.none() | st.floats(0, 0.999), data=st.data())
def test_schedules_are_those_of_transformers_whose_warmup_is_one_step_later(
    schedule: LearningRateSchedule, with_floor: bool, steps: int, ratio: float | None, data: st.DataObject
) -> None:
    floor = FLOORS.get(schedule, 0.0) if with_floor else 0.0
    optim = OptimConfig(lr=8.0, schedule=schedule, min_lr_ratio=floor)
    if ratio is None:
        warmup = data.draw(st.integers(0, steps - 1))
        optim = replace(optim, warmup_steps=warmup)
    else:
        given_so = SimpleNamespace(warmup_steps=ratio, warmup_ratio=None)
        warmup = TrainingArguments.get_warmup_steps(given_so, steps)
        optim = replace(optim, warmup_ratio=ratio)
    assume(warmup < steps)  # theirs divide by the steps after it
    theirs = of_transformers(schedule, floor, warmup, steps)
    for step in range(steps):
        expected = theirs[step + 1] if step < warmup else theirs[step]
        assert learning_rate(optim, step, steps) == pytest.approx(expected, rel=1e-12)


def test_a_warmup_longer_than_the_run_is_an_error() -> None:
    check_warmup(OptimConfig(warmup_steps=5), 5)
    check_warmup(OptimConfig(warmup_ratio=1.0), 5)
    with pytest.raises(ConfigError, match="longer than the run") as error:
        check_warmup(OptimConfig(warmup_steps=6), 5)
    assert error.value.got == "6 of 5 steps"
