"""The seconds of the phases add up to those of the step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpo_dist.insight.metrics.log import PHASES
from dpo_dist.training import step
from dpo_dist.training.step import StepClock


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the host's clock go on by these seconds."""
    now = [100.0]
    monkeypatch.setattr(step.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_phases_add_up_to_the_step(wait: Callable[[float], None]) -> None:
    clock = StepClock(torch.device("cpu"))
    wait(1)
    for _ in range(3):
        clock.enter("forward")
        wait(2)
        clock.enter("backward")
        wait(4)
    clock.enter("other")
    wait(8)
    seconds = clock.stop()
    assert tuple(seconds) == PHASES
    assert {name: spent for name, spent in seconds.items() if spent} == {
        "forward": 6,
        "backward": 12,
        "other": 9,
    }


def test_on_a_gpu_the_last_phase_may_not_have_been_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may be committed after the host has waited for the step."""
    recorded: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool):
            self.is_reached = not enable_timing

        def record(self) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            for event in recorded[: recorded.index(self) + 1]:
                event.is_reached = True

        def elapsed_time(self, end: "Event") -> float:
            assert self.is_reached
            assert end.is_reached
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for phase in ("optimizer", "checkpoint", "other"):
        clock.enter(phase)  # type: ignore[arg-type]
    seconds = clock.stop()
    assert seconds["optimizer"] == seconds["checkpoint"] == 0.001
