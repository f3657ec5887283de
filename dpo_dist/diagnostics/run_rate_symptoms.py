"""Signs of a learning rate that is too high in the rows of a run: see `run_checks`."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median

from dpo_dist.diagnostics.run_facts import Row, RunFacts, finite, pooled, values

LOGISTIC = ("sigmoid", "robust", "dpop", "odpo")
"""Losses that fall to 0 with a growing margin; others have another scale, or grow again."""
_MEAN_OF = 3
"""Rows of a mean: the loss of few pairs is noisy."""
_FIRST_SPIKE = 5
"""Rows before which a gradient norm has no usual value."""


def symptoms_of_rate(facts: RunFacts, limits: Mapping[str, float]) -> Iterator[str]:
    """Yield a clause for each sign; `limits` are those of `learning_rate_too_high`."""
    yield from rise_of_loss(facts, limits)
    fallen = [(step, fall) for step, fall in falls_of_chosen(facts, limits) if fall > limits["fall"]]
    if len(fallen) >= limits["rows"] and fallen[0][0] <= limits["steps_share"] * facts.total_steps:
        step, fall = fallen[0]
        yield (
            f"the log-prob of chosen responses fell by {fall:.2g} nats per token by step {step:.0f} of "
            f"{facts.total_steps:,}"
        )
    yield from _jumps_of_gradient(facts.steps, limits)


def falls_of_chosen(facts: RunFacts, limits: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return step and fall of the log-prob of chosen responses during training, in nats per token.

    Relative to the reference, or to the first rows if that is not known; these have other responses.
    """
    falls = facts.falls(facts.steps)
    if falls is None:
        logps = pooled(facts.steps, "logps/chosen_per_token", limits["pairs"])
        falls = [(step, logps[0][1] - logp) for step, logp in logps]
    return falls


def rise_of_loss(facts: RunFacts, limits: Mapping[str, float]) -> Iterator[str]:
    """Yield a clause if the loss rose; `limits` are those of `learning_rate_too_high`."""
    means = _means_of_loss(facts, limits)
    if not means:
        return
    start = means[0][1]
    for step, mean in means[1:]:
        if mean > limits["loss_rise"] * start > 0:
            yield f"the loss rose from {start:.3g} to {mean:.3g} by step {step:.0f}"
            break


def _means_of_loss(facts: RunFacts, limits: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return step and loss of the start and of the rows after it, as means over enough pairs."""
    if facts.setting("loss.kind") not in LOGISTIC or facts.setting("reference.path") is not None:
        return pooled(facts.steps, "loss", limits["varied_pairs"])
    logged = [
        row for row in facts.steps if finite(row, "loss") is not None
    ]  # the first: the same for all pairs
    recent = [logged[index + 1 - _MEAN_OF : index + 1] for index in range(_MEAN_OF, len(logged))]
    means = [(rows[-1]["step"], _mean_loss(rows)) for rows in recent if _pairs(rows) >= limits["pairs"]]
    return [(logged[0]["step"], logged[0]["loss"]), *means] if logged else []


def _jumps_of_gradient(steps: Sequence[Row], limits: Mapping[str, float]) -> Iterator[str]:
    logged = [row for row in steps if finite(row, "loss") is not None]
    norms = values(logged, "grad_norm")
    jumps = []
    for index in range(_FIRST_SPIKE, len(norms)):
        step, norm = norms[index]
        usual = median(value for _, value in norms[:index])
        if norm > max(limits["spike"] * usual, norms[0][1]):
            jumps.append((step, norm, usual))
    if len(jumps) < limits["rows"]:
        return
    step, norm, usual = jumps[0]
    before = [row for row in logged if row["step"] < step][-_MEAN_OF:]
    after = [row for row in logged if row["step"] >= step][-_MEAN_OF:]
    if _mean_loss(after) > _mean_loss(before):  # not of a loss with steep parts, such as dpop
        yield f"the gradient norm jumped from {usual:.2g} to {norm:.2g} at step {step:.0f}"


def _mean_loss(rows: Sequence[Row]) -> float:
    return fmean(row["loss"] for row in rows)


def _pairs(rows: Sequence[Row]) -> float:
    return sum(row.get("pairs", 0) for row in rows)
