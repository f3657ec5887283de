"""Memory: copies of slices in the host's, limits of cgroups, and errors that name the micro-batch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.pack import PackedBatch
from dpo_dist.distributed.checkpoint import slices as host_copy
from dpo_dist.distributed.checkpoint.slices import HostCopy, ModelSlices, Slice
from dpo_dist.distributed.memory import available_memory, return_memory
from dpo_dist.distributed.zero import FrozenEngine, PolicyEngine
from dpo_dist.foundation.errors import DeviceMemoryError
from tests.support.alone import ALONE
from tests.support.packing import pack_unkeyed, random_pairs

CPU = torch.device("cpu")
GIB = 2**30
FAULT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"


def failing(fails_in: str, calls: int, arrangement: Arrangement) -> tuple[Any, Any]:
    """A DeepSpeed engine that runs out of memory after so many calls of the named kind, and a model."""
    engine = Mock(side_effect=lambda batch, _=(): torch.zeros(len(batch.targets)), training=True)
    engine.optimizer.param_groups = []
    call = engine if fails_in == "forward" else getattr(engine, fails_in)
    call.side_effect = [torch.zeros(())] * calls + [torch.OutOfMemoryError(FAULT + "\nand much more text")]
    return engine, SimpleNamespace(arrangement=arrangement)


def policy(fails_in: str, arrangement: Arrangement = Arrangement.packed, calls: int = 0) -> PolicyEngine:
    made: Any = object.__new__(PolicyEngine)
    made._engine, made.model = failing(fails_in, calls, arrangement)
    made._world, made._current, made._leaf_gradients = ALONE, "", None
    return made


def batch(*responses: int) -> PackedBatch:
    """A pair for each number: a prompt of 3 tokens and two responses of so many."""
    return pack_unkeyed(random_pairs([(3, count, count) for count in responses]))


def step(engine: PolicyEngine, *batches: PackedBatch) -> None:
    for number, micro_batch in enumerate(batches, start=1):
        engine.token_logps(micro_batch)
        engine.backward(torch.zeros(()), is_last=number == len(batches))
    engine.step(1e-6)


def error_of(engine: PolicyEngine, *batches: PackedBatch) -> DeviceMemoryError:
    with pytest.raises(DeviceMemoryError) as raised:
        step(engine, *batches)
    assert raised.value.got == FAULT
    return raised.value


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_micro_batch_is_named_with_its_size(where: str) -> None:
    error = error_of(policy(where, calls=1), batch(2), batch(5, 9))
    # Responses without their last tokens: 3 + 4 + 4, and 3 + 8 + 8.
    assert error.where == "a micro-batch: 30 tokens in 2 pairs, the longest of 19"
    assert "trainer.micro_batch_tokens" in error.remedy
    # Two rows of 3 + 4, and two of 3 + 8.
    error = error_of(policy(where, Arrangement.padded), batch(5, 9))
    assert error.where == "a micro-batch: 44 tokens with padding in 2 pairs, the longest of 19"


def test_the_optimizer_step_and_the_reference_have_their_own_remedies() -> None:
    error = error_of(policy("step"), batch(5))
    assert error.where == "the optimizer's step"
    assert "zero3_offload" in error.remedy
    reference: Any = object.__new__(FrozenEngine)
    reference._engine, reference.model = failing("forward", 0, Arrangement.packed)
    with pytest.raises(DeviceMemoryError) as raised:
        reference.token_logps(batch(5, 9))
    assert raised.value.where == "scoring 30 tokens in 2 pairs, the longest of 19"
    assert "trainer.micro_batch_tokens" in raised.value.remedy


def test_freed_memory_between_living_tensors_is_returned() -> None:
    """glibc itself returns the end of its heap only."""
    tensors = [torch.ones(1 << 14) for _ in range(2000)]  # 64 KiB each
    living, before = tensors[::100] + tensors[-1:], psutil.Process().memory_info().rss
    del tensors
    return_memory()
    assert psutil.Process().memory_info().rss < before - (1 << 26)
    assert all(map(torch.Tensor.all, living))


def slices() -> list[ModelSlices]:
    """Slices of the policy in float32 and of a reference in bfloat16, as views of flat tensors."""
    flat = torch.arange(12, dtype=torch.float32)
    policy = [
        Slice("first", (2, 4), 3, {"weight": flat[:5], "exp_avg": -flat[:5]}),
        Slice("second", (7,), 0, {"weight": flat[5:], "exp_avg": -flat[5:]}),
    ]
    frozen = [Slice("first", (3,), 0, {"weight": flat[:3].bfloat16()})]
    return [ModelSlices("engine", policy, 4), ModelSlices("reference", frozen)]


@pytest.mark.parametrize(
    ("available", "others", "has_room"),
    [
        (320, [], True),
        (319, [], False),
        (1000, [("a", 680, 1000)], True),
        (1000, [("a", 681, 1000)], False),
        (320, [("b", 1000, 1000)], True),
        (320, [("b", 1001, 1000)], False),
    ],
)
def test_all_ranks_of_every_host_need_room(
    available: int, others: list[tuple[str, int, int]], has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy, "available_memory", lambda: available)
    world: Any = SimpleNamespace(host="a", gather=lambda value: [value, *others])
    assert HostCopy(CPU).has_room(slices(), world) is has_room, "5 tensors, of at most 64 bytes each"


def test_memory_that_was_taken_before_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "available_memory", lambda: 0)
    copy = HostCopy(CPU)
    assert not copy.has_room(slices(), ALONE)
    copy.fill(slices())
    assert copy.has_room(slices(), ALONE)


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
# Lines of /proc/self/cgroup; folder, names, limit, use and file cache of groups with a limit or a use.
GROUPS = {
    "a job": (
        "5:cpu:/slurm/job_7\n9:memory:/slurm/job_7/step_0\n1:name=systemd:/\n",
        ("memory/slurm/job_7", V1, str(10 * GIB), 6 * GIB, 2 * GIB),
        ("memory/slurm/job_7/step_0", V1, str(2**63 - 4096), 6 * GIB, 2 * GIB),
    ),
    "a service": (
        "0::/job.slice/run.scope\n",
        ("job.slice", V2, str(10 * GIB), 6 * GIB, 2 * GIB),
        ("job.slice/run.scope", V2, "max", GIB, 0),
    ),
    # Its own limit is at the root; the path is that on its host.
    "a container": ("0::/kubepods/pod1/container2\n", (".", V2, str(10 * GIB), 6 * GIB, 2 * GIB)),
    "nothing": ("",),
}


@pytest.mark.parametrize("of", GROUPS)
def test_the_limit_of_a_job_or_container_counts(
    of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(total=1000 * GIB, available=300 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    process_cgroups, root = tmp_path / "process", tmp_path / "cgroup"
    lines, *groups = GROUPS[of]
    process_cgroups.write_text(lines)
    for folder, names, *values in groups:
        group(root / folder, names, *values)  # type: ignore[arg-type]
    # A tenth is kept free: of 10 GiB, 4 of them used; or of the host.
    assert available_memory(root, process_cgroups) == (5 if groups else 200) * GIB
