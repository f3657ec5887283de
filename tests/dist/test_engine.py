"""Steps equal plain PyTorch for any number of ranks, packing and sharding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import Dtype, Offload, ParallelismConfig, ParallelismKind, RunConfig
from dpo_dist.data.collate import shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import LossScale, PolicyEngine, frozen_config, sharded_loading
from dpo_dist.model.load import TORCH_DTYPES, load_packed
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import RunningMeans, preference_loss
from dpo_dist.reference.engine import load_reference
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, train_step
from tests.dist.scenario import Assets, files_of
from tests.support.packing import COSTS, plain_logps
from tests.support.precision import NEEDS_FP16
from tests.support.ranks import OPTIM, run_ranks
from tests.support.written import whole_weights

LOSS = LossConfig(beta=0.5)
# Rows of each global batch with the token budget that divides it: odd numbers, fewer pairs than ranks, one
# micro-batch and many.
STEPS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((0, 1, 2, 3, 4), 128),
    ((5,), 8192),
    ((6, 7, 8, 9, 10), 8192),
    ((2, 9), 1),
)


@dataclass(frozen=True)
class RowsAtHand:
    """Reference log-probs by key; `spoilt` is the key of a response whose values are not finite."""

    rows: dict[bytes, Tensor]
    spoilt: bytes = b""

    @staticmethod
    def of(dataset: PreferenceDataset, values: Sequence[np.ndarray], spoilt: bytes = b"") -> "RowsAtHand":
        keys = [key.tobytes() for key in dataset.keys]
        return RowsAtHand(dict(zip(keys, map(torch.from_numpy, values), strict=True)), spoilt)

    def attach(self, batch: PackedBatch) -> PackedBatch:
        return batch

    def token_logps(self, batch: PackedBatch) -> Tensor:
        if not len(batch.keys):
            return torch.zeros(len(batch.targets))
        parts = [self.rows[key.tobytes()] for key in batch.keys]
        return torch.cat(
            [
                part * torch.nan if key.tobytes() == self.spoilt else part
                for key, part in zip(batch.keys, parts, strict=True)
            ]
        )


def plain_steps(model: Any, dataset: PreferenceDataset, reference: Sequence[np.ndarray]) -> list[float]:
    """Gradient norms of `STEPS`, applied to `model` by PyTorch alone, a sequence at a time."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": OPTIM.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=OPTIM.lr,
        eps=OPTIM.eps,
    )
    norms = []
    for rows, _ in STEPS:
        pairs = [dataset.sequences(row) for row in rows]
        lengths = torch.tensor([len(response) for pair in pairs for response in pair.responses])
        values = np.concatenate([reference[place] for row in rows for place in dataset.response_range(row)])
        logps = sum_by_response(plain_logps(model, pairs), lengths)
        losses = preference_loss(logps, sum_by_response(torch.from_numpy(values), lengths), LOSS)
        losses.mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def shards(policy: PolicyEngine) -> list[Tensor]:
    """Return copies of this rank's shards of the weights, whose padding may be any bits."""
    parameters = policy.causal_lm.parameters()
    return [getattr(parameter, "ds_tensor", parameter).detach().nan_to_num() for parameter in parameters]


def steps(
    assets: Assets, model: Path, reference: Sequence[np.ndarray], dtype: Dtype, world: World, folder: Path
) -> dict[str, Any]:
    """`STEPS` with a reference engine, and steps that are not finite, coming and going between."""
    config, dataset = assets.config(model, dtype=dtype), assets.dataset()
    policy = PolicyEngine(
        load_packed(model, config.model, 1024, world.device, sequence=world.sequence), OPTIM, world
    )
    if policy.loss_scale is not None:
        policy.set_loss_scale(LossScale(2.0**8))  # at the start's, the first step overflows
    write_whole(policy, folder / "before.safetensors")
    objective = Objective(LOSS, RowsAtHand.of(dataset, reference))

    def step(rows: Sequence[int], budget: int, objective: Objective = objective) -> float:
        plan = shard_batch(dataset, np.array(rows), world.replica, world.replicas, budget, COSTS)
        ready = objective.ready_step(plan, world.device)
        clock = StepClock(world.device)
        return train_step(policy, objective, ready, OPTIM.lr, world, clock, RunningMeans())[1].item()

    norms = [step(*STEPS[0])]
    shares = reference_comes_and_goes(assets, config, dataset, reference, world)

    # Steps that are not finite leave nothing behind, so that the next ones are those of plain PyTorch.
    spoilt = dataset.keys[dataset.response_range(3)[1]].tobytes()
    before = shards(policy)
    bad_norms = [
        step(*STEPS[0], Objective(LOSS, RowsAtHand.of(dataset, reference, spoilt))),
        step([3], 8192, Objective(LOSS, RowsAtHand.of(dataset, reference, spoilt))),
    ]
    unchanged = all(torch.equal(a, b) for a, b in zip(before, shards(policy), strict=True))
    norms += [step(*of_step) for of_step in STEPS[1:]]
    write_whole(policy, folder / "after.safetensors")
    return {"norms": norms, "bad norms": list(map(str, bad_norms)), "unchanged": unchanged, **shares}


def write_whole(policy: PolicyEngine, file: Path) -> None:
    weights = whole_weights(policy)
    if weights is not None:
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, file)


