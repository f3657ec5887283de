"""TR-DPO: mixing the policy's shards into the reference equals mixing whole weights in one process."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.config.losses import LossConfig, SyncReferenceConfig
from dpo_dist.config.schema import Offload, ParallelismKind, ReferenceConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.checkpoint import CheckpointSaver, latest_checkpoint, load_checkpoint
from dpo_dist.distributed.reference_sync import ReferenceSync
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.load import load_packed
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.objective.metrics import MetricSums
from dpo_dist.reference.engine import load_reference
from dpo_dist.reference.scoring import LiveReference
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, evaluate, train_step
from tests.dist.scenario import Assets, files_of
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import OPTIM, run_ranks
from tests.support.slow_disk import slow_disk
from tests.support.tiny_model import write_model
from tests.support.written import whole_weights

ROWS = [(0, 1, 2), (3, 4), (5, 6, 7, 8), (9,), (10, 0), (1, 2, 3)]
MIXUP = 0.6
EVERY = 2
POLICY = "policy.safetensors"


class Trainer:
    """A policy and a live reference that follows it."""

    def __init__(
        self,
        assets: Assets,
        world: World,
        model: Path,
        reference: Path,
        mixup: float = MIXUP,
        offload: Offload = Offload.none,
    ):
        config = assets.config(model, ReferenceConfig(offload=offload))
        self.reference = load_reference(files_of(reference), config, world)
        packed = load_packed(model, config.model, 1024, world.device)
        self.policy = PolicyEngine(packed, OPTIM, world)
        self.sync = ReferenceSync(self.reference, self.policy, SyncReferenceConfig(EVERY, mixup), world)
        self.objective = Objective(LossConfig(beta=0.5), LiveReference(self.reference))
        self.dataset, self.world, self.done = assets.dataset(), world, 0

    def steps(self, count: int) -> list[float]:
        return [self.step(ROWS[self.done]) for _ in range(count)]

    def step(self, rows: Sequence[int]) -> float:
        world = self.world
        ready, clock = self.objective.ready_step(self._plan(rows), world.device), StepClock(world.device)
        sums, norm = train_step(self.policy, self.objective, ready, OPTIM.lr, world, clock, RunningMeans())
        self.done += 1
        self.sync.after_step(self.done)
        return self._metrics(sums)["loss"] + norm.item()

    def margin(self) -> float:
        """Return the mean reward margin of all pairs."""
        plan = self._plan(range(len(self.dataset)))
        self.policy.train(False)
        sums = evaluate(self.policy, self.objective, plan, self.world, RunningMeans()).sums
        return self._metrics(sums)["rewards/margins"]

    def _plan(self, rows: Sequence[int]) -> Any:
        return shard_batch(self.dataset, np.array(rows), self.world.rank, self.world.size, 256, COSTS)

    def _metrics(self, sums: MetricSums) -> dict[str, float]:
        return MetricSums(sums.names, self.world.sum(sums.values)).means()

    def shards(self) -> list[Tensor]:
        """Return copies of this rank's shards of the reference without padding."""
        rank, kept = self.world.rank, []
        for weight in self.reference.causal_lm.parameters():
            own = min(weight.ds_tensor.ds_numel, weight.ds_numel - rank * weight.ds_tensor.ds_numel)
            kept.append(weight.ds_tensor[: max(0, own)].clone())
        return kept


