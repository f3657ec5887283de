"""The verdict about a run: one sentence, and the rows that found a fault; see docs/watching.md.

A row of verdict.yaml is what is measured, where, and the comparison that finds the fault. A function here
measures it; it returns None where a run has nothing to measure, so that nothing is said about it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.text import percent, pluralize
from dpo_dist.kit import EXCESS, PREFIX, MetricsRow, is_collapsed
from dpo_dist.tools.findings import Finding, Level
from dpo_dist.tools.report.facts import (
    MARGIN,
    RunFacts,
    digits,
    evaluation_rows,
    first,
    last,
    mean,
    values,
)

_FEWEST_STEPS = 10
"""A run with fewer steps has learnt too little to be judged; chosen."""
_FIRST_PAIRS = 200
_FEWEST_PAIRS = 50
"""So many pairs for the mean loss at the start, and at least for the median at the end; chosen."""
# In published healthy runs of a 7B model the log-probs fell from about -1 by 0.06 to 0.95 of that.
# Responses that are almost certain after an SFT stage break sooner.
_FORGOTTEN_NATS = (0.5, 1.0)
_BOTH_FALL = 0.5
_MORE_REPEATED = 0.15
_GUESS_LEARNT = 0.6
"""A learnt answer is likelier than this share of the log-prob of a guess."""
_CHANGED_NATS = 2.0
"""A loss with a large constant part, as of sppo_hard with a small beta, hardly changes while margins grow."""
_REPEATED = "samples/longest_repeat"
_REPEATED_BY_REFERENCE = "samples/reference_longest_repeat"
_ORDER = ("rewards/chosen", "logps/chosen", "logps/rejected", "loss", "grad_norm")
"""As a step computes them: the first one that is not finite is named."""
_FAULTS = {
    "dropped": "are dropped",
    "chat_template_not_applied": "are plain text, although the tokenizer has a chat template: "
    "data.text_as_messages=auto makes each prompt a user's turn",
    "response_truncated": "have a response whose end data.max_length cuts: raise it, or set "
    "data.truncation=keep_end or drop",
}


Measured = Mapping[str, Any]
"""The `value` that a row compares, and what else its sentence names."""


def _diverged(facts: RunFacts) -> Measured | None:
    for row in facts.rows:
        broken = [key.removeprefix(PREFIX) for key in row if not math.isfinite(row[key])]
        if broken:
            name = next((key for key in _ORDER if key in broken), broken[0])
            return {"value": 1, "what": f"{name} is not finite at step {row['step']:.0f}"}
    if not facts.steps:
        return None
    end = facts.steps[-1]
    if is_collapsed(end):
        what = f"the policy has collapsed: at step {end['step']:.0f} all tokens are alike, without a gradient"
        return {"value": 1, "what": what}
    skipped = facts.summary.get("bad_steps") or 0
    what = f"{pluralize(skipped, 'step')} taught nothing, because loss or gradient was not finite"
    return {"value": skipped, "what": what}


def _nothing_trained(facts: RunFacts) -> Measured | None:
    norms = [norm for _, norm in values(facts.steps, "grad_norm")]
    return {"value": max(norms)} if norms else None


def _labels_swapped(facts: RunFacts) -> Measured | None:
    if not _is_judged(facts):
        return None
    found = []
    for part, name, read in (
        ("evaluation", "eval", facts.evaluation_accuracy),
        ("training", "train", facts.training_accuracy),
    ):
        for source, share in facts.sources(name).items():
            accuracy = read(source, share)
            if accuracy is not None:
                found.append(
                    {
                        "value": accuracy.value + accuracy.noise,
                        "of": part,
                        "share": accuracy.value,
                        "pairs": pluralize(accuracy.pairs, facts.unit),
                        "source": source.replace("/", " of source ", 1),
                    }
                )
    return min(found, key=_value, default=None)


def _evaluation_leak(facts: RunFacts) -> Measured | None:
    counts = facts.counts("eval")
    pairs = counts.get("pairs")
    count = counts.get("prompts_also_in_train")
    if not pairs or count is None:
        return None
    evaluated = pluralize(pairs, f"evaluation {facts.unit}")
    return {"value": count / pairs, "count": count, "pairs": evaluated, "share": percent(count / pairs)}


def _does_not_generalise(facts: RunFacts) -> Measured | None:
    losses = values(evaluation_rows(facts.rows), "loss")
    recent = facts.recent("loss")
    if not _is_judged(facts) or len(losses) < 2 or not recent or not facts.evaluated_pairs:
        return None
    step, lowest = min(losses[:-1], key=lambda point: point[1])
    # Without a training loss before that step, the evaluation's own loss replaces it.
    earlier = [loss for at, loss in values(facts.steps, "loss") if at <= step]
    before = earlier[-1] if earlier else lowest
    after = fmean(recent)
    end = losses[-1][1]
    noise = 3 * abs(end) / math.sqrt(facts.evaluated_pairs)
    rise = (end - lowest - noise) / (abs(losses[0][1]) or 1.0)
    numbers = {"lowest": lowest, "at": step, "end": end, "before": before, "after": after}
    return {"value": rise if after < before else 0.0, **numbers}


def _learning_rate_too_high(facts: RunFacts) -> Measured | None:
    recent = facts.recent("loss")
    start_rows = []
    pairs = 0.0
    for row in facts.steps:
        if pairs < _FIRST_PAIRS:
            start_rows.append(row)
            pairs += row.get("pairs", 0)
    start = mean(start_rows, "loss")
    pairs_of_end = sum(row.get("pairs", 0) for row in facts.recent_rows())
    if not _is_judged(facts) or not recent or not start or min(pairs, pairs_of_end) < _FEWEST_PAIRS:
        return None
    end = median(recent)
    return {"value": (end - start) / abs(start), "start": start, "end": end}


def _answers_broken(facts: RunFacts) -> Measured | None:
    """Measure what shows broken answers more clearly: sampled ones, or the log-probs of chosen ones."""
    signs = [sign for sign in (_repeated(facts), _forgotten(facts)) if sign is not None]
    return max(signs, key=_value, default=None)


def _repeated(facts: RunFacts) -> Measured | None:
    end = last(facts.evaluations, _REPEATED)
    start = last(facts.evaluations, _REPEATED_BY_REFERENCE)
    if start is None:
        start = first(evaluation_rows(facts.rows), _REPEATED)
    if start is None or end is None:
        return None
    what = (
        f"the longest passage that a sampled answer repeats has {percent(end)} of its words, "
        f"and {percent(start)} in the reference's or the first answers"
    )
    return {"value": (end - start) / _MORE_REPEATED, "what": what}


def _forgotten(facts: RunFacts) -> Measured | None:
    logps = facts.chosen_logps()
    share = last(facts.last_rows, "rewards/both_fall")
    if facts.unit == "record":
        share = 1.0  # good and bad responses are of other prompts
    # `apo_down` lowers both by design.
    if not _is_judged(facts) or logps is None or share is None or "apo_down" in facts.kinds:
        return None
    start, end = logps
    least, most = _FORGOTTEN_NATS
    fall = (start - end) / min(max(-start, least), most)
    what = f"chosen responses became far less likely, {start:.2f} -> {end:.2f} nats per token"
    return {"value": fall if share >= _BOTH_FALL else 0.0, "what": what}


def _untrained_base(facts: RunFacts) -> Measured | None:
    logps = facts.chosen_logps()
    tokens = facts.summary.get("vocabulary")
    if not tokens or not logps or not _is_complete(facts):
        return None
    start, end = logps
    guess = -math.log(tokens)
    value = 0.0 if end > _GUESS_LEARNT * guess else start / guess
    return {"value": value, "start": start, "end": end, "guess": guess, "tokens": tokens}


def _learnt_nothing(facts: RunFacts) -> Measured | None:
    rows: Sequence[MetricsRow] = evaluation_rows(facts.rows)
    # In training only a loss that starts as the reference's has a start without noise.
    if not facts.evaluations and facts.falls(facts.steps):
        rows = facts.steps
    name = "loss" if first(rows, EXCESS) is None else EXCESS
    losses = [loss for _, loss in values(rows, name)]
    if not _is_complete(facts) or len(losses) < 2:
        return None
    start = losses[0]
    end = losses[-1]
    margins = [margin for _, margin in values(rows, MARGIN)]
    beta = facts.setting("loss.beta")
    has_moved = bool(margins and beta) and (margins[-1] - margins[0]) / beta >= _CHANGED_NATS
    fall = (start - end) / (abs(start) or 1.0)
    accuracy = facts.accuracy()
    share = digits(accuracy and accuracy.value)
    return {"value": math.inf if has_moved else fall, "start": start, "end": end, "share": share}


def _data_faults(facts: RunFacts) -> Measured | None:
    found = []
    for name, part in (("train", "training"), ("eval", "evaluation")):
        counts = facts.counts(name)
        dropped = sum((counts.get("dropped") or {}).values())
        for fault, what in _FAULTS.items():
            records = counts.get("read" if fault == "dropped" else "kept")
            count = dropped if fault == "dropped" else counts.get(fault, 0)
            if records:
                share = count / records
                facts_of_fault = {"count": count, "records": records, "of": part, "what": what}
                found.append({"value": share, "share": percent(share), **facts_of_fault})
    return max(found, key=_value, default=None)


def _value(measured: Measured) -> float:
    return float(measured["value"])


def _is_judged(facts: RunFacts) -> bool:
    """Return whether a run has enough steps, the last of which left usable weights."""
    return facts.total_steps >= _FEWEST_STEPS and facts.summary.get("exit") != RunOutcome.diverged


def _is_complete(facts: RunFacts) -> bool:
    return _is_judged(facts) and facts.summary.get("exit") != RunOutcome.preempted


_MEASURES: Mapping[str, Callable[[RunFacts], Measured | None]] = {
    "diverged": _diverged,
    "nothing_trained": _nothing_trained,
    "labels_swapped": _labels_swapped,
    "evaluation_leak": _evaluation_leak,
    "does_not_generalise": _does_not_generalise,
    "learning_rate_too_high": _learning_rate_too_high,
    "answers_broken": _answers_broken,
    "untrained_base": _untrained_base,
    "learnt_nothing": _learnt_nothing,
    "data_faults": _data_faults,
}
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "above": gt,
    "at least": ge,
    "at most": le,
    "below": lt,
}


@dataclass(frozen=True)
class RunRule:
    """A row of verdict.yaml, which says what each field is."""

    text: str
    group: str
    metric: str
    where: str
    comparison: str
    threshold: float
    shown_by: str
    sentence: str
    remedy: str

    def finding(self, name: str, measured: Measured | None, facts: RunFacts) -> Finding | None:
        """Return the finding if the measured value has the fault."""
        if measured is None or not _COMPARISONS[self.comparison](measured["value"], self.threshold):
            return None
        words = {
            "part": facts.part,
            "accuracy": facts.accuracy_title,
            "rate": digits(facts.setting("optim.lr")),
            "steps": pluralize(facts.total_steps, "step"),
        }
        return Finding(name, Level.warning, self.sentence.format(**words, **measured), remedy=self.remedy)


RUN_RULES = {name: RunRule(**row) for name, row in own_table(Path(__file__).with_suffix(".yaml")).items()}
"""The rows by name, in the order of verdict.yaml: a verdict reports the worst fault first."""


@dataclass(frozen=True)
class Verdict:
    """A sentence on the worst fault, or on the result if there is no fault; findings, the worst first."""

    sentence: str
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the section `verdict` of summary.json."""
        fields = ("rule", "text", "remedy")  # of those in doctor.json
        findings = [{name: getattr(finding, name) for name in fields} for finding in self.findings]
        return {"sentence": self.sentence, "findings": findings}

    def lines(self) -> list[str]:
        """Return the verdict for a screen; the text of the first finding is in the sentence."""
        lines = [f"verdict: {self.sentence}"]
        lines += [f"  try: {finding.remedy}" for finding in self.findings[:1]]
        lines += [f"  - {finding.with_remedy}" for finding in self.findings[1:]]
        return lines


