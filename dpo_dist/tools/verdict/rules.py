"""The verdict about a run: one sentence and at most five findings; see docs/watching.md."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from dpo_dist.config.losses import balancing_weight
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import counted, percent
from dpo_dist.objective.metrics import EXCESS, MISMATCH
from dpo_dist.tools.findings import Finding, Level, Rule
from dpo_dist.tools.verdict.facts import (
    MARGIN,
    Accuracy,
    Row,
    RunFacts,
    evaluation_rows,
    first,
    last,
    mean,
    number,
    pooled,
    values,
)
from dpo_dist.training.reporting.metrics_log import finite, is_collapsed, logps_by_side

MOST_FINDINGS = 5
NOTHING_TO_JUDGE = "nothing to judge, as no metrics row of a training step was written (trainer.log_every)"
_FEWEST_STEPS = 10
"""A shorter run has learnt too little to be judged by it."""
_FEWEST_PAIRS, _FIRST_PAIRS = 50, 200
"""Fewest pairs for a mean that is not noise; the second is for the loss at the start."""
_QUANTITIES = {
    "logps/chosen": "log-prob of chosen responses",
    "logps/rejected": "log-prob of rejected responses",
    "loss": "loss",
    "grad_norm": "gradient norm",
}
"""In the order in which a step computes them; the first that is not finite is named."""
_LOGISTIC = ("sigmoid", "robust", "dpop", "odpo")
"""Losses that fall to 0 with a growing margin; others have another scale, or grow again."""
_LEAKS = ("label_leak", "length_bias", "style_bias")
"""Rules of the doctor that name a feature which reveals the chosen response."""
_REFERENCE = "samples/reference_"
Find = Callable[[RunFacts], Iterator[str]]


@dataclass(frozen=True)
class RunRule(Rule):
    """A rule about a run; its `text` is the fault in two to five words, with which the sentence starts.

    `find` yields what shows the fault; rules that this one `explains` are its consequences, not reported.
    """

    find: Find
    explains: tuple[str, ...] = ()


RULES: dict[str, RunRule] = {}
"""By name, in the order in which a verdict reports them: the worst fault first."""
_TABLE = yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"))


def _rule(find: Find) -> Find:
    """Add the rule of a function, by whose name it is in the table."""
    name = find.__name__.strip("_")
    level, text, remedy, *explains = _TABLE[name]
    RULES[name] = RunRule(Level(level), text, remedy, find, tuple(explains))
    return find


@_rule
def _diverged(facts: RunFacts) -> Iterator[str]:
    yield from _lost_weights(facts)
    if bad := facts.summary.get("bad_steps", 0):
        yield (
            f"in {counted(bad, 'step')} of {facts.total_steps:,}, which taught nothing, loss or gradient was "
            "not finite"
        )


def _lost_weights(facts: RunFacts) -> Iterator[str]:
    """Yield a clause if the weights compute nothing usable any more, or never did."""
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
            f"responses have {number(logp)} nats per token, as if all "
            f"tokens were alike; before it the loss was {number(last(before, 'loss'))}, with "
            f"optim.lr={number(facts.setting('optim.lr'))}"
        )


def _first_bad_value(facts: RunFacts, index: int, broken: Sequence[str]) -> str:
    """Return the likeliest cause of the first row with values that are not finite, and its place."""
    row = facts.rows[index]
    quantity = next(key for key in (*_QUANTITIES, *broken) if key in broken or f"eval_{key}" in broken)
    # The row that ends a run has the last of several skipped steps.
    ends = row is facts.rows[-1] and "loss" in row
    step = int(row["step"]) - ((facts.summary.get("bad_in_a_row") or 1) - 1 if ends else 0)
    before = RunFacts(facts.rows[:index], {**facts.summary, "steps": int(row["step"])})
    if symptom := next(_signs_of_rate(before), None):
        cause = f"the learning rate is too high: {symptom}"
    elif "loss" not in row:
        cause = f"the evaluation data have {facts.unit}s for which the policy gives no finite value"
    elif not quantity.startswith("logps/"):
        cause = "the log-probs are finite, the loss or its gradient is not"
    elif before.steps:
        cause = "an update damaged the weights: the learning rate is too high, or its warm-up too short"
    else:
        cause = "the model gives no finite log-probs from the start: damaged weights, or numbers out of range"
    return (
        f"{cause}; the {_QUANTITIES.get(quantity, quantity)} was the first value that is not finite, at step "
        f"{step}; before it the loss was {number(last(before.steps, 'loss'))} and the gradient norm "
        f"{number(last(before.steps, 'grad_norm'))}, with a learning rate of "
        f"{number(last([row, *before.steps], 'learning_rate'))}"
    )


@_rule
def _nothing_trained(facts: RunFacts) -> Iterator[str]:
    norms = [norm for _, norm in values(facts.steps, "grad_norm")]
    if norms and not any(norms):
        yield f"the gradient was exactly 0 in every step of {facts.total_steps:,}"


@_rule
def _labels_swapped(facts: RunFacts) -> Iterator[str]:
    training, name = facts.training_accuracy(), facts.accuracy_title
    if training is not None and training.is_below_half:
        yield (
            f"training {facts.accuracy_title} is {training.value:.3f} on {training.pairs:,} {facts.unit}s: "
            "the loss teaches the opposite of the labels"
        )
        return
    if facts.total_steps < _FEWEST_STEPS:  # one step moves all pairs together
        return
    for source, share in facts.sources("eval").items():
        accuracy = facts.evaluation_accuracy(source, share)
        if accuracy is not None and accuracy.is_below_half:
            yield (
                f"evaluation {name} is {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s"
                f"{source.replace('/', ' of ', 1)}, clearly below one half, while training {name} is "
                f"{number(training.value if training else None)}: "
                f"{'its' if source else 'training or evaluation'} labels look swapped"
            )
            return
    for source, share in facts.sources("train").items():
        # Later, a policy may tell the sources apart, or know the pairs by heart. One that does not start as
        # the reference has preferences of its own before it learns.
        ends = (0.25, 0.5, 0.75, 1.0) if facts.falls(facts.steps) else (1.0,)
        quarters = (facts.training_accuracy(source, share, end) for end in ends)
        below = [part for part in quarters if source and part is not None and part.is_below_half]
        if below:
            yield (
                f"training {name} of {source[1:]} is {min(below).value:.3f} on the {min(below).pairs:,} "
                f"{facts.unit}s of a quarter of the steps, clearly below one half, while that of all is "
                f"{number(training.value if training else None)} at the end: its labels look swapped"
            )
            return


@_rule
def _evaluation_leak(facts: RunFacts) -> Iterator[str]:
    counts = facts.counts("eval")
    count, pairs = counts.get("prompts_also_in_train", 0), counts.get("pairs", 0)
    if pairs and count > 0.01 * pairs:
        yield (
            f"{count:,} of {pairs:,} evaluation {facts.unit}s ({percent(count / pairs)}) have a prompt "
            "that is also in the training data: the evaluation measures memory"
        )


@_rule
def _evaluation_too_good(facts: RunFacts) -> Iterator[str]:
    for training, accuracy, noise in _accuracies(facts):
        if accuracy.value - training.value > max(0.05, noise):
            yield (
                f"evaluation {facts.accuracy_title} {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s "
                f"is above training {facts.accuracy_title} {number(training.value)}: the "
                "evaluation data are easier, or copies of training data, or some training labels are noise"
            )


def _accuracies(facts: RunFacts) -> Iterator[tuple[Accuracy, Accuracy, float]]:
    """Yield training and evaluation accuracy, and how far they differ by chance, if both are known."""
    training, accuracy = facts.training_accuracy(), facts.accuracy()
    is_long = facts.total_steps >= _FEWEST_STEPS
    if facts.evaluations and is_long and training is not None and accuracy is not None:
        yield training, accuracy, math.hypot(training.noise, accuracy.noise)


@_rule
def _label_leak(facts: RunFacts) -> Iterator[str]:
    within = max(_FEWEST_STEPS, 0.1 * facts.total_steps)
    # In later epochs a run may know its data by heart.
    unseen = [row for row in facts.steps if row.get("epoch", 0) <= 1]
    for source, share in facts.sources("train").items():
        of_source = f" of {source[1:]}" if source else ""
        means = pooled(unseen, facts.accuracy_key + source, _FEWEST_PAIRS, share)
        at_once = next(((step, value) for step, value in means if step <= within and value >= 0.95), None)
        by_length = _leak_by_length(facts, source, 1.3)
        if at_once is not None and (evidence := by_length or _leak_by_form(facts, source)):
            step, value = at_once
            yield f"{facts.accuracy_title}{of_source} is {value:.3f} at step {step:.0f} already, {evidence}"
            return
        if means and by_length and _leak_by_length(facts, source, 2.0):
            yield f"the label{of_source} shows {by_length}"
            return


def _leak_by_length(facts: RunFacts, source: str, ratio: float) -> str | None:
    """Return a clause if the mean lengths of both sides differ by this ratio."""
    rows = facts.evaluations if source else facts.steps  # steps have no lengths by source
    chosen, rejected = mean(rows, f"tokens/chosen{source}"), mean(rows, f"tokens/rejected{source}")
    if not chosen or not rejected or max(chosen / rejected, rejected / chosen) < ratio:
        return None
    return f"by length: chosen responses have {chosen:.0f} tokens, rejected ones {rejected:.0f}"


def _leak_by_form(facts: RunFacts, source: str) -> str | None:
    """Return a clause about the doctor's finding of a leak; not its text, which may quote the data."""
    for finding in facts.data_findings:
        is_leak = finding.get("rule") in _LEAKS and finding.get("level") != Level.note
        if is_leak and (not source or finding.get("source") == source[1:]):
            share = finding.get("share")
            guessed = (
                "" if share is None else f", which alone guesses {percent(share)} of the {facts.unit}s right"
            )
            return f"by form: the doctor found {finding['rule']}{guessed}"
    return None


