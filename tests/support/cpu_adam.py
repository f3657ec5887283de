"""DeepSpeed's CPU Adam in PyTorch: a process would compile the kernel for a minute first."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor

from dpo_dist.distributed.processes.world import World

T = TypeVar("T")


def with_cpu_adam(scenario: Callable[[World, Path], T], world: World, folder: Path) -> T:
    """Run a scenario of `run_ranks` with `CPUAdamInPyTorch`."""
    stand_in_for_cpu_adam()
    return scenario(world, folder)


def stand_in_for_cpu_adam() -> None:
    """Until this process ends, CPU Adam is `CPUAdamInPyTorch`."""
    mock.patch.object(CPUAdamBuilder, "load", return_value=CPUAdamInPyTorch()).start()


class CPUAdamInPyTorch:
    """The functions of the compiled kernel that DeepSpeed calls; powers of betas are float32, as there."""

    def __init__(self) -> None:
        self._powers: dict[int, tuple[int, Any]] = {}
        """By optimizer: of which step, and the powers."""

    def create_adam(self, number: int, *_defaults: Any) -> None:
        """Create an optimizer; `adam_update` gets its settings again."""
        self._powers[number] = 0, np.ones(2, np.float32)

    def destroy_adam(self, number: int) -> None:
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
        last, powers = self._powers[number]
        betas = np.array([beta1, beta2], np.float32)
        if step == last + 1:
            powers = powers * betas
        elif step != last:
            powers = (betas.astype(np.float64) ** step).astype(np.float32)
        self._powers[number] = step, powers
        power1, power2 = map(float, powers)
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_(math.sqrt(1 - power2) or 1.0).add_(eps)
        weight.mul_(1 - rate * decay).addcdiv_(mean, root, value=-rate / ((1 - power1) or 1.0))
