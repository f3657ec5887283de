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

from dpo_dist.config.metrics import EXCESS, MISMATCH
from dpo_dist.data import DataCounts
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.text import percent, pluralize
from dpo_dist.kit import MetricsRow, finite, is_collapsed, logps_by_side
from dpo_dist.tools.findings import Finding, FindingRule, Level, balancing_weight
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

# Tuned numbers: what is compared, with what. These were chosen; the rules were tried on the runs of the entry
# "The verdict's first line on spoiled and healthy runs" in benchmarks/log.md (2026-11-23).
_FIRST_PAIRS = 200  # fewest pairs for the mean loss at the start
_LARGE_BETA = 1.0  # beta, from which on it can be too large
_VANISHED = 0.01  # loss, of that before training
_NATS_OF_VANISHED = 5.0  # margin at that loss, up to which beta is too large
_NATS_OF_RISEN = 10.0  # margin beside a loss that rose, up to which beta is too large
_STAYED = 0.01  # how far a loss that stays may be from its start, as a share of it
_RISEN = 1.2  # loss, and z, of what they were before
_RISEN_EARLY = 2.0  # median loss of the first quarter of the steps, of the first loss
_FALLEN_NATS = 1.0  # fall of chosen log-probs per token in the first quarter, and at the end
_LARGE_MISMATCH = 3.0  # z at the end, in 1 / beta
_CHANGED_NATS = 2.0  # margin, from which on a policy has changed
_FEWEST_JUDGED = 30  # fewest evaluated pairs, beside which a training loss does not count
_LEARNT = 0.6  # accuracy of a policy that has learnt something
_EQUAL_LOSS = 0.99  # loss, of that before training, with which it has not fallen
_GUESS = 0.6  # log-prob per token of chosen responses, of that of a guess among all tokens
_GUESS_OF_LETTERS = 0.95  # the same at the start, with a vocabulary below `_LEAST_VOCABULARY`
_SHARED_PROMPTS = 0.01  # evaluation pairs whose prompt is in the training data
_TOO_GOOD = 0.05  # evaluation accuracy above that of training, if more than by chance
_FAR_ABOVE = 0.1  # training accuracy above that of evaluation, if more than by chance
_LOSS_ROSE = 0.05  # evaluation loss above its lowest, as a share of its start, if more than by chance
_AT_ONCE = 0.95  # accuracy within the first tenth of the steps
_LENGTHS_DIFFER = 1.3  # mean length of one side, of the other's, beside `_AT_ONCE`
_LENGTHS_TELL = 2.0  # the same, alone
_CUT_RESPONSES = 0.05  # kept records whose response is cut
_DISAGREES = 0.2  # records of which the reference prefers the other response by far
_ONE_LABEL = 0.9  # responses with the more frequent label
_FELL_NATS = 0.1  # fall of chosen log-probs per token, which is worth a remark
_LONGER = 1.5  # length of sampled responses, of the reference's, if more than 3 standard errors
_LESS_DISTINCT = 0.7  # distinct 3-grams of samples, of the reference's
_MORE_SAMPLES = 0.1  # rise of a share of samples, if more than 2.5 standard errors
_LOOP = 0.5  # words of a sample in its longest repeated passage
# These are from the runs of the entry "Chosen responses that fall" (2026-11-26).
_BOTH_FALL = 0.5  # pairs both of whose log-probs fell
_FORGOTTEN_NATS = (0.5, 1.0)  # fall of chosen log-probs, at least and at most asked for

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
    bad = facts.summary.get("bad_steps")
    if bad:
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
        row = collapsed[-1]
        before = rows[: -len(collapsed)]
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
    scored = "rewards/chosen" if facts.has_scores else ""
    scores = "scores" if facts.has_scores else "log-probs"
    names = (scored, *_QUANTITIES, *broken)
    quantity = next(key for key in names if key in broken or f"eval_{key}" in broken)
    # If several skipped steps end the run, its last row has the last of them: `step` is the first.
    step = int(row["step"])
    if row is facts.rows[-1] and "loss" in row:
        step -= (facts.summary.get("bad_in_a_row") or 1) - 1
    before = RunFacts(facts.rows[:index], {**facts.summary, "steps": int(row["step"])})
    symptom = next(_signs_of_rate(before), None)
    if symptom:
        cause = f"the learning rate is too high: {symptom}"
    elif "loss" not in row:
        cause = f"the evaluation data have {facts.unit}s for which the policy computes no finite value"
    elif quantity != scored and not quantity.startswith("logps/"):
        cause = f"the {scores} are finite, the loss or its gradient is not"
    elif before.steps:
        cause = "an update damaged the weights: the learning rate is too high, or its warm-up too short"
    else:
        cause = f"the model gives no finite {scores} from the start: damaged weights, or numbers out of range"
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
    beta = facts.setting("loss.beta")
    nats = facts.margin_nats()
    start = first(facts.steps, "loss")
    recent = facts.recent("loss")
    if nats is None or start is None or not recent or facts.setting("loss.kind") not in _LOGISTIC:
        return
    change = "the log-prob of chosen minus rejected changed by"
    untrained = max(start, math.log(2))
    end = median(recent)
    losses = f"{start:.2g} -> {end:.2g}"
    is_large = beta >= _LARGE_BETA
    if is_large and end <= _VANISHED * untrained:
        # The margin is read where the loss has almost vanished: in later steps a few pairs still raise it.
        at = next(at for at, row in enumerate(facts.steps, 1) if row["loss"] <= _VANISHED * untrained)
        then = RunFacts(facts.steps[:at], facts.summary).margin_nats() or 0.0
        if abs(then) <= _NATS_OF_VANISHED:
            yield (
                f"loss.beta={digits(beta)} is too large: the loss has almost vanished ({losses}) from step "
                f"{facts.steps[at - 1]['step']:.0f} on, when {change} {then:.2g} nats only"
            )
    elif is_large and end > _RISEN * untrained and abs(nats) <= _NATS_OF_RISEN:
        yield (
            f"loss.beta={digits(beta)} is too large: the loss of wrong pairs grew ({losses}) although "
            f"{change} {nats:.2g} nats only"
        )
    elif nats >= _CHANGED_NATS:
        constant_loss = _loss_that_stayed(facts)
        if constant_loss:
            yield (
                f"loss.beta={digits(beta)} is too small: the loss stays at {constant_loss} although {change} "
                f"{nats:.2g} nats"
            )


