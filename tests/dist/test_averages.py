"""What follows the trained weights on any number of ranks: their moving average, and a reference (TR-DPO)."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import SyncReferenceConfig
from dpo_dist.config.schema import AdapterConfig, Dtype, Offload, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.checkpoint.saver import SavedSlices
from dpo_dist.distributed.checkpoint.slices import SHARDS
from dpo_dist.distributed.processes.world import World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.training.steps.step import evaluate
from tests.dist.scenario import LOSS, Assets
from tests.dist.test_checkpoint import Trainer, demand_equal, resume
from tests.dist.test_engine import write_whole
from tests.support.cpu_adam import with_cpu_adam
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

DECAY = 0.7
STEPS = ([0, 1, 2], [3, 4, 5], [6, 7])
KEPT = 1 + len(STEPS)
BAD = 2
"""An update that is not applied comes before this step."""
ADAPTER = AdapterConfig(r=4, alpha=8.0, target_modules="all-linear")
OFFLOADED = ParallelismConfig(
    ParallelismKind.zero3, offload_optimizer=Offload.cpu, offload_parameters=Offload.cpu
)
WAYS = [
    pytest.param(Dtype.bf16, ParallelismKind.ddp, ParallelismKind.zero3, None, id="ddp in bf16, to zero3"),
    pytest.param(Dtype.fp32, OFFLOADED, ParallelismKind.zero2, ADAPTER, id="offloaded adapter, to zero2"),
]


def train(
    assets: Assets, root: Path, dtype: Dtype, adapter: AdapterConfig | None, world: World, _folder: Path
) -> None:
    trainer = Trainer(assets, world, adapter, dtype, ema_decay=DECAY)
    trainer.save(root, 0, KEPT)
    for number, rows in enumerate(STEPS, start=1):
        if number == BAD:
            backward = trainer.policy.backward
            with mock.patch.object(
                trainer.policy, "backward", lambda loss, is_last, do=backward: do(loss * torch.nan, is_last)
            ):
                assert trainer.step(rows) == torch.inf
        trainer.step(rows)
        trainer.save(root, number, KEPT)


def saved(root: Path, step: int) -> SavedSlices:
    return SavedSlices.find(root / f"step-{step:06d}", SHARDS)


@pytest.mark.parametrize(("dtype", "kind", "other_kind", "adapter"), WAYS)
def test_the_average_of_applied_updates_survives_a_checkpoint_and_another_world(
    dtype: Dtype,
    kind: ParallelismKind | ParallelismConfig,
    other_kind: ParallelismKind,
    adapter: AdapterConfig | None,
    assets: Assets,
    tmp_path: Path,
) -> None:
    root, again, elsewhere = tmp_path / "checkpoints", tmp_path / "again", tmp_path / "elsewhere"
    run = partial(with_cpu_adam, partial(train, assets, root, dtype, adapter))
    run_ranks(run, 2, tmp_path / "ranks", kind, dtype)
    last = len(STEPS)
    first, *later = (saved(root, step) for step in range(KEPT))
    end = later[-1]
    for name in end.shapes:
        assert torch.equal(first.whole(name, "ema"), first.whole(name))
        assert not torch.equal(end.whole(name, "ema"), end.whole(name))
        average = first.whole(name).double()
        for step in later:
            average = DECAY * average + (1 - DECAY) * step.whole(name).double()
        torch.testing.assert_close(end.whole(name, "ema").double(), average, rtol=1e-6, atol=1e-7)

    before, final = (f"step-{step:06d}" for step in (last - 1, last))
    make = partial(Trainer, assets, adapter=adapter, dtype=dtype, ema_decay=DECAY)
    going_on = partial(with_cpu_adam, partial(resume, make, root / before, STEPS[-1:], again / final))
    run_ranks(going_on, 2, tmp_path / "second", kind, dtype)
    demand_equal(saved(again, last), end, {"weight", "ema", "exp_avg", "exp_avg_sq"}, last)

    moving = partial(resume, make, root / before, STEPS[-1:], elsewhere / final)
    run_ranks(moving, 3, tmp_path / "third", other_kind, dtype)
    other, tolerance = saved(elsewhere, last), 1e-5 if dtype is Dtype.fp32 else 3e-3
    for name in end.shapes:
        torch.testing.assert_close(
            other.whole(name, "ema"), end.whole(name, "ema"), rtol=tolerance, atol=tolerance
        )


ROWS = [(0, 1, 2), (3, 4), (5, 6, 7, 8), (9,), (10, 0)]
MIXUP, EVERY = 0.6, 2
Models = tuple[Path, Path]


def trainer_of(assets: Assets, models: Models, world: World, offload: Offload = Offload.none) -> Trainer:
    own = replace(assets, policy=models[0], reference=models[1])
    return Trainer(own, world, loss=LOSS, sync=SyncReferenceConfig(EVERY, MIXUP), offload=offload)


def margin(trainer: Trainer) -> float:
    """The mean reward margin of all pairs."""
    plan = shard_batch(trainer.dataset, np.arange(11), trainer.world.rank, trainer.world.size, 256, COSTS)
    trainer.policy.train(False)
    return evaluate(trainer.policy, trainer.objective, plan, trainer.world, RunningMeans())[0][
        "rewards/margins"
    ]


def follow(
    assets: Assets, models: Models, offload: Offload, world: World, folder: Path
) -> dict[str, list[float]]:
    """Gradient norms and margins; of the first sync the policy's weights, and the reference's log-probs."""
    trainer = trainer_of(assets, models, world, offload)
    [batch] = shard_batch(trainer.dataset, np.arange(4), 0, 1, 8192, COSTS).batches()
    margins, norms, scored = [margin(trainer)], [], []
    for done, rows in enumerate(ROWS, start=1):
        norms.append(trainer.step(rows))
        margins.append(margin(trainer))  # which gathers small weights on every rank
        if done == EVERY:
            write_whole(trainer.policy, folder / "policy.safetensors")
            scored = trainer.reference.token_logps(batch).tolist()
    return {"steps": norms, "margins": margins, "scored": scored}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Policy and reference with weights whose sizes are not divisible by three ranks."""
    folder = tmp_path_factory.mktemp("odd")
    sizes = {"hidden_size": 40, "layers": 1, "intermediate_size": 37}
    return (
        write_model(folder / "policy", seed=5, **sizes),
        write_model(folder / "reference", seed=6, **sizes),
    )


