"""Steps that teach nothing: not finite, so skipped on all ranks, counted and named; or of a collapsed policy.

DeepSpeed applies no update whose gradient norm is not finite, and the norm is the same on all ranks.
"""

import json
import math
from collections.abc import Sequence

import torch

from dpo_dist.batching.sampler import Indices
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.errors import DivergedError
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.text import first_few
from dpo_dist.insight.verdict.facts import is_collapsed
from dpo_dist.objective.losses import BatchFacts, RunningMeans, preference_loss
from dpo_dist.training.loss import Objective, ReadyStep
from dpo_dist.training.state import Position
from dpo_dist.training.step import StepTotals, gather_pairs

MOST_BAD_STEPS = 3  # in a row
_BAD_AT_THE_END = 1
"""One bad pair may be in the last batch; more bad steps there are a policy that computes nothing finite."""


def is_bad(totals: StepTotals) -> bool:
    """Return whether the mean loss of a step or its gradient norm is not finite."""
    return not (math.isfinite(totals.means["loss"]) and math.isfinite(totals.grad_norm))


def is_overflow(totals: StepTotals, policy: PolicyEngine) -> bool:
    """Return whether the last step was skipped because gradients in fp16 were too large for its scale."""
    return policy.has_overflowed and math.isfinite(totals.means["loss"])


def count(position: Position, totals: StepTotals, *, overflow: bool) -> None:
    """Count a step, whose number is `position.step` already, in `position`."""
    if overflow:
        position.overflows += 1
    elif is_bad(totals):
        position.bad_steps += 1
        position.bad_in_a_row += 1
    else:
        position.bad_in_a_row = 0
        collapsed = is_collapsed({**totals.means, "grad_norm": totals.grad_norm})
        position.collapsed_in_a_row = position.collapsed_in_a_row + 1 if collapsed else 0


def pair_losses(
    policy: PolicyEngine, objective: Objective, ready: ReadyStep, running: RunningMeans, world: World
) -> list[float]:
    """Score the pairs of a step again; return their losses in the order of the global batch. Collective."""
    rank_batch, loss = ready.rank_batch, objective.loss
    facts = BatchFacts(rank_batch.mean_chosen_tokens, running=running)
    whole = torch.zeros(rank_batch.pairs, dtype=torch.float64, device=world.device)
    policy.train(False)
    with torch.no_grad():
        scored = list(objective.scored(policy, ready.batches, facts, world.device))
        if loss.is_coupled:
            pairs = gather_pairs(scored, rank_batch, world)
            return preference_loss(pairs.policy, pairs.reference, loss, pairs.facts).tolist()
        for pairs, positions in zip(scored, rank_batch.positions, strict=True):
            if positions:
                losses = preference_loss(pairs.policy, pairs.reference, loss, pairs.facts)
                whole[torch.tensor(positions, device=world.device)] = losses.double()
    return world.sum_replicas(whole).tolist()


def write_bad_step(
    folder: RunFolder,
    totals: StepTotals,
    step: int,
    dataset: PreferenceDataset,
    pairs: Indices,
    losses: Sequence[float],
) -> str:
    """Write source, line and loss of every pair of a skipped step; return a warning that names the cause."""
    described = [
        {"source": origin.source, "line": origin.line, "loss": _json_number(loss)}
        for origin, loss in zip(map(dataset.origin, pairs.tolist()), losses, strict=True)
    ]
    norm = _json_number(totals.grad_norm)
    content = {"step": step, "loss": _json_number(totals.means["loss"]), "grad_norm": norm}
    write_text(folder.bad_step(step), json.dumps({**content, "pairs": described}, indent=1) + "\n")
    named = [f"{pair['source']}:{pair['line']}" for pair in described if isinstance(pair["loss"], str)]
    return (
        f"warning: step {step} was skipped: loss {totals.means['loss']:.4g}, gradient norm "
        f"{totals.grad_norm:.4g}; {first_few(named) or 'no pair alone is the cause'}; "
        f"all pairs of the step: {folder.bad_step(step)}"
    )


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def ending_error(
    totals: StepTotals,
    position: Position,
    steps: int,
    folder: RunFolder,
    loss_scale: float | None,
) -> DivergedError | None:
    """Return the error that ends a run of `steps` after this one, if it must; the same on all ranks."""
    step, is_last = position.step, position.step == steps
    allowed = min(MOST_BAD_STEPS, _BAD_AT_THE_END) if is_last else MOST_BAD_STEPS
    has_trained_nothing = is_last and position.bad_steps + position.overflows == steps
    if has_trained_nothing and not position.bad_in_a_row:
        return DivergedError(
            "the run has trained nothing: gradients overflow in fp16, and no update was applied",
            where="model.dtype",
            got=f"{position.overflows} overflows and {position.bad_steps} bad steps in {step} steps; "
            f"the loss scale of the next step is {loss_scale:g}",
            remedy="train for more steps, as each overflow halves the scale, or set model.dtype=bf16 or fp32",
        )
    if position.bad_in_a_row > allowed or has_trained_nothing:
        return DivergedError(
            f"loss or gradient is not finite at step {step}; this update was not applied",
            where=f"the pairs of this step: {folder.bad_step(step)}",
            got=f"loss {totals.means['loss']}, gradient norm {totals.grad_norm}; bad steps in a row: "
            f"{position.bad_in_a_row}, of this run: {position.bad_steps}",
            expected=f"at most {allowed} in a row here ({_BAD_AT_THE_END} at the end)",
            remedy="lower optim.lr or raise optim.warmup_ratio, and look at these pairs",
        )
    if position.collapsed_in_a_row > MOST_BAD_STEPS or (position.collapsed_in_a_row and is_last):
        return DivergedError(
            f"the policy has collapsed: the gradient is 0 at step {step}, and nothing is learnt",
            where="optim.lr",
            got=f"{totals.means['logps/chosen_per_token']:.4g} nats per token of chosen responses, loss "
            f"{totals.means['loss']:.4g}; steps of this kind in a row: {position.collapsed_in_a_row}",
            remedy="lower optim.lr or raise optim.warmup_ratio; from the first step on: check model.path",
        )
    return None
