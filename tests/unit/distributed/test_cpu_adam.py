"""The powers of the betas that DeepSpeed's CPU Adam keeps are those of an uninterrupted run."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo_dist.distributed.slices import _restore_powers

BETAS = (0.9, 0.999)


class Powers:
    """Powers of the betas as DeepSpeed's `csrc/includes/cpu_adam.h` updates them."""

    def __init__(self) -> None:
        self.step, self.powers, self.calls = 0, np.ones(2, np.float32), 0

    def adam_update(self, _number: int, step: int, _rate: float, *betas: Any) -> None:
        self.calls += 1
        factors = np.array(betas[:2], np.float32)
        if step == self.step + 1:
            self.powers = self.powers * factors
        elif step != self.step:
            self.powers = (factors.astype(np.float64) ** step).astype(np.float32)
        self.step = step


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


def test_powers_that_have_vanished_are_not_restored() -> None:
    forged = Powers()
    _restore_powers(adam(forged), 2**47)
    assert forged.calls == 0
