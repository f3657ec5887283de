"""Steps equal plain PyTorch for any number of ranks, packing and sharding."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.comm import comm
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import ReferenceFreeLossConfig
from dpo_dist.config.schema import Dtype, ModelConfig, ParallelismConfig, ParallelismKind
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import LossScale, PolicyEngine
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.model.files.load import TORCH_DTYPES
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.training.steps.step import Objective
from tests.dist.scenario import (
    LOSS,
    STEPS,
    Assets,
    RowsAtHand,
    all_steps,
    load_policy,
    load_reference,
    plain_steps,
)
from tests.support.packing import COSTS
from tests.support.precision import NEEDS_FP16
from tests.support.ranks import be_alone_on_a_node, run_ranks
from tests.support.written import whole_weights


def shards(policy: PolicyEngine) -> list[Tensor]:
    """Copies of this rank's shards of the weights, whose padding may be any bits."""
    parameters = policy.causal_lm.parameters()
    return [getattr(parameter, "ds_tensor", parameter).detach().nan_to_num() for parameter in parameters]


def steps(
    assets: Assets, model: Path, reference: Sequence[np.ndarray], dtype: Dtype, world: World, folder: Path
) -> dict[str, Any]:
    """`STEPS` with a reference engine, and steps that are not finite, coming and going between."""
    dataset = assets.dataset()
    policy = load_policy(assets.config(model, dtype=dtype).model, world)
    if policy.loss_scale is not None:
        policy.set_loss_scale(LossScale(2.0**8))  # at the start's, the first step overflows
    write_whole(policy, folder / "before.safetensors")
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))
    norms = all_steps(policy, objective, dataset, world, STEPS[:1])
    shares = reference_comes_and_goes(assets, model, dtype, dataset, reference, world)

    # Steps that are not finite leave nothing behind, so that the next ones are those of plain PyTorch.
    spoilt = dataset.keys[dataset.response_range(3)[1]].tobytes()
    before = shards(policy)
    spoilt_objective = Objective(LOSS, RowsAtHand.of(dataset, reference, spoilt))
    bad_norms = all_steps(policy, spoilt_objective, dataset, world, [STEPS[0], ((3,), 8192)])
    unchanged = all(torch.equal(a, b) for a, b in zip(before, shards(policy), strict=True))
    norms += all_steps(policy, objective, dataset, world, STEPS[1:])
    write_whole(policy, folder / "after.safetensors")
    return {"norms": norms, "bad norms": list(map(str, bad_norms)), "unchanged": unchanged, **shares}


def write_whole(policy: PolicyEngine, file: Path) -> None:
    weights = whole_weights(policy)
    if weights is not None:
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, file)


def reference_comes_and_goes(
    assets: Assets,
    model: Path,
    dtype: Dtype,
    dataset: PreferenceDataset,
    expected: Sequence[np.ndarray],
    world: World,
) -> dict[str, Any]:
    """Load, score with and free the reference; how far it is off, and the share of it that is held here."""
    engine = load_reference(assets.reference, assets.config(model, dtype=dtype), world)
    parameters = list(engine._engine.module.parameters())
    held = sum(parameter.ds_tensor.numel() for parameter in parameters)
    whole = sum(parameter.ds_numel for parameter in parameters)
    plan = shard_batch(dataset, np.arange(4), world.replica, world.replicas, 256, COSTS)
    wanted, drift = RowsAtHand.of(dataset, expected), 0.0
    for batch in plan.batches():
        difference = engine.token_logps(batch) - wanted.token_logps(batch)
        drift = max(drift, float(difference.abs().max())) if len(batch.keys) else drift
    engine.free()
    return {"share": held / whole, "drift": drift}


# Tolerances of trained weights, of gradient norms, and of the reference's log-probs.
TOLERANCES = {
    Dtype.fp32: (1e-5, 5e-5, 1e-5),
    Dtype.bf16: (0.01, 0.1, 0.1),
    Dtype.fp16: (0.01 / 8, 0.1 / 8, 0.1 / 8),
}
FP32, BF16, FP16 = TOLERANCES
ZERO3, ZERO2, DDP = ParallelismKind
WAYS = [
    pytest.param(3, ZERO3, False, FP32, id="3 ranks, zero3, untied"),
    pytest.param(3, ZERO2, True, FP32, id="3 ranks, zero2"),
    pytest.param(2, DDP, True, FP32, id="2 ranks, ddp"),
    pytest.param(4, ParallelismConfig(ZERO2, sequence_parallel=2), False, FP32, id="2 x 2, sequence, zero2"),
    pytest.param(4, ParallelismConfig(ZERO3, sequence_parallel=4), True, FP32, id="4, sequence"),
    pytest.param(4, ParallelismConfig(ZERO3, shard_size=2), False, FP32, id="2 x 2, sharded in groups"),
    pytest.param(3, ParallelismConfig(ZERO3, shard_size=1), True, FP32, id="3 copies"),
    pytest.param(
        4, ParallelismConfig(ZERO3, shard_size=2, sequence_parallel=2), True, FP32, id="sequences in groups"
    ),
    pytest.param(
        2, ParallelismConfig(ZERO3, shard_size=1), True, FP16, marks=NEEDS_FP16, id="2 copies, fp16"
    ),
    # Each kind has an optimizer wrapper of its own in 16 bits, with its own way to skip a step.
    pytest.param(2, ZERO3, True, BF16, id="2 ranks, zero3, bf16"),
    pytest.param(2, ZERO2, True, BF16, id="2 ranks, zero2, bf16"),
    pytest.param(2, DDP, True, BF16, id="2 ranks, ddp, bf16"),
    pytest.param(2, ZERO3, True, FP16, marks=NEEDS_FP16, id="2 ranks, zero3, fp16"),
]


