"""Checkpoints of several ranks: complete or absent, and exact (law L4)."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dpo_dist.config.losses import BcoDelta, BcoPairOptions, LossConfig, LossKind, SyncReferenceConfig
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    Dtype,
    Offload,
    OptimConfig,
    ParallelismConfig,
    ParallelismKind,
    Quantization,
    ReferenceConfig,
)
from dpo_dist.distributed.checkpoint import saver as checkpoint
from dpo_dist.distributed.checkpoint import slices
from dpo_dist.distributed.checkpoint.saver import (
    CheckpointSaver,
    SavedSlices,
    latest_checkpoint,
)
from dpo_dist.distributed.checkpoint.slices import SHARDS, Entries, SlicedWeights
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.objective.metrics import MetricSums
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.steps.state import Position
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import Assets, load_policy, load_reference, one_step
from tests.support.cpu_adam import with_cpu_adam
from tests.support.full_disk import full_disk
from tests.support.precision import NEEDS_FP16
from tests.support.ranks import OPTIM, run_ranks

SYNC = SyncReferenceConfig(1, 0.5)
OBJECTIVE = Objective(LossConfig(kind=LossKind.simpo, beta=2.0), ReferenceProvider())


@dataclass(frozen=True)
class Policy:
    """What is trained; with `loss`, one with running means, and a reference that follows the policy."""

    adapter: AdapterConfig | None = None
    quantization: Quantization | None = None
    loss: LossConfig | None = None
    optim: OptimConfig = OPTIM


class Trainer:
    """A policy with its steps, and copies of this rank's shards of it."""

    def __init__(
        self,
        assets: Assets,
        world: World,
        adapter: AdapterConfig | None = None,
        dtype: Dtype = Dtype.fp32,
        quantization: Quantization | None = None,
        loss: LossConfig | None = None,
        ema_decay: float | None = None,
        optim: OptimConfig = OPTIM,
        sync: SyncReferenceConfig = SYNC,
        offload: Offload = Offload.none,
    ):
        model_config = assets.config(assets.policy).model
        config = replace(model_config, adapter=adapter, dtype=dtype, quantization=quantization)
        self.objective, self.sync = OBJECTIVE, None
        if loss is not None:
            placed = assets.config(assets.policy, ReferenceConfig(offload=offload), dtype)
            self.reference = load_reference(assets.reference, placed, world)
            self.objective = Objective(loss, ReferenceProvider(engine=self.reference))
        self.policy = load_policy(config, world, optim, ema_decay=ema_decay)
        if loss is not None:
            self.sync = ReferenceSync(self.reference, self.policy, sync, world)
        self.dataset, self.position = assets.dataset(), Position()
        self.world = world

    def step(self, rows: Sequence[int]) -> float:
        world = self.world
        position = self.position
        sums, norm = one_step(
            self.policy, self.objective, self.dataset, rows, 256, world, running=position.running
        )
        means = MetricSums(sums.names, self.world.sum_replicas(sums.values)).means()
        position.add_running(self.objective.loss, means, len(rows))
        position.step += 1
        if self.sync is not None:
            self.sync.after_step(position.step)
        return norm.item()

    def save(self, root: Path, step: int, keep_last: int = 2, *, is_last: bool = False) -> None:
        saver = self.saver(root, keep_last)
        saver.save(step, {**asdict(self.position), "step": step}, is_last=is_last)
        saver.commit()

    def saver(self, root: Path, keep_last: int = 2) -> CheckpointSaver:
        return CheckpointSaver(root, keep_last, self.parts(), self.world)

    def parts(self) -> list[SlicedWeights]:
        return [self.policy] if self.sync is None else [self.policy, self.sync]

    def held(self) -> list[Tensor]:
        """Copies of this rank's weights, master weights and optimizer states."""
        engine = self.policy._engine
        weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        states = [
            tensor
            for group in engine.optimizer.optimizer.param_groups
            for parameter in group["params"]
            for tensor in (parameter, *engine.optimizer.optimizer.state[parameter].values())
            if isinstance(tensor, Tensor)
        ]
        return [tensor.detach().clone() for tensor in (*weights, *states)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


@contextlib.contextmanager
def slow_disk() -> Iterator[None]:
    """Nothing of a checkpoint is written before the end of the block."""
    may_write, write = threading.Event(), checkpoint.write_slices

    def wait_and_write(*arguments: Any) -> Entries:
        assert may_write.wait(60)
        return write(*arguments)

    with mock.patch.object(checkpoint, "write_slices", wait_and_write):
        try:
            yield
        finally:
            may_write.set()


def save_go_on_and_return(
    assets: Assets, root: Path, policy: Policy, dtype: Dtype, world: World, _folder: Path
) -> dict[str, Any]:
    trainer = Trainer(assets, world, policy.adapter, dtype, optim=policy.optim)
    trainer.step([0, 1, 2])
    trainer.step([3, 4, 5])
    saved = trainer.held()
    with slow_disk():
        saver, running = trainer.saver(root), {"reward": 0.5}
        saver.save(2, {"step": 2, "running": running})
        assert not saver.is_written
        after_save = trainer.held()
        norms = [trainer.step([6, 7]), trainer.step([8, 9, 10])]
        running["reward"] = 0.7
        end = trainer.held()
    saver.commit()
    found = latest_checkpoint(root, world)
    assert found is not None
    trainer.policy.load_shards(found.folder)
    returned = trainer.held()
    return {
        "folder": found.folder.name,
        "state": found.state,
        "saving changes nothing": same(saved, after_save),
        "steps change it": not same(saved, end),
        "loaded is saved": same(saved, returned),
        "norms": norms == [trainer.step([6, 7]), trainer.step([8, 9, 10])],
        "end": same(end, trainer.held()),
    }


OFFLOADED = ParallelismConfig(ParallelismKind.zero2, offload_optimizer=Offload.cpu)
FULL = Policy()
DORA = Policy(AdapterConfig(r=2, alpha=4, variant=AdapterVariant.dora))
EXACT = [
    (ParallelismKind.ddp, Dtype.fp32, FULL),
    (ParallelismKind.ddp, Dtype.bf16, DORA),
    (ParallelismKind.zero2, Dtype.fp32, DORA),
    (ParallelismKind.zero2, Dtype.bf16, FULL),
    (ParallelismKind.zero2, Dtype.fp16, FULL),
    (ParallelismKind.zero3, Dtype.fp32, FULL),
    (ParallelismKind.zero3, Dtype.bf16, DORA),
    (ParallelismKind.zero3, Dtype.fp16, FULL),
    (OFFLOADED, Dtype.bf16, FULL),
]


@pytest.mark.parametrize(
    ("kind", "dtype", "policy"),
    [pytest.param(*case, marks=NEEDS_FP16 if case[1] is Dtype.fp16 else ()) for case in EXACT],
)
def test_a_loaded_checkpoint_is_the_saved_state_bit_for_bit(
    kind: ParallelismKind | ParallelismConfig,
    dtype: Dtype,
    policy: Policy,
    assets: Assets,
    tmp_path: Path,
) -> None:
    root = tmp_path / "checkpoints"
    scenario = partial(with_cpu_adam, partial(save_go_on_and_return, assets, root, policy, dtype))
    for result in run_ranks(scenario, 2, tmp_path / "ranks", kind, dtype):
        assert result.pop("folder") == "step-000002"
        assert result.pop("state") == {"step": 2, "running": {"reward": 0.5}}
        assert result == dict.fromkeys(result, True)
    if policy.adapter is not None:  # without the base
        saved = SavedSlices.find(root / "step-000002", SHARDS)
        assert {name.rpartition(".lora_")[1] for name in saved.shapes} == {".lora_"}
        written = sum(file.stat().st_size for file in root.rglob("*.safetensors"))
        assert written < (assets.policy / "model.safetensors").stat().st_size


def train_with_bad_step(assets: Assets, world: World, _folder: Path) -> list[list[float]]:
    """The gradient norms of the steps beside a bad one, without it and with it."""
    found = []
    for is_bad in (False, True):
        trainer = Trainer(assets, world, dtype=Dtype.bf16)
        norms = [trainer.step([0, 1, 2])]
        if is_bad:
            backward = trainer.policy.backward
            with mock.patch.object(
                trainer.policy, "backward", lambda loss, is_last, do=backward: do(loss * torch.nan, is_last)
            ):
                assert trainer.step([3, 4, 5]) == torch.inf
        found.append([*norms, trainer.step([6, 7]), trainer.step([8, 9, 10])])
        trainer.policy.free()
    return found


def test_a_bad_step_of_an_offloaded_optimizer_is_lost_alone(assets: Assets, tmp_path: Path) -> None:
    scenario = partial(with_cpu_adam, partial(train_with_bad_step, assets))
    ((plain, with_bad),) = run_ranks(scenario, 1, tmp_path / "ranks", OFFLOADED, Dtype.bf16)
    assert with_bad == plain


def save_without_room(assets: Assets, root: Path, world: World, _folder: Path) -> dict[str, Any]:
    trainer = Trainer(assets, world)
    trainer.save(root, 1)
    trainer.step([0, 1, 2])
    results: dict[str, Any] = {}

    def save() -> None:
        try:
            trainer.save(root, 2)
        except CheckpointError as error:
            results["error"] = str(error)

    if world.rank == 1:
        with full_disk(40_000):
            save()
    else:
        save()
    world.barrier()
    found = latest_checkpoint(root, world)
    results["then"] = [found and found.folder.name, (root / "latest").read_text()]
    world.barrier()
    trainer.step([3, 4, 5])
    trainer.save(root, 3)
    results["left"] = sorted(path.name for path in root.iterdir())
    return results


def test_a_full_disk_on_one_rank_is_one_error_on_all_and_keeps_checkpoints(
    assets: Assets, tmp_path: Path
) -> None:
    results = run_ranks(partial(save_without_room, assets, tmp_path / "checkpoints"), 2, tmp_path / "ranks")
    assert results[0] == results[1]
    assert "a checkpoint cannot be written" in results[0]["error"]
    assert "free disk space" in results[0]["error"]
    assert results[0]["then"] == ["step-000001", "step-000001"]
    assert results[0]["left"] == ["latest", "step-000001", "step-000003"]


def go_on(
    assets: Assets, root: Path, policy: Policy, dtype: Dtype, world: World, _folder: Path
) -> list[float]:
    """Train two steps and save, or load that checkpoint and save it again as step 3; then train two more.

    Return the gradient norms of the two, and the running means after them.
    """
    mock.patch.object(slices, "_FILE_BYTES", 2**14).start()  # several files for each rank
    trainer = Trainer(
        assets, world, policy.adapter, dtype, policy.quantization, policy.loss, optim=policy.optim
    )
    found = latest_checkpoint(root, world)
    if found is None:
        trainer.step([0, 1, 2])
        trainer.step([3, 4, 5])
        trainer.save(root, 2)
    else:
        for part in trainer.parts():
            part.load_shards(found.folder)
        trainer.position = Position.from_state(found.state)
        trainer.save(root, 3)
    norms = [trainer.step([6, 7]), trainer.step([8, 9, 10])]
    running = trainer.position.running
    return [*norms, running.margin or 0.0, running.reward]


DDP, ZERO2, ZERO3 = map(
    ParallelismConfig, (ParallelismKind.ddp, ParallelismKind.zero2, ParallelismKind.zero3)
)
LORA = Policy(AdapterConfig(r=2, alpha=4))
IN_GROUPS = replace(ZERO3, shard_size=2)
SHARED_BY_2, SHARED_BY_4 = replace(ZERO2, sequence_parallel=2), replace(ZERO3, sequence_parallel=4)
NF4_LORA = replace(LORA, quantization=Quantization.nf4)
BCO = Policy(loss=LossConfig(kind=LossKind.bco_pair, options=BcoPairOptions(BcoDelta.running_mean)))
FP32, BF16 = Dtype.fp32, Dtype.bf16
WORLDS = {
    "full in bf16, 3 with zero3 to 2 with zero2": (FULL, BF16, 3, ZERO3, 2, ZERO2),
    "bco and a reference that follows, 2 with zero3 to zero2": (BCO, FP32, 2, ZERO3, 2, ZERO2),
    "a reference that follows, 2 groups of 2 to 3 with zero3": (BCO, FP32, 4, IN_GROUPS, 3, ZERO3),
    "DoRA in bf16, 2 with zero3 to 2 groups of 2": (DORA, BF16, 2, ZERO3, 4, IN_GROUPS),
    "DoRA, 1 to 3 with zero2": (DORA, FP32, 1, ZERO2, 3, ZERO2),
    "LoRA, 2 with ddp to 3 with zero2": (LORA, FP32, 2, DDP, 3, ZERO2),
    "LoRA on nf4 in fp16, 1 to 2": (NF4_LORA, Dtype.fp16, 1, DDP, 2, DDP),
    "full in bf16, 2 times 2 that share tokens to 4 that do": (FULL, BF16, 4, SHARED_BY_2, 4, SHARED_BY_4),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=NEEDS_FP16 if "fp16" in case else ()) for case in WORLDS]
)
def test_another_world_reads_the_same_weights_and_states(case: str, assets: Assets, tmp_path: Path) -> None:
    policy, dtype, ranks, kind, other_ranks, other_kind = WORLDS[case]
    if policy.quantization is not None:
        pytest.importorskip("bitsandbytes")
        assets = replace(assets, policy=assets.wide)
    root = tmp_path / "checkpoints"
    scenario = partial(go_on, assets, root, policy, dtype)
    norms = run_ranks(scenario, ranks, tmp_path / "ranks", kind, dtype)
    others = run_ranks(scenario, other_ranks, tmp_path / "others", other_kind, dtype)
    models = [(SHARDS, {"weight", "exp_avg", "exp_avg_sq"}, 2)]
    if policy.loss is not None:
        models.append(("reference", {"weight"}, 0))
    for model, parts, step in models:
        saved = (SavedSlices.find(root / f"step-00000{number}", model) for number in (2, 3))
        demand_equal(*saved, parts, step)
    tolerance = 1e-5 if dtype is Dtype.fp32 else 2e-2
    for found in others:
        assert found[0] == pytest.approx(norms[0][0], rel=tolerance)
        assert found[1:] == pytest.approx(norms[0][1:], rel=10 * tolerance)


