"""The powers of the betas that DeepSpeed's CPU Adam keeps are those of an uninterrupted run."""

from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.distributed.slices import _restore_powers
from tests.support.cpu_adam import Powers

BETAS = (0.9, 0.999)


def adam(powers: Powers) -> Any:
    return SimpleNamespace(param_groups=[{"betas": BETAS}], opt_id=0, ds_opt_adam=powers)


def updated(powers: Powers, steps: range) -> list[float]:
    for step in steps:
        powers.adam_update(0, step, 0.0, *BETAS)
    return powers.powers.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("done", [0, 1, 2, 50, 3000])
@pytest.mark.parametrize("before", [0, 3])
def test_they_are_those_of_the_updates_before(done: int, before: int) -> None:
    wanted, restored = Powers(), Powers()
    updated(restored, range(1, before + 1))
    _restore_powers(adam(restored), done)
    assert updated(restored, range(done + 1, done + 3)) == updated(wanted, range(1, done + 3))


def test_plain_powers_would_differ() -> None:
    jumping, steady = Powers(), Powers()
    assert updated(jumping, range(51, 53)) != updated(steady, range(1, 53))