@pytest.mark.parametrize(("size", "kind", "tied", "dtype"), WAYS)
def test_steps_equal_plain_pytorch_up_to_rounding(
    size: int,
    kind: ParallelismKind | ParallelismConfig,
    tied: bool,
    dtype: Dtype,
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
) -> None:
    model, ranks = assets.policy if tied else assets.untied_policy, tmp_path / "ranks"
    results = run_ranks(partial(steps, assets, model, plain_entries, dtype), size, ranks, kind, dtype)
    of_weights, of_norms, of_drift = TOLERANCES[dtype]
    rounded = TORCH_DTYPES[dtype]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=rounded)
    before = load_file(ranks / "before.safetensors")
    assert before.keys() == loaded.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())
    norms = plain_steps(loaded.float(), assets.dataset(), plain_entries)
    after = load_file(ranks / "after.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert after[name].dtype is rounded
        assert not torch.equal(before[name], after[name]), f"{name} was not trained"
        assert torch.allclose(after[name].float(), tensor, atol=of_weights, rtol=of_weights), name
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(norms, rel=of_norms)
        assert of_rank["norms"] == results[0]["norms"]
        assert of_rank["bad norms"] == ["inf", "inf"]
        assert of_rank["unchanged"]
        assert of_rank["drift"] < of_drift
        assert of_rank["share"] == pytest.approx(1 / (getattr(kind, "shard_size", None) or size), abs=0.01)


def norm_in_bf16(model: Path, assets: Assets, world: World, _folder: Path) -> float:
    """Of a step in which each pair is a micro-batch of its own, so that only sums over processes differ."""
    policy = load_policy(ModelConfig(str(model), dtype=Dtype.bf16), world)
    objective = Objective(ReferenceFreeLossConfig(), ReferenceProvider())
    (norm,) = all_steps(policy, objective, assets.dataset(), world, [((0, 1, 2, 3, 4), 1)])
    return norm


@pytest.mark.parametrize("kind", ParallelismKind)
def test_gradients_in_bf16_that_are_summed_in_float32_do_not_depend_on_the_number_of_processes(
    kind: ParallelismKind, assets: Assets, tmp_path: Path
) -> None:
    scenario = partial(norm_in_bf16, assets.policy, assets)
    # By a power of two nothing is rounded where the loss is multiplied by the number of processes.
    one, two = (
        run_ranks(scenario, size, tmp_path / str(size), kind, Dtype.bf16, enter=be_alone_on_a_node)[0]
        for size in (1, 2)
    )
    assert two == pytest.approx(one, rel=1e-6)


def messages(assets: Assets, world: World, _folder: Path) -> dict[str, list[list[int]]]:
    """Calls that gather weights, and that sum tensors, in a second step of two micro-batches.

    Of each call the processes and the elements.
    """
    policy = load_policy(assets.config(assets.policy, dtype=Dtype.fp32).model, world)
    objective = Objective(ReferenceFreeLossConfig(), ReferenceProvider())
    gathers, sums = list[list[int]](), list[list[int]]()
    gather, add = comm.cdb.all_gather_into_tensor, dist.all_reduce

    def noted_gather(**options: Any) -> Any:
        gathers.append([dist.get_world_size(options["group"]), options["output_tensor"].numel()])
        return gather(**options)

    def noted_sum(tensor: torch.Tensor, *arguments: Any, group: Any = None, **options: Any) -> Any:
        sums.append([dist.get_world_size(group), tensor.numel()])
        return add(tensor, *arguments, group=group, **options)

    for _ in range(2):
        gathers.clear()
        sums.clear()
        with (
            mock.patch.object(comm.cdb, "all_gather_into_tensor", noted_gather),
            mock.patch.object(dist, "all_reduce", noted_sum),
        ):
            all_steps(policy, objective, assets.dataset(), world, [((0, 1, 2, 3, 4), 1)])
    return {"gathers": gathers, "sums": sums}


def test_a_layer_is_gathered_at_once(assets: Assets, tmp_path: Path) -> None:
    plain = run_ranks(partial(messages, assets), 4, tmp_path / "ranks", ParallelismConfig(ZERO3))[0][
        "gathers"
    ]
    assert {processes for processes, _ in plain} == {4}
    # In each micro-batch the embedding and two layers of six matrices: far fewer calls than 26.
    assert sum(size >= 1024 for _, size in plain) < 20


def test_groups_of_shards_exchange_gradients_once_a_step_and_nothing_else(
    assets: Assets, tmp_path: Path
) -> None:
    groups = ParallelismConfig(ZERO3, shard_size=2)
    found = run_ranks(partial(messages, assets), 4, tmp_path / "ranks", groups)[0]
    assert {processes for processes, _ in found["gathers"]} == {2}
    weights = sum(
        weight.numel() for weight in AutoModelForCausalLM.from_pretrained(assets.policy).parameters()
    )
    large = [size for _, size in found["sums"] if size > 100]  # the others are of metrics
    assert large == [pytest.approx(weights / 2, rel=0.01)]
