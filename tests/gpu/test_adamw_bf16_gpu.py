"""AdamW in bf16 has the bits of a CPU on a GPU, whole and in parts, compiled and not; and its speed."""

import pytest
import torch
from torch import Tensor

from dpo_dist.distributed.adamw_bf16 import FIRST, SECOND
from tests.gpu.test_step_gpu import CPU, CUDA, without_waits
from tests.unit.distributed.test_adamw_bf16 import Alone, weights_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

COUNT = 2**22 + 1001  # two pieces
CUTS = (1, 3_000_000, 2**22 + 7)


def optimizer_on(device: torch.device, *cuts: int, compiles: bool = False) -> tuple[Alone, list[Tensor]]:
    """The optimizer of a whole weight or of its parts, and gradients of three steps."""
    start, gradients = weights_and_gradients(COUNT, 3)
    optimizer = Alone(start.to(device), cuts, lr=1e-3, decay=0.1, compiles=compiles)
    return optimizer, [gradient.to(device) for gradient in gradients]


@pytest.mark.parametrize("compiles", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("cuts", [(), CUTS], ids=["whole", "parts"])
def test_a_gpu_has_the_bits_of_a_cpu_and_the_host_does_not_wait(
    cuts: tuple[int, ...], compiles: bool
) -> None:
    expected, gradients = optimizer_on(CPU)
    found, on_device = optimizer_on(CUDA, *cuts, compiles=compiles)
    for gradient in gradients:
        expected.step(gradient)
    found.step(on_device[0])
    without_waits(lambda: [found.step(gradient) for gradient in on_device[1:]])
    for state in (None, FIRST, SECOND):
        assert torch.equal(found.whole(state).cpu(), expected.whole(state)), state


def test_a_compiled_update_is_faster() -> None:
    """By the bytes that move it should be so by ten times."""
    seconds = []
    for compiles in (False, True):
        optimizer, gradients = optimizer_on(CUDA, compiles=compiles)
        optimizer.step(gradients[0])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            optimizer.step(gradients[1])
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    print(f"ns a weight: {[second / 10 / COUNT * 1e9 for second in seconds]}")
    assert seconds[1] < seconds[0] / 2