def _loss_that_stayed(facts: RunFacts) -> str | None:
    """Return "first loss -> mean loss in the last quarter of the steps" if they are alike, or None."""
    name = "loss" if first(facts.steps, EXCESS) is None else EXCESS  # soft labels keep the loss above 0
    recent = facts.recent(name)
    start = first(facts.steps, name)
    if not recent or start is None or abs(fmean(recent) - start) > _STAYED * abs(start):
        return None
    return f"{start:.4g} -> {fmean(recent):.4g}"


def _learning_rate_too_high(facts: RunFacts) -> Iterator[str]:
    signs = list(_signs_of_rate(facts))
    if signs:
        yield f"{'; '.join(signs)}, with optim.lr={digits(facts.setting('optim.lr'))}"


def _signs_of_rate(facts: RunFacts) -> Iterator[str]:
    """Yield a clause for each sign of a high rate; medians judge the end, so spikes do not count."""
    steps = facts.total_steps
    falls = facts.falls(facts.steps)
    losses = pooled(facts.steps, "loss", _FIRST_PAIRS)
    recent_losses = facts.recent("loss")
    # If the policy starts as the reference, its first loss has no noise. Later the decaying rate heals the
    # loss, so only the first quarter shows the fault.
    early = [loss for step, loss in values(facts.steps, "loss") if step <= steps / 4]
    pairs = sum(row.get("pairs", 0) for row in facts.recent_rows())
    start = losses[0][1] if losses and recent_losses and pairs >= FEWEST_PAIRS else 0.0
    if start > 0 and median(recent_losses) > _RISEN * start:
        yield f"the loss rose from {start:.3g} to {median(recent_losses):.3g}"
    elif len(early) >= 3 and falls and median(early) > _RISEN_EARLY * early[0] > 0:
        yield f"the loss rose from {early[0]:.3g} to {median(early):.3g} in the first quarter of the steps"
    if falls is None:  # without a reference: relative to the first rows, which have other responses
        logps = pooled(facts.steps, "logps/chosen_per_token", FEWEST_PAIRS)
        falls = [(step, logps[0][1] - logp) for step, logp in logps]
    early_falls = [(step, fall) for step, fall in falls if step <= steps / 4]
    recent = [fall for step, fall in falls if step > 0.75 * steps]
    if recent and median(recent) > _FALLEN_NATS:
        for step, fall in early_falls:
            if fall > _FALLEN_NATS:
                yield (
                    f"the log-prob of chosen responses fell by {fall:.2g} nats per token by step {step:.0f} "
                    f"of {steps:,}"
                )
                break
    beta = facts.setting("loss.beta")
    ratios = values(facts.steps, MISMATCH)
    before = [ratio for step, ratio in ratios if 0.5 < step / steps <= 0.75]
    end = [ratio for step, ratio in ratios if 0.75 < step / steps <= 1]
    if beta and before and end:
        mismatch = fmean(end)
        if beta * mismatch > _LARGE_MISMATCH and mismatch > _RISEN * fmean(before):
            yield (
                f"the log-ratio of mismatched responses (z) is {digits(mismatch)} nats at the end and still "
                f"grows, {digits(beta * mismatch)} times 1 / loss.beta: the policy makes any response "
                "likelier"
            )


