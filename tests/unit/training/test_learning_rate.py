"""The learning rate is a function of the step."""

import math
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
from dpo_dist.training.schedule import check_warmup, learning_rate


def rates(schedule: LearningRateSchedule, steps: int, warmup_ratio: float, floor: float = 0.0) -> list[float]:
    optim = OptimConfig(lr=8.0, schedule=schedule, warmup_ratio=warmup_ratio, min_lr_ratio=floor)
    return [learning_rate(optim, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LearningRateSchedule.constant, [4, 8, 8, 8, 8, 8]),
        (LearningRateSchedule.constant_with_warmup, [4, 8, 8, 8, 8, 8]),
        (LearningRateSchedule.linear, [4, 8, 8, 6, 4, 2]),
        (LearningRateSchedule.inverse_sqrt, [4, 8, 8, *(8 * math.sqrt(2 / n) for n in (3, 4, 5))]),
        (
            LearningRateSchedule.cosine,
            [4, 8, 8, 4 * (1 + math.sqrt(0.5)), 4, 4 * (1 - math.sqrt(0.5))],
        ),
    ],
)
def test_rates_of_six_steps_two_of_them_warmup(schedule: LearningRateSchedule, expected: list[float]) -> None:
    assert rates(schedule, 6, 1 / 3) == pytest.approx(expected)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert rates(LearningRateSchedule.linear, 4, 0.0) == [8, 6, 4, 2]


def test_all_warmup_ends_at_the_full_rate() -> None:
    assert rates(LearningRateSchedule.cosine, 4, 1.0) == [2, 4, 6, 8]


@given(st.sampled_from(LearningRateSchedule), st.integers(1, 200), st.floats(0, 1))
def test_rates_rise_then_fall_and_every_step_changes_weights(
    schedule: LearningRateSchedule, steps: int, warmup_ratio: float
) -> None:
    values = rates(schedule, steps, warmup_ratio)
    peak = values.index(max(values))
    assert all(0 < rate <= 8 for rate in values)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


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
@given(steps=st.integers(1, 60), data=st.data())
def test_schedules_are_those_of_transformers_whose_warmup_is_one_step_later(
    schedule: LearningRateSchedule, with_floor: bool, steps: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, steps - 1))  # theirs divide by the steps after it
    floor = FLOORS.get(schedule, 0.0) if with_floor else 0.0
    optim = OptimConfig(lr=8.0, schedule=schedule, warmup_steps=warmup, min_lr_ratio=floor)
    theirs = of_transformers(schedule, floor, warmup, steps)
    for step in range(steps):
        expected = theirs[step + 1] if step < warmup else theirs[step]
        assert learning_rate(optim, step, steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", LearningRateSchedule)
@given(steps=st.integers(1, 40), more=st.integers(0, 40), ratio=st.floats(0, 0.999), data=st.data())
def test_a_run_of_a_ratio_that_is_continued_to_more_steps_has_the_schedule_of_these(
    schedule: LearningRateSchedule, steps: int, more: int, ratio: float, data: st.DataObject
) -> None:
    optim = OptimConfig(lr=8.0, schedule=schedule, warmup_ratio=ratio)
    whole, done = steps + more, data.draw(st.integers(0, steps))
    given_so = SimpleNamespace(warmup_steps=ratio, warmup_ratio=None)
    warmup = TrainingArguments.get_warmup_steps(given_so, whole)
    assume(warmup < whole)
    theirs = of_transformers(schedule, 0.0, warmup, whole)
    for step in range(done, whole):
        expected = theirs[step + 1] if step < warmup else theirs[step]
        assert learning_rate(optim, step, whole) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", LearningRateSchedule)
def test_a_warmup_of_one_step_is_none_and_a_run_of_one_step_has_the_full_rate(
    schedule: LearningRateSchedule,
) -> None:
    with_one = OptimConfig(lr=8.0, schedule=schedule, warmup_steps=1)
    for steps in (1, 5):
        assert learning_rate(with_one, 0, steps) == 8.0
    assert learning_rate(OptimConfig(lr=8.0, schedule=schedule, warmup_steps=0), 0, 1) == 8.0
    assert learning_rate(OptimConfig(lr=8.0, schedule=schedule, warmup_ratio=0.01), 0, 1) == 8.0


@pytest.mark.parametrize("schedule", FLOORS)
def test_a_schedule_falls_to_its_floor_and_not_below(schedule: LearningRateSchedule) -> None:
    values = rates(schedule, 1000, 0.1, FLOOR)
    assert values[-1] == pytest.approx(8.0 * FLOOR, rel=5e-3)
    assert min(values[100:]) > 8.0 * FLOOR


def test_steps_of_warmup_replace_the_ratio_and_do_not_grow_with_the_run() -> None:
    optim = OptimConfig(lr=8.0, schedule=LearningRateSchedule.inverse_sqrt, warmup_steps=4)
    assert [learning_rate(optim, step, 10) for step in range(10)] == [
        learning_rate(optim, step, 1000) for step in range(10)
    ]
    assert learning_rate(optim, 0, 1000) == 2.0


def test_a_warmup_longer_than_the_run_is_an_error() -> None:
    check_warmup(OptimConfig(warmup_steps=5), 5)
    check_warmup(OptimConfig(warmup_ratio=1.0), 5)
    with pytest.raises(ConfigError, match="longer than the run") as error:
        check_warmup(OptimConfig(warmup_steps=6), 5)
    assert error.value.got == "6 of 5 steps"