@_rule
def _does_not_generalise(facts: RunFacts) -> Iterator[str]:
    if facts.total_steps >= _FEWEST_STEPS:
        yield from _rise_of_evaluation_loss(facts)
    for training, accuracy, noise in _accuracies(facts):
        if training.value - accuracy.value > max(0.1, noise):
            yield (
                f"training {facts.accuracy_title} {training.value:.3f} is far above evaluation "
                f"{facts.accuracy_title} {accuracy.value:.3f} on {counted(accuracy.pairs, facts.unit)}"
            )


def _rise_of_evaluation_loss(facts: RunFacts) -> Iterator[str]:
    """Yield a clause if the last evaluation loss is above an earlier one, also above that of step 0."""
    losses = values(evaluation_rows(facts.rows), "loss")
    recent = facts.recent("loss")
    if len(losses) < 2 or not recent:
        return
    step, lowest = min(losses[:-1], key=lambda point: point[1])
    # Before the first step the loss of the training pairs is that of a policy that is the reference, too.
    earlier = [loss for at, loss in values(facts.steps, "loss") if at <= step]
    before, after = earlier[-1] if earlier else lowest, fmean(recent)
    end, pairs = losses[-1][1], facts.evaluated_pairs
    noise = 3 * abs(end) / math.sqrt(pairs) if pairs else math.inf
    if after < before and end - lowest > max(0.05 * abs(losses[0][1]), noise):
        since = f"at step {step:.0f}" if step else "at the start"
        yield (
            f"evaluation loss rose from {lowest:.3g} {since} to {end:.3g}, while training loss fell from "
            f"{before:.3g} to {after:.3g}"
        )