def _learnt_nothing(facts: RunFacts) -> Iterator[str]:
    accuracy = facts.accuracy()
    training = facts.training_accuracy()
    name = facts.accuracy_title
    if not _should_have_learnt(facts) or accuracy is None or training is None or not accuracy.is_chance:
        return
    clause = (
        f"{facts.part} {name} {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s is within its "
        f"noise of one half ({accuracy.noise:.3f}); training {name} {digits(training.value)}"
    )
    is_judged = accuracy.pairs >= _FEWEST_JUDGED
    if is_judged and max(accuracy.value, training.value) < _LEARNT:
        yield clause
        return
    # A training loss falls, too, where a policy learns its pairs by heart: it counts beside few pairs only.
    losses = [loss for _, loss in values(evaluation_rows(facts.rows), "loss")]
    recent = facts.recent("loss")
    start = first(facts.steps, "loss")
    if len(losses) < 2 or start is None or not recent:
        return
    if losses[-1] >= _EQUAL_LOSS * losses[0] and (is_judged or fmean(recent) >= _EQUAL_LOSS * start):
        yield (
            f"{clause}; evaluation loss {losses[0]:.3g} -> {losses[-1]:.3g}, training loss "
            f"{start:.3g} -> {fmean(recent):.3g}"
        )


def _untrained_base(facts: RunFacts) -> Iterator[str]:
    """Yield a clause if chosen responses stay about as unlikely as a guess among all tokens makes them."""
    logps = facts.chosen_logps()
    vocabulary = facts.summary.get("vocabulary")
    if not vocabulary or not logps or not _should_have_learnt(facts):
        return
    start, end = logps
    guess = -math.log(vocabulary)
    share = _GUESS if vocabulary >= _LEAST_VOCABULARY else _GUESS_OF_LETTERS
    if start < share * guess and end < _GUESS * guess:
        yield (
            f"chosen responses have {start:.2f} nats per token at first and {end:.2f} at the end; "
            f"a guess among {vocabulary:,} tokens has {guess:.2f}: no sampled response can be a text"
        )


def _hardly_moved(facts: RunFacts) -> Iterator[str]:
    if not _should_have_learnt(facts):
        return
    margin = last(facts.last_rows, MARGIN)
    noise = facts.noise(facts.last_rows).get(MARGIN)
    if margin is not None and noise is not None and abs(margin) <= noise:
        yield f"{facts.part} margin {digits(margin)} is within the noise of rounding ({digits(noise)})"
    constant_loss = _loss_that_stayed(facts)
    nats = facts.margin_nats()
    # A loss with a large constant part, as of sppo_hard with a small beta, hardly changes while margins grow.
    has_changed = nats is not None and nats >= _CHANGED_NATS
    if constant_loss and len(values(facts.steps, "loss")) >= 3 and not has_changed:
        yield (
            f"the training loss stayed at its start, {constant_loss}, in {facts.total_steps:,} steps with "
            f"optim.lr={digits(facts.setting('optim.lr'))}"
        )