def test_an_adapter_on_packed_experts_resumes_exactly(assets: Assets, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    root = tmp_path / "checkpoints"
    scenario = partial(go_on, replace(assets, policy=assets.mixture), root, NF4_LORA, FP32)
    whole = run_ranks(scenario, 2, tmp_path / "whole", DDP)
    assert run_ranks(scenario, 2, tmp_path / "resumed", DDP) == whole
    saved = (SavedSlices.find(root / f"step-00000{number}", SHARDS) for number in (2, 3))
    demand_equal(*saved, {"weight", "exp_avg", "exp_avg_sq"}, 2)


def demand_equal(first: SavedSlices, second: SavedSlices, parts: set[str], step: int) -> None:
    """Two checkpoints have the same tensors of a model, of these parts, after this number of updates."""
    assert (first.step, first.shapes, {*first.parts}) == (step, second.shapes, parts)
    assert (second.step, {*second.parts}) == (step, parts)
    for name in first.shapes:
        for part in parts:
            assert torch.equal(first.whole(name, part), second.whole(name, part)), (name, part)


def resume(
    make: Callable[[World], Trainer],
    found: Path,
    steps: Sequence[Sequence[int]],
    end: Path,
    world: World,
    _folder: Path,
) -> list[float]:
    """Continue a checkpoint of two ranks in new processes, and save its end; return the gradient norms."""
    trainer = make(world)
    trainer.policy.load_shards(found)
    norms = [trainer.step(rows) for rows in steps]
    trainer.save(end.parent, int(end.name.removeprefix("step-")))
    return norms
