"""The seconds of the phases add up to those of the step."""

import time

import pytest
import torch

from dpo_dist.insight.metrics.log import PHASES
from dpo_dist.training.step import StepClock

CPU = torch.device("cpu")


class Event:
    """A fake CUDA event; the device reaches it when the host waits for it or for a later one."""

    recorded: list["Event"]

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.is_reached = False

    def record(self) -> None:
        self.recorded.append(self)

    def synchronize(self) -> None:
        for event in self.recorded[: self.recorded.index(self) + 1]:
            event.is_reached = True

    def elapsed_time(self, end: "Event") -> float:
        if not (self.is_reached and end.is_reached):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1.0


def test_phases_add_up_to_the_step() -> None:
    before = time.monotonic()
    clock = StepClock(CPU)
    for _ in range(3):
        clock.enter("forward")
        time.sleep(0.02)
        clock.enter("backward")
        time.sleep(0.03)
    clock.enter("other")
    time.sleep(0.01)
    seconds = clock.stop()
    elapsed = time.monotonic() - before
    assert tuple(seconds) == PHASES
    assert seconds["forward"] >= 0.06
    assert seconds["backward"] >= 0.09
    assert seconds["other"] >= 0.01
    assert seconds["data"] == seconds["reference"] == seconds["optimizer"] == 0
    assert 0.16 <= sum(seconds.values()) <= elapsed


def test_time_outside_of_the_phases_is_other() -> None:
    clock = StepClock(CPU)
    time.sleep(0.02)
    clock.enter("optimizer")
    clock.enter("other")
    time.sleep(0.02)
    assert clock.stop()["other"] >= 0.04


def test_a_step_without_phases_is_all_other() -> None:
    seconds = StepClock(CPU).stop()
    assert sum(seconds.values()) == pytest.approx(seconds["other"])


def test_on_a_gpu_the_last_phase_may_not_have_been_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may be committed after the host has waited for the step."""
    Event.recorded = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    clock.enter("optimizer")
    clock.enter("checkpoint")
    clock.enter("other")
    seconds = clock.stop()
    assert seconds["optimizer"] == seconds["checkpoint"] == 0.001
