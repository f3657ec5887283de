"""The row of several steps."""

import pytest

from dpo_dist.training.steps.state import LogWindow

PEAK = 100.0


def step(losses: list[float], grad_norm: float, seconds: float, rate: float = 0.1) -> LogWindow:
    return LogWindow(
        steps=1,
        sums={"loss": sum(losses)},
        counts={"loss": float(len(losses))},
        values={"grad_norm": grad_norm},
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
        "learning_rate": 0.05,
        "pairs": 4,
        "tokens": 40,
        "step_seconds": 2.0,
        "pairs_per_second": 1.0,
        "tokens_per_second": 10.0,
        "mfu": pytest.approx(120 / 4 / 100),
    }
