"""Rules about faults of the data that show in a run: wrong labels, leaks, no generalisation."""

import math
from collections.abc import Iterator
from statistics import fmean

from dpo_dist.config.losses import balancing_weight
from dpo_dist.data.counts import are_mostly_plain, plain_text_count
from dpo_dist.foundation.text import percent, pluralize
from dpo_dist.tools.findings import Level
from dpo_dist.tools.report.verdict.facts import (
    FEWEST_PAIRS,
    FEWEST_STEPS,
    Accuracy,
    Find,
    RunFacts,
    digits,
    evaluation_rows,
    mean,
    pooled,
    values,
)

_LEAKS = ("label_leak", "length_bias", "style_bias")
"""The doctor's rules about features that reveal the chosen response."""


def _labels_swapped(facts: RunFacts) -> Iterator[str]:
    training, name = facts.training_accuracy(), facts.accuracy_title
    if training is not None and training.is_below_half:
        yield (
            f"training {facts.accuracy_title} is {training.value:.3f} on {training.pairs:,} {facts.unit}s: "
            "the loss teaches the opposite of the labels"
        )
        return
    if facts.total_steps < FEWEST_STEPS:  # few steps move all pairs alike, not independently
        return
    for source, share in facts.sources("eval").items():
        accuracy = facts.evaluation_accuracy(source, share)
        if accuracy is not None and accuracy.is_below_half:
            yield (
                f"evaluation {name} is {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s"
                f"{source.replace('/', ' of ', 1)}, clearly below one half, while training {name} is "
                f"{digits(training.value if training else None)}: "
                f"{'its' if source else 'training or evaluation'} labels look swapped"
            )
            return
    for source, share in facts.sources("train").items():
        # Every quarter is judged: in later ones a policy may tell the sources apart, or know the pairs by
        # heart. If it does not start as the reference, it has preferences before it learns: then only the
        # last quarter is judged.
        ends = (0.25, 0.5, 0.75, 1.0) if facts.falls(facts.steps) else (1.0,)
        quarters = (facts.training_accuracy(source, share, end) for end in ends)
        below = [part for part in quarters if source and part is not None and part.is_below_half]
        if below:
            yield (
                f"training {name} of {source[1:]} is {min(below).value:.3f} on the {min(below).pairs:,} "
                f"{facts.unit}s of a quarter of the steps, clearly below one half, while that of all is "
                f"{digits(training.value if training else None)} at the end: its labels look swapped"
            )
            return


def _evaluation_leak(facts: RunFacts) -> Iterator[str]:
    counts = facts.counts("eval")
    count, pairs = counts.get("prompts_also_in_train", 0), counts.get("pairs", 0)
    if pairs and count > 0.01 * pairs:
        yield (
            f"{count:,} of {pairs:,} evaluation {facts.unit}s ({percent(count / pairs)}) have a prompt "
            "that is also in the training data: the evaluation measures memory"
        )


def _evaluation_too_good(facts: RunFacts) -> Iterator[str]:
    for training, accuracy, noise in _accuracies(facts):
        if accuracy.value - training.value > max(0.05, noise):
            yield (
                f"evaluation {facts.accuracy_title} {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s "
                f"is above training {facts.accuracy_title} {digits(training.value)}: the "
                "evaluation data are easier, or copies of training data, or some training labels are noise"
            )


def _accuracies(facts: RunFacts) -> Iterator[tuple[Accuracy, Accuracy, float]]:
    """Yield training and evaluation accuracy with their difference by chance, if known after enough steps."""
    training, accuracy = facts.training_accuracy(), facts.accuracy()
    is_long = facts.total_steps >= FEWEST_STEPS
    if facts.evaluations and is_long and training is not None and accuracy is not None:
        yield training, accuracy, math.hypot(training.noise, accuracy.noise)


