"""The learning rate is a function of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.config.schema import LearningRateSchedule, OptimConfig
from dpo_dist.training.learning_rate import learning_rate


def rates(schedule: LearningRateSchedule, steps: int, warmup_ratio: float) -> list[float]:
    optim = OptimConfig(lr=8.0, schedule=schedule, warmup_ratio=warmup_ratio)
    return [learning_rate(optim, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LearningRateSchedule.constant, [4, 8, 8, 8, 8, 8]),
        (LearningRateSchedule.linear, [4, 8, 8, 6, 4, 2]),
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