@_rule
def _beta_wrong(facts: RunFacts) -> Iterator[str]:
    beta, nats = facts.setting("loss.beta"), facts.margin_nats()
    start, recent = first(facts.steps, "loss"), facts.recent("loss")
    if nats is None or start is None or not recent or facts.setting("loss.kind") not in _LOGISTIC:
        return
    change = "the log-prob of chosen minus rejected changed by"
    untrained, end = max(start, math.log(2)), median(recent)
    losses = f"{start:.2g} -> {end:.2g}"
    if beta >= 1 and end <= 0.01 * untrained:
        # Judged where it is used up: later, few pairs push the margin further.
        at = next(at for at, row in enumerate(facts.steps, 1) if row["loss"] <= 0.01 * untrained)
        then = RunFacts(facts.steps[:at], facts.summary).margin_nats() or 0.0
        if abs(then) <= 5:
            yield (
                f"loss.beta={number(beta)} is too large: the loss is used up ({losses}) from step "
                f"{facts.steps[at - 1]['step']:.0f} on, when {change} {then:.2g} nats only"
            )
    elif beta >= 1 and end > 1.2 * untrained and abs(nats) <= 10:
        yield (
            f"loss.beta={number(beta)} is too large: the loss of wrong pairs grew ({losses}) although "
            f"{change} {nats:.2g} nats only"
        )
    elif nats >= 2 and (stayed := _loss_that_stayed(facts)):
        yield (
            f"loss.beta={number(beta)} is too small: the loss stays at {stayed} although {change} {nats:.2g} "
            "nats"
        )


