"""The time of a run by kind of work: every moment once, over all starts."""

import contextlib
import json
from dataclasses import asdict

import pytest

from dpo_dist.training import state
from dpo_dist.training.reference import over_starts
from dpo_dist.training.state import Position, WorkClock, WorkTime


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


def test_a_resumed_run_continues_the_time_of_the_starts_before(time: Time) -> None:
    former = Position(work=WorkTime({"starting": 10.0, "training": 90.0}, 800.0))
    position = Position.of(json.loads(json.dumps(asdict(former))))
    clock = WorkClock(2, 99.0)
    clock.resume(position.work)
    clock.enter("training")
    time.now += 5.0
    assert clock.read() is position.work
    assert position.work == WorkTime({"starting": 11.0, "training": 95.0}, 800.0 + 2 * 6.0)


FIRST = {
    "mode": "cached",
    "hits": 10,
    "computed": 90,
    "seconds": 9.0,
    "damaged": ["a"],
    "drift": {"mean_token_drift": 0.02},
    "peak_memory_bytes": 500,
}
LATER = {
    "mode": "cached",
    "hits": 100,
    "computed": 0,
    "seconds": 0.0,
    "damaged": ["b"],
    "served": {"own": 100},
}


def test_the_report_of_the_reference_is_that_of_all_starts() -> None:
    once = over_starts(FIRST, LATER)
    assert once == {**FIRST, "damaged": ["a", "b"], "served": {"own": 100}}
    lost = {**LATER, "hits": 60, "computed": 40, "seconds": 4.0, "drift": {"mean_token_drift": 0.0}}
    twice = over_starts(once, {**lost, "peak_memory_bytes": 700})
    assert (twice["hits"], twice["computed"], twice["seconds"]) == (10, 130, 13.0)
    assert twice["drift"] == FIRST["drift"]
    assert twice["peak_memory_bytes"] == 700
