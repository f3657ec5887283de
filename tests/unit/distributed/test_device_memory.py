"""Device memory: released, measured, and out-of-memory errors that name the micro-batch and a remedy."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpo_dist.batching.pack import PackedBatch, Sequences, pack
from dpo_dist.batching.plan import Arrangement
from dpo_dist.distributed.memory import peak_memory_bytes, reset_peak_memory
from dpo_dist.distributed.zero import FrozenEngine, PolicyEngine
from dpo_dist.foundation.errors import DeviceMemoryError
from dpo_dist.objective.token_logps import Statistic

FAULT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"


class Engine:
    """Fake DeepSpeed engine that runs out of memory in the named call."""

    training = True

    def __init__(self, fails_in: str, calls: int = 0):
        self._fails_in, self._calls = fails_in, calls
        self.optimizer = type("Optimizer", (), {"param_groups": []})

    def _reach(self, what: str) -> None:
        if what == self._fails_in:
            self._calls -= 1
            if self._calls < 0:
                raise torch.OutOfMemoryError(FAULT + "\nand much more text")

    def __call__(self, batch: PackedBatch, _statistics: Sequence[Statistic] = ()) -> torch.Tensor:
        self._reach("forward")
        return torch.zeros(len(batch.targets))

    def backward(self, _loss: torch.Tensor) -> None:
        self._reach("backward")

    def step(self) -> None:
        self._reach("step")

    def set_gradient_accumulation_boundary(self, _is_last: bool) -> None:
        pass


def policy(engine: Engine, arrangement: Arrangement = Arrangement.packed) -> PolicyEngine:
    made: Any = object.__new__(PolicyEngine)
    made.model = SimpleNamespace(arrangement=arrangement)
    made._engine, made._world = engine, type("World", (), {"size": 1})
    made._backwards, made._current = 0, ("", "")
    return made


def batch(*responses: int) -> PackedBatch:
    """A pair for each number: a prompt of 3 tokens and two responses of so many."""
    ids = [np.arange(count, dtype=np.int32) for count in (3, *responses)]
    return pack(
        [Sequences(ids[0], (response, response)) for response in ids[1:]],
        np.zeros((2 * len(responses), 2), dtype=np.uint64),
    )


def error_of(work: Callable[[], Any]) -> DeviceMemoryError:
    with pytest.raises(DeviceMemoryError) as raised:
        work()
    return raised.value


def one_step(engine: PolicyEngine, *batches: PackedBatch) -> None:
    for number, micro_batch in enumerate(batches, start=1):
        engine.token_logps(micro_batch)
        engine.backward(torch.zeros(()), is_last=number == len(batches))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_micro_batch_is_named_with_its_size(where: str) -> None:
    engine = policy(Engine(where, calls=3))
    one_step(engine, batch(2), batch(2))
    error = error_of(lambda: one_step(engine, batch(2), batch(5, 9)))
    # Responses without their last tokens: 3 + 4 + 4, and 3 + 8 + 8.
    assert error.where == "micro-batch 2 of a step: 30 tokens in 2 pairs, the longest of 19"
    assert error.got == FAULT
    assert "trainer.micro_batch_tokens" in error.remedy
    assert "model.gradient_checkpointing" in error.remedy


@pytest.mark.parametrize(
    ("arrangement", "can_share"), [(Arrangement.packed, True), (Arrangement.padded, False)]
)
def test_a_single_pair_needs_a_shorter_max_length(arrangement: Arrangement, can_share: bool) -> None:
    error = error_of(lambda: one_step(policy(Engine("forward"), arrangement), batch(5)))
    assert "data.max_length" in error.remedy
    assert ("sequence_parallel" in error.remedy) is can_share
    assert "micro_batch_tokens" not in error.remedy


def test_rows_are_named_with_their_padding() -> None:
    # Two rows of 3 + 4, and two of 3 + 8.
    error = error_of(lambda: one_step(policy(Engine("forward"), Arrangement.padded), batch(5, 9)))
    assert error.where == "micro-batch 1 of a step: 44 tokens with padding in 2 pairs, the longest of 19"


def test_the_optimizer_step_is_named() -> None:
    error = error_of(lambda: policy(Engine("step")).step(1e-6))
    assert error.where == "the optimizer's step"
    assert "zero3_offload" in error.remedy


def test_the_reference_has_its_own_remedy() -> None:
    reference: Any = object.__new__(FrozenEngine)
    reference._engine, reference.model = Engine("forward"), SimpleNamespace(arrangement=Arrangement.packed)
    error = error_of(lambda: reference.token_logps(batch(5, 9)))
    assert error.where == "scoring 30 tokens in 2 pairs, the longest of 19"
    assert "trainer.micro_batch_tokens" in error.remedy


def test_a_reset_peak_counts_from_there() -> None:
    cpu = torch.device("cpu")
    block = np.ones(1 << 27, dtype=np.uint8)
    assert len(block) < peak_memory_bytes(cpu)
    del block
    before = peak_memory_bytes(cpu)
    reset_peak_memory(cpu)
    assert peak_memory_bytes(cpu) < before - (1 << 26)
