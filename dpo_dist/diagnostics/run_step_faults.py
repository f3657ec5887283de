"""Faults of single steps in the rows of a run: a policy that has collapsed, spikes of the loss."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.diagnostics.run_facts import Row, RunFacts, finite, last, number, values
from dpo_dist.diagnostics.run_rules import RULES
from dpo_dist.number_text import counted

Fields: TypeAlias = Mapping[str, Any]
Limits: TypeAlias = Mapping[str, float]

SPIKE = {"excursion": 5.0, "rows": 100, "fewest_rows": 50, "rise": 1.0}
"""A spike is above the median of the `rows` rows before it (at least `fewest_rows`) by more than `excursion`
times the largest among them, and than `rise` times that median and the first loss."""
_SIDES = "logps/chosen_per_token", "logps/rejected_per_token"
_EQUAL = 1e-9
"""Relative difference of means that only rounding makes different."""


def is_collapsed(row: Row, limits: Limits | None = None) -> bool:
    """Return whether the policy of a step has no gradient, and gives responses no usable probability.

    Either every token has the same probability, as after weights that overflow a normalisation layer, or
    that of responses is far below any guess. A loss that is satisfied (hinge, ipo) has no gradient either,
    but its policy still prefers some tokens.
    """
    chosen, rejected = (finite(row, side) for side in _SIDES)
    if row.get("grad_norm") != 0 or chosen is None:
        return False
    is_uniform = rejected is not None and abs(chosen - rejected) <= _EQUAL * abs(chosen)
    return is_uniform or chosen < -(limits or RULES["collapsed"].limits)["nats"]


def find_collapse(facts: RunFacts, limits: Limits) -> Fields | None:
    """Return the fields of the rule `collapsed`; the last rows count, as a policy may recover."""
    rows = [row for row in facts.steps if finite(row, "loss") is not None]
    first = len(rows)
    while first and is_collapsed(rows[first - 1], limits):
        first -= 1
    if first == len(rows):
        return None
    row = rows[first]
    return {
        "step": int(row["step"]),
        "chosen": number(row[_SIDES[0]]),
        "loss": number(last(rows[:first], "loss")),
        "rate": number(facts.setting("optim.lr")),
    }


@dataclass(frozen=True)
class Spike:
    """A row whose loss is far above those before: its step, its loss, and their median."""

    step: int
    loss: float
    usual: float


def spikes(rows: Sequence[Row], limits: Limits) -> list[Spike]:
    """Return the spikes among the rows of training steps."""
    logged = values(rows, "loss")
    losses = np.array([loss for _, loss in logged], dtype=np.float64)
    found = []
    for at in range(int(limits["fewest_rows"]), len(losses)):
        before = losses[max(0, at - int(limits["rows"])) : at]
        # Seldom true, and a median of every window is slow.
        if losses[at] > before.max() and _is_spike(before, losses[at], losses[0], limits):
            found.append(Spike(int(logged[at][0]), float(losses[at]), float(np.median(before))))
    return found


def _is_spike(before: npt.NDArray[np.float64], loss: float, first: float, limits: Limits) -> bool:
    usual = float(np.median(before))
    rise = loss - usual
    scale = max(abs(usual), abs(first))
    return rise > limits["excursion"] * (before.max() - usual) and rise > limits["rise"] * scale


def spike_of_last(rows: Sequence[Row], row: Row) -> Spike | None:
    """Return the spike of `row`, if it is one.

    Args:
        rows: all rows before it, of which the last ones are read.
        row: of training steps.
    """
    limits = SPIKE
    logged = (float(row["loss"]) for row in reversed(rows) if finite(row, "loss") is not None)
    before = np.array(list(itertools.islice(logged, int(limits["rows"]))), dtype=np.float64)
    loss = finite(row, "loss")
    if loss is None or len(before) < limits["fewest_rows"] or loss <= before.max():
        return None
    first = next(row["loss"] for row in rows if finite(row, "loss") is not None)
    if not _is_spike(before, loss, first, limits):
        return None
    return Spike(int(row["step"]), loss, float(np.median(before)))


def find_bad_steps(facts: RunFacts, limits: Limits) -> Fields | None:
    """Return the fields of the rule `bad_steps`."""
    bad = facts.summary.get("bad_steps", 0)
    if bad < limits["steps"]:
        return None
    return {"count": counted(bad, "step"), "steps": facts.total_steps}
