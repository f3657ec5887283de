"""Steps without an update: which of them end a run, and what the error says."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.training.loop import count, ending_error
from dpo_dist.training.state import Position
from dpo_dist.training.step import StepTotals

MEANS = {"loss": 0.7, "logps/chosen_per_token": -9.0}
INFINITE = StepTotals(sums={}, counts={}, means=MEANS, votes=[], grad_norm=float("inf"))


@pytest.mark.parametrize(
    ("steps", "facts", "said"),
    [
        (9, {"step": 3, "bad_steps": 4, "bad_in_a_row": 4}, "not finite at step 3"),
        (9, {"step": 3, "bad_steps": 3, "bad_in_a_row": 3}, None),
        (9, {"step": 9, "bad_steps": 2, "bad_in_a_row": 2}, "not finite at step 9"),
        (9, {"step": 9, "bad_steps": 1, "bad_in_a_row": 1}, None),
        (9, {"step": 5, "collapsed_in_a_row": 4}, "the policy has collapsed"),
        (9, {"step": 5, "collapsed_in_a_row": 3}, None),
        (9, {"step": 9, "collapsed_in_a_row": 1}, "the policy has collapsed"),
        (3, {"step": 3, "overflows": 3}, "gradients overflow in fp16"),
        (3, {"step": 3, "overflows": 2}, None),
        (4, {"step": 3, "overflows": 2}, None),
        (3, {"step": 3, "overflows": 2, "bad_steps": 1, "bad_in_a_row": 1}, "not finite at step 3"),
    ],
)
def test_a_run_ends_that_learns_nothing(steps: int, facts: dict[str, Any], said: str | None) -> None:
    error = ending_error(INFINITE, Position(**facts), steps, RunFolder(Path("run")), 2.0**13)
    assert (error is None) == (said is None)
    assert error is None or str(said) in error.message


def test_an_overflow_neither_ends_nor_continues_a_row_of_bad_steps() -> None:
    position = Position(step=3, bad_steps=2, bad_in_a_row=2, collapsed_in_a_row=1)
    count(position, INFINITE, overflow=True)
    assert (position.overflows, position.bad_steps, position.bad_in_a_row) == (1, 2, 2)
    count(position, INFINITE, overflow=False)
    assert (position.overflows, position.bad_steps, position.bad_in_a_row) == (1, 3, 3)
