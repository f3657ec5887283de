"""No kernel makes the host wait in a step, which is timed afterwards.

What waits in whole runs, `tests/simulated_cuda/test_waits.py` shows; only a GPU knows all kernels that do.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.model.load import load_packed
from dpo_dist.objective.losses import BatchFacts
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.step import Objective, StepClock
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")


def test_forward_and_backward_do_not_make_the_host_wait(tmp_path: Path) -> None:
    folder = write_model(tmp_path, hidden_size=256)
    model = load_packed(folder, ModelConfig(dtype=Dtype.bf16), 256, CUDA).to(CUDA)
    policy: Any = type("Model", (), {"token_logps": staticmethod(model)})
    objective = Objective(LossConfig(kind=LossKind.simpo), ReferenceProvider())
    batch = pack_unkeyed(random_pairs([(70, 50, 90), (1, 1, 4), (12, 3, 1)])).pinned()

    def step() -> None:
        (pairs,) = objective.scored(policy, [batch], BatchFacts(1.0), CUDA)
        loss, _ = objective.measure(pairs)
        loss.backward()  # type: ignore[no-untyped-call]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_phase_lasts_as_long_as_its_work_on_the_device() -> None:
    clock = StepClock(CUDA)
    clock.enter("forward")
    torch.cuda._sleep(100_000_000)  # cycles, of at most 5 GHz
    clock.enter("optimizer")
    clock.enter("other")
    torch.cuda.synchronize()
    seconds = clock.stop()
    assert seconds["forward"] >= 0.02
    assert seconds["optimizer"] < seconds["forward"]
    assert seconds["other"] >= 0
