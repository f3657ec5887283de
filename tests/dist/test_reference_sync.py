"""TR-DPO: mixing the policy's shards into the reference equals mixing whole weights in one process."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_dist.config.losses import SyncReferenceConfig
from dpo_dist.config.schema import Offload, ParallelismKind
from dpo_dist.data.dataset import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.training.step import evaluate
from tests.dist.scenario import LOSS, Assets
from tests.dist.test_checkpoint import Trainer
from tests.dist.test_engine import write_whole
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

ROWS = [(0, 1, 2), (3, 4), (5, 6, 7, 8), (9,), (10, 0), (1, 2, 3)]
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
    ],
)
def test_any_number_of_ranks_follows_like_one_and_like_the_weighted_mean_of_whole_weights(
    size: int,
    kind: ParallelismKind,
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
        wanted = plain_logps(plain, [assets.dataset().sequences(row) for row in range(4)])
    for result in results:
        assert result["steps"] == pytest.approx(one_rank["steps"], rel=2e-4)
        assert result["margins"] == pytest.approx(one_rank["margins"], rel=2e-4, abs=2e-4)
        torch.testing.assert_close(torch.tensor(result["scored"]), wanted, atol=1e-4, rtol=0)


def follow_another_shape(assets: Assets, model: Path, world: World, _folder: Path) -> str:
    with pytest.raises(ConfigError, match="weights of the same names and shapes") as caught:
        trainer_of(assets, (model, assets.reference), world)
    return caught.value.got


def test_a_reference_of_another_shape_is_refused(assets: Assets, odd: Models, tmp_path: Path) -> None:
    [got] = run_ranks(partial(follow_another_shape, assets, odd[0]), 1, tmp_path / "ranks")
    assert "model.embed_tokens.weight" in got
