"""The loop: the learning rate, steps without an update that end a run, and the best checkpoint."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import TrainingArguments
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_polynomial_decay_schedule_with_warmup,
)

from dpo_dist.config.load import load_run_config
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import LearningRateSchedule, OptimConfig, TrainerConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.metrics import MetricPlan
from dpo_dist.training.start.inputs import check_keep_best
from dpo_dist.training.steps.health import best_after, count_step, divergence_error
from dpo_dist.training.steps.loop import Loop
from dpo_dist.training.steps.schedule import check_schedule, learning_rate
from dpo_dist.training.steps.state import BestCheckpoint, Health, Position
from dpo_dist.training.steps.step import StepTotals, without_comparisons


def of_transformers(schedule: LearningRateSchedule, floor: float, warmup: int, steps: int) -> list[float]:
    """Return the rates of the first `steps` + 1 steps by the schedule of transformers."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    match schedule:
        case LearningRateSchedule.constant:
            made = get_constant_schedule_with_warmup(optimizer, warmup)
        case LearningRateSchedule.inverse_sqrt:
            made = get_inverse_sqrt_schedule(optimizer, warmup)
        case LearningRateSchedule.linear:
            made = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=0.5 * floor)
        case LearningRateSchedule.cosine:
            made = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=floor)
    found = []
    for _ in range(steps + 1):
        found += made.get_last_lr()
        optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "floor"),
    [
        *((schedule, 0.0) for schedule in LearningRateSchedule),
        (LearningRateSchedule.linear, 0.2),
        (LearningRateSchedule.cosine, 0.2),
    ],
)
@given(steps=st.integers(1, 60), ratio=st.none() | st.floats(0, 0.999), data=st.data())
def test_schedules_are_those_of_transformers_whose_warmup_is_from_zero(
    schedule: LearningRateSchedule, floor: float, steps: int, ratio: float | None, data: st.DataObject
) -> None:
    optim = OptimConfig(lr=0.5, schedule=schedule, min_lr_ratio=floor)
    if ratio is None:
        warmup = data.draw(st.integers(0, steps - 1))
        optim = replace(optim, warmup=warmup)
    else:
        given_so = SimpleNamespace(warmup_steps=ratio, warmup_ratio=None)
        warmup = TrainingArguments.get_warmup_steps(given_so, steps)
        optim = replace(optim, warmup=ratio)
    assume(warmup < steps)  # theirs divide by the steps after it
    theirs = of_transformers(schedule, floor, warmup, steps)
    for step in range(steps):
        expected = theirs[step + 1] if step < warmup else theirs[step]
        assert learning_rate(optim, step, steps) == pytest.approx(expected, rel=1e-12)


def test_a_warmup_longer_than_the_run_is_an_error() -> None:
    check_schedule(OptimConfig(warmup=5), 5)
    check_schedule(OptimConfig(warmup=0.99), 5)
    with pytest.raises(ConfigError, match="longer than the run") as error:
        check_schedule(OptimConfig(warmup=6), 5)
    assert error.value.got == "6 of 5 steps"
    assert error.value.remedy[:19] == "set optim.warmup=5 "


MEANS = {"loss": 0.7, "logps/chosen_per_token": -9.0}
INFINITE = StepTotals(sums={}, counts={}, means=MEANS, votes=[], grad_norm=float("inf"))


@pytest.mark.parametrize(
    ("steps", "facts", "said"),
    [
        (9, {"step": 3, "bad_steps": 4, "bad_in_a_row": 4}, "not finite at step 3"),
        (9, {"step": 3, "bad_steps": 3, "bad_in_a_row": 3}, None),
        (9, {"step": 9, "bad_steps": 2, "bad_in_a_row": 2}, "not finite at step 9"),
        (9, {"step": 9, "bad_steps": 1, "bad_in_a_row": 1}, None),
        (9, {"step": 5, "without_gradient_in_a_row": 4}, "the gradient is exactly 0 at step 5"),
        (9, {"step": 5, "without_gradient_in_a_row": 3}, None),
        (9, {"step": 9, "without_gradient_in_a_row": 1}, "the gradient is exactly 0 at step 9"),
        (9, {"step": 9, "without_gradient": 9}, "the gradient is exactly 0 at step 9"),
        (9, {"step": 8, "without_gradient": 8}, None),
        (9, {"step": 9, "without_gradient": 8}, None),
        (9, {"step": 9, "without_gradient": 8, "bad_steps": 1}, "the gradient is exactly 0 at step 9"),
        (3, {"step": 3, "overflows": 3}, "gradients overflow in fp16"),
        (3, {"step": 3, "overflows": 2}, None),
        (4, {"step": 3, "overflows": 2}, None),
        (3, {"step": 3, "overflows": 2, "bad_steps": 1, "bad_in_a_row": 1}, "not finite at step 3"),
    ],
)
def test_a_run_ends_that_learns_nothing(steps: int, facts: dict[str, Any], said: str | None) -> None:
    counts = {name: value for name, value in facts.items() if name != "step"}
    position = Position(facts["step"], health=Health(**counts))
    error = divergence_error(INFINITE, position, steps, RunFolder(Path("run")))
    assert (error is None) == (said is None)
    assert error is None or str(said) in error.message
    if error is not None and "overflow" in error.message:
        assert "set model.dtype=bf16" in error.remedy


ALIKE = {"logps/chosen_per_token": -3.0, "logps/rejected_per_token": -3.0}
PREFERS = {"logps/chosen_per_token": -1.0, "logps/rejected_per_token": -3.0}


