"""The verdict about a run: one sentence and at most five findings; see docs/watching.md.

A rule is a function of this file and a row of verdict.yaml. It yields a clause for each sign of its fault.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dpo_dist.config.losses import balancing_weight
from dpo_dist.config.metrics import EXCESS, MISMATCH
from dpo_dist.data import DataCounts
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.text import percent, pluralize
from dpo_dist.tools.findings import Finding, FindingRule, Level
from dpo_dist.tools.report.facts import (
    FEWEST_PAIRS,
    FEWEST_STEPS,
    MARGIN,
    Accuracy,
    RunFacts,
    digits,
    evaluation_rows,
    first,
    last,
    mean,
    pooled,
    values,
)
from dpo_dist.training.reporting.metrics_log import MetricsRow, finite, is_collapsed, logps_by_side

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
_LEAKS = ("label_leak", "length_bias", "style_bias")
"""The doctor's rules about features that reveal the chosen response."""
_REFERENCE = "samples/reference_"
_MOST_FINDINGS = 5


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
    steps, falls = facts.total_steps, facts.falls(facts.steps)
    losses, recent_losses = pooled(facts.steps, "loss", _FIRST_PAIRS), facts.recent("loss")
    # If the policy starts as the reference, its first loss has no noise. Later the decaying rate heals the
    # loss, so only the first quarter shows the fault.
    early = [loss for step, loss in values(facts.steps, "loss") if step <= steps / 4]
    pairs = sum(row.get("pairs", 0) for row in facts.recent_rows())
    start = losses[0][1] if losses and recent_losses and pairs >= FEWEST_PAIRS else 0.0
    if start > 0 and median(recent_losses) > 1.2 * start:
        yield f"the loss rose from {start:.3g} to {median(recent_losses):.3g}"
    elif len(early) >= 3 and falls and median(early) > 2 * early[0] > 0:
        yield f"the loss rose from {early[0]:.3g} to {median(early):.3g} in the first quarter of the steps"
    if falls is None:  # without a reference: relative to the first rows, which have other responses
        logps = pooled(facts.steps, "logps/chosen_per_token", FEWEST_PAIRS)
        falls = [(step, logps[0][1] - logp) for step, logp in logps]
    far = next(((step, fall) for step, fall in falls if fall > 1 and step <= steps / 4), None)
    recent = [fall for step, fall in falls if step > 0.75 * steps]
    if far and recent and median(recent) > 1:
        yield (
            f"the log-prob of chosen responses fell by {far[1]:.2g} nats per token by step {far[0]:.0f} "
            f"of {steps:,}"
        )
    beta, ratios = facts.setting("loss.beta"), values(facts.steps, MISMATCH)
    before, end = (
        [ratio for step, ratio in ratios if low < step / steps <= low + 0.25] for low in (0.5, 0.75)
    )
    if beta and before and end and beta * fmean(end) > 3 and fmean(end) > 1.2 * fmean(before):
        yield (
            f"the log-ratio of mismatched responses (z) is {digits(fmean(end))} nats at the end and still "
            f"grows, {digits(beta * fmean(end))} times 1 / loss.beta: the policy makes any response likelier"
        )


