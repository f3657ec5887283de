"""The row of several steps, and the clock of the phases of a step."""

from collections.abc import Callable

import pytest
import torch

from dpo_dist.training.clock import PHASES, StepClock
from dpo_dist.training.steps.state import LogWindow

PEAK = 100.0


def step(losses: list[float], grad_norm: float, seconds: float, rate: float = 0.1) -> LogWindow:
    return LogWindow(
        steps=1,
        sums={"loss": sum(losses)},
        counts={"loss": float(len(losses))},
        values={"grad_norm": grad_norm, "time/forward": seconds},
        learning_rate=rate,
        pairs=len(losses),
        tokens=10 * len(losses),
        flops=30.0 * len(losses),
        seconds=seconds,
    )


def test_means_are_over_all_pairs_of_the_window_and_totals_are_totals() -> None:
    window = LogWindow()
    window.add(step([1.0, 2.0, 3.0], grad_norm=4.0, seconds=1.0))
    window.add(step([10.0], grad_norm=2.0, seconds=3.0, rate=0.05))
    assert window.row(PEAK) == {
        "loss": 4.0,
        "grad_norm": 3.0,
        "time/forward": 2.0,
        "learning_rate": 0.05,
        "pairs": 4,
        "tokens": 40,
        "step_seconds": 2.0,
        "pairs_per_second": 1.0,
        "tokens_per_second": 10.0,
        "mfu": pytest.approx(120 / 4 / 100),
    }


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the host's clock, which is at 100 seconds, go on by these seconds."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
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