def _loss_that_stayed(facts: RunFacts) -> str | None:
    """Return the first loss and the mean of the last quarter of the steps if they are alike, or None."""
    name = "loss" if first(facts.steps, EXCESS) is None else EXCESS  # soft labels keep the loss above 0
    recent, start = facts.recent(name), first(facts.steps, name)
    if not recent or start is None or abs(fmean(recent) - start) > 0.01 * abs(start):
        return None
    return f"{start:.4g} -> {fmean(recent):.4g}"


@_rule
def _learning_rate_too_high(facts: RunFacts) -> Iterator[str]:
    if signs := "; ".join(_signs_of_rate(facts)):
        yield f"{signs}, with optim.lr={number(facts.setting('optim.lr'))}"


def _signs_of_rate(facts: RunFacts) -> Iterator[str]:
    """Yield a clause for each sign; of the end by medians, as a spike that recovers is no sign."""
    yield from _rise_of_loss(facts)
    steps, falls = facts.total_steps, facts.falls(facts.steps)
    if falls is None:  # without a reference relative to the first rows, which have other responses
        logps = pooled(facts.steps, "logps/chosen_per_token", _FEWEST_PAIRS)
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
    if losses and recent and pairs >= _FEWEST_PAIRS:
        start, end = losses[0][1], median(recent)
        if start > 0 and end > 1.2 * start:
            yield f"the loss rose from {start:.3g} to {end:.3g}"
            return
    # The first loss of a policy that starts as the reference has no noise. A decaying rate heals later ones.
    early = [loss for step, loss in values(facts.steps, "loss") if step <= facts.total_steps / 4]
    if len(early) >= 3 and facts.falls(facts.steps) and median(early) > 2 * early[0] > 0:
        yield f"the loss rose from {early[0]:.3g} to {median(early):.3g} in the first quarter of the steps"


@_rule
def _responses_forgotten(facts: RunFacts) -> Iterator[str]:
    start, end = facts.chosen_logps() or (0.0, 0.0)
    if start - end < _least_fall(start):
        return
    share = last(facts.last_rows, "rewards/both_fall") or 0.0
    if facts.unit == "record":
        yield f"good responses became far less likely, {start:.2f} -> {end:.2f} nats per token"
    elif share >= 0.5 and "apo_down" not in facts.kinds:
        yield (
            f"chosen responses became far less likely, {start:.2f} -> {end:.2f} nats per token, and both "
            f"responses did in {percent(share)} of the pairs, at an accuracy of "
            f"{number(last(facts.last_rows, facts.accuracy_key))}"
        )


