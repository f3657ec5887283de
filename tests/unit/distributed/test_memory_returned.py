"""What a freed model held goes back to the host and the device, and the peak counts from there."""

import numpy as np
import pytest
import torch

from dpo_dist.distributed.engine import return_memory
from dpo_dist.distributed.world import World
from dpo_dist.training.step_timer import peak_memory_bytes, reset_peak_memory


class Alone(World):
    """One process without a process group."""

    def gather(self, value: int) -> list[int]:
        return [value]


def test_pinned_memory_of_the_host_is_returned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: returned.append("device"))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: returned.append("host"), raising=False)
    return_memory()
    assert returned == ["device", "host"]
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")
    return_memory()
    assert returned == ["device", "host", "device"]


def test_a_peak_before_the_reset_does_not_count() -> None:
    world = Alone(None, 0, 1, torch.device("cpu"), ())
    held = np.ones(1 << 27, dtype=np.uint8)
    assert len(held) < peak_memory_bytes(world)
    del held
    before = peak_memory_bytes(world)
    reset_peak_memory(world)
    assert peak_memory_bytes(world) < before - (1 << 26)
