"""No kernel makes the host wait in a step, which is timed afterwards.

What waits in whole runs, `tests/simulated_cuda/test_waits.py` shows; only a GPU knows all kernels that do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_dist.config.losses import KINDS, BcoDelta, BcoPairOptions, IpoOptions, LossConfig, LossKind
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.numerics import deterministic_kernels
from dpo_dist.objective.distillation import SparseRows
from dpo_dist.objective.losses import BatchFacts, RunningMeans
from dpo_dist.objective.metrics import MetricPlan
from dpo_dist.objective.token_logps import rows_of_logits
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.reference.teacher import Teacher
from dpo_dist.training.steps.step import Objective
from tests.support.own_loss import function_of
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def without_waits(function: Callable[[], Any]) -> Any:
    """Call the function; a wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_and_backward_do_not_make_the_host_wait(tmp_path: Path) -> None:
    folder = write_model(tmp_path, hidden_size=256)
    model = load_packed(folder, ModelConfig(dtype=Dtype.bf16), 256, CUDA).to(CUDA)
    policy: Any = type("Model", (), {"token_logps": staticmethod(model)})
    objective = Objective(LossConfig(kind=LossKind.simpo), ReferenceProvider())
    batch = pack_unkeyed(random_pairs([(70, 50, 90), (1, 1, 4), (12, 3, 1)])).pinned()

    def step() -> None:
        (pairs,) = objective.score(policy, [batch], BatchFacts(1.0), CUDA)
        loss, _ = objective.measure(pairs, MetricPlan(objective.loss))
        loss.backward()  # type: ignore[no-untyped-call]

    step()
    without_waits(step)


def variants(kind: LossKind) -> Iterator[LossConfig]:
    """The loss by its defaults, and with another value of each option that is a choice."""
    plain = LossConfig(kind, function=function_of(kind))
    yield plain
    if kind is LossKind.bco_pair:
        yield replace(plain, options=BcoPairOptions(BcoDelta.running_mean))
    if kind is LossKind.ipo:
        yield replace(plain, options=IpoOptions(length_average=False))
    for option in sorted(KINDS[kind].uses):
        value = getattr(plain, option)
        if isinstance(value, StrEnum):
            yield from (replace(plain, **{option: other}) for other in type(value) if other is not value)
        elif value is None or isinstance(value, bool):
            yield replace(plain, **{option: 0.25 if value is None else not value})


@pytest.mark.parametrize("kind", LossKind)
def test_no_loss_makes_the_host_wait_and_each_is_that_of_the_cpu(kind: LossKind) -> None:
    shapes = [(7, 5, 9), (1, 1, 4), (12, 3, 2), *([(3, 4, 2, 6)] if KINDS[kind].accepts_rankings else [])]
    batch = pack_unkeyed(random_pairs(shapes))
    spread = torch.Generator().manual_seed(1)
    values, known = -3 * torch.rand(2, len(batch.targets), generator=spread)
    batch = replace(batch, reference_logps=known, score_gaps=torch.rand(len(shapes), generator=spread) + 0.5)

    def measured(config: LossConfig, device: torch.device, leaf: Tensor) -> list[Tensor]:
        """The gradient, the loss and the metrics; `leaf` is of the log-probs that a policy would return."""

        def token_logps(_: Any, statistics: Sequence[str]) -> Tensor:
            if not statistics:
                return leaf * 1
            halves = [leaf / 2 if name == "of_teacher" else leaf.detach() / 2 for name in statistics]
            return torch.stack((leaf, *halves))

        policy: Any = type("Model", (), {"token_logps": staticmethod(token_logps)})
        kept = SparseRows(2, 1, 1.0, 50)
        rows = torch.ones(kept.width, len(batch.targets), device=device)
        engine: Any = type("Model", (), {"token_logps": staticmethod(lambda *_: rows)})
        teacher = Teacher(kept, engine=engine) if config.needs_teacher else None
        running = RunningMeans(margin=0.1, reward=0.2, pairs=2)
        facts = BatchFacts(3.5, mismatch=-leaf.detach().mean(), running=running)
        objective = Objective(config, ReferenceProvider(), teacher=teacher)
        rank_batch: Any = type("RankBatch", (), {"batches": lambda: [batch]})
        ready = objective.ready_batches(rank_batch, device)
        (pairs,) = objective.score(policy, ready, facts, device)
        loss, sums = objective.measure(pairs, MetricPlan(config))
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return [leaf.grad, loss.detach(), sums.values]

    for config in variants(kind):
        leaves = [values.to(device, copy=True).requires_grad_() for device in (CPU, CUDA)]
        expected = measured(config, CPU, leaves[0])
        found = without_waits(lambda config=config, leaves=leaves: measured(config, CUDA, leaves[1]))
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-6, msg=str(config))


def test_draws_of_a_teacher_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 1000)
    uniforms = torch.rand(7, 4)
    kept = SparseRows(5, 4, 1.0, 1000)
    with deterministic_kernels(True):
        rows = rows_of_logits(logits.to(CUDA), uniforms.to(CUDA), kept)
    torch.testing.assert_close(rows.cpu(), rows_of_logits(logits, uniforms, kept))