def _least_fall(start: float) -> float:
    """Return the fall of chosen responses, in nats per token, that healthy runs do not have at their end.

    Published ones of a 7B model fell by 0.06 to 0.95 times their start near -1; responses that
    are almost certain after an SFT stage break sooner.
    """
    return min(max(-start, 0.5), 1.0)


@_rule
def _over_optimised(facts: RunFacts) -> Iterator[str]:
    if symptoms := ", ".join(_worse_samples(facts)):
        is_known = any(key.startswith(_REFERENCE) for row in facts.evaluations for key in row)
        yield f"{symptoms} compared with {'the reference' if is_known else 'the first samples'}"


def _worse_samples(facts: RunFacts) -> Iterator[str]:
    rows = facts.evaluations
    prompts = last(rows, "samples/prompts") or math.inf

    def ends(name: str) -> tuple[float, float] | None:
        """Return a metric of the reference's responses, else of the first samples, and of the last ones."""
        start, end = last(rows, _REFERENCE + name), last(rows, f"samples/{name}")
        start = first(rows, f"samples/{name}") if start is None else start
        return None if start is None or end is None else (start, end)

    if lengths := ends("length"):
        start, end = lengths
        # Lengths of few responses differ by chance; 1.5 times from 36 prompts on.
        least = start * max(1.5, 1 + 3 / math.sqrt(prompts))
        if start and end >= least and end > (last(rows, "tokens/chosen") or 0.0):
            yield f"sampled responses are {end / start:.1f}x longer ({start:.0f} -> {end:.0f} tokens)"
    if (distinct := ends("distinct_3")) and distinct[0] > 0 and distinct[1] <= 0.7 * distinct[0]:
        yield "they repeat themselves (distinct 3-grams {} -> {})".format(*map(percent, distinct))
    for metric, meaning in (
        ("finished", "do not end by themselves"),
        ("empty", "are empty"),
        ("refusals", "are refusals"),
        ("language_changed", "are in another language than the chosen response"),
    ):
        if shares := ends(metric):
            start, end = (1 - value if metric == "finished" else value for value in shares)
            both = (start + end) / 2
            # Healthy runs sample, too, and half of their responses may not end: far more than by chance.
            if end - start >= max(0.1, 2.5 * math.sqrt(2 * both * (1 - both) / prompts)):
                yield f"more sampled responses {meaning} ({percent(start)} -> {percent(end)})"


@_rule
def _learnt_nothing(facts: RunFacts) -> Iterator[str]:
    if not _should_have_learnt(facts):
        return
    accuracy, training, name = facts.accuracy(), facts.training_accuracy(), facts.accuracy_title
    if accuracy is not None and training is not None and accuracy.pairs >= 30:
        is_chance = abs(accuracy.value - 0.5) <= accuracy.noise
        if is_chance and max(accuracy.value, training.value) < 0.6:
            yield (
                f"{facts.part} {name} {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s is within its "
                f"noise of one half ({accuracy.noise:.3f}); training {name} {number(training.value)}"
            )


@_rule
def _hardly_moved(facts: RunFacts) -> Iterator[str]:
    if not _should_have_learnt(facts):
        return
    margin, noise = last(facts.last_rows, MARGIN), facts.noise(facts.last_rows).get(MARGIN)
    if margin is not None and noise is not None and abs(margin) <= noise:
        yield f"{facts.part} margin {number(margin)} is within the noise of rounding ({number(noise)})"
    losses, nats = _loss_that_stayed(facts), facts.margin_nats()
    # A loss with a large constant part, such as sppo_hard with a small beta, stays while margins grow.
    if losses and len(values(facts.steps, "loss")) >= 3 and (nats is None or nats < 2):
        yield (
            f"the training loss stayed at its start, {losses}, in {facts.total_steps:,} steps with "
            f"optim.lr={number(facts.setting('optim.lr'))}"
        )


