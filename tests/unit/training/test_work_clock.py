"""The time of a run by kind of work: every moment once, over all starts."""

import contextlib

import pytest

from dpo_dist.training import state
from dpo_dist.training.state import WorkClock


class Time:
    """A clock that a test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(state, "time", time)
    return time


def test_every_moment_of_a_start_is_one_kind_of_work(time: Time) -> None:
    clock = WorkClock(2, 97.0)
    with clock.of("samples"):
        time.now += 1.0
    time.now += 2.0
    clock.enter("other")
    with contextlib.suppress(KeyError), clock.of("evaluation"):
        time.now += 4.0
        with clock.of("samples"):
            time.now += 8.0
        time.now += 16.0
        raise KeyError
    time.now += 32.0
    spent = clock.read()
    assert spent.seconds == {"starting": 5.0, "samples": 9.0, "evaluation": 20.0, "other": 32.0}
    assert spent.device_seconds == 2 * (time.now - 97.0)
