"""DeepSpeed's CPU Adam: compiled, or in PyTorch where a process would compile it for a minute first."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor
from torch.utils.cpp_extension import _get_build_directory

from dpo_dist.distributed.world import World

T = TypeVar("T")


def is_built() -> bool:
    """Return whether a process of this environment loads CPU Adam without compiling it."""
    try:
        folder = Path(_get_build_directory("cpu_adam", False))
    except OSError:
        return False
    if not (folder / "cpu_adam.so").is_file() or (folder / "lock").exists():
        return False
    return f"{Path(torch.__file__).parent}/include" in (folder / "build.ninja").read_text()


def with_cpu_adam(scenario: Callable[[World, Path], T], world: World, folder: Path) -> T:
    """Run a scenario of `run_ranks` with CPU Adam, compiled if it `is_built`."""
    with _cpu_adam():
        return scenario(world, folder)


@contextlib.contextmanager
def _cpu_adam() -> Iterator[None]:
    if is_built():
        yield
        return
    with mock.patch.object(CPUAdamBuilder, "load", return_value=CPUAdamInPyTorch()):
        yield


class Powers:
    """Powers of the betas as DeepSpeed's `csrc/includes/cpu_adam.h` updates them, in float32."""

    def __init__(self) -> None:
        self.step, self.powers, self.calls = 0, np.ones(2, np.float32), 0

    def adam_update(self, _number: int, step: int, _rate: float, *betas: Any) -> None:
        """Update them for the step `step`; other arguments as of the kernel."""
        self.calls += 1
        factors = np.array(betas[:2], np.float32)
        if step == self.step + 1:
            self.powers = self.powers * factors
        elif step != self.step:
            self.powers = (factors.astype(np.float64) ** step).astype(np.float32)
        self.step = step


class CPUAdamInPyTorch:
    """The functions of the compiled kernel that DeepSpeed calls."""

    def __init__(self) -> None:
        self._powers: dict[int, Powers] = {}

    def create_adam(self, number: int, *_defaults: Any) -> None:
        """Create an optimizer; `adam_update` gets its settings again."""
        self._powers[number] = Powers()

    def destroy_adam(self, number: int) -> None:
        """Delete an optimizer."""
        del self._powers[number]

    def adam_update(
        self,
        number: int,
        step: int,
        rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        _bias_correction: bool,
        weight: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
    ) -> None:
        """Update a weight and its moments in place (AdamW, arXiv:1711.05101)."""
        self._powers[number].adam_update(number, step, rate, beta1, beta2)
        power1, power2 = map(float, self._powers[number].powers)
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_(math.sqrt(1 - power2) or 1.0).add_(eps)
        weight.mul_(1 - rate * decay).addcdiv_(mean, root, value=-rate / ((1 - power1) or 1.0))