def _should_have_learnt(facts: RunFacts) -> bool:
    """Return whether a run reached its end in enough steps, all of them applied."""
    is_cut = facts.summary.get("exit") in (RunOutcome.preempted, RunOutcome.diverged)
    return not is_cut and not facts.summary.get("bad_steps") and facts.total_steps >= FEWEST_STEPS


def _labels_swapped(facts: RunFacts) -> Iterator[str]:
    training = facts.training_accuracy()
    training_value = digits(training.value if training else None)
    name = facts.accuracy_title
    if training is not None and training.is_below_half:
        yield (
            f"training {name} is {training.value:.3f} on {training.pairs:,} {facts.unit}s: "
            "the loss teaches the opposite of the labels"
        )
        return
    if facts.total_steps < FEWEST_STEPS:  # few steps move all pairs alike, not independently
        return
    for source, share in facts.sources("eval").items():
        accuracy = facts.evaluation_accuracy(source, share)
        if accuracy is not None and accuracy.is_below_half:
            labels = "its" if source else "training or evaluation"
            yield (
                f"evaluation {name} is {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s"
                f"{source.replace('/', ' of ', 1)}, clearly below one half, while training {name} is "
                f"{training_value}: {labels} labels look swapped"
            )
            return
    # Every quarter is judged: in later ones a policy may tell the sources apart, or know the pairs by heart.
    # If it does not start as the reference, it has preferences before it learns: then only the last quarter
    # is judged.
    ends = (0.25, 0.5, 0.75, 1.0) if facts.falls(facts.steps) else (1.0,)
    for source, share in facts.sources("train").items():
        if not source:
            continue
        quarters = filter(None, (facts.training_accuracy(source, share, end) for end in ends))
        worst = min((quarter for quarter in quarters if quarter.is_below_half), default=None)
        if worst is not None:
            yield (
                f"in a quarter of the steps training {name} of source {source[1:]} is "
                f"{worst.value:.3f} on {worst.pairs:,} {facts.unit}s, clearly below one half, "
                f"while that of all sources is {training_value} at the end: "
                "the labels of this source look swapped"
            )
            return


def _evaluation_leak(facts: RunFacts) -> Iterator[str]:
    counts = facts.counts("eval")
    count = counts.get("prompts_also_in_train", 0)
    pairs = counts.get("pairs", 0)
    if count > _SHARED_PROMPTS * pairs > 0:
        yield (
            f"{count:,} of {pairs:,} evaluation {facts.unit}s ({percent(count / pairs)}) have a prompt "
            "that is also in the training data: the evaluation measures memory"
        )


def _evaluation_too_good(facts: RunFacts) -> Iterator[str]:
    for training, accuracy, noise in _accuracies(facts):
        if accuracy.value - training.value > max(_TOO_GOOD, noise):
            yield (
                f"evaluation {facts.accuracy_title} {accuracy.value:.3f} on {accuracy.pairs:,} {facts.unit}s "
                f"is above training {facts.accuracy_title} {digits(training.value)}: the "
                "evaluation data are easier, or copies of training data, or some training labels are noise"
            )


def _accuracies(facts: RunFacts) -> Iterator[tuple[Accuracy, Accuracy, float]]:
    """Yield training and evaluation accuracy with their difference by chance, if known after enough steps."""
    training = facts.training_accuracy()
    accuracy = facts.accuracy()
    is_long = facts.total_steps >= FEWEST_STEPS
    if facts.evaluations and is_long and training is not None and accuracy is not None:
        yield training, accuracy, math.hypot(training.noise, accuracy.noise)


