"""The seconds of the phases add up to those of the step."""

from collections.abc import Callable

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