def verdict(rows: Sequence[MetricsRow], summary: Mapping[str, Any]) -> Verdict:
    """Judge a run by its files.

    `rows` are of log_history.json, with nan for null; `exit` need not be in the summary.
    """
    facts = RunFacts(rows, summary)
    unmeasured = []
    by_group: dict[str, Finding] = {}
    for name, rule in RUN_RULES.items():
        measured = _MEASURES[name](facts)
        if measured is None:
            unmeasured.append(name.replace("_", " "))
        finding = rule.finding(name, measured, facts)
        if finding is not None:
            by_group.setdefault(rule.group, finding)
    findings = tuple(by_group.values())
    if findings:
        sentence = f"{RUN_RULES[findings[0].rule].text}: {findings[0].text}"
    else:
        sentence = _result(facts, unmeasured)
    if summary.get("exit") == RunOutcome.preempted:
        sentence = f"stopped after step {facts.total_steps:,}; so far: {sentence}"
    return Verdict(sentence, findings)


def sample_alarm(rows: Sequence[MetricsRow]) -> Finding | None:
    """Return what is wrong with the sampled responses, judged by the metrics rows so far."""
    facts = RunFacts(rows, {})
    return RUN_RULES["answers_broken"].finding("answers_broken", _repeated(facts), facts)


def _result(facts: RunFacts, unmeasured: Sequence[str]) -> str:
    """Return what a run without a finding has reached, and what was not looked at."""
    start = first(facts.steps, "loss")
    end = last(facts.steps, "loss")
    if start is None or end is None:
        return "nothing to judge, as no metrics row of a training step was written (trainer.log_every)"
    result = "no fault found"
    if facts.total_steps < _FEWEST_STEPS:
        result = "too short to be judged"
    elif unmeasured:
        result += f" (not looked at: {', '.join(unmeasured)})"
    fall = f"training loss {start:.3g} -> {end:.3g} in {pluralize(facts.total_steps, 'step')}"
    accuracy = facts.accuracy()
    if accuracy is None:
        return f"{result}: {fall}"
    pairs = f" on {pluralize(accuracy.pairs, facts.unit)}" if accuracy.pairs else ""
    margin = digits(last(facts.last_rows, MARGIN))
    return (
        f"{result}: {facts.part} {facts.accuracy_title} {accuracy.value:.3f}{pairs}, margin {margin}, {fall}"
    )