@pytest.mark.parametrize(
    ("loss", "logps", "in_a_row", "said"),
    [
        (0.7, ALIKE, 2, "the policy has collapsed"),
        (0.7, PREFERS, 2, "the gradient is exactly 0"),  # a constant loss
        (0.7, {"logps/chosen_per_token": -1.0}, 2, "the gradient is exactly 0"),  # records of one label
        (0.0, PREFERS, 0, None),  # hinge or ipo, which all pairs satisfy
        (0.0, {"logps/chosen_per_token": -1.0}, 1, "the gradient is exactly 0"),  # cannot show a collapse
    ],
)
def test_steps_without_a_gradient_are_lost_unless_all_pairs_satisfy_the_loss(
    loss: float, logps: dict[str, float], in_a_row: int, said: str | None
) -> None:
    totals = StepTotals(sums={}, counts={}, means={"loss": loss, **logps}, votes=[], grad_norm=0.0)
    health = Health(without_gradient_in_a_row=1)
    count_step(health, totals, overflow=False)
    assert (health.without_gradient, health.without_gradient_in_a_row) == (1, in_a_row)
    error = divergence_error(totals, Position(9, health=health), 9, RunFolder(Path("run")))
    assert (error.message.partition(" at step")[0].partition(":")[0] if error else None) == said
    count_step(health, replace(totals, grad_norm=0.1), overflow=False)
    assert (health.without_gradient, health.without_gradient_in_a_row) == (1, 0)


def test_an_overflow_neither_ends_nor_continues_a_row_of_bad_steps() -> None:
    health = Health(bad_steps=2, bad_in_a_row=2, without_gradient_in_a_row=1)
    count_step(health, INFINITE, overflow=True)
    assert (health.overflows, health.bad_steps, health.bad_in_a_row) == (1, 2, 2)
    count_step(health, INFINITE, overflow=False)
    assert (health.overflows, health.bad_steps, health.bad_in_a_row) == (1, 3, 3)


ACCURACY = "eval_rewards/accuracies"


@pytest.mark.parametrize(
    ("metric", "values", "best_step"),
    [
        (ACCURACY, [9.0, 0.5, 0.7, 0.7], 2),
        (f"{ACCURACY}/math", [0.0, 0.5, 0.4], 1),
        ("eval_loss", [0.0, 0.5, 0.7, 0.4], 3),
    ],
)
def test_the_best_value_is_kept(metric: str, values: list[float], best_step: int) -> None:
    """Of evaluations at steps 0, 1, 2, ...; not of the model before training."""
    best = None
    for step, value in enumerate(values):
        best = best_after(TrainerConfig(keep_best=metric), best, step, {metric: value})
    assert best is not None
    assert best.step == best_step


def test_another_metric_starts_again_and_none_keeps_none() -> None:
    best = BestCheckpoint(ACCURACY, 5, 0.9)
    of_loss = best_after(TrainerConfig(keep_best="eval_loss"), best, 10, {"eval_loss": 0.5, ACCURACY: 0.1})
    assert of_loss == BestCheckpoint("eval_loss", 10, 0.5)
    assert best_after(TrainerConfig(), best, 10, {ACCURACY: 1.0}) is None
    assert best_after(TrainerConfig(keep_best=ACCURACY), best, 10, {"eval_loss": 0.5}) == best


@pytest.mark.parametrize(
    ("position", "is_over"),
    [
        (Position(5, best=BestCheckpoint("eval_loss", 1, 0.5), stale_evaluations=2), True),
        (Position(5, best=BestCheckpoint("eval_loss", 1, 0.5), stale_evaluations=1), False),
        (Position(5, stale_evaluations=2), False),
        (Position(9), True),
    ],
)
def test_a_run_ends_after_evaluations_that_its_metric_did_not_improve(
    position: Position, is_over: bool
) -> None:
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Loop))
    trainer = TrainerConfig(keep_best="eval_loss", patience=2)
    parts["run"] = SimpleNamespace(config=SimpleNamespace(trainer=trainer))
    parts["inputs"] = SimpleNamespace(sampler=SimpleNamespace(steps=9))
    assert Loop(**parts).is_over(position) == is_over


def test_a_metric_that_the_loss_does_not_have_is_refused() -> None:
    data = ["data.train=[a.jsonl]", "data.eval=[b.jsonl]", "trainer.eval_every=5"]
    config = load_run_config(["model.path=org/model", *data, f"trainer.keep_best={ACCURACY}", "loss=sft"])
    with pytest.raises(ConfigError, match="do not have this metric") as error:
        check_keep_best(ACCURACY, MetricPlan(config.loss, ("math", "code"), is_evaluation=True))
    assert "eval_rewards/chosen" in error.value.expected


def test_the_first_step_of_a_policy_that_is_the_reference_compares_nothing() -> None:
    sums = {"rewards/accuracies": 3.0, "rewards/accuracies/a": 1.0, "rewards/both_fall": 2.0, "loss": 2.8}
    sums |= {"rewards/auc": 5.0, "rewards/margins": 1e-6}
    counts = dict.fromkeys(sums, 4.0) | {"rewards/accuracies/a": 1.0}
    means = {name: value / counts[name] for name, value in sums.items()}
    totals = without_comparisons(StepTotals(sums, counts, means, votes=[1], grad_norm=2.0))
    ties = {
        "rewards/accuracies": 2.0,
        "rewards/accuracies/a": 0.5,
        "rewards/auc": 2.0,
        "rewards/both_fall": 0.0,
    }
    assert totals.sums == sums | ties
    assert totals.means == {name: value / counts[name] for name, value in totals.sums.items()}
    assert (totals.counts, totals.votes, totals.grad_norm) == (counts, [1], 2.0)
