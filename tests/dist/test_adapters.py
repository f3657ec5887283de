"""Adapters on several ranks, with any sharding: peft on plain PyTorch is the oracle."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    Dtype,
    ModelConfig,
    OptimConfig,
    ParallelismKind,
)
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import RunningMeans, preference_loss
from dpo_dist.reference.scoring import AdapterReference
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, train_step
from tests.dist.scenario import Assets
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import OPTIM, run_ranks
from tests.support.written import write_model

LOSS = LossConfig(beta=0.5)
STEPS: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3, 4), (5,), (6, 7, 8, 9, 10), (2, 9))
SCORED = (1, 4, 7)
SEED = 5
LORA = AdapterConfig(r=4, alpha=8)
RSLORA = AdapterConfig(r=4, alpha=8, variant=AdapterVariant.rslora, target_modules=["q_proj", "mlp.up_proj"])
WHOLE = AdapterConfig(
    r=4, alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]
)
DORA = AdapterConfig(r=4, alpha=8, variant=AdapterVariant.dora)


class Trainer:
    """An adapted policy whose reference is its base, and its steps."""

    def __init__(self, model: ModelConfig, assets: Assets, world: World, optim: OptimConfig = OPTIM):
        packed = load_packed(Path(model.path), model, 1024, world.device)
        add_adapter(packed, model, SEED)
        self.policy = PolicyEngine(packed, optim, world)
        self.objective = Objective(LOSS, AdapterReference(self.policy))
        self.dataset, self.world, self.lr = assets.dataset(), world, optim.lr

    def step(self, rows: Sequence[int]) -> float:
        world = self.world
        plan = shard_batch(self.dataset, np.array(rows), world.rank, world.size, 128, COSTS)
        ready, clock = self.objective.ready_step(plan, world.device), StepClock(world.device)
        return train_step(self.policy, self.objective, ready, self.lr, world, clock, RunningMeans())[1].item()

    @torch.no_grad()
    def scored(self) -> dict[str, list[float]]:
        """Log-probs of the rows `SCORED` with the adapter and without, the same batch on every rank."""
        self.policy.train(False)
        (batch,) = shard_batch(self.dataset, np.array(SCORED), 0, 1, 8192, COSTS).batches()
        return {
            "policy": self.policy.token_logps(batch).tolist(),
            "base": self.policy.base_token_logps(batch).tolist(),
        }


def steps(model: ModelConfig, assets: Assets, world: World, folder: Path) -> dict[str, Any]:
    trainer = Trainer(model, assets, world)
    before = trainer.scored()
    norms = [trainer.step(rows) for rows in STEPS]
    write_model(trainer.policy, folder / "model", world)
    inner = trainer.policy._engine.optimizer.optimizer
    moments = sum(state["exp_avg"].numel() for state in inner.state.values())
    return {"before": before, "norms": norms, "after": trainer.scored(), "moments": moments}


def plain_steps(model: Any, assets: Assets) -> list[float]:
    """Gradient norms of `STEPS`, applied to a peft model by PyTorch alone, a sequence at a time."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, eps=OPTIM.eps)
    norms = []
    for rows in STEPS:
        pairs = [assets.dataset().sequences(row) for row in rows]
        lengths = torch.tensor([len(response) for pair in pairs for response in pair.responses])
        with torch.no_grad(), model.disable_adapter():
            reference = sum_by_response(plain_logps(model, pairs), lengths)
        logps = sum_by_response(plain_logps(model, pairs), lengths)
        preference_loss(logps, reference, LOSS).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, OPTIM.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def plain_adapter(path: Path, adapter: AdapterConfig) -> Any:
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        use_rslora=adapter.variant is AdapterVariant.rslora,
        use_dora=adapter.variant is AdapterVariant.dora,
        modules_to_save=[f"model.{name}" if name == "norm" else name for name in adapter.modules_to_save],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(SEED)
    base = plain_base(path)
    is_tied = base.lm_head.weight is base.model.embed_tokens.weight
    model = get_peft_model(base, config)
    if adapter.modules_to_save and is_tied:
        embeddings, output = base.model.embed_tokens, base.lm_head
        output.modules_to_save["default"].weight = embeddings.modules_to_save["default"].weight
    return model


