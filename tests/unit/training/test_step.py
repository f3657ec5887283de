"""A step: micro-batches ready on the host, no wait for the device, gradients of the whole batch."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.losses import KINDS, LossConfig, LossKind, Weighting
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.collate import shard_batch
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.model.load import load_packed
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.objective.losses import BatchFacts, RunningMeans
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.scoring import NoReference, StoredReference
from dpo_dist.reference.store import LogpStore
from dpo_dist.training.loss import Objective
from dpo_dist.training.step import StepClock, evaluate, train_step
from tests.support import tiny
from tests.support.one_process import Fixed, OneProcess
from tests.support.own_loss import function_of
from tests.support.packing import COSTS
from tests.support.records import jsonl
from tests.support.tiny_model import write_model

CPU = torch.device("cpu")
WORLD = World(None, 0, 1, CPU, ())
PAIRS = 5
BUDGET = 64
POLICY: Any = Fixed(lambda targets: -torch.ones_like(targets))
ROWS = [
    {
        "prompt": f"q {n}",
        "chosen": f"right {n}" * (1 + n),
        "rejected": f"wrong {n}" * 2,
        "score_chosen": 2,
        "score_rejected": 1,
    }
    for n in range(PAIRS)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataset:
    folder = tmp_path_factory.mktemp("data")
    config = DataConfig(cache=str(folder / "cache"))
    (folder / "more").mkdir()
    files = jsonl(folder, *ROWS[:2]), jsonl(folder / "more", *ROWS[2:])
    written = prepare_dataset(list(map(SourceConfig, files)), config, tiny.qwen(), "qwen")
    return open_dataset(written, config)


def stored(data: PreferenceDataset, root: Path, responses: int = 2 * PAIRS) -> StoredReference:
    """A store of the first `responses` of `data`; values encode the response and the token."""
    space = ReferenceFingerprint("weights", {})
    lengths = [tokens for index in range(PAIRS) for tokens in data.lengths(index)[1:]]
    values = [-1 - n - np.linspace(0, 0.5, tokens, dtype=np.float32) for n, tokens in enumerate(lengths)]
    LogpStore.open(root, space).write(data.keys[:responses], values[:responses])
    return StoredReference(LogpStore.open(root, space))


def plan_of(data: PreferenceDataset, rank: int = 0, world_size: int = 1) -> Any:
    return shard_batch(data, np.arange(PAIRS), rank, world_size, BUDGET, COSTS)


def test_a_missing_log_prob_ends_an_evaluation(data: PreferenceDataset, tmp_path: Path) -> None:
    objective = Objective(LossConfig(), stored(data, tmp_path, responses=2 * PAIRS - 1))
    with pytest.raises(ReferenceModelError, match="missing or damaged"):
        evaluate(POLICY, objective, plan_of(data), WORLD, RunningMeans())  # type: ignore[arg-type]
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedCausalLM:
    folder = write_model(tmp_path_factory.mktemp("model"))
    return load_packed(folder, ModelConfig(dtype=Dtype.fp32), 1024, CPU)


@pytest.mark.parametrize(
    ("kind", "weighting"),
    [
        *((kind, Weighting.none) for kind in sorted(LossKind)),
        (LossKind.sigmoid, Weighting.wpo),
        (LossKind.beta_dpo, Weighting.wpo),
    ],
)
def test_a_step_in_micro_batches_has_the_gradient_of_the_whole_batch(
    data: PreferenceDataset, model: PackedCausalLM, tmp_path: Path, kind: LossKind, weighting: Weighting
) -> None:
    """Also for coupled losses: two passes give the gradient of one graph over all pairs."""
    ld_alpha = None if kind is LossKind.sft else 0.5
    loss = LossConfig(kind, weighting=weighting, ld_alpha=ld_alpha, function=function_of(kind))
    objective = Objective(
        loss, stored(data, tmp_path / "store") if KINDS[kind].needs_reference else NoReference()
    )
    running, indices = RunningMeans(margin=-1.0), np.arange(PAIRS)

    def gradient(step: Callable[[Any], None]) -> Tensor:
        model.zero_grad()
        step(OneProcess(model))
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def in_micro_batches(policy: Any) -> None:
        plan = shard_batch(data, indices, 0, 1, BUDGET, COSTS, loss.is_one_sided)
        assert len(plan.micro_batches) > 1
        ready = objective.ready_step(plan, CPU)
        train_step(policy, objective, ready, 1.0, WORLD, StepClock(CPU), running)

    def at_once(policy: Any) -> None:
        plan = shard_batch(data, indices, 0, 1, 8192, COSTS, loss.is_one_sided)
        (batch,) = objective.ready_batches(plan, CPU)
        facts = BatchFacts(plan.mean_chosen_tokens, running=running)
        pairs = objective.score(policy, batch, objective.reference.token_logps(batch), facts)
        total, _ = objective.measure(pairs)
        policy.backward(total / PAIRS, is_last=True)

    ours, direct = gradient(in_micro_batches), gradient(at_once)
    assert (ours - direct).norm() <= 1e-4 * direct.norm()
    assert direct.norm() > 0
