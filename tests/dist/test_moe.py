"""Mixtures of experts train on two ranks as in one process, under each kind of optimizer wrapper."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig, ParallelismKind
from dpo_dist.data.collate import shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.objective.losses import RunningMeans
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, train_step
from tests.dist.scenario import Assets
from tests.dist.test_engine import LOSS, STEPS, RowsAtHand, plain_steps
from tests.support import tiny
from tests.support.packing import COSTS
from tests.support.ranks import OPTIM, run_ranks
from tests.support.written import write_model

OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
}
OWN["qwen2_moe"] = {**OWN["qwen3_moe"], "shared_expert_intermediate_size": 16, "mlp_only_layers": []}
OWN["glm4_moe"] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
ZERO3, ZERO2, DDP = ParallelismKind


def write_moe(folder: Path, model_type: str) -> Path:
    tokenizer = tiny.qwen()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        router_jitter_noise=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **OWN[model_type],
    )
    torch.manual_seed(1)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, buffer in causal_lm.named_buffers():
        if name.endswith("e_score_correction_bias"):  # balances the experts, without a gradient
            buffer.normal_(std=0.3)
    causal_lm.save_pretrained(folder)
    return folder


def moe_steps(
    assets: Assets, model: Path, dtype: Dtype, reference: Sequence[np.ndarray], world: World, folder: Path
) -> list[float]:
    """Gradient norms of `STEPS`; the result is exported to `folder`."""
    config, dataset = ModelConfig(str(model), dtype=dtype), assets.dataset()
    policy = PolicyEngine(load_packed(model, config, 1024, world.device), OPTIM, world)
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    norms = []
    for rows, budget in STEPS:
        plan = shard_batch(dataset, np.array(rows), world.rank, world.size, budget, COSTS)
        ready = objective.ready_step(plan, world.device)
        clock = StepClock(world.device)
        norms.append(train_step(policy, objective, ready, OPTIM.lr, world, clock, RunningMeans())[1].item())
    write_model(policy, folder / "model", world)
    return norms


def trained(folder: Path) -> dict[str, Tensor]:
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return dict(loaded.state_dict())


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("qwen3_moe", ZERO3),
        ("qwen3_moe", ZERO2),
        ("mixtral", ZERO3),
        ("mixtral", DDP),
        ("glm4_moe", ZERO3),
        ("glm4_moe", DDP),
    ],
)
def test_two_ranks_train_a_mixture_of_experts_like_plain_pytorch(
    model_type: str, kind: ParallelismKind, assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    model = write_moe(tmp_path / "model", model_type)
    scenario = partial(moe_steps, assets, model, Dtype.fp32, plain_entries)
    results = run_ranks(scenario, 2, tmp_path / "ranks", kind)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    norms = plain_steps(plain, assets.dataset(), plain_entries)
    for of_rank in results:
        assert of_rank == pytest.approx(norms, rel=5e-5)
    after = trained(tmp_path / "ranks" / "model")
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(
            after[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize(("model_type", "kind"), [("qwen3_moe", DDP), ("mixtral", ZERO3)])
def test_in_bf16_two_ranks_train_it_like_one_process(
    model_type: str, kind: ParallelismKind, assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    model = write_moe(tmp_path / "model", model_type)
    scenario = partial(moe_steps, assets, model, Dtype.bf16, plain_entries)
    norms = run_ranks(scenario, 1, tmp_path / "one", kind, Dtype.bf16)[0]
    results = run_ranks(scenario, 2, tmp_path / "two", kind, Dtype.bf16)
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(norms[0], rel=5e-3)
    before, one, two = (
        trained(folder / "model") for folder in (tmp_path, tmp_path / "one", tmp_path / "two")
    )
    # Rounding moves a share of the weights by a bf16 step: some hundredths of what they were trained by.
    apart, change = (
        torch.cat([(a[name] - b[name]).flatten() for name in before]).norm()
        for a, b in ((two, one), (one, before))
    )
    assert apart < 0.06 * change


SHARED = AdapterConfig(r=4, alpha=8.0, target_modules=["gate_proj", "up_proj", "down_proj"])


def adapted_steps(
    assets: Assets, model: Path, reference: Sequence[np.ndarray], world: World, _folder: Path
) -> list[float]:
    """Gradient norms of `STEPS`, LoRA on the shared experts only: the first one's input has no gradient."""
    config, dataset = ModelConfig(str(model), dtype=Dtype.fp32, adapter=SHARED), assets.dataset()
    loaded = load_packed(model, config, 1024, world.device)
    add_adapter(loaded, config, 0)
    policy = PolicyEngine(loaded, OPTIM, world)
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    norms = []
    for rows, budget in STEPS:
        plan = shard_batch(dataset, np.array(rows), world.rank, world.size, budget, COSTS)
        ready = objective.ready_step(plan, world.device)
        clock = StepClock(world.device)
        norms.append(train_step(policy, objective, ready, OPTIM.lr, world, clock, RunningMeans())[1].item())
    return norms


def test_an_adapter_of_shared_experts_only_gets_its_whole_gradient(
    assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    model = write_moe(tmp_path / "model", "qwen2_moe")
    results = run_ranks(partial(adapted_steps, assets, model, plain_entries), 2, tmp_path / "ranks", ZERO3)
    config = ModelConfig(str(model), dtype=Dtype.fp32, adapter=SHARED)
    loaded = load_packed(model, config, 1024, torch.device("cpu"))
    add_adapter(loaded, config, 0)
    loaded.causal_lm.config._attn_implementation = "sdpa"
    norms = plain_steps(loaded.causal_lm, assets.dataset(), plain_entries)
    for of_rank in results:
        assert of_rank == pytest.approx(norms, rel=5e-5)
