"""Steps without an update: which of them end a run, and what the error says."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.zero import LossScale
from dpo_dist.training.guards import StepGuard, count, is_overflow
from dpo_dist.training.state import Position
from dpo_dist.training.step import StepTotals

INFINITE = StepTotals(sums={}, counts={}, means={"loss": 0.7}, votes=[], grad_norm=float("inf"))


def guard(steps: int) -> StepGuard:
    parts: Any = SimpleNamespace(
        sampler=SimpleNamespace(steps=steps), loss_scale=LossScale(2.0**13), console=None
    )
    return StepGuard(RunConfig(), parts, parts, parts, parts, parts)


def test_a_run_of_overflows_only_says_what_they_are() -> None:
    error = guard(3).end(INFINITE, Position(step=3, overflows=3))
    assert error is not None
    assert "overflow in fp16" in error.message
    assert (error.where, "optim.lr" in error.remedy) == ("model.dtype", False)
    assert "3 overflows" in error.got
    assert "8192" in error.got


@pytest.mark.parametrize("steps", [3, 4])
def test_overflows_before_the_end_or_beside_updates_end_no_run(steps: int) -> None:
    assert guard(steps).end(INFINITE, Position(step=3, overflows=2)) is None


def test_an_overflow_neither_ends_nor_continues_a_row_of_bad_steps() -> None:
    position = Position(step=3, bad_steps=2, bad_in_a_row=2, collapsed_in_a_row=1)
    count(position, INFINITE, overflow=True)
    assert (position.overflows, position.bad_steps, position.bad_in_a_row) == (1, 2, 2)
    count(position, INFINITE, overflow=False)
    assert (position.overflows, position.bad_steps, position.bad_in_a_row) == (1, 3, 3)


def test_a_loss_that_is_not_finite_is_no_overflow() -> None:
    policy: Any = SimpleNamespace(has_overflowed=True)
    assert is_overflow(INFINITE, policy)
    assert not is_overflow(replace(INFINITE, means={"loss": float("nan")}), policy)
    policy.has_overflowed = False
    assert not is_overflow(INFINITE, policy)


def test_bad_steps_at_the_end_of_a_run_without_updates_name_their_pairs() -> None:
    error = guard(3).end(INFINITE, Position(step=3, overflows=2, bad_steps=1, bad_in_a_row=1))
    assert error is not None
    assert "bad-step" in error.where or "pairs of this step" in error.where