def _label_leak(facts: RunFacts) -> Iterator[str]:
    within = max(FEWEST_STEPS, 0.1 * facts.total_steps)
    # In later epochs a run may know its data by heart.
    unseen = [row for row in facts.steps if row.get("epoch", 0) <= 1]
    for source, share in facts.sources("train").items():
        source_phrase = f" of {source[1:]}" if source else ""
        means = pooled(unseen, facts.accuracy_key + source, FEWEST_PAIRS, share)
        at_once = next(((step, value) for step, value in means if step <= within and value >= 0.95), None)
        by_length = _leak_by_length(facts, source, 1.3)
        if at_once is not None and (evidence := by_length or _leak_by_form(facts, source)):
            step, value = at_once
            name = f"{facts.accuracy_title}{source_phrase}"
            yield f"{name} is {value:.3f} at step {step:.0f} already, {evidence}"
            return
        if means and by_length and _leak_by_length(facts, source, 2.0):
            yield f"the label{source_phrase} shows {by_length}"
            return


def _leak_by_length(facts: RunFacts, source: str, ratio: float) -> str | None:
    """Return a clause if the mean lengths of the two sides differ by at least this ratio."""
    rows = facts.evaluations if source else facts.steps  # steps have no lengths by source
    chosen, rejected = mean(rows, f"tokens/chosen{source}"), mean(rows, f"tokens/rejected{source}")
    if not chosen or not rejected or max(chosen / rejected, rejected / chosen) < ratio:
        return None
    return f"by length: chosen responses have {chosen:.0f} tokens, rejected ones {rejected:.0f}"


def _leak_by_form(facts: RunFacts, source: str) -> str | None:
    """Return a clause on the doctor's finding of a label leak, without its text, which may quote data."""
    for finding in facts.data_findings:
        is_leak = finding.get("rule") in _LEAKS and finding.get("level") != Level.note
        if is_leak and (not source or finding.get("source") == source[1:]):
            share = finding.get("share")
            guessed = (
                "" if share is None else f", which alone guesses {percent(share)} of the {facts.unit}s right"
            )
            return f"by form: the doctor found {finding['rule']}{guessed}"
    return None


def _does_not_generalise(facts: RunFacts) -> Iterator[str]:
    if facts.total_steps >= FEWEST_STEPS:
        yield from _rise_of_evaluation_loss(facts)
    for training, accuracy, noise in _accuracies(facts):
        if training.value - accuracy.value > max(0.1, noise):
            yield (
                f"training {facts.accuracy_title} {training.value:.3f} is far above evaluation "
                f"{facts.accuracy_title} {accuracy.value:.3f} on {pluralize(accuracy.pairs, facts.unit)}"
            )


def _rise_of_evaluation_loss(facts: RunFacts) -> Iterator[str]:
    """Yield a clause if the last evaluation loss is above the lowest earlier one, step 0 included."""
    losses = values(evaluation_rows(facts.rows), "loss")
    recent = facts.recent("loss")
    if len(losses) < 2 or not recent:
        return
    step, lowest = min(losses[:-1], key=lambda point: point[1])
    # Without a training loss before that step, the evaluation's own loss replaces it.
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


def _template_not_applied(facts: RunFacts) -> Iterator[str]:
    counts = facts.counts("train")
    if are_mostly_plain(counts):
        told = plain_text_count(counts, "training records")
        yield f"{told}: chats with the model do not look like what it was trained on"


def _label_missing(facts: RunFacts) -> Iterator[str]:
    labels = facts.counts("train").get("labels") or {}
    present = [label for label, count in labels.items() if count]
    if len(present) == 1:
        yield f"all {labels[present[0]]:,} training responses are {present[0]}: there is nothing to compare"


def _one_label(facts: RunFacts) -> Iterator[str]:
    labels = facts.counts("train").get("labels") or {}
    weights = {facts.setting(f"loss.{name}_weight") or 1.0 for name in ("desirable", "undesirable")}
    most = max(labels, key=labels.__getitem__, default="")
    if most and all(labels.values()) and labels[most] > 0.9 * sum(labels.values()) and len(weights) == 1:
        given = (labels["good"], labels["bad"], *weights, *weights)
        yield (
            f"{percent(labels[most] / sum(labels.values()))} of the training responses are {most}, and both "
            f"labels have the same weight; {balancing_weight(*given)} balances them"
        )


DATA_RULES: tuple[Find, ...] = (
    _label_missing,
    _template_not_applied,
    _labels_swapped,
    _evaluation_leak,
    _evaluation_too_good,
    _label_leak,
    _does_not_generalise,
    _responses_cut,
    _doctor_errors,
    _one_label,
)