def _should_have_learnt(facts: RunFacts) -> bool:
    """Return whether a run reached its end in enough steps, all of them applied."""
    is_cut = facts.summary.get("exit") in (RunOutcome.preempted, RunOutcome.diverged)
    return not is_cut and not facts.summary.get("bad_steps") and facts.total_steps >= _FEWEST_STEPS


@_rule
def _responses_cut(facts: RunFacts) -> Iterator[str]:
    for name, noun in (("train", "training"), ("eval", "evaluation")):
        counts = facts.counts(name)
        count, kept = counts.get("response_truncated", 0), counts.get("kept", 0)
        if kept and count > 0.05 * kept:
            yield (
                f"{count:,} of {kept:,} {noun} records ({percent(count / kept)}) have a response whose end "
                "data.max_length cuts: the policy does not learn to end"
            )
            return


@_rule
def _doctor_errors(facts: RunFacts) -> Iterator[str]:
    findings = facts.data_findings
    names = [str(finding.get("rule")) for finding in findings if finding.get("level") == Level.error]
    if names:
        yield f"the doctor found errors in the data: {', '.join(dict.fromkeys(names))}"
    for finding in findings:
        if finding.get("rule") == "reference_disagrees" and (finding.get("share") or 0.0) > 0.2:
            yield (
                f"the reference prefers the rejected response by far in {percent(finding['share'])} of "
                f"{finding.get('source') or 'the data'}: labels may be swapped"
            )
            return


@_rule
def _outside_band(facts: RunFacts) -> Iterator[str]:
    is_whole = facts.summary.get("exit") == RunOutcome.completed and facts.total_steps >= _FEWEST_STEPS
    for band in facts.summary.get("bands") or ():
        metric, at, low, high = (band[name] for name in ("metric", "step", "low", "high"))
        at = facts.total_steps if at is None and is_whole else at
        for step, value in values(facts.rows, metric):
            if step == at and not low <= value <= high:
                yield f"{metric} at step {step:.0f} is {number(value)}, not in the band {low:g} to {high:g}"


@_rule
def _mismatch_grows(facts: RunFacts) -> Iterator[str]:
    beta, ratios = facts.setting("loss.beta"), values(facts.steps, MISMATCH)
    before, end = (
        [ratio for step, ratio in ratios if low < step / facts.total_steps <= low + 0.25]
        for low in (0.5, 0.75)
    )
    if beta and before and end and beta * fmean(end) > 3 and fmean(end) > 1.2 * fmean(before):
        yield (
            f"the log-ratio of mismatched responses (z) is {number(fmean(end))} nats at the end and still "
            f"grows, {number(beta * fmean(end))} times 1 / loss.beta: the policy makes any response likelier"
        )


@_rule
def _good_responses_fall(facts: RunFacts) -> Iterator[str]:
    falls = facts.falls(facts.last_rows)
    if facts.unit == "record" and falls and falls[-1][1] >= 0.1:
        yield (
            f"good responses lost {falls[-1][1]:.2g} nats per token against the reference, although the loss "
            f"rewards them ({facts.part} reward {number(last(facts.last_rows, 'rewards/chosen'))})"
        )


@_rule
def _one_label(facts: RunFacts) -> Iterator[str]:
    labels = facts.counts("train").get("labels") or {}
    weights = {facts.setting(f"loss.{name}_weight") or 1.0 for name in ("desirable", "undesirable")}
    most = max(labels, key=labels.__getitem__, default="")
    if most and labels[most] > 0.9 * sum(labels.values()) and len(weights) == 1:
        given = (labels["good"], labels["bad"], *weights, *weights)
        remedy = f"; {balancing_weight(*given)} balances them" if all(labels.values()) else ""
        yield (
            f"{percent(labels[most] / sum(labels.values()))} of the training responses are {most}, and both "
            f"labels have the same weight{remedy}"
        )


