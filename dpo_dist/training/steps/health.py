"""Check a run's health: steps that are not finite or have no gradient, loss spikes, the best checkpoint."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from dpo_dist.config.rules import best_direction
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Direction, TrainerConfig
from dpo_dist.data import Origin
from dpo_dist.distributed.processes.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.errors import DivergedError
from dpo_dist.foundation.files import write_json
from dpo_dist.foundation.text import first_few
from dpo_dist.objective.losses import RunningMeans, preference_loss
from dpo_dist.training.reporting.metrics_log import MetricsRow, is_collapsed, logps_by_side, loss_before_spike
from dpo_dist.training.steps.state import BestCheckpoint, Health, Position
from dpo_dist.training.steps.step import Objective, ReadyStep, StepTotals, gather_pairs, in_batch_order


def count_spike(row: MetricsRow, rows: Sequence[MetricsRow], warn: Callable[[str], None]) -> None:
    """Add `loss_spikes`, the number of spikes so far, to the row that follows `rows`; warn of a new spike."""
    last: MetricsRow = next((before for before in reversed(rows) if "loss" in before), {})
    row["loss_spikes"] = last.get("loss_spikes", 0)
    typical = loss_before_spike(rows, row)
    if typical is not None:
        row["loss_spikes"] += 1
        warn(
            f"the loss jumped to {row['loss']:.4g} at step {row['step']:.0f}, from a median of {typical:.4g}"
        )


def best_after(
    trainer: TrainerConfig, best: BestCheckpoint | None, step: int, row: Mapping[str, float]
) -> BestCheckpoint | None:
    """Return the best checkpoint after an evaluation at `step`; of equal ones, the earlier.

    Ignores a `best` of another metric, step 0, which is never saved, and values that are not finite.
    """
    metric = trainer.keep_best
    if best is not None and best.metric != metric:
        best = None
    if metric is None or step == 0 or not math.isfinite(row.get(metric, math.nan)):
        return best
    sign = 1 if best_direction(metric) is Direction.highest else -1
    is_better = best is None or sign * row[metric] > sign * best.value
    return BestCheckpoint(metric, step, row[metric]) if is_better else best


MOST_BAD_STEPS = 3  # in a row
# A bad pair may make the last step bad; two bad steps at the end mean that the policy has diverged.
_BAD_AT_THE_END = 1


def count_step(health: Health, totals: StepTotals, *, overflow: bool) -> None:
    """Add a step to the counts of `health`."""
    if overflow:
        health.overflows += 1
    elif totals.is_bad:
        health.bad_steps += 1
        health.bad_in_a_row += 1
    else:
        health.bad_in_a_row = 0
        health.without_gradient += totals.grad_norm == 0
        is_lost = _is_collapsed(totals)
        if totals.grad_norm == 0 and totals.means["loss"] != 0:
            is_lost = True  # a loss that all pairs satisfy, as hinge or ipo may, is 0
        if is_lost is not None:
            health.without_gradient_in_a_row = health.without_gradient_in_a_row + 1 if is_lost else 0


def _is_collapsed(totals: StepTotals) -> bool | None:
    return is_collapsed({**totals.means, "grad_norm": totals.grad_norm})


def write_bad_step(
    file: Path, step: int, totals: StepTotals, origins: Iterable[Origin], losses: Sequence[float]
) -> str:
    """Write the pairs of a bad step with their losses; return the places of pairs without a finite loss."""
    pairs = [
        {"source": origin.source, "line": origin.line, "loss": _json_number(loss)}
        for origin, loss in zip(origins, losses, strict=True)
    ]
    figures = {"loss": totals.means["loss"], "grad_norm": totals.grad_norm}
    content = {"step": step, **{name: _json_number(value) for name, value in figures.items()}, "pairs": pairs}
    write_json(file, content)
    places = [f"{pair['source']}:{pair['line']}" for pair in pairs if isinstance(pair["loss"], str)]
    return first_few(places) or "each pair alone has a finite loss"


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def divergence_error(
    totals: StepTotals, position: Position, steps: int, folder: RunFolder
) -> DivergedError | None:
    """Return the error that ends a run of `steps` after this step, if there is one; the same on all ranks."""
    step = position.step
    health = position.health
    is_last = position.step == steps
    allowed = _BAD_AT_THE_END if is_last else MOST_BAD_STEPS
    no_update_applied = is_last and health.bad_steps + health.overflows == steps
    if no_update_applied and not health.bad_in_a_row:
        return DivergedError(
            "no update was applied in the whole run: gradients overflow in fp16",
            where="model.dtype",
            got=f"{health.overflows} overflows and {health.bad_steps} bad steps in {step} steps",
            remedy="train for more steps, as each overflow halves the scale, or set model.dtype=bf16 or fp32",
        )
    if health.bad_in_a_row > allowed or no_update_applied:
        return DivergedError(
            f"loss or gradient is not finite at step {step}; this update was not applied",
            where=f"the pairs of this step: {folder.bad_step(step)}",
            got=f"loss {totals.means['loss']}, gradient norm {totals.grad_norm}; bad steps in a row: "
            f"{health.bad_in_a_row}, of this run: {health.bad_steps}",
            expected=f"at most {allowed} bad steps in a row, and {_BAD_AT_THE_END} at the end of a run",
            remedy="lower optim.lr or raise optim.warmup, and look at these pairs",
        )
    # A run without a gradient in any step has written its start as its result, whatever the loss.
    is_untrained = is_last and health.without_gradient + health.bad_steps + health.overflows == steps
    in_a_row = health.without_gradient_in_a_row
    if not (in_a_row > MOST_BAD_STEPS or (in_a_row and is_last) or is_untrained):
        return None
    got = f"loss {totals.means['loss']:.4g}"
    side, logp = next(iter(logps_by_side(totals.means).items()), ("", math.nan))  # a reward model has none
    if side:
        got = f"{logp:.4g} nats per token of {side} responses, {got}"
    if _is_collapsed(totals):
        return DivergedError(
            f"the policy has collapsed: the gradient is 0 at step {step}, so that it learns nothing",
            where="optim.lr",
            got=f"{got}; steps of this kind in a row: {in_a_row}",
            remedy="lower optim.lr or raise optim.warmup; at the first step, check model.path",
        )
    return DivergedError(
        f"the gradient is exactly 0 at step {step}, so that the policy learns nothing",
        where="loss",
        got=f"{got}; steps without a gradient: {health.without_gradient} of {step}, in a row: {in_a_row}",
        remedy="check that the loss depends on the policy (a loss of your own: no detach), and that no "
        "weight of a record or of a label makes it 0",
    )


@torch.no_grad()
def pair_losses(
    policy: PolicyEngine, objective: Objective, ready: ReadyStep, running: RunningMeans, world: World
) -> list[float]:
    """Score a step's pairs again; return their losses in the global batch's order. Collective."""
    rank_batch = ready.rank_batch
    loss = objective.loss
    policy.train(False)
    facts = objective.facts(policy, rank_batch, ready.partners, world, running)
    scored = list(objective.score(policy, ready.batches, facts, world.device))
    if loss.is_coupled:
        scored = [gather_pairs(scored, rank_batch, world)]
    losses = [preference_loss(pairs.policy, pairs.reference, loss, pairs.facts) for pairs in scored]
    if loss.is_coupled:
        return losses[0].tolist()
    return in_batch_order([values[None] for values in losses], rank_batch, world)[0].tolist()
