"""Adapters on several ranks, with any sharding: peft on plain PyTorch is the oracle."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    Dtype,
    FusedLayers,
    ModelConfig,
    OptimConfig,
    ParallelismKind,
    Quantization,
)
from dpo_dist.distributed import zero
from dpo_dist.distributed.processes.world import World
from dpo_dist.model.files.load import load_config, load_weights
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import preference_loss
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import LOSS, Assets, all_steps, load_policy, plain_training
from tests.support.packing import COSTS, plain_logps
from tests.support.ranks import run_ranks
from tests.support.written import write_model

STEPS: tuple[tuple[tuple[int, ...], int], ...] = tuple(
    (rows, 128) for rows in ((0, 1, 2, 3, 4), (5,), (6, 7, 8, 9, 10), (2, 9))
)
SCORED = (1, 4, 7)
SEED = 5
LORA = AdapterConfig(r=4, alpha=8)
ATTENTION = AdapterConfig(r=4, alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
RSLORA = AdapterConfig(r=4, alpha=8, variant=AdapterVariant.rslora, target_modules=["q_proj", "mlp.up_proj"])
WHOLE = AdapterConfig(
    r=4, alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]
)
EXPERTS = AdapterConfig(r=4, alpha=8, target_modules=["q_proj", "experts.gate_up_proj", "experts.down_proj"])
DORA = AdapterConfig(r=4, alpha=8, variant=AdapterVariant.dora)


@torch.no_grad()
def scored(policy: Any, assets: Assets) -> dict[str, list[float]]:
    """Log-probs of the rows `SCORED` with the adapter and without, the same batch on every rank."""
    policy.train(False)
    (batch,) = shard_batch(assets.dataset(), np.array(SCORED), 0, 1, 8192, COSTS).batches()
    return {
        "policy": policy.token_logps(batch).tolist(),
        "base": policy.scored(batch, without_adapter=True).tolist(),
    }


def steps(model: ModelConfig, assets: Assets, world: World, folder: Path) -> dict[str, Any]:
    policy = load_policy(model, world, seed=SEED)
    before = scored(policy, assets)
    norms = all_steps(
        policy, Objective(LOSS, ReferenceProvider(policy=policy)), assets.dataset(), world, STEPS
    )
    write_model(policy, folder / "model", world)
    inner = policy._engine.optimizer.optimizer
    moments = sum(state["exp_avg"].numel() for state in inner.state.values())
    return {"before": before, "norms": norms, "after": scored(policy, assets), "moments": moments}


def plain_steps(model: Any, assets: Assets) -> list[float]:
    """Gradient norms of `STEPS`, applied to a peft model by PyTorch alone, a sequence at a time."""

    def loss(rows: Sequence[int]) -> Tensor:
        pairs = [assets.dataset().example(row) for row in rows]
        lengths = torch.tensor([len(response) for pair in pairs for response in pair.responses])
        with torch.no_grad(), model.disable_adapter():
            reference = sum_by_response(plain_logps(model, pairs), lengths)
        return preference_loss(sum_by_response(plain_logps(model, pairs), lengths), reference, LOSS).mean()

    return plain_training(model, [partial(loss, rows) for rows, _ in STEPS])


def plain_adapter(base: Any, adapter: AdapterConfig) -> Any:
    targets: Any = adapter.target_modules
    experts = [name for name in targets if "experts" in name] if isinstance(targets, list) else []
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        target_modules=[name for name in targets if "experts" not in name] if experts else targets,
        target_parameters=experts or None,
        use_rslora=adapter.variant is AdapterVariant.rslora,
        use_dora=adapter.variant is AdapterVariant.dora,
        modules_to_save=[f"model.{name}" if name == "norm" else name for name in adapter.modules_to_save],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(SEED)
    is_tied = base.lm_head.weight is base.model.embed_tokens.weight
    model = get_peft_model(base, config)
    if adapter.modules_to_save and is_tied:
        embeddings, output = base.model.embed_tokens, base.lm_head
        output.modules_to_save["default"].weight = embeddings.modules_to_save["default"].weight
    return model


def plain_base(path: Path, quantization: Quantization | None = None) -> Any:
    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = ModelConfig(str(path), dtype=Dtype.fp32, quantization=quantization)
    return load_weights(path, load_config(path, config), config, torch.device("cpu"))


def scored_plainly(model: Any, assets: Assets) -> Tensor:
    with torch.no_grad():
        return plain_logps(model, [assets.dataset().example(row) for row in SCORED])


ZERO3, ZERO2, DDP = ParallelismKind
WAYS = [
    pytest.param(2, ZERO3, DORA, "full", "policy", None, id="2 ranks, zero3, dora, checkpointing"),
    pytest.param(3, ZERO3, RSLORA, "none", "policy", None, id="3 ranks, zero3, rslora"),
    pytest.param(2, ZERO3, WHOLE, "full", "policy", None, id="2 ranks, zero3, whole modules"),
    pytest.param(3, ZERO2, WHOLE, "none", "untied_policy", None, id="3 ranks, zero2, whole modules, untied"),
    pytest.param(2, DDP, LORA, "full", "policy", None, id="2 ranks, ddp, lora, checkpointing"),
    pytest.param(2, DDP, DORA, "none", "wide", Quantization.nf4, id="2 ranks, ddp, dora on nf4"),
    pytest.param(2, DDP, LORA, "none", "policy", Quantization.int8, id="2 ranks, ddp, lora on int8"),
    pytest.param(2, ZERO3, EXPERTS, "none", "mixture", None, id="2 ranks, zero3, lora on experts"),
    pytest.param(2, DDP, EXPERTS, "full", "mixture", None, id="2 ranks, ddp, lora on experts, checkpointing"),
    pytest.param(
        2, DDP, ATTENTION, "none", "mixture", Quantization.nf4, id="2 ranks, ddp, lora on packed experts"
    ),
]


@pytest.mark.parametrize(("size", "kind", "adapter", "checkpointing", "base", "quantization"), WAYS)
def test_steps_and_the_exported_adapter_equal_plain_peft(
    size: int,
    kind: ParallelismKind,
    adapter: AdapterConfig,
    checkpointing: str,
    base: str,
    quantization: Quantization | None,
    assets: Assets,
    tmp_path: Path,
) -> None:
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    path, ranks = getattr(assets, base), tmp_path / "ranks"
    model = ModelConfig(str(path), dtype=Dtype.fp32, adapter=adapter, quantization=quantization)
    model = replace(model, gradient_checkpointing=checkpointing)
    results = run_ranks(partial(steps, model, assets), size, ranks, kind)
    tolerance = 1e-4 if quantization is None else 1e-3

    oracle = plain_adapter(plain_base(path, quantization), adapter)
    trained = sum(p.numel() for p in oracle.parameters() if p.requires_grad)
    assert trained <= sum(of_rank["moments"] for of_rank in results) < 1.1 * trained
    # On a CPU, bitsandbytes rounds the inputs of int8 weights in evaluation mode only.
    is_int8 = quantization is Quantization.int8
    norms = plain_steps(oracle.train(is_int8), assets)
    start = torch.tensor(results[0]["before"]["base"])
    plain = scored_plainly(plain_base(path, quantization), assets)
    torch.testing.assert_close(start, plain, atol=tolerance, rtol=tolerance)
    if quantization is not None:
        assert (scored_plainly(plain_base(path), assets) - start).abs().max() > 1e-3
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(norms, rel=1e-4)
        assert of_rank["before"]["policy"] == of_rank["before"]["base"] == of_rank["after"]["base"]

    files = {file.name for file in (ranks / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not [name for name in files if name.startswith("model")]
    reloaded = PeftModel.from_pretrained(plain_base(path, quantization), ranks / "model")
    seen = torch.tensor(results[0]["after"]["policy"])
    assert (seen - start).abs().max() > 0.01
    torch.testing.assert_close(scored_plainly(reloaded, assets), seen, atol=tolerance, rtol=tolerance)
    # Without those roundings, of which the last bit of an input decides one by 0.005 nats.
    trained_alike, exported = (scored_plainly(model.train(is_int8), assets) for model in (oracle, reloaded))
    torch.testing.assert_close(trained_alike, exported, atol=2e-4, rtol=2e-4)


def first_norms(model: ModelConfig, assets: Assets, world: World, _folder: Path) -> list[list[float]]:
    # Layers are gathered and their gradients taken as for compiled ones, without the minute of compiling.
    torch._dynamo.config.disable = True
    found = []
    for fused in (FusedLayers.none, FusedLayers.compile):
        policy = load_policy(replace(model, fused=fused), world, seed=SEED)
        objective = Objective(LOSS, ReferenceProvider(policy=policy))
        found.append(all_steps(policy, objective, assets.dataset(), world, STEPS[:1]))
    return found


def test_compiled_layers_train_every_adapter(assets: Assets, tmp_path: Path) -> None:
    model = ModelConfig(str(assets.policy), dtype=Dtype.fp32, adapter=LORA)
    for plain, compiled in run_ranks(partial(first_norms, model, assets), 2, tmp_path / "ranks"):
        assert compiled == pytest.approx(plain)


def small_steps(model: ModelConfig, assets: Assets, world: World, folder: Path) -> None:
    zero.ADAM_EPS = 1e-12
    policy = load_policy(model, world, OptimConfig(lr=1e-4), seed=SEED)
    write_model(policy, folder / "before", world)
    objective = Objective(LOSS, ReferenceProvider(policy=policy))
    all_steps(policy, objective, assets.dataset(), world, [((0, 1), 128)] * 8, lr=1e-4)
    write_model(policy, folder / "after", world)


@pytest.mark.parametrize("kind", ParallelismKind)
def test_steps_below_the_resolution_of_bf16_add_up(
    kind: ParallelismKind, assets: Assets, tmp_path: Path
) -> None:
    """A step of 1e-4 is lost in a bf16 number beyond 0.1, whose neighbours are 5e-4 away."""
    model = ModelConfig(str(assets.policy), dtype=Dtype.bf16, adapter=LORA)
    run_ranks(partial(small_steps, model, assets), 2, tmp_path / "ranks", kind, Dtype.bf16)
    before, after = (
        load_file(tmp_path / "ranks" / name / "adapter_model.safetensors") for name in ("before", "after")
    )
    large = {name: tensor.abs() > 0.1 for name, tensor in before.items() if "lora_A" in name}
    moved = torch.cat([(before[name] != after[name])[mask] for name, mask in large.items()])
    assert moved.float().mean() > 0.5
