"""An update is that of PyTorch's AdamW, exactly; the loss scale of fp16."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import AttentionBackend, Dtype, OptimConfig, ParallelismConfig, ParallelismKind
from dpo_dist.distributed import zero
from dpo_dist.distributed.deepspeed_config import START, policy_config
from dpo_dist.distributed.processes.failures import Reports
from dpo_dist.distributed.processes.join import join_world
from dpo_dist.distributed.processes.world import ShardGroup
from dpo_dist.distributed.zero import LossScale, PolicyEngine
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.packed import PackedCausalLM
from tests.support.families import tiny_family
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.written import whole_weights

pytestmark = pytest.mark.slow


RATE = 100.0  # updates are large beside the rounding of the weights
EPS = 1.0  # and nowhere as large as the rounding of a gradient decides


@pytest.mark.parametrize(
    ("kind", "clipped"),
    [(ParallelismKind.zero3, 10.0), (ParallelismKind.zero2, None), (ParallelismKind.ddp, 10.0)],
)
def test_an_update_is_that_of_adamw(
    kind: ParallelismKind, clipped: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero, "ADAM_EPS", EPS)
    optim = OptimConfig(weight_decay=0.1, max_grad_norm=clipped)
    torch.manual_seed(0)
    causal_lm, batch = tiny_family("llama"), pack_unkeyed(random_pairs([(7, 5, 9), (3, 4, 2)]))
    plain = copy.deepcopy(causal_lm)
    with join_world(policy_config(ParallelismConfig(kind), optim, Dtype.fp32), 60, Reports()) as world:
        assert world.sum(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]
        policy = PolicyEngine(PackedCausalLM(causal_lm, AttentionBackend.sdpa), optim, world)
        policy.train()
        for part, is_last in ((0.25, False), (0.5, True)):
            policy.backward(-policy.token_logps(batch).sum() * part, is_last=is_last)
        norm = float(policy.step(RATE))
        found = whole_weights(policy)

    (-PackedCausalLM(plain, AttentionBackend.sdpa)(batch).sum() * 0.75).backward()
    weights = dict(plain.named_parameters())
    groups = [
        {"params": [weight for weight in weights.values() if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights.values() if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=2e-6)
    if clipped is not None:
        torch.nn.utils.clip_grad_norm_(weights.values(), clipped)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    torch.optim.AdamW(groups, lr=RATE, betas=tuple(optim.betas), eps=EPS).step()
    assert found is not None
    for name, weight in weights.items():
        update, expected = found[name] - before[name], weight.detach() - before[name]
        assert float((update - expected).norm() / expected.norm()) < 3e-6, name  # measured: 5e-7


@pytest.mark.parametrize(("rank", "writes"), [(0, True), (1, True), (2, False), (5, False)])
def test_the_first_copy_of_the_weights_alone_is_written(rank: int, writes: bool) -> None:
    """Of three groups of two ranks that each shard a copy."""
    with join_world(policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32), 60, Reports()) as world:
        placed = replace(world, rank=rank, size=6, shards=ShardGroup(rank % 2, 2, None))
        model = PackedCausalLM(tiny_family("llama"), AttentionBackend.sdpa)
        assert bool(PolicyEngine(model, OptimConfig(), placed).shards().slices) is writes


def lost_by_two_micro_batches(
    causal_lm: Any, arrangement: Arrangement = Arrangement.packed
) -> tuple[bool, str]:
    """Whether ZeRO-3 loses gradients of a model, and the error about them."""
    batch, error = pack_unkeyed(random_pairs([(7, 5, 9), (3, 4, 2)])), ""
    config = policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32)
    with join_world(config, 60, Reports()) as world:
        model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=arrangement)
        policy = PolicyEngine(model, OptimConfig(), world)
        policy.train()
        policy.token_logps(batch)  # without a backward, as in the check at start
        for is_last in (False, True):
            policy.backward(-policy.token_logps(batch).sum(), is_last=is_last)
        assert math.isfinite(policy.step(RATE))
        try:
            policy.check_gradients()
        except ConfigError as raised:
            error = str(raised)
        return policy.has_lost_gradients, error


@pytest.mark.parametrize("is_marked", [False, True])
def test_gradients_that_zero_3_loses_are_an_error_by_name(
    is_marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loses those of weights that several leaves share."""
    if is_marked:
        monkeypatch.setattr(zero, "shared_weights", lambda _: set())
    is_lost, error = lost_by_two_micro_batches(tiny_family("zamba2"))
    assert is_lost is is_marked
    if is_marked:
        assert "model.layers.1.shared_transformer.self_attn.q_proj.weight" in error
        assert "parallelism=zero2" in error
    else:
        assert not error


def test_gradients_that_may_be_reduced_too_early_are_lost() -> None:
    """Those of a leaf whose input has no gradient, as that of the first layer above frozen embeddings."""
    causal_lm = tiny_family("llama").requires_grad_(False)
    causal_lm.model.layers[0].self_attn.q_proj.requires_grad_(True)
    is_lost, error = lost_by_two_micro_batches(causal_lm, Arrangement.single)
    assert is_lost
    assert "model.layers.0.self_attn.q_proj.weight" in error


def test_gradients_of_a_leaf_that_waits_for_a_use_outside_of_the_loss_are_lost() -> None:
    causal_lm, calls = tiny_family("llama"), itertools.count()

    def call_twice(layer: nn.Module, arguments: Any, options: Any) -> None:
        if next(calls) == 1:  # in the first micro-batch only
            layer(*arguments, **options)

    causal_lm.model.layers[1].register_forward_pre_hook(call_twice, with_kwargs=True)
    is_lost, error = lost_by_two_micro_batches(causal_lm)
    assert is_lost
    assert "model.layers.1.self_attn.q_proj.weight" in error


def test_an_overflow_halves_the_loss_scale_and_a_thousand_updates_double_it() -> None:
    scale = LossScale().after(is_applied=True).after(is_applied=False)
    assert scale == LossScale(START / 2, applied=0)
    for _ in range(999):
        scale = scale.after(is_applied=True)
        assert scale.value == START / 2
    assert scale.after(is_applied=True) == LossScale(START, applied=0)
    assert LossScale(2.0).after(is_applied=False).after(is_applied=False) == LossScale(1.0)


def test_norms_and_weights_without_a_gradient_are_not_decayed(monkeypatch: pytest.MonkeyPatch) -> None:
    causal_lm = tiny_family("llama")
    unmoved = causal_lm.model.layers[0].mlp.up_proj.weight
    monkeypatch.setattr(zero, "without_gradient", lambda _: {unmoved})
    optimizer = zero.create_optimizer(
        PackedCausalLM(causal_lm, AttentionBackend.sdpa), OptimConfig(weight_decay=0.1), seed=0
    )
    decays = {weight: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert decays == {
        weight: 0.1 if weight.ndim > 1 and weight is not unmoved else 0.0 for weight in causal_lm.parameters()
    }


@pytest.mark.parametrize(
    ("processes", "of_node", "shards", "reduced"),
    [
        (8, 8, None, "bf16"),
        (16, 8, None, "fp32"),
        (16, 8, 8, "bf16"),
        (32, 8, 16, "fp32"),
        (1, 1, None, "bf16"),
    ],
)
def test_gradients_are_summed_in_float32_over_several_nodes(
    processes: int,
    of_node: int,
    shards: int | None,
    reduced: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of_node))
    parallelism = ParallelismConfig(shard_size=shards)
    config = policy_config(parallelism, OptimConfig(), Dtype.bf16)
    assert config["communication_data_type"] == reduced
