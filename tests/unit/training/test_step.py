"""A step gives each log-prob the gradient of the global batch's mean loss, on any number of ranks."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import LossConfig, LossKind, LossTermConfig
from dpo_dist.distributed.zero import Engine, PolicyEngine
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.partners import with_partners
from dpo_dist.objective.distillation import SparseRows
from dpo_dist.objective.logps import sum_by_response
from dpo_dist.objective.losses import RunningMeans, preference_loss
from dpo_dist.objective.token_logps import Statistic
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.reference.teacher import Teacher
from dpo_dist.training.steps.step import Objective, evaluate, reduce_step, train_step
from tests.support.alone import ALONE
from tests.support.cache import opened
from tests.support.packing import COSTS
from tests.support.records import GOOD, jsonl

NORM = 0.125


class LogProbs:
    """Stands for a model: log-probs of the tokens of each response are its parameters, in float64."""

    def __init__(self, dataset: PreferenceDataset, seed: int):
        draw = torch.Generator().manual_seed(seed)
        tokens = np.delete(dataset.piece_tokens, dataset.first_pieces[:-1]).tolist()
        drawn = [torch.rand(each, dtype=torch.float64, generator=draw) for each in tokens]
        self.seed, self.values = seed, [(-each).requires_grad_() for each in drawn]
        self._of = dict(zip([key.tobytes() for key in dataset.keys], self.values, strict=True))

    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        dummy = torch.full((len(batch.targets),), -self.seed, dtype=torch.float64)
        logps = torch.cat([self._of[key.tobytes()] for key in batch.keys]) if len(batch.keys) else dummy
        return torch.stack((logps, *[logps] * len(statistics))) if statistics else logps

    def add_stored_logps(self, batch: PackedBatch) -> PackedBatch:
        return batch

    def train(self, mode: bool = True) -> None: ...

    def backward(self, loss: Tensor, is_last: bool) -> None:
        if loss.requires_grad:
            loss.backward()

    def step(self, rate: float) -> Tensor:
        return torch.tensor(NORM)

    def gradient(self) -> Tensor:
        return torch.cat([value.grad for value in self.values if value.grad is not None])


@pytest.mark.parametrize("kind", [LossKind.sigmoid, LossKind.ipo, LossKind.aot, LossKind.beta_dpo])
@pytest.mark.parametrize("budget", [1, 64, 8192])
def test_the_gradient_is_that_of_the_mean_loss_of_the_global_batch(
    kind: LossKind, budget: int, tmp_path: Path
) -> None:
    dataset, loss = opened(tmp_path, jsonl(tmp_path, *GOOD)), LossConfig(kind, beta=0.5)
    policy, reference, plain = (LogProbs(dataset, seed) for seed in (1, 2, 1))
    objective = Objective(loss, cast(ReferenceProvider, reference))
    rows, ranks, total = np.arange(len(dataset)), 1 if loss.is_coupled else 2, 0.0
    for rank in range(ranks):
        share = shard_batch(dataset, rows, rank, ranks, budget, COSTS, loss)
        step = objective.ready_step(share, ALONE.device)
        engine = cast(PolicyEngine, policy)
        sums, norm = train_step(engine, objective, step, 1e-3, ALONE, RunningMeans())
        reduced = reduce_step(sums, [], norm, ALONE)
        assert reduced.grad_norm == NORM
        total += reduced.sums["loss"]

    lengths = torch.tensor([len(value) for value in plain.values])
    pairs = [sum_by_response(torch.cat(each.values), lengths) for each in (plain, reference)]
    expected = preference_loss(*pairs, loss).mean()
    expected.backward()
    assert total / len(dataset) == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(policy.gradient(), plain.gradient(), rtol=1e-9, atol=1e-12)
    share = shard_batch(dataset, rows, 0, 1, budget, COSTS, loss)
    evaluated, _ = evaluate(cast(PolicyEngine, policy), objective, share, ALONE, RunningMeans())
    assert evaluated["loss"] == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("kind", [LossKind.sigmoid, LossKind.aot])
def test_a_teacher_that_is_certain_of_the_chosen_response_teaches_as_sft_does(
    kind: LossKind, tmp_path: Path
) -> None:
    """Beside a loss of pairs or of a whole batch, whose weights of tokens are not those of the divergence."""
    longer = {"prompt": "Hi", "chosen": "a long answer of many words", "rejected": "no"}
    dataset = opened(tmp_path, jsonl(tmp_path, *GOOD, longer))
    kept = SparseRows(1, 1, 1.0, 9)
    rows = SimpleNamespace(token_logps=lambda batch, _: torch.zeros(kept.width, len(batch.targets)))
    losses, gradients = [], []
    for other in (LossKind.sft, LossKind.distill):
        terms = [LossTermConfig(kind, 1.0), LossTermConfig(other, 2.0)]
        loss = LossConfig(beta=0.5, ld_alpha=0.5, terms=terms)
        policy, reference = (LogProbs(dataset, seed) for seed in (1, 2))
        teacher = Teacher(kept, engine=cast(Engine, rows)) if loss.needs_teacher else None
        objective = Objective(loss, cast(ReferenceProvider, reference), teacher=teacher)
        share = shard_batch(dataset, np.arange(len(dataset)), 0, 1, 64, COSTS, loss)
        step = objective.ready_step(share, ALONE.device)
        engine = cast(PolicyEngine, policy)
        sums, norm = train_step(engine, objective, step, 1e-3, ALONE, RunningMeans())
        losses.append(reduce_step(sums, [], norm, ALONE).sums["loss"])
        gradients.append(policy.gradient())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_the_mismatch_of_kto_is_the_mean_log_ratio_of_the_partners_of_the_global_batch(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"{n}?", "completion": "a" * 9 * n, "label": n % 2 == 0} for n in range(1, 8)]
    dataset, loss = with_partners(opened(tmp_path, jsonl(tmp_path, *rows)), 8192), LossConfig(LossKind.kto)
    policy, reference = (LogProbs(dataset, seed) for seed in (1, 2))
    objective, found = Objective(loss, cast(ReferenceProvider, reference)), 0.0
    for rank in range(2):
        share = shard_batch(dataset, np.arange(len(dataset)), rank, 2, 1, COSTS, loss)
        partners = objective.ready_step(share, ALONE.device).partners
        engine = cast(PolicyEngine, policy)
        mismatch = objective.facts(engine, share, partners, ALONE, RunningMeans()).mismatch
        assert mismatch is not None
        found += mismatch.item()
    ratios = [(one - other).sum().item() for one, other in zip(policy.values, reference.values, strict=True)]
    assert found == pytest.approx(np.mean(ratios[1::2]), rel=1e-9)
