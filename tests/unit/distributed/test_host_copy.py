"""Copies of slices in host memory: exact, in memory that is reused, and only where there is room."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dpo_dist.distributed import slices as host_copy
from dpo_dist.distributed.memory import available_memory
from dpo_dist.distributed.slices import HostCopy, ModelSlices, Slice
from tests.support.alone import ALONE

CPU = torch.device("cpu")
GIB = 2**30


def slices(value: float, *, with_states: bool = True) -> list[ModelSlices]:
    """Slices of the policy in float32 and of a reference in bfloat16, as views of flat tensors."""
    flat = torch.arange(12, dtype=torch.float32) + value
    policy = [
        Slice("first", (2, 4), 3, {"weight": flat[:5]} | ({"exp_avg": -flat[:5]} if with_states else {})),
        Slice("second", (7,), 0, {"weight": flat[5:]} | ({"exp_avg": -flat[5:]} if with_states else {})),
    ]
    frozen = [Slice("first", (3,), 0, {"weight": flat[:3].bfloat16()})]
    return [ModelSlices("engine", policy, 4), ModelSlices("reference", frozen)]


def listed(models: list[ModelSlices]) -> list[Any]:
    return [
        (model.folder, model.step, own.name, own.shape, own.start, part, tensor.dtype, tensor.tolist())
        for model in models
        for own in model.slices
        for part, tensor in own.parts.items()
    ]


def test_copies_are_exact_and_do_not_change_with_the_tensors() -> None:
    own = slices(1.0)
    copied, wanted = HostCopy(CPU).of(own), listed(slices(1.0))
    for model in own:
        for each in model.slices:
            for tensor in each.parts.values():
                tensor.zero_()
    assert listed(copied) == wanted


def test_memory_is_reused_and_grows_once_there_are_optimizer_states() -> None:
    copy, places = HostCopy(CPU), []
    for value, with_states in ((1.0, False), (2.0, True), (3.0, True), (4.0, False)):
        copied = copy.of(slices(value, with_states=with_states))
        assert listed(copied) == listed(slices(value, with_states=with_states))
        places.append(copied[0].slices[0].parts["weight"].data_ptr())
    assert places[1] == places[2] == places[3]


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
    assert HostCopy(CPU).has_room(slices(0.0), world) is has_room, "5 tensors, of at most 64 bytes each"


def test_memory_that_was_taken_before_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "available_memory", lambda: 0)
    copy = HostCopy(CPU)
    assert not copy.has_room(slices(0.0), ALONE)
    copy.of(slices(0.0))
    assert copy.has_room(slices(0.0), ALONE)


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
    own, root = tmp_path / "own", tmp_path / "cgroup"
    lines, *groups = GROUPS[of]
    own.write_text(lines)
    for folder, names, *values in groups:
        group(root / folder, names, *values)  # type: ignore[arg-type]
    # A tenth is kept free: of 10 GiB, 4 of them used; or of the host.
    assert available_memory(root, own) == (5 if groups else 200) * GIB
