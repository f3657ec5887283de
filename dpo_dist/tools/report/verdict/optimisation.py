"""Rules about faults that show in loss, gradient and margins: learning rate, beta, nothing learnt."""

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from dpo_dist.config.metrics import EXCESS, MISMATCH
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import pluralize
from dpo_dist.tools.report.verdict.facts import (
    FEWEST_PAIRS,
    FEWEST_STEPS,
    MARGIN,
    Find,
    RunFacts,
    digits,
    evaluation_rows,
    first,
    last,
    pooled,
    values,
)
from dpo_dist.training.reporting.metrics_log import finite, is_collapsed, logps_by_side

_FIRST_PAIRS = 200
"""Fewest pairs for the mean loss at the start."""
_QUANTITIES = {
    "logps/chosen": "log-prob of chosen responses",
    "logps/rejected": "log-prob of rejected responses",
    "loss": "loss",
    "grad_norm": "gradient norm",
}
"""In the order in which a step computes them: the first one that is not finite is reported."""
_LEAST_VOCABULARY = 1000
"""Fewest tokens of a vocabulary of texts: an alphabet, as of proteins, can be hard to guess for any model,
but each trained one knows which of its tokens are letters."""
_LOGISTIC = ("sigmoid", "robust", "dpop", "odpo")
"""Losses that fall to 0 with a growing margin; other losses have another scale, or rise again."""


def _diverged(facts: RunFacts) -> Iterator[str]:
    yield from lost_weights(facts)
    if bad := facts.summary.get("bad_steps", 0):
        yield (
            f"{pluralize(bad, 'step')} of {facts.total_steps:,} taught nothing, because loss or gradient was "
            "not finite"
        )


def lost_weights(facts: RunFacts) -> Iterator[str]:
    """Yield a clause if the weights compute nothing usable any more, or never have."""
    for index, row in enumerate(facts.rows):
        broken = [key for key in row if not math.isfinite(row[key])]
        if broken:
            yield _first_bad_value(facts, index, broken)
            return
    rows = [row for row in facts.steps if finite(row, "loss") is not None]
    collapsed = list(itertools.takewhile(lambda row: is_collapsed(row) is not False, reversed(rows)))
    while collapsed and not is_collapsed(collapsed[-1]):
        collapsed.pop()
    if collapsed:
        row, before = collapsed[-1], rows[: -len(collapsed)]
        side, logp = next(iter(logps_by_side(row).items()))
        yield (
            f"the policy has collapsed: from step {row['step']:.0f} on the gradient is 0, and {side} "
            f"responses have {digits(logp)} nats per token, as if all "
            f"tokens were alike; before it the loss was {digits(last(before, 'loss'))}, with "
            f"optim.lr={digits(facts.setting('optim.lr'))}"
        )


def _first_bad_value(facts: RunFacts, index: int, broken: Sequence[str]) -> str:
    """Return the likeliest cause of the first row with a value that is not finite, and where it was."""
    row = facts.rows[index]
    quantity = next(key for key in (*_QUANTITIES, *broken) if key in broken or f"eval_{key}" in broken)
    # If several skipped steps end the run, its last row has the last of them: `step` is the first.
    ends = row is facts.rows[-1] and "loss" in row
    step = int(row["step"]) - ((facts.summary.get("bad_in_a_row") or 1) - 1 if ends else 0)
    before = RunFacts(facts.rows[:index], {**facts.summary, "steps": int(row["step"])})
    if symptom := next(_signs_of_rate(before), None):
        cause = f"the learning rate is too high: {symptom}"
    elif "loss" not in row:
        cause = f"the evaluation data have {facts.unit}s for which the policy computes no finite value"
    elif not quantity.startswith("logps/"):
        cause = "the log-probs are finite, the loss or its gradient is not"
    elif before.steps:
        cause = "an update damaged the weights: the learning rate is too high, or its warm-up too short"
    else:
        cause = "the model gives no finite log-probs from the start: damaged weights, or numbers out of range"
    return (
        f"{cause}; the {_QUANTITIES.get(quantity, quantity)} was the first value that is not finite, at step "
        f"{step}; before it the loss was {digits(last(before.steps, 'loss'))} and the gradient norm "
        f"{digits(last(before.steps, 'grad_norm'))}, with a learning rate of "
        f"{digits(last([row, *before.steps], 'learning_rate'))}"
    )


def _nothing_trained(facts: RunFacts) -> Iterator[str]:
    norms = [norm for _, norm in values(facts.steps, "grad_norm")]
    if norms and not any(norms):
        yield f"the gradient was exactly 0 in every step of {facts.total_steps:,}"