def _learnt_nothing(facts: RunFacts) -> Iterator[str]:
    accuracy, training, name = facts.accuracy(), facts.training_accuracy(), facts.accuracy_title
    if not _should_have_learnt(facts) or accuracy is None or training is None or not accuracy.is_chance:
        return
    clause = (
        f"{facts.part} {name} {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s is within its "
        f"noise of one half ({accuracy.noise:.3f}); training {name} {digits(training.value)}"
    )
    if accuracy.pairs >= 30 and max(accuracy.value, training.value) < 0.6:
        yield clause
        return
    # A training loss falls, too, where a policy learns its pairs by heart: it counts beside few pairs only.
    evaluated = [loss for _, loss in values(evaluation_rows(facts.rows), "loss")]
    recent, start = facts.recent("loss"), first(facts.steps, "loss")
    if len(evaluated) < 2 or start is None or not recent:
        return
    if evaluated[-1] >= 0.99 * evaluated[0] and (accuracy.pairs >= 30 or fmean(recent) >= 0.99 * start):
        yield (
            f"{clause}; evaluation loss {evaluated[0]:.3g} -> {evaluated[-1]:.3g}, training loss "
            f"{start:.3g} -> {fmean(recent):.3g}"
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
                f"in a quarter of the steps training {name} of source {source[1:]} is "
                f"{min(below).value:.3f} on {min(below).pairs:,} {facts.unit}s, clearly below one half, "
                f"while that of all sources is {digits(training.value if training else None)} at the end: "
                "the labels of this source look swapped"
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
    # The last evaluation loss is above the lowest earlier one, step 0 included.
    losses, recent = values(evaluation_rows(facts.rows), "loss"), facts.recent("loss")
    if facts.total_steps >= FEWEST_STEPS and len(losses) >= 2 and recent:
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
    for training, accuracy, noise in _accuracies(facts):
        if training.value - accuracy.value > max(0.1, noise):
            yield (
                f"training {facts.accuracy_title} {training.value:.3f} is far above evaluation "
                f"{facts.accuracy_title} {accuracy.value:.3f} on {pluralize(accuracy.pairs, facts.unit)}"
            )


def _data_faults(facts: RunFacts) -> Iterator[str]:
    """Yield what the counts of the start and the doctor have said about many of the records."""
    training = DataCounts.from_numbers(facts.counts("train"))
    if training.is_mostly_plain:
        plain = training.plain_in_words("training records")
        yield f"{plain}: data.text_as_messages=true makes each prompt a user's turn"
    for name, noun in (("train", "training"), ("eval", "evaluation")):
        counts = facts.counts(name)
        count, kept = counts.get("response_truncated", 0), counts.get("kept", 0)
        if kept and count > 0.05 * kept:
            yield (
                f"{count:,} of {kept:,} {noun} records ({percent(count / kept)}) have a response whose end "
                "data.max_length cuts, and the policy does not learn to end: raise it, or set "
                "data.truncation=keep_end or drop"
            )
            break
    errors = [str(each.get("rule")) for each in facts.data_findings if each.get("level") == Level.error]
    if errors:
        yield f"the doctor found errors: {', '.join(dict.fromkeys(errors))}"
    disagrees = [each for each in facts.data_findings if each.get("rule") == "reference_disagrees"]
    for finding in disagrees[:1]:
        if (share := finding.get("share") or 0.0) > 0.2:
            yield (
                f"the reference prefers the rejected response by far in {percent(share)} of "
                f"{finding.get('source') or 'the data'}: labels may be swapped"
            )


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


def _responses_forgotten(facts: RunFacts) -> Iterator[str]:
    start, end = facts.chosen_logps() or (0.0, 0.0)
    # In published healthy runs of a 7B model the log-probs fell from about -1 by 0.06 to 0.95 of that.
    # Responses that are almost certain after an SFT stage break sooner.
    if start - end < min(max(-start, 0.5), 1.0):
        return
    share = last(facts.last_rows, "rewards/both_fall") or 0.0
    if facts.unit == "record":
        yield f"good responses became far less likely, {start:.2f} -> {end:.2f} nats per token"
    elif share >= 0.5 and "apo_down" not in facts.kinds:
        yield (
            f"chosen responses became far less likely, {start:.2f} -> {end:.2f} nats per token, and both "
            f"responses did in {percent(share)} of the pairs, at an accuracy of "
            f"{digits(last(facts.last_rows, facts.accuracy_key))}"
        )


def _over_optimised(facts: RunFacts) -> Iterator[str]:
    if symptoms := ", ".join(_worse_samples(facts)):
        is_known = any(key.startswith(_REFERENCE) for row in facts.evaluations for key in row)
        yield f"{symptoms} compared with {'the reference' if is_known else 'the first samples'}"


def _worse_samples(facts: RunFacts) -> Iterator[str]:
    rows = facts.evaluations
    prompts = last(rows, "samples/prompts") or math.inf

    def ends(name: str) -> tuple[float, float] | None:
        """Return a metric of the reference's responses (else of the first samples) and of the last ones."""
        start, end = last(rows, _REFERENCE + name), last(rows, f"samples/{name}")
        start = first(rows, f"samples/{name}") if start is None else start
        return None if start is None or end is None else (start, end)

    if lengths := ends("length"):
        start, end = lengths
        # Lengths of few responses differ by chance; from 36 prompts on, 1.5 times is enough.
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
            # In healthy runs, too, half of the samples may not end: only a rise far above chance counts.
            if end - start >= max(0.1, 2.5 * math.sqrt(2 * both * (1 - both) / prompts)):
                yield f"more sampled responses {meaning} ({percent(start)} -> {percent(end)})"


def _samples_loop(facts: RunFacts) -> Iterator[str]:
    repeated, start = (last(facts.evaluations, name + "longest_repeat") for name in ("samples/", _REFERENCE))
    if repeated is not None and repeated >= 0.5 and facts.total_steps >= FEWEST_STEPS:
        yield (
            f"the longest passage that a sampled response repeats has {percent(repeated)} of its words"
            + (f", and {percent(start)} in the reference's responses" if start is not None else "")
        )


def _displacement(facts: RunFacts) -> Iterator[str]:
    share, logps, falls = (
        last(facts.last_rows, "rewards/both_fall"),
        facts.chosen_logps(),
        facts.falls(facts.last_rows),
    )
    if facts.unit == "record":
        if falls and falls[-1][1] >= 0.1:
            yield (
                f"good responses lost {falls[-1][1]:.2g} nats per token against the reference, although the "
                f"loss rewards them ({facts.part} reward {digits(last(facts.last_rows, 'rewards/chosen'))})"
            )
    elif share is not None and share >= 0.5 and logps and "apo_down" not in facts.kinds:
        start, end = logps  # apo_down lowers both by design
        if start - end >= 0.1:
            yield (
                f"chosen responses became less likely, {start:.2f} -> {end:.2f} nats per token, "
                f"and in {percent(share)} of the pairs both responses did (likelihood displacement): usual, "
                "and harmful only if probability moves to texts that are neither"
            )


@dataclass(frozen=True)
class RunRule(FindingRule):
    """A rule about a run; the verdict's sentence starts with its `text`, the fault in two to five words.

    `find` yields the signs of the fault. Rules that it `explains` are its consequences, and not reported.
    """

    find: Callable[[RunFacts], Iterator[str]]
    explains: tuple[str, ...] = ()


_FIND: dict[str, Callable[[RunFacts], Iterator[str]]] = {
    "diverged": _diverged,
    "nothing_trained": _nothing_trained,
    "label_missing": _label_missing,
    "labels_swapped": _labels_swapped,
    "evaluation_leak": _evaluation_leak,
    "evaluation_too_good": _evaluation_too_good,
    "label_leak": _label_leak,
    "does_not_generalise": _does_not_generalise,
    "beta_wrong": _beta_wrong,
    "learning_rate_too_high": _learning_rate_too_high,
    "responses_forgotten": _responses_forgotten,
    "over_optimised": _over_optimised,
    "learnt_nothing": _learnt_nothing,
    "hardly_moved": _hardly_moved,
    "untrained_base": _untrained_base,
    "samples_loop": _samples_loop,
    "data_faults": _data_faults,
    "one_label": _one_label,
    "displacement": _displacement,
}
_TABLE = own_table(Path(__file__).with_suffix(".yaml"))
RUN_RULES = {
    name: RunRule(Level(level), text, remedy, _FIND[name], tuple(explained))
    for name, (level, text, remedy, *explained) in _TABLE.items()
}
"""The rules by name, in the order of verdict.yaml: a verdict reports the worst fault first."""


@dataclass(frozen=True)
class Verdict:
    """A sentence on the worst fault, or on the result if there is no fault; findings, the worst first."""

    sentence: str
    findings: tuple[Finding, ...] = ()
    worst: Finding | None = None  # the one that the sentence states

    def as_dict(self) -> dict[str, Any]:
        """Return the section `verdict` of summary.json."""
        fields = ("rule", "text", "remedy")  # of those in doctor.json
        findings = [{name: getattr(finding, name) for name in fields} for finding in self.findings]
        return {"sentence": self.sentence, "findings": findings}

    def lines(self) -> list[str]:
        """Return the verdict for a screen, at most six lines; the sentence's own finding is not repeated."""
        return [
            f"verdict: {self.sentence}",
            *(
                f"  try: {fault.remedy}" if fault is self.worst else f"  - {fault.with_remedy}"
                for fault in self.findings
            ),
        ]


def verdict(
    rows: Sequence[MetricsRow], summary: Mapping[str, Any], data_findings: Sequence[Mapping[str, Any]] = ()
) -> Verdict:
    """Judge a run by its files; a rule whose inputs are missing finds nothing.

    `rows` are of log_history.json, with nan for null; `exit` need not be in the summary.
    """
    facts = RunFacts(rows, summary, data_findings)
    by_rule = {name: finding for name in RUN_RULES if (finding := _finding(name, facts)) is not None}
    is_lost = next(lost_weights(facts), None) is not None  # else the run only skipped some steps
    causes = [name for name in by_rule if name != "diverged" or is_lost]
    explained = {other for name in causes for other in RUN_RULES[name].explains}
    findings = [finding for name, finding in by_rule.items() if name not in explained]
    worst = next((finding for finding in findings if finding.level is not Level.note), None)
    sentence = f"{RUN_RULES[worst.rule].text}: {worst.text}" if worst else _success(facts)
    if summary.get("exit") == RunOutcome.preempted:
        sentence = f"stopped after step {facts.total_steps:,}; so far: {sentence}"
    return Verdict(sentence, tuple(findings[:_MOST_FINDINGS]), worst)


def sample_alarm(rows: Sequence[MetricsRow]) -> Finding | None:
    """Return what is wrong with the sampled responses, judged by the metrics rows so far."""
    return _finding("over_optimised", RunFacts(rows, {}))


def _finding(name: str, facts: RunFacts) -> Finding | None:
    rule = RUN_RULES[name]
    text = "; ".join(rule.find(facts))
    return Finding(name, rule.level, text, remedy=rule.remedy) if text else None


def _success(facts: RunFacts) -> str:
    accuracy = facts.accuracy()
    start, end = first(facts.steps, "loss"), last(facts.steps, "loss")
    if start is None or end is None:
        return "nothing to judge, as no metrics row of a training step was written (trainer.log_every)"
    fall = f"training loss {start:.3g} -> {end:.3g} in {pluralize(facts.total_steps, 'step')}"
    result = "no fault found" if facts.total_steps >= FEWEST_STEPS else "too short to be judged"
    unknown = []
    if not facts.evaluations:
        unknown.append("nothing was evaluated after a step, or sampled")
    elif last(facts.evaluations, "samples/prompts") is None:
        unknown.append("nothing was sampled")
    if accuracy is not None and accuracy.is_chance and facts.total_steps >= FEWEST_STEPS:
        unknown.append(f"the {facts.accuracy_title} is within its noise of a guess, {accuracy.noise:.3f}")
    result += f" ({'; '.join(unknown)})" if unknown else ""
    if accuracy is None or last(facts.last_rows, facts.accuracy_key) is None:
        return f"{result}: {fall}"
    pairs = f" on {pluralize(accuracy.pairs, facts.unit)}" if accuracy.pairs else ""
    margin = digits(last(facts.last_rows, "rewards/margins"))
    return (
        f"{result}: {facts.part} {facts.accuracy_title} {accuracy.value:.3f}{pairs}, margin {margin}, {fall}"
    )