def _label_leak(facts: RunFacts) -> Iterator[str]:
    within = max(FEWEST_STEPS, 0.1 * facts.total_steps)
    # In later epochs a run may know its data by heart.
    unseen = [row for row in facts.steps if row.get("epoch", 0) <= 1]
    for source, share in facts.sources("train").items():
        of_source = f" of {source[1:]}" if source else ""
        means = pooled(unseen, facts.accuracy_key + source, FEWEST_PAIRS, share)
        by_length = _leak_by_length(facts, source, _LENGTHS_DIFFER)
        evidence = by_length or _leak_by_form(facts, source)
        for step, value in means:
            if evidence and step <= within and value >= _AT_ONCE:
                title = f"{facts.accuracy_title}{of_source}"
                yield f"{title} is {value:.3f} at step {step:.0f} already, {evidence}"
                return
        if means and by_length and _leak_by_length(facts, source, _LENGTHS_TELL):
            yield f"the label{of_source} shows {by_length}"
            return


def _leak_by_length(facts: RunFacts, source: str, ratio: float) -> str | None:
    """Return a clause if the mean lengths of the two sides differ by at least this ratio."""
    rows = facts.evaluations if source else facts.steps  # steps have no lengths by source
    chosen = mean(rows, f"tokens/chosen{source}")
    rejected = mean(rows, f"tokens/rejected{source}")
    if not chosen or not rejected or max(chosen / rejected, rejected / chosen) < ratio:
        return None
    return f"by length: chosen responses have {chosen:.0f} tokens, rejected ones {rejected:.0f}"


def _leak_by_form(facts: RunFacts, source: str) -> str | None:
    """Return a clause on the doctor's finding of a label leak, without its text, which may quote data."""
    for finding in facts.data_findings:
        is_leak = finding.get("rule") in _LEAKS and finding.get("level") != Level.note
        if is_leak and (not source or finding.get("source") == source[1:]):
            clause = f"by form: the doctor found {finding['rule']}"
            share = finding.get("share")
            if share is not None:
                clause += f", which alone guesses {percent(share)} of the {facts.unit}s right"
            return clause
    return None


def _does_not_generalise(facts: RunFacts) -> Iterator[str]:
    # The last evaluation loss is above the lowest earlier one, step 0 included.
    losses = values(evaluation_rows(facts.rows), "loss")
    recent = facts.recent("loss")
    if facts.total_steps >= FEWEST_STEPS and len(losses) >= 2 and recent:
        step, lowest = min(losses[:-1], key=lambda point: point[1])
        # Without a training loss before that step, the evaluation's own loss replaces it.
        earlier = [loss for at, loss in values(facts.steps, "loss") if at <= step]
        before = earlier[-1] if earlier else lowest
        after = fmean(recent)
        end = losses[-1][1]
        pairs = facts.evaluated_pairs
        noise = 3 * abs(end) / math.sqrt(pairs) if pairs else math.inf
        if after < before and end - lowest > max(_LOSS_ROSE * abs(losses[0][1]), noise):
            since = f"at step {step:.0f}" if step else "at the start"
            yield (
                f"evaluation loss rose from {lowest:.3g} {since} to {end:.3g}, while training loss fell from "
                f"{before:.3g} to {after:.3g}"
            )
    for training, accuracy, noise in _accuracies(facts):
        if training.value - accuracy.value > max(_FAR_ABOVE, noise):
            yield (
                f"training {facts.accuracy_title} {training.value:.3f} is far above evaluation "
                f"{facts.accuracy_title} {accuracy.value:.3f} on {pluralize(accuracy.pairs, facts.unit)}"
            )