def _beta_wrong(facts: RunFacts) -> Iterator[str]:
    beta, nats = facts.setting("loss.beta"), facts.margin_nats()
    start, recent = first(facts.steps, "loss"), facts.recent("loss")
    if nats is None or start is None or not recent or facts.setting("loss.kind") not in _LOGISTIC:
        return
    change = "the log-prob of chosen minus rejected changed by"
    untrained, end = max(start, math.log(2)), median(recent)
    losses = f"{start:.2g} -> {end:.2g}"
    if beta >= 1 and end <= 0.01 * untrained:
        # The margin is read where the loss has almost vanished: in later steps a few pairs still raise it.
        at = next(at for at, row in enumerate(facts.steps, 1) if row["loss"] <= 0.01 * untrained)
        then = RunFacts(facts.steps[:at], facts.summary).margin_nats() or 0.0
        if abs(then) <= 5:
            yield (
                f"loss.beta={digits(beta)} is too large: the loss has almost vanished ({losses}) from step "
                f"{facts.steps[at - 1]['step']:.0f} on, when {change} {then:.2g} nats only"
            )
    elif beta >= 1 and end > 1.2 * untrained and abs(nats) <= 10:
        yield (
            f"loss.beta={digits(beta)} is too large: the loss of wrong pairs grew ({losses}) although "
            f"{change} {nats:.2g} nats only"
        )
    elif nats >= 2 and (stayed := _loss_that_stayed(facts)):
        yield (
            f"loss.beta={digits(beta)} is too small: the loss stays at {stayed} although {change} {nats:.2g} "
            "nats"
        )


def _loss_that_stayed(facts: RunFacts) -> str | None:
    """Return "first loss -> mean loss in the last quarter of the steps" if they are alike, or None."""
    name = "loss" if first(facts.steps, EXCESS) is None else EXCESS  # soft labels keep the loss above 0
    recent, start = facts.recent(name), first(facts.steps, name)
    if not recent or start is None or abs(fmean(recent) - start) > 0.01 * abs(start):
        return None
    return f"{start:.4g} -> {fmean(recent):.4g}"


def _learning_rate_too_high(facts: RunFacts) -> Iterator[str]:
    if signs := "; ".join(_signs_of_rate(facts)):
        yield f"{signs}, with optim.lr={digits(facts.setting('optim.lr'))}"


def _signs_of_rate(facts: RunFacts) -> Iterator[str]:
    """Yield a clause for each sign of a high rate; medians judge the end, so spikes do not count."""
    yield from _rise_of_loss(facts)
    steps, falls = facts.total_steps, facts.falls(facts.steps)
    if falls is None:  # without a reference: relative to the first rows, which have other responses
        logps = pooled(facts.steps, "logps/chosen_per_token", FEWEST_PAIRS)
        falls = [(step, logps[0][1] - logp) for step, logp in logps]
    early = next(((step, fall) for step, fall in falls if fall > 1 and step <= steps / 4), None)
    recent = [fall for step, fall in falls if step > 0.75 * steps]
    if early and recent and median(recent) > 1:
        yield (
            f"the log-prob of chosen responses fell by {early[1]:.2g} nats per token by step {early[0]:.0f} "
            f"of {steps:,}"
        )


def _rise_of_loss(facts: RunFacts) -> Iterator[str]:
    losses, recent = pooled(facts.steps, "loss", _FIRST_PAIRS), facts.recent("loss")
    pairs = sum(row.get("pairs", 0) for row in facts.steps if row["step"] > 0.75 * facts.total_steps)
    if losses and recent and pairs >= FEWEST_PAIRS:
        start, end = losses[0][1], median(recent)
        if start > 0 and end > 1.2 * start:
            yield f"the loss rose from {start:.3g} to {end:.3g}"
            return
    # If the policy starts as the reference, its first loss has no noise. Later the decaying rate heals the
    # loss, so only the first quarter shows the fault.
    early = [loss for step, loss in values(facts.steps, "loss") if step <= facts.total_steps / 4]
    if len(early) >= 3 and facts.falls(facts.steps) and median(early) > 2 * early[0] > 0:
        yield f"the loss rose from {early[0]:.3g} to {median(early):.3g} in the first quarter of the steps"


def _learnt_nothing(facts: RunFacts) -> Iterator[str]:
    if not _should_have_learnt(facts):
        return
    accuracy, training, name = facts.accuracy(), facts.training_accuracy(), facts.accuracy_title
    if accuracy is None or training is None or not accuracy.is_chance:
        return
    is_known = accuracy.pairs >= 30 and max(accuracy.value, training.value) < 0.6
    if is_known or (stayed := _losses_that_did_not_fall(facts, accuracy.pairs)):
        losses = "" if is_known else f"; {stayed}"
        yield (
            f"{facts.part} {name} {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s is within its "
            f"noise of one half ({accuracy.noise:.3f}); training {name} {digits(training.value)}{losses}"
        )


