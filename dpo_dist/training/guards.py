"""Steps that teach nothing: not finite, so skipped on all ranks, counted and named; or of a collapsed policy.

DeepSpeed applies no update whose gradient norm is not finite, and the norm is the same on all ranks.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_dist.batching.sampler import Indices
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation.errors import DivergedError
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.text import first_few
from dpo_dist.insight.console import Console
from dpo_dist.insight.verdict.facts import is_collapsed
from dpo_dist.objective.losses import BatchFacts, preference_loss
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.loss import Objective, ReadyStep
from dpo_dist.training.start import write_on_main
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


@dataclass(frozen=True)
class StepGuard:
    """Names the pairs of bad steps, and ends a run that learns nothing any more. Methods are collective."""

    config: RunConfig
    world: World
    inputs: Inputs
    policy: PolicyEngine
    objective: Objective
    console: Console

    def name_pairs(self, ready: ReadyStep, totals: StepTotals, position: Position) -> None:
        """Write source, line and loss of every pair of a bad step to its file in the logs, and warn.

        The pairs are scored again: no weight has changed.
        """
        folder, step = RunFolder.of(self.config), position.step
        losses = self._losses(ready, position)
        pairs = self.inputs.sampler.indices(step - 1)

        def write() -> list[str]:
            described = describe_pairs(self.inputs.train_set, pairs, losses)
            norm = _json_number(totals.grad_norm)
            content = {"step": step, "loss": _json_number(totals.means["loss"]), "grad_norm": norm}
            text = json.dumps({**content, "pairs": described}, indent=1)
            write_text(folder.bad_step(step), text + "\n")
            return [f"{pair['source']}:{pair['line']}" for pair in described if isinstance(pair["loss"], str)]

        named = write_on_main(write, folder, self.world)
        self.console.say(
            f"warning: step {step} was skipped: loss {totals.means['loss']:.4g}, gradient norm "
            f"{totals.grad_norm:.4g}; {first_few(named) or 'no pair alone is the cause'}; "
            f"all pairs of the step: {folder.bad_step(step)}"
        )

    def say_overflow(self, position: Position) -> None:
        """Say that the last step was an overflow."""
        assert self.policy.loss_scale is not None
        self.console.say(
            f"step {position.step} was skipped: gradients overflow in fp16; the loss scale falls to "
            f"{self.policy.loss_scale.value:g}"
        )

    def _losses(self, ready: ReadyStep, position: Position) -> list[float]:
        """Return the loss of every pair of the global batch, in its order."""
        rank_batch, device = ready.rank_batch, self.world.device
        facts = BatchFacts(rank_batch.mean_chosen_tokens, running=position.running)
        whole = torch.zeros(rank_batch.pairs, dtype=torch.float64, device=device)
        scored = []
        self.policy.train(False)
        with torch.no_grad():
            scoring = self.objective.scored(self.policy, ready.batches, facts, device)
            for (_, pairs), positions in zip(scoring, rank_batch.positions, strict=True):
                scored.append(pairs)
                if positions and not self.objective.loss.is_coupled:
                    losses = preference_loss(pairs.policy, pairs.reference, self.objective.loss, pairs.facts)
                    whole[torch.tensor(positions, device=device)] = losses.double()
            if self.objective.loss.is_coupled:
                pairs = gather_pairs(scored, rank_batch, self.world)
                loss = self.objective.loss
                return preference_loss(pairs.policy, pairs.reference, loss, pairs.facts).tolist()
        return self.world.sum_replicas(whole).tolist()

    def end(self, totals: StepTotals, position: Position) -> DivergedError | None:
        """Return the error that ends the run after this step, if it must; the same on all ranks."""
        most, steps = MOST_BAD_STEPS, self.inputs.sampler.steps
        is_last, skipped = position.step == steps, position.bad_steps + position.overflows
        allowed = min(most, _BAD_AT_THE_END) if is_last else most
        if is_last and skipped == steps and not position.bad_in_a_row:
            return self._only_overflows(position)
        if position.bad_in_a_row > allowed or (is_last and skipped == steps):
            return self._not_finite(totals, position, allowed)
        if position.collapsed_in_a_row > most or (position.collapsed_in_a_row and is_last):
            return self._collapsed(totals, position)
        return None

    def _not_finite(self, totals: StepTotals, position: Position, allowed: int) -> DivergedError:
        row, step = position.bad_in_a_row, position.step
        return DivergedError(
            f"loss or gradient is not finite at step {step}; this update was not applied",
            where=f"the pairs of this step: {RunFolder.of(self.config).bad_step(step)}",
            got=f"loss {totals.means['loss']}, gradient norm {totals.grad_norm}; bad steps in a row: {row}, "
            f"of this run: {position.bad_steps}",
            expected=f"at most {allowed} in a row here ({_BAD_AT_THE_END} at the end)",
            remedy="lower optim.lr or raise optim.warmup_ratio, and look at these pairs; the checkpoints "
            "before it are complete",
        )

    def _only_overflows(self, position: Position) -> DivergedError:
        assert self.policy.loss_scale is not None
        return DivergedError(
            "the run has trained nothing: gradients overflow in fp16, and no update was applied",
            where="model.dtype",
            got=f"{position.overflows} overflows and {position.bad_steps} bad steps in {position.step} "
            f"steps; the loss scale of the next step is {self.policy.loss_scale.value:g}",
            remedy="train for more steps, as each overflow halves the scale, or set model.dtype=bf16 or fp32",
        )

    def _collapsed(self, totals: StepTotals, position: Position) -> DivergedError:
        return DivergedError(
            f"the policy has collapsed: the gradient is 0 at step {position.step}, and nothing is learnt",
            where="optim.lr",
            got=f"{totals.means['logps/chosen_per_token']:.4g} nats per token of chosen responses, loss "
            f"{totals.means['loss']:.4g}; steps of this kind in a row: {position.collapsed_in_a_row}",
            remedy="lower optim.lr or raise optim.warmup_ratio; if this is so from the first step, the "
            "weights of model.path are damaged",
        )


def count(position: Position, totals: StepTotals, *, overflow: bool) -> None:
    """Count a step, whose number is `position.step` already, in `position`.

    Args:
        position: changed.
        totals: of the step.
        overflow: it `is_overflow`.
    """
    if overflow:
        position.overflows += 1
        return
    if is_bad(totals):
        position.bad_steps += 1
        position.bad_in_a_row += 1
        return
    position.bad_in_a_row = 0
    collapsed = is_collapsed({**totals.means, "grad_norm": totals.grad_norm})
    position.collapsed_in_a_row = position.collapsed_in_a_row + 1 if collapsed else 0


def describe_pairs(
    dataset: PreferenceDataset, pairs: Indices, losses: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """Return source and line of each pair, and its loss: a text if it is not finite."""
    found = []
    for number, pair in enumerate(pairs):
        origin = dataset.origin(int(pair))
        loss = {} if losses is None else {"loss": _json_number(losses[number])}
        found.append({"source": origin.source, "line": origin.line, **loss})
    return found


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