def _data_faults(facts: RunFacts) -> Iterator[str]:
    """Yield what the counts of the start and the doctor have said about many of the records."""
    training = DataCounts.from_numbers(facts.counts("train"))
    if training.is_mostly_plain:
        plain = training.plain_in_words("training records")
        yield f"{plain}: data.text_as_messages=auto makes each prompt a user's turn"
    for name, noun in (("train", "training"), ("eval", "evaluation")):
        counts = facts.counts(name)
        count = counts.get("response_truncated", 0)
        records = counts.get("kept", 0)
        if count > _CUT_RESPONSES * records > 0:
            effect = "is scored without it" if facts.has_scores else "the policy does not learn to end"
            yield (
                f"{count:,} of {records:,} {noun} records ({percent(count / records)}) have a response whose "
                f"end data.max_length cuts, and {effect}: raise it, or set data.truncation=keep_end or drop"
            )
            break
    errors = [str(each.get("rule")) for each in facts.data_findings if each.get("level") == Level.error]
    if errors:
        yield f"the doctor found errors: {', '.join(dict.fromkeys(errors))}"
    disagrees = [each for each in facts.data_findings if each.get("rule") == "reference_disagrees"]
    for finding in disagrees[:1]:
        share = finding.get("share") or 0.0
        if share > _DISAGREES:
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
    weight = facts.setting("loss.desirable_weight") or 1.0
    if not labels or not all(labels.values()) or weight != (facts.setting("loss.undesirable_weight") or 1.0):
        return
    most = max(labels, key=labels.__getitem__)
    share = labels[most] / sum(labels.values())
    if share > _ONE_LABEL:
        balanced = balancing_weight(labels["good"], labels["bad"], weight, weight)
        yield (
            f"{percent(share)} of the training responses are {most}, and both "
            f"labels have the same weight; {balanced} balances them"
        )


def _responses_forgotten(facts: RunFacts) -> Iterator[str]:
    start, end = facts.chosen_logps() or (0.0, 0.0)
    # In published healthy runs of a 7B model the log-probs fell from about -1 by 0.06 to 0.95 of that.
    # Responses that are almost certain after an SFT stage break sooner.
    least, most = _FORGOTTEN_NATS
    if start - end < min(max(-start, least), most):
        return
    share = last(facts.last_rows, "rewards/both_fall") or 0.0
    if facts.unit == "record":
        yield f"good responses became far less likely, {start:.2f} -> {end:.2f} nats per token"
    elif share >= _BOTH_FALL and "apo_down" not in facts.kinds:
        yield (
            f"chosen responses became far less likely, {start:.2f} -> {end:.2f} nats per token, and both "
            f"responses did in {percent(share)} of the pairs, at an accuracy of "
            f"{digits(last(facts.last_rows, facts.accuracy_key))}"
        )


def _over_optimised(facts: RunFacts) -> Iterator[str]:
    symptoms = list(_worse_samples(facts))
    if symptoms:
        keys = itertools.chain.from_iterable(facts.evaluations)
        has_reference = any(key.startswith(_REFERENCE) for key in keys)
        others = "the reference" if has_reference else "the first samples"
        yield f"{', '.join(symptoms)} compared with {others}"


def _worse_samples(facts: RunFacts) -> Iterator[str]:
    rows = facts.evaluations
    prompts = last(rows, "samples/prompts") or math.inf

    def ends(name: str) -> tuple[float, float] | None:
        """Return a metric of the reference's responses (else of the first samples) and of the last ones."""
        start = last(rows, _REFERENCE + name)
        if start is None:
            start = first(rows, f"samples/{name}")
        end = last(rows, f"samples/{name}")
        return None if start is None or end is None else (start, end)

    lengths = ends("length")
    if lengths:
        start, end = lengths
        # Lengths of few responses differ by chance; from 36 prompts on, 1.5 times is enough.
        least = start * max(_LONGER, 1 + 3 / math.sqrt(prompts))
        if start and end >= least and end > (last(rows, "tokens/chosen") or 0.0):
            yield f"sampled responses are {end / start:.1f}x longer ({start:.0f} -> {end:.0f} tokens)"
    distinct = ends("distinct_3")
    if distinct:
        start, end = distinct
        if start > 0 and end <= _LESS_DISTINCT * start:
            yield f"they repeat themselves (distinct 3-grams {percent(start)} -> {percent(end)})"
    for metric, meaning in (
        ("finished", "do not end by themselves"),
        ("empty", "are empty"),
        ("refusals", "are refusals"),
        ("language_changed", "are in another language than the chosen response"),
    ):
        shares = ends(metric)
        if shares:
            start, end = (1 - value if metric == "finished" else value for value in shares)
            both = (start + end) / 2
            # In healthy runs, too, half of the samples may not end: only a rise far above chance counts.
            if end - start >= max(_MORE_SAMPLES, 2.5 * math.sqrt(2 * both * (1 - both) / prompts)):
                yield f"more sampled responses {meaning} ({percent(start)} -> {percent(end)})"