def _losses_that_did_not_fall(facts: RunFacts, pairs: int) -> str | None:
    """Return a clause if the evaluation loss ended at its start or above; of few pairs, if both losses did.

    A training loss falls, too, where a policy learns its pairs by heart.
    """
    evaluated, recent = (
        [loss for _, loss in values(evaluation_rows(facts.rows), "loss")],
        facts.recent("loss"),
    )
    start = first(facts.steps, "loss")
    if len(evaluated) < 2 or evaluated[-1] < 0.99 * evaluated[0] or start is None or not recent:
        return None
    if pairs < 30 and fmean(recent) < 0.99 * start:
        return None
    return (
        f"evaluation loss {evaluated[0]:.3g} -> {evaluated[-1]:.3g}, training loss {start:.3g} -> "
        f"{fmean(recent):.3g}"
    )


def _untrained_base(facts: RunFacts) -> Iterator[str]:
    """Yield a clause if chosen responses stay about as unlikely as a guess among all tokens makes them."""
    logps, vocabulary = facts.chosen_logps(), facts.summary.get("vocabulary")
    if not vocabulary or not logps or not _should_have_learnt(facts):
        return
    guess = -math.log(vocabulary)
    if logps[0] < (0.6 if vocabulary >= _LEAST_VOCABULARY else 0.95) * guess and logps[1] < 0.6 * guess:
        yield (
            f"chosen responses have {logps[0]:.2f} nats per token at first and {logps[1]:.2f} at the end; "
            f"a guess among {vocabulary:,} tokens has {guess:.2f}: no sampled response can be a text"
        )


def _hardly_moved(facts: RunFacts) -> Iterator[str]:
    if not _should_have_learnt(facts):
        return
    margin, noise = last(facts.last_rows, MARGIN), facts.noise(facts.last_rows).get(MARGIN)
    if margin is not None and noise is not None and abs(margin) <= noise:
        yield f"{facts.part} margin {digits(margin)} is within the noise of rounding ({digits(noise)})"
    losses, nats = _loss_that_stayed(facts), facts.margin_nats()
    # A loss with a large constant part, as of sppo_hard with a small beta, hardly changes while margins grow.
    if losses and len(values(facts.steps, "loss")) >= 3 and (nats is None or nats < 2):
        yield (
            f"the training loss stayed at its start, {losses}, in {facts.total_steps:,} steps with "
            f"optim.lr={digits(facts.setting('optim.lr'))}"
        )


def _should_have_learnt(facts: RunFacts) -> bool:
    """Return whether a run reached its end in enough steps, all of them applied."""
    is_cut = facts.summary.get("exit") in (RunOutcome.preempted, RunOutcome.diverged)
    return not is_cut and not facts.summary.get("bad_steps") and facts.total_steps >= FEWEST_STEPS


def _outside_band(facts: RunFacts) -> Iterator[str]:
    is_whole = facts.summary.get("exit") == RunOutcome.completed and facts.total_steps >= FEWEST_STEPS
    for band in facts.summary.get("bands") or ():
        metric, at, low, high = (band[name] for name in ("metric", "step", "low", "high"))
        at = facts.total_steps if at is None and is_whole else at
        for step, value in values(facts.rows, metric):
            if step == at and not low <= value <= high:
                yield f"{metric} at step {step:.0f} is {digits(value)}, not in the band {low:g} to {high:g}"


def _mismatch_grows(facts: RunFacts) -> Iterator[str]:
    beta, ratios = facts.setting("loss.beta"), values(facts.steps, MISMATCH)
    before, end = (
        [ratio for step, ratio in ratios if low < step / facts.total_steps <= low + 0.25]
        for low in (0.5, 0.75)
    )
    if beta and before and end and beta * fmean(end) > 3 and fmean(end) > 1.2 * fmean(before):
        yield (
            f"the log-ratio of mismatched responses (z) is {digits(fmean(end))} nats at the end and still "
            f"grows, {digits(beta * fmean(end))} times 1 / loss.beta: the policy makes any response likelier"
        )


OPTIMISATION_RULES: tuple[Find, ...] = (
    _diverged,
    _nothing_trained,
    _beta_wrong,
    _learning_rate_too_high,
    _untrained_base,
    _learnt_nothing,
    _hardly_moved,
    _outside_band,
    _mismatch_grows,
)