def follow(
    assets: Assets, model: Path, reference: Path, offload: Offload, world: World, _folder: Path
) -> dict[str, Any]:
    trainer = Trainer(assets, world, model, reference, offload=offload)
    margins = [trainer.margin()]
    losses = []
    for _ in ROWS:
        losses += trainer.steps(1)
        margins.append(trainer.margin())
    return {"steps": losses, "margins": margins}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return policy and reference with weights whose sizes are not divisible by three ranks."""
    folder = tmp_path_factory.mktemp("odd")
    sizes = {"hidden_size": 40, "layers": 1, "intermediate_size": 37}
    return (
        write_model(folder / "policy", seed=5, **sizes),
        write_model(folder / "reference", seed=6, **sizes),
    )


@pytest.fixture(scope="module")
def one_rank(
    assets: Assets, odd: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    ranks = tmp_path_factory.mktemp("one") / "ranks"
    result: dict[str, Any] = run_ranks(partial(follow, assets, *odd, Offload.none), 1, ranks)[0]
    return result


WAYS = [
    pytest.param(3, ParallelismKind.zero3, Offload.none, id="3 ranks, zero3"),
    pytest.param(3, ParallelismKind.zero2, Offload.none, id="3 ranks, zero2"),
    pytest.param(2, ParallelismKind.ddp, Offload.cpu, id="2 ranks, ddp, offloaded"),
]


@pytest.mark.parametrize(("size", "kind", "offload"), WAYS)
def test_any_number_of_ranks_follows_like_one(
    size: int,
    kind: ParallelismKind,
    offload: Offload,
    assets: Assets,
    odd: tuple[Path, Path],
    one_rank: dict[str, Any],
    tmp_path: Path,
) -> None:
    for result in run_ranks(partial(follow, assets, *odd, offload), size, tmp_path / "ranks", kind):
        assert result["steps"] == pytest.approx(one_rank["steps"], rel=2e-4)
        assert result["margins"] == pytest.approx(one_rank["margins"], rel=2e-4, abs=2e-4)


def follow_and_score(assets: Assets, model: Path, reference: Path, world: World, folder: Path) -> list[float]:
    """Sync once, save the policy's weights to a file, and return the reference's log-probs."""
    trainer = Trainer(assets, world, model, reference)
    trainer.steps(1)
    trainer.margin()  # now small weights are gathered on every rank
    trainer.steps(1)
    weights = whole_weights(trainer.policy)
    if weights is not None:
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / POLICY)
    [batch] = shard_batch(trainer.dataset, np.arange(4), 0, 1, 8192, COSTS).batches()
    scored: list[float] = trainer.reference.token_logps(batch).tolist()
    return scored


def test_the_mixed_reference_scores_like_the_weighted_mean_of_both_models(
    assets: Assets, odd: tuple[Path, Path], tmp_path: Path
) -> None:
    ranks = run_ranks(partial(follow_and_score, assets, *odd), 2, tmp_path / "ranks")
    plain = AutoModelForCausalLM.from_pretrained(odd[1], dtype=torch.float32)
    policy = load_file(tmp_path / "ranks" / POLICY)
    plain.load_state_dict(
        {name: (1 - MIXUP) * old + MIXUP * policy[name] for name, old in plain.state_dict().items()}
    )
    with torch.no_grad():
        wanted = plain_logps(plain, [assets.dataset().sequences(row) for row in range(4)])
    for scored in ranks:
        torch.testing.assert_close(torch.tensor(scored), wanted, atol=1e-4, rtol=0)


def hard_update(assets: Assets, model: Path, reference: Path, world: World, _folder: Path) -> list[float]:
    trainer = Trainer(assets, world, model, reference, mixup=1.0)
    trainer.steps(1)
    before = trainer.margin()
    trainer.steps(1)
    return [before, trainer.margin()]


@pytest.mark.parametrize("kind", [ParallelismKind.zero3, ParallelismKind.zero2])
def test_a_mixup_of_one_makes_the_reference_the_policy(
    kind: ParallelismKind, assets: Assets, odd: tuple[Path, Path], tmp_path: Path
) -> None:
    for before, after in run_ranks(partial(hard_update, assets, *odd), 2, tmp_path / "ranks", kind):
        assert before != 0.0
        assert after == 0.0


def save_continue_and_restore(
    assets: Assets, model: Path, reference: Path, root: Path, world: World, _folder: Path
) -> dict[str, Any]:
    trainer = Trainer(assets, world, model, reference)
    parts = [trainer.policy, trainer.sync]
    trainer.steps(3)
    saved = trainer.shards()
    saver = CheckpointSaver(root, 2, parts, world)
    with slow_disk():
        saver.save(3, {"step": 3})
        continued = trainer.steps(3)
        end = trainer.shards()
    saver.commit()
    found = latest_checkpoint(root, world)
    assert found is not None
    load_checkpoint(found, parts, world)
    trainer.done = 3
    same = [all(map(torch.equal, saved, trainer.shards()))]
    again = trainer.steps(3)
    same.append(all(map(torch.equal, end, trainer.shards())))
    moved = not all(map(torch.equal, saved, end))
    files = sorted(file.name for file in found.folder.glob("reference/*"))
    return {"same": same, "moved": moved, "continued": continued == again, "files": files}


@pytest.mark.parametrize("kind", [ParallelismKind.zero3, ParallelismKind.zero2])
def test_a_checkpoint_restores_the_reference(
    kind: ParallelismKind, assets: Assets, odd: tuple[Path, Path], tmp_path: Path
) -> None:
    scenario = partial(save_continue_and_restore, assets, *odd, tmp_path / "checkpoints")
    for result in run_ranks(scenario, 2, tmp_path / "ranks", kind):
        assert result == {
            "same": [True, True],
            "moved": True,
            "continued": True,
            "files": ["rank-00000-00000.safetensors", "rank-00001-00000.safetensors"],
        }


def follow_another_shape(assets: Assets, model: Path, world: World, _folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(assets, world, model, assets.reference)
    return str(caught.value.block())


def test_a_reference_of_another_shape_is_refused(
    assets: Assets, odd: tuple[Path, Path], tmp_path: Path
) -> None:
    [block] = run_ranks(partial(follow_another_shape, assets, odd[0]), 1, tmp_path / "ranks")
    assert "weights of the same names and shapes" in block
    assert "model.embed_tokens.weight" in block