def reference_comes_and_goes(
    assets: Assets,
    config: RunConfig,
    dataset: PreferenceDataset,
    expected: Sequence[np.ndarray],
    world: World,
) -> dict[str, Any]:
    """Load, score with and free the reference; how far it is off, and the share of it that is held here."""
    engine = load_reference(files_of(assets.reference), config, world)
    parameters = list(engine._engine.module.parameters())
    held = sum(parameter.ds_tensor.numel() for parameter in parameters)
    whole = sum(parameter.ds_numel for parameter in parameters)
    plan = shard_batch(dataset, np.arange(4), world.replica, world.replicas, 256, COSTS)
    wanted = RowsAtHand.of(dataset, expected)
    drift = 0.0
    for batch in plan.batches():
        difference = engine.token_logps(batch) - wanted.token_logps(batch)
        drift = max(drift, float(difference.abs().max())) if len(batch.keys) else drift
    engine.free()
    return {"share": held / whole, "drift": drift}


WAYS = [
    pytest.param(1, ParallelismKind.zero3, True, id="1 rank, zero3"),
    pytest.param(2, ParallelismKind.zero3, True, id="2 ranks, zero3"),
    pytest.param(3, ParallelismKind.zero3, False, id="3 ranks, zero3, untied"),
    pytest.param(2, ParallelismKind.zero2, False, id="2 ranks, zero2, untied"),
    pytest.param(3, ParallelismKind.zero2, True, id="3 ranks, zero2"),
    pytest.param(2, ParallelismKind.ddp, True, id="2 ranks, ddp"),
    pytest.param(2, ParallelismConfig(ParallelismKind.zero3, sequence_parallel=2), True, id="2, sequence"),
    pytest.param(
        4, ParallelismConfig(ParallelismKind.zero2, sequence_parallel=2), False, id="2 x 2, sequence, zero2"
    ),
    pytest.param(4, ParallelismConfig(ParallelismKind.zero3, sequence_parallel=4), True, id="4, sequence"),
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
    ranks = tmp_path / "ranks"
    results = run_ranks(partial(steps, assets, model, plain_entries, Dtype.fp32), size, ranks, kind)

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = load_file(ranks / "before.safetensors")
    assert before.keys() == loaded.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())

    norms = plain_steps(loaded, assets.dataset(), plain_entries)
    after = load_file(ranks / "after.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert not torch.equal(before[name], after[name]), f"{name} was not trained"
        torch.testing.assert_close(
            after[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(norms, rel=5e-5)
        assert of_rank["norms"] == results[0]["norms"]
        assert of_rank["drift"] < 1e-5
        assert of_rank["share"] == pytest.approx(1 / size, abs=0.01)
        assert of_rank["bad norms"] == ["inf", "inf"]
        assert of_rank["unchanged"]


@pytest.mark.parametrize("dtype", [Dtype.bf16, pytest.param(Dtype.fp16, marks=NEEDS_FP16)])
@pytest.mark.parametrize("kind", ParallelismKind)
def test_steps_in_16_bits_equal_float32_up_to_rounding(
    kind: ParallelismKind, dtype: Dtype, assets: Assets, plain_entries: list[np.ndarray], tmp_path: Path
) -> None:
    """Each kind has an optimizer wrapper of its own in 16 bits, with its own way to skip a step."""
    ranks = tmp_path / "ranks"
    scenario = partial(steps, assets, assets.policy, plain_entries, dtype)
    results = run_ranks(scenario, 2, ranks, kind, dtype)
    rounded, finer = TORCH_DTYPES[dtype], 8 if dtype is Dtype.fp16 else 1
    loaded = AutoModelForCausalLM.from_pretrained(assets.policy, dtype=rounded)
    before = load_file(ranks / "before.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())

    norms = plain_steps(loaded.float(), assets.dataset(), plain_entries)
    after = load_file(ranks / "after.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert after[name].dtype is rounded
        assert not torch.equal(before[name], after[name]), f"{name} was not trained"
        torch.testing.assert_close(after[name].float(), tensor, atol=0.01 / finer, rtol=0.01 / finer)
    for of_rank in results:
        assert of_rank["norms"] == pytest.approx(norms, rel=0.1 / finer)
        assert of_rank["norms"] == results[0]["norms"]
        assert of_rank["drift"] < 0.1 / finer
        assert of_rank["bad norms"] == ["inf", "inf"]
        assert of_rank["unchanged"]


def load_both(assets: Assets, world: World, _folder: Path) -> dict[str, bool]:
    """Return whether the reference, and a policy loaded after it, have only this rank's shard of weights."""
    config = assets.config(assets.policy).model
    with sharded_loading(world, frozen_config(Offload.none, Dtype.fp32)):
        reference = load_packed(assets.reference, config, 1024, world.device)
    policy = load_packed(assets.policy, config, 1024, world.device)
    return {
        name: all(hasattr(parameter, "ds_tensor") for parameter in model.parameters())
        for name, model in (("reference", reference), ("policy", policy))
    }


@pytest.mark.parametrize("kind", ParallelismKind)
def test_the_reference_is_loaded_sharded_and_the_policy_by_its_kind(
    kind: ParallelismKind, assets: Assets, tmp_path: Path
) -> None:
    for result in run_ranks(partial(load_both, assets), 2, tmp_path / "ranks", kind):
        assert result == {"reference": True, "policy": kind is ParallelismKind.zero3}
