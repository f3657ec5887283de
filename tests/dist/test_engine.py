"""Steps equal plain PyTorch for any number of ranks, packing and sharding."""

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

from dpo_dist.config.schema import Dtype, ParallelismConfig, ParallelismKind
from dpo_dist.data.dataset import PreferenceDataset, shard_batch
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import LossScale, PolicyEngine
from dpo_dist.model.load import TORCH_DTYPES
from dpo_dist.reference.engine import load_reference
from dpo_dist.training.step import Objective
from tests.dist.scenario import (
    LOSS,
    STEPS,
    Assets,
    RowsAtHand,
    all_steps,
    files_of,
    load_policy,
    plain_steps,
)
from tests.support.packing import COSTS
from tests.support.precision import NEEDS_FP16
from tests.support.ranks import run_ranks
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
    engine = load_reference(files_of(assets.reference), assets.config(model, dtype=dtype), world)
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


ZERO3, ZERO2, DDP = ParallelismKind
WAYS = [
    pytest.param(3, ZERO3, False, id="3 ranks, zero3, untied"),
    pytest.param(3, ZERO2, True, id="3 ranks, zero2"),
    pytest.param(2, DDP, True, id="2 ranks, ddp"),
    pytest.param(4, ParallelismConfig(ZERO2, sequence_parallel=2), False, id="2 x 2, sequence, zero2"),
    pytest.param(4, ParallelismConfig(ZERO3, sequence_parallel=4), True, id="4, sequence"),
]


@pytest.mark.parametrize(("size", "kind", "tied"), WAYS)
def test_steps_equal_plain_pytorch(
    size: int,
    kind: ParallelismKind | ParallelismConfig,
    tied: bool,
    assets: Assets,
    plain_entries: list[np.ndarray],
    tmp_path: Path,
) -> None:
    model = assets.policy if tied else assets.untied_policy
    results = run_ranks(
        partial(steps, assets, model, plain_entries, Dtype.fp32), size, tmp_path / "ranks", kind
    )
    assert_as_plain(results, model, Dtype.fp32, assets, plain_entries, tmp_path / "ranks", 1e-5, 5e-5)
    for of_rank in results:
        assert of_rank["drift"] < 1e-5
        assert of_rank["share"] == pytest.approx(1 / size, abs=0.01)


def assert_as_plain(
    results: list[dict[str, Any]],
    model: Path,
    dtype: Dtype,
    assets: Assets,
    plain_entries: list[np.ndarray],
    ranks: Path,
    tolerance: float,
    tolerance_of_norms: float,
) -> None:
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
        assert torch.allclose(after[name].float(), tensor, atol=tolerance, rtol=tolerance), name
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(norms, rel=tolerance_of_norms)
        assert of_rank["norms"] == results[0]["norms"]
        assert of_rank["bad norms"] == ["inf", "inf"]
        assert of_rank["unchanged"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, Dtype.bf16) for kind in ParallelismKind),
        pytest.param(ParallelismKind.zero3, Dtype.fp16, marks=NEEDS_FP16),
    ],
)
def test_steps_in_16_bits_equal_float32_up_to_rounding(
    kind: ParallelismKind, dtype: Dtype, assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    """Each kind has an optimizer wrapper of its own in 16 bits, with its own way to skip a step."""
    scenario = partial(steps, assets, assets.policy, plain_entries, dtype)
    results = run_ranks(scenario, 2, tmp_path / "ranks", kind, dtype)
    finer = 8 if dtype is Dtype.fp16 else 1
    tolerances = 0.01 / finer, 0.1 / finer
    assert_as_plain(results, assets.policy, dtype, assets, plain_entries, tmp_path / "ranks", *tolerances)
    assert all(of_rank["drift"] < 0.1 / finer for of_rank in results)