def plain_base(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def scored_plainly(model: Any, assets: Assets) -> Tensor:
    with torch.no_grad():
        return plain_logps(model, [assets.dataset().sequences(row) for row in SCORED])


WAYS = [
    pytest.param(2, ParallelismKind.zero3, LORA, "full", False, id="2 ranks, zero3, lora, untied"),
    pytest.param(2, ParallelismKind.zero3, DORA, "full", True, id="2 ranks, zero3, dora, checkpointing"),
    pytest.param(3, ParallelismKind.zero3, RSLORA, "none", True, id="3 ranks, zero3, rslora"),
    pytest.param(2, ParallelismKind.zero2, DORA, "none", False, id="2 ranks, zero2, dora, untied"),
    pytest.param(2, ParallelismKind.zero3, WHOLE, "full", True, id="2 ranks, zero3, whole modules"),
    pytest.param(3, ParallelismKind.zero2, WHOLE, "none", False, id="3 ranks, zero2, whole modules, untied"),
    pytest.param(2, ParallelismKind.ddp, LORA, "full", True, id="2 ranks, ddp, lora, checkpointing"),
]


@pytest.mark.parametrize(("size", "kind", "adapter", "checkpointing", "tied"), WAYS)
def test_steps_and_the_exported_adapter_equal_plain_peft(
    size: int,
    kind: ParallelismKind,
    adapter: AdapterConfig,
    checkpointing: str,
    tied: bool,
    assets: Assets,
    tmp_path: Path,
) -> None:
    path = assets.policy if tied else assets.untied_policy
    model = ModelConfig(str(path), dtype=Dtype.fp32, gradient_checkpointing=checkpointing, adapter=adapter)
    results = run_ranks(partial(steps, model, assets), size, tmp_path / "ranks", kind)

    oracle = plain_adapter(path, adapter)
    trained = sum(p.numel() for p in oracle.parameters() if p.requires_grad)
    assert trained <= sum(of_rank["moments"] for of_rank in results) < 1.1 * trained
    norms = plain_steps(oracle, assets)
    base = torch.tensor(results[0]["before"]["base"])
    torch.testing.assert_close(base, scored_plainly(plain_base(path), assets), atol=1e-4, rtol=1e-4)
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(norms, rel=1e-4)
        assert of_rank["before"]["policy"] == of_rank["before"]["base"]
        assert of_rank["after"]["base"] == of_rank["before"]["base"]

    written = tmp_path / "ranks" / "model"
    files = {file.name for file in written.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not [name for name in files if name.startswith("model")]
    reloaded = AutoPeftModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    seen = torch.tensor(results[0]["after"]["policy"])
    assert (seen - base).abs().max() > 0.01
    torch.testing.assert_close(scored_plainly(reloaded, assets), seen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scored_plainly(oracle, assets), seen, atol=2e-4, rtol=2e-4)


def first_norm(model: ModelConfig, assets: Assets, world: World, _folder: Path) -> float:
    # Layers are gathered and their gradients taken as for compiled ones, without the minute of compiling.
    torch._dynamo.config.disable = True
    return Trainer(model, assets, world).step(STEPS[0])


def test_compiled_layers_train_every_adapter(assets: Assets, tmp_path: Path) -> None:
    plain = ModelConfig(str(assets.policy), dtype=Dtype.fp32, adapter=LORA)
    wanted = run_ranks(partial(first_norm, plain, assets), 2, tmp_path / "plain")
    compiled = replace(plain, compile=True)
    assert run_ranks(partial(first_norm, compiled, assets), 2, tmp_path / "compiled") == pytest.approx(wanted)


def small_steps(model: ModelConfig, assets: Assets, world: World, folder: Path) -> None:
    trainer = Trainer(model, assets, world, OptimConfig(lr=2e-5, eps=1e-12))
    write_model(trainer.policy, folder / "before", world)
    for _ in range(40):
        trainer.step((0, 1))
    write_model(trainer.policy, folder / "after", world)


@pytest.mark.parametrize("kind", ParallelismKind)
def test_steps_below_the_resolution_of_bf16_add_up(
    kind: ParallelismKind, assets: Assets, tmp_path: Path
) -> None:
    """A step of 2e-5 is lost in a bf16 number beyond 0.1, whose neighbours are 5e-4 away."""
    model = ModelConfig(str(assets.policy), dtype=Dtype.bf16, adapter=LORA)
    run_ranks(partial(small_steps, model, assets), 2, tmp_path / "ranks", kind, Dtype.bf16)
    before, after = (
        load_file(tmp_path / "ranks" / name / "adapter_model.safetensors") for name in ("before", "after")
    )
    large = {name: tensor.abs() > 0.1 for name, tensor in before.items() if "lora_A" in name}
    moved = torch.cat([(before[name] != after[name])[mask] for name, mask in large.items()])
    assert moved.float().mean() > 0.5
