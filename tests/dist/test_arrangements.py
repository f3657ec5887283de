"""Policy and live reference of different arrangements, and stored log-probs of another arrangement."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import Dtype, ModelConfig, RunConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.reference.engine import load_reference, settle_engine
from dpo_dist.reference.scoring import LiveReference
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, train_step
from tests.dist.scenario import Assets, files_of
from tests.dist.test_engine import LOSS
from tests.dist.test_families import STEPS, plain_steps, row_logps, write_families
from tests.support.own_code import ship_code
from tests.support.packing import COSTS
from tests.support.ranks import OPTIM, run_ranks
from tests.support.tiny_model import write_model

PACKED, PADDED, SINGLE = Arrangement
# Of a policy and its reference.
PAIRINGS = {("jamba", "plain"): (PADDED, PACKED), ("plain", "rows"): (PACKED, SINGLE)}


def walk(assets: Assets, models: dict[str, Path], world: World, _folder: Path) -> list[dict[str, Any]]:
    """Arrangements and gradient norms of `STEPS` of each pairing."""
    return [train(assets, models[policy], models[reference], world) for policy, reference in PAIRINGS]


def train(assets: Assets, policy_folder: Path, reference_folder: Path, world: World) -> dict[str, Any]:
    config = ModelConfig(str(policy_folder), dtype=Dtype.fp32, trust_remote_code=True)
    dataset = assets.dataset()
    policy = PolicyEngine(load_packed(policy_folder, config, 512, world.device), OPTIM, world)
    settle_engine(policy, 512, world)
    reference = load_reference(files_of(reference_folder), RunConfig(model=config), world)
    objective = Objective(LOSS, LiveReference(reference))
    costs, norms = replace(COSTS, arrangement=policy.model.arrangement), []
    for indices, budget in STEPS:
        plan = shard_batch(dataset, np.array(indices), world.rank, world.size, budget, costs)
        ready, clock = objective.ready_step(plan, world.device), StepClock(world.device)
        norms.append(train_step(policy, objective, ready, OPTIM.lr, world, clock, RunningMeans())[1].item())
    arrangements = policy.model.arrangement, reference.model.arrangement
    reference.free()
    policy.free()
    world.accelerator._models.clear()
    world.accelerator._optimizers.clear()
    return {"arrangements": arrangements, "norms": norms}


def test_a_live_reference_is_arranged_by_itself(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose ranks make a forward per response, of micro-batches planned for a packed policy."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    models = write_families(["jamba"], tmp_path) | {"plain": write_model(tmp_path / "plain")}
    models["rows"] = ship_code(write_model(tmp_path / "rows", seed=2), "rows")
    by_rank = run_ranks(partial(walk, assets, models), 2, tmp_path / "ranks")
    dataset = assets.dataset()
    pairs = [dataset.sequences(index) for index in range(len(dataset))]
    rows = [(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
    plain = {
        name: AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, trust_remote_code=True, experts_implementation="eager"
        ).eval()
        for name, path in models.items()
    }
    for number, ((policy, reference), arrangements) in enumerate(PAIRINGS.items()):
        with torch.no_grad():
            values = [row_logps(plain[reference], [row])[0].numpy() for row in rows]
        norms = plain_steps(plain[policy], pairs, values, alone=True)
        for of_rank in by_rank:
            found = of_rank[number]
            assert found["arrangements"] == list(arrangements)
            assert found["norms"] == pytest.approx(norms, rel=5e-4)


def other_arrangements(assets: Assets, world: World, _folder: Path) -> list[float]:
    """Largest difference of a log-prob from the packed one, of each other arrangement of the reference."""
    dataset = assets.dataset()
    engine = load_reference(files_of(assets.reference), assets.config(assets.policy), world)
    plan = shard_batch(dataset, np.arange(8), world.rank, world.size, 512, COSTS)
    (batch,) = plan.batches()
    packed = engine.token_logps(batch)
    differences = []
    for arrangement in (PADDED, SINGLE):
        engine.model.arrange(arrangement, own_logits=False)
        differences.append(float((engine.token_logps(batch) - packed).abs().max()))
    return differences


def test_stored_log_probs_do_not_depend_on_the_arrangement(assets: Assets, tmp_path: Path) -> None:
    """So it is no field of the numerics profile: entries of one arrangement serve runs of another."""
    for differences in run_ranks(partial(other_arrangements, assets), 2, tmp_path / "ranks"):
        assert 0 < max(differences) < 1e-5