@_rule
def _displacement(facts: RunFacts) -> Iterator[str]:
    share, logps = last(facts.last_rows, "rewards/both_fall"), facts.chosen_logps()
    if share is None or logps is None or "apo_down" in facts.kinds:  # by design
        return
    start, end = logps
    if share >= 0.5 and start - end >= 0.1:
        yield (
            f"chosen responses became less likely, {start:.2f} -> {end:.2f} nats per token, "
            f"and in {percent(share)} of the pairs both responses did (likelihood displacement): usual, and "
            "harmful only if probability moves to texts that are neither"
        )


@dataclass(frozen=True)
class Verdict:
    """The worst fault with its numbers, or the result of a run without one; findings, the worst first."""

    sentence: str
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the section `verdict` of summary.json."""
        findings = [{"rule": finding.rule, "text": finding.with_remedy} for finding in self.findings]
        return {"sentence": self.sentence, "findings": findings}

    def lines(self) -> list[str]:
        """Return the verdict for a screen, at most six lines; the sentence is not repeated by its finding."""
        return [
            f"verdict: {self.sentence}",
            *(
                f"  try: {fault.remedy}" if self.sentence.endswith(fault.text) else f"  - {fault.with_remedy}"
                for fault in self.findings
            ),
        ]


def verdict(
    rows: Sequence[Row], summary: Mapping[str, Any], data_findings: Sequence[Mapping[str, Any]] = ()
) -> Verdict:
    """Judge a run by its files; a rule whose inputs are missing finds nothing.

    `rows` are of log_history.json, with nan for null; `exit` need not be in the summary.
    """
    facts = RunFacts(rows, summary, data_findings)
    by_rule = {name: finding for name in RULES if (finding := _finding(name, facts)) is not None}
    is_lost = next(_lost_weights(facts), None) is not None  # else some steps were skipped, no more
    causes = [name for name in by_rule if name != "diverged" or is_lost]
    explained = {other for name in causes for other in RULES[name].explains}
    findings = [finding for name, finding in by_rule.items() if name not in explained]
    worst = next((finding for finding in findings if finding.level is not Level.note), None)
    sentence = f"{RULES[worst.rule].text}: {worst.text}" if worst else _success(facts)
    if summary.get("exit") == RunOutcome.preempted:
        sentence = f"stopped after step {facts.total_steps:,}; so far: {sentence}"
    return Verdict(sentence, tuple(findings[:MOST_FINDINGS]))


def sample_alarm(rows: Sequence[Row]) -> Finding | None:
    """Return what is wrong with the sampled responses, by the metrics rows so far."""
    return _finding("over_optimised", RunFacts(rows, {}))


def _finding(name: str, facts: RunFacts) -> Finding | None:
    rule = RULES[name]
    text = "; ".join(rule.find(facts))
    return Finding(name, rule.level, text, remedy=rule.remedy) if text else None


def _success(facts: RunFacts) -> str:
    accuracy = facts.accuracy()
    start, end = first(facts.steps, "loss"), last(facts.steps, "loss")
    if start is None or end is None:
        return NOTHING_TO_JUDGE
    fall = f"training loss {start:.3g} -> {end:.3g} in {counted(facts.total_steps, 'step')}"
    result = "no fault found" if facts.total_steps >= _FEWEST_STEPS else "too short to be judged"
    if not facts.evaluations:
        result += " (nothing was evaluated after a step, or sampled)"
    elif last(facts.evaluations, "samples/prompts") is None:
        result += " (nothing was sampled)"
    if accuracy is None or last(facts.last_rows, facts.accuracy_key) is None:
        return f"{result}: {fall}"
    pairs = f" on {counted(accuracy.pairs, facts.unit)}" if accuracy.pairs else ""
    margin = number(last(facts.last_rows, "rewards/margins"))
    return (
        f"{result}: {facts.part} {facts.accuracy_title} {accuracy.value:.3f}{pairs}, margin {margin}, {fall}"
    )
