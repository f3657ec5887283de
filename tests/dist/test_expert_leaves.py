"""Ranks whose tokens visit different experts neither hang nor differ from one process."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import (
    AdapterConfig,
    AttentionBackend,
    Dtype,
    FusedLayers,
    ModelConfig,
    Offload,
    ParallelismConfig,
    ParallelismKind,
)
from dpo_dist.distributed.deepspeed_config import frozen_config
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import FrozenEngine, PolicyEngine
from dpo_dist.model.attention.kernels import PACKED
from dpo_dist.model.attention.ulysses import TokenExchange
from dpo_dist.model.layers import checkpoint_layers, offload_inputs, partly_used_blocks
from dpo_dist.model.lora import add_adapter
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import LOSS, Assets, all_steps, entries_of, load_policy, plain_steps
from tests.dist.test_engine import write_whole
from tests.support import tiny
from tests.support.families import COMMON, HEADS, tiny_family
from tests.support.packing import VOCABULARY, pack_unkeyed, random_pairs
from tests.support.ranks import OPTIM, run_ranks

EXPERTS, UNUSED = 8, 7
SECONDS = 60
"""A hang fails the test within a minute."""


class Expert(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up_proj = nn.Linear(width, 16, bias=False)
        self.down_proj = nn.Linear(16, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.up_proj(hidden)))
        return out


class ListedExperts(nn.Module):
    """As models with their own code have them: a module per expert, called if a token visits it."""

    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(EXPERTS))
        self.visited: list[list[int]] = []
        # As in a sharded model, an expert without tokens has a gradient of 0: it decays, and has momentum.
        self.touches_all = False

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        never = torch.zeros(EXPERTS).index_fill(0, torch.tensor(UNUSED), -torch.inf)
        weights, chosen = torch.softmax(self.gate(tokens) + never, -1).max(-1)
        mixed = torch.zeros_like(tokens)
        self.visited.append(chosen.unique().tolist())
        for expert in self.visited[-1]:
            (own,) = torch.where(chosen == expert)
            scored = self.experts[expert](tokens[own]) * weights[own, None]
            mixed = mixed.index_add(0, own, scored.to(mixed.dtype))
        if self.touches_all:
            mixed = mixed + 0.0 * sum(weight.sum() for weight in self.experts.parameters())
        return mixed.view_as(hidden)


def listed_model() -> Any:
    """A model with lists of experts, the same on every rank, not sharded."""
    unset_hf_deepspeed_config()
    options = COMMON | HEADS | {"vocab_size": len(tiny.qwen()), "pad_token_id": None}
    config = AutoConfig.for_model("qwen3", **options, initializer_range=0.1)
    torch.manual_seed(1)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for layer in causal_lm.model.layers:
        layer.mlp = ListedExperts(32)
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, std=0.2)
    return causal_lm


def listed_packed(
    sequence: TokenExchange | None = None,
    fused: FusedLayers = FusedLayers.none,
    targets: list[str] | None = None,
) -> PackedCausalLM:
    """Compiled, the traced graphs run as they are: tracing is at stake, not the kernels of a backend.

    With an adapter on `targets`.
    """
    causal_lm = listed_model()
    causal_lm.config._attn_implementation = PACKED
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, fused, sequence)
    if targets is not None:
        adapter = AdapterConfig(r=4, alpha=8.0, target_modules=targets)
        add_adapter(model, ModelConfig("tiny", dtype=Dtype.fp32, adapter=adapter), 0)
    return model


def visits(causal_lm: Any) -> list[list[list[int]]]:
    """Return the experts that each forward visited, for each layer."""
    return [layer.mlp.visited for layer in causal_lm.model.layers]


def listed_steps(
    assets: Assets,
    targets: list[str] | None,
    checkpointing: str,
    fused: FusedLayers,
    world: World,
    folder: Path,
) -> dict[str, Any]:
    """Gradient norms of `STEPS`, the experts visited in them; the weights after them go to `folder`.

    A sharded model of the same kind is the reference.
    """
    dataset, model = assets.dataset(), listed_packed(world.sequence, fused, targets)
    checkpoint_layers(model.causal_lm, checkpointing)
    if checkpointing == "full":
        offload_inputs(model.causal_lm)
    blocks = [layer.mlp for layer in model.causal_lm.model.layers]
    assert partly_used_blocks(model.causal_lm) == blocks
    policy = PolicyEngine(model, OPTIM, world)
    reference = FrozenEngine(listed_packed(world.sequence), frozen_config(Offload.none, Dtype.fp32))
    norms = all_steps(policy, Objective(LOSS, ReferenceProvider(engine=reference)), dataset, world)
    write_whole(policy, folder / "after.safetensors")
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) is (fused is FusedLayers.compile)
    return {"norms": norms, "visited": visits(policy.causal_lm)}


def plain_model(targets: list[str] | None) -> Any:
    model = listed_packed(targets=targets)
    model.causal_lm.config._attn_implementation = "sdpa"
    for layer in model.causal_lm.model.layers:
        layer.mlp.touches_all = True
    return model.causal_lm


ZERO3, ZERO2 = ParallelismConfig(), ParallelismConfig(ParallelismKind.zero2)
OFFLOADED = ParallelismConfig(offload_parameters=Offload.cpu)
SHARED = ParallelismConfig(sequence_parallel=2)
OF_EXPERTS = ["up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("size", "parallelism", "targets", "checkpointing"),
    [
        pytest.param(3, ZERO3, None, "full", id="3 ranks, checkpointing"),
        pytest.param(2, OFFLOADED, OF_EXPERTS, "none", id="2 ranks, offloaded weights, LoRA on experts"),
        pytest.param(3, ZERO3, ["q_proj"], "full", id="3 ranks, LoRA beside frozen experts"),
        pytest.param(2, SHARED, None, "full", id="2 ranks share tokens, checkpointing"),
        pytest.param(2, ZERO2, OF_EXPERTS, "none", id="2 ranks, zero2, LoRA on experts"),
        pytest.param(2, ZERO2, None, "compiled", id="2 ranks, zero2, compiled"),
        pytest.param(2, ParallelismConfig(ParallelismKind.ddp), None, "full", id="2 ranks, ddp"),
    ],
)
def test_ranks_with_tokens_for_different_experts_train_like_one_process(
    size: int,
    parallelism: ParallelismConfig,
    targets: list[str] | None,
    checkpointing: str,
    assets: Assets,
    tmp_path: Path,
) -> None:
    fused = FusedLayers.none
    if checkpointing == "compiled":
        checkpointing, fused = "none", FusedLayers.compile
    scenario = partial(listed_steps, assets, targets, checkpointing, fused)
    results = run_ranks(scenario, size, tmp_path / "ranks", parallelism, seconds=SECONDS)
    # In the second step one rank has a pair and the others a dummy, which visits one expert of each layer; or
    # each rank has a share of the tokens.
    assert results[0]["visited"] != results[1]["visited"]
    assert all(UNUSED not in of for result in results for layer in result["visited"] for of in layer)
    plain = plain_model(targets)
    values = entries_of(plain_model(None), assets.dataset())
    norms = plain_steps(plain, assets.dataset(), values)
    after = load_file(tmp_path / "ranks" / "after.safetensors")
    for result in results:
        assert result["norms"] == pytest.approx(norms, rel=5e-5)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert {name.replace(".default", "") for name in trained} == {n.replace(".default", "") for n in after}
    for name, tensor in trained.items():
        torch.testing.assert_close(
            after[name], tensor.detach(), atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )


def one_rank_makes_no_keys(model: Path, world: World, folder: Path) -> float:
    """Norm of a step in which the sequences of rank 1 are too short for a compressed key."""
    policy = load_policy(ModelConfig(str(model), dtype=Dtype.fp32), world, max_length=64)
    policy.model.arrange(Arrangement.padded, own_logits=False)
    policy.train()
    batch = pack_unkeyed(random_pairs([(1, 1, 1)] if world.rank else [(9, 8, 8)]))
    policy.backward(policy.token_logps(batch).sum(), is_last=True)
    return float(policy.step(1e-2))


def test_a_rank_without_compressed_keys_does_not_stop_the_others(tmp_path: Path) -> None:
    tiny_family("deepseek_v4", VOCABULARY).save_pretrained(tmp_path / "model")
    scenario, norms = partial(one_rank_makes_no_keys, tmp_path / "model"), []
    for kind in (ParallelismKind.zero3, ParallelismKind.zero2):
        norms += run_ranks(scenario, 2, tmp_path / kind, kind, seconds=SECONDS)
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5)