@pytest.fixture(scope="module")
def one_rank(assets: Assets, odd: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ranks = tmp_path_factory.mktemp("one") / "ranks"
    result: dict[str, Any] = run_ranks(partial(follow, assets, odd, Offload.none), 1, ranks)[0]
    return result


@pytest.mark.parametrize(
    ("size", "kind", "offload"),
    [
        pytest.param(3, ParallelismKind.zero3, Offload.none, id="3 ranks, zero3"),
        pytest.param(2, ParallelismKind.ddp, Offload.cpu, id="2 ranks, ddp, offloaded"),
        pytest.param(4, ParallelismConfig(shard_size=2), Offload.cpu, id="2 groups of 2, offloaded"),
    ],
)
def test_any_number_of_ranks_follows_like_one_and_like_the_weighted_mean_of_whole_weights(
    size: int,
    kind: ParallelismKind | ParallelismConfig,
    offload: Offload,
    assets: Assets,
    odd: Models,
    one_rank: dict[str, Any],
    tmp_path: Path,
) -> None:
    results = run_ranks(partial(follow, assets, odd, offload), size, tmp_path / "ranks", kind)
    plain = AutoModelForCausalLM.from_pretrained(odd[1], dtype=torch.float32)
    policy = load_file(tmp_path / "ranks" / "policy.safetensors")
    plain.load_state_dict(
        {name: (1 - MIXUP) * old + MIXUP * policy[name] for name, old in plain.state_dict().items()}
    )
    with torch.no_grad():
        wanted = plain_logps(plain, [assets.dataset().example(row) for row in range(4)])
    for result in results:
        assert result["steps"] == pytest.approx(one_rank["steps"], rel=2e-4)
        assert result["margins"] == pytest.approx(one_rank["margins"], rel=2e-4, abs=2e-4)
        torch.testing.assert_close(torch.tensor(result["scored"]), wanted, atol=1e-4, rtol=0)


def follow_another_shape(assets: Assets, model: Path, world: World, _folder: Path) -> str:
    with pytest.raises(ConfigError, match="weight names and shapes") as caught:
        trainer_of(assets, (model, assets.reference), world)
    return caught.value.got


def test_a_reference_of_another_shape_is_refused(assets: Assets, odd: Models, tmp_path: Path) -> None:
    [got] = run_ranks(partial(follow_another_shape, assets, odd[0]), 1, tmp_path / "ranks")
    assert "model.embed_tokens.weight" in got