def _samples_loop(facts: RunFacts) -> Iterator[str]:
    share = last(facts.evaluations, "samples/longest_repeat")
    if share is None or share < _LOOP or facts.total_steps < FEWEST_STEPS:
        return
    clause = f"the longest passage that a sampled response repeats has {percent(share)} of its words"
    start = last(facts.evaluations, _REFERENCE + "longest_repeat")
    if start is not None:
        clause += f", and {percent(start)} in the reference's responses"
    yield clause


def _displacement(facts: RunFacts) -> Iterator[str]:
    if facts.unit == "record":
        falls = facts.falls(facts.last_rows)
        if falls and falls[-1][1] >= _FELL_NATS:
            yield (
                f"good responses lost {falls[-1][1]:.2g} nats per token against the reference, although the "
                f"loss rewards them ({facts.part} reward {digits(last(facts.last_rows, 'rewards/chosen'))})"
            )
        return
    share = last(facts.last_rows, "rewards/both_fall")
    start, end = facts.chosen_logps() or (0.0, 0.0)
    if share is None or share < _BOTH_FALL or "apo_down" in facts.kinds:  # apo_down lowers both by design
        return
    if start - end >= _FELL_NATS:
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
        lines = [f"verdict: {self.sentence}"]
        for fault in self.findings:
            line = f"  - {fault.with_remedy}"
            if fault is self.worst:
                line = f"  try: {fault.remedy}"
            lines.append(line)
        return lines


def verdict(
    rows: Sequence[MetricsRow], summary: Mapping[str, Any], data_findings: Sequence[Mapping[str, Any]] = ()
) -> Verdict:
    """Judge a run by its files; a rule whose inputs are missing finds nothing.

    `rows` are of log_history.json, with nan for null; `exit` need not be in the summary.
    """
    facts = RunFacts(rows, summary, data_findings)
    all_findings = list(filter(None, (_finding(name, facts) for name in RUN_RULES)))
    is_lost = next(lost_weights(facts), None) is not None  # else the run only skipped some steps
    consequences = set[str]()
    for finding in all_findings:
        if finding.rule != "diverged" or is_lost:
            consequences.update(RUN_RULES[finding.rule].explains)
    findings = [finding for finding in all_findings if finding.rule not in consequences]
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
    start = first(facts.steps, "loss")
    end = last(facts.steps, "loss")
    if start is None or end is None:
        return "nothing to judge, as no metrics row of a training step was written (trainer.log_every)"
    fall = f"training loss {start:.3g} -> {end:.3g} in {pluralize(facts.total_steps, 'step')}"
    result = "no fault found" if facts.total_steps >= FEWEST_STEPS else "too short to be judged"
    unknown = []
    if not facts.evaluations:
        unknown.append("nothing was evaluated after a step" + ("" if facts.has_scores else ", or sampled"))
    elif last(facts.evaluations, "samples/prompts") is None and not facts.has_scores:
        unknown.append("nothing was sampled")
    if accuracy is not None and accuracy.is_chance and facts.total_steps >= FEWEST_STEPS:
        unknown.append(f"the {facts.accuracy_title} is within its noise of a guess, {accuracy.noise:.3f}")
    if unknown:
        result += f" ({'; '.join(unknown)})"
    if accuracy is None or last(facts.last_rows, facts.accuracy_key) is None:
        return f"{result}: {fall}"
    pairs = f" on {pluralize(accuracy.pairs, facts.unit)}" if accuracy.pairs else ""
    margin = digits(last(facts.last_rows, "rewards/margins"))
    return (
        f"{result}: {facts.part} {facts.accuracy_title} {accuracy.value:.3f}{pairs}, margin {margin}, {fall}"
    )
