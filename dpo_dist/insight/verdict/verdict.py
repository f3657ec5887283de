"""The verdict about a run: one sentence and at most five findings, by the rules of `run_rules`."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import percent
from dpo_dist.insight.verdict.checks import TRAINING_CHECKS, Check, Fields, Limits, sentence_of_success
from dpo_dist.insight.verdict.facts import (
    ACCURACY,
    Accuracy,
    Row,
    RunFacts,
    first,
    last,
    mean,
    number,
    pooled,
)
from dpo_dist.insight.verdict.rules import RULES

_LEAKS = ("label_leak", "length_bias", "style_bias", "one_sided_form")
"""Rules of the doctor that name a feature which reveals the chosen response."""


def _labels_swapped(facts: RunFacts, limits: Limits) -> Fields | None:
    if not facts.evaluations or facts.total_steps < limits["steps"]:
        return None
    training = facts.training_accuracy()
    if training is not None and training.value < limits["accuracy"]:
        return None  # `prefers_rejected`
    whole = facts.accuracy()
    candidates = {} if whole is None else {"": whole}
    candidates |= {f" of {label}": found for label, found in facts.evaluated_sources().items()}
    for source, accuracy in candidates.items():
        by_chance = 0.5 - limits["standard_errors"] * accuracy.noise
        if accuracy.value < min(limits["accuracy"], by_chance):
            return {
                "accuracy": accuracy.value,
                "pairs": accuracy.pairs,
                "source": source,
                "training": number(None if training is None else training.value),
            }
    return None


def _evaluation_leak(facts: RunFacts, limits: Limits) -> Fields | None:
    counts = facts.counts("eval")
    count, pairs = counts.get("prompts_also_in_train", 0), counts.get("pairs", 0)
    if not pairs or count <= limits["share"] * pairs:
        return None
    return {"count": count, "pairs": pairs, "share": percent(count / pairs)}


def _evaluation_too_good(facts: RunFacts, limits: Limits) -> Fields | None:
    training, accuracy = facts.training_accuracy(), facts.accuracy()
    if not facts.evaluations or training is None or accuracy is None or not accuracy.pairs:
        return None
    if facts.total_steps < limits["steps"]:
        return None
    difference = accuracy.value - training.value
    noise = limits["standard_errors"] * math.hypot(training.noise, accuracy.noise)
    if difference <= max(limits["difference"], noise):
        return None
    return {"accuracy": accuracy.value, "pairs": accuracy.pairs, "training": number(training.value)}


def _label_leak(facts: RunFacts, limits: Limits) -> Fields | None:
    within = max(limits["steps"], limits["steps_share"] * facts.total_steps)
    pairs = facts.counts("train").get("pairs") or 1
    shares = {f"/{label}": own / pairs for label, own in facts.pairs_of_labels("train").items()}
    for source, share in {"": 1.0, **shares}.items():
        of_source = f" of {source[1:]}" if source else ""
        means = pooled(facts.steps, ACCURACY + source, limits["pairs"], share)
        at_once = next((one for one in means if one[0] <= within and one[1] >= limits["accuracy"]), None)
        if at_once is not None and (evidence := _evidence_of_leak(facts, source, limits["length_ratio"])):
            step, accuracy = at_once
            return {
                "symptom": f"accuracy{of_source} is {accuracy:.2f} at step {step:.0f} already, {evidence}"
            }
        if means and (evidence := _leak_by_length(facts, source, limits["sure_ratio"])):
            return {"symptom": f"the label{of_source} shows {evidence}"}
    return None


def _leak_by_length(facts: RunFacts, source: str, ratio: float) -> str | None:
    """Return a clause if the mean lengths of both sides differ by this ratio."""
    rows = facts.evaluations if source else facts.steps  # steps have no lengths by source
    chosen, rejected = mean(rows, f"tokens/chosen{source}"), mean(rows, f"tokens/rejected{source}")
    if not chosen or not rejected or max(chosen / rejected, rejected / chosen) < ratio:
        return None
    return f"by length: chosen responses have {chosen:.0f} tokens, rejected ones {rejected:.0f}"


def _evidence_of_leak(facts: RunFacts, source: str, ratio: float) -> str | None:
    """Return a clause that names the feature by which the label leaks, or None if none is known."""
    if (by_length := _leak_by_length(facts, source, ratio)) is not None:
        return by_length
    for finding in facts.data_findings:
        if source and finding.get("source") != source[1:]:
            continue
        if finding.get("rule") in _LEAKS and finding.get("level") != "note":
            # Not the finding's text, which may quote words of the data.
            share = finding.get("share")
            found = "" if share is None else f", which alone guesses {percent(share)} of the pairs right"
            return f"by form: the doctor found {finding['rule']}{found}"
    return None


def _noisy_source(facts: RunFacts, limits: Limits) -> Fields | None:
    parts = (("evaluation", facts.evaluated_sources()), ("training", facts.unseen_sources()))
    for part, found in parts:
        accuracies = {label: one for label, one in found.items() if one.pairs >= limits["pairs"]}
        noisy = {label: one for label, one in accuracies.items() if _is_chance(one, limits)}
        if not noisy or len(noisy) == len(accuracies):
            continue
        other = max(accuracies, key=lambda label: accuracies[label].value)
        best = accuracies[other].value
        if best < limits["others"]:
            continue
        pairs = sum(one.pairs for one in noisy.values())
        return {
            "part": part,
            "sources": ", ".join(noisy),
            "accuracy": sum(one.value * one.pairs for one in noisy.values()) / pairs,
            "pairs": pairs,
            "other": other,
            "best": best,
        }
    return None


def _is_chance(accuracy: Accuracy, limits: Limits) -> bool:
    noise = limits["standard_errors"] * accuracy.noise
    return abs(accuracy.value - 0.5) <= noise and accuracy.value + noise < limits["accuracy"]


def _responses_cut(facts: RunFacts, limits: Limits) -> Fields | None:
    for name, noun in (("train", "training"), ("eval", "evaluation")):
        counts = facts.counts(name)
        count, kept = counts.get("response_truncated", 0), counts.get("kept", 0)
        if kept and count > limits["share"] * kept:
            return {"count": count, "kept": kept, "name": noun, "share": percent(count / kept)}
    return None


def _reference_drift(facts: RunFacts, limits: Limits) -> Fields | None:
    drift = ((facts.summary.get("reference") or {}).get("drift") or {}).get("mean_token_drift")
    return None if drift is None or drift <= limits["drift"] else {"drift": drift}


def _reference_disagrees(facts: RunFacts, limits: Limits) -> Fields | None:
    for finding in facts.data_findings:
        share = finding.get("share") or 0.0
        if finding.get("rule") == "reference_disagrees" and share > limits["share"]:
            return {"share": percent(share), "source": finding.get("source") or "the data"}
    return None


def _doctor_errors(facts: RunFacts, limits: Limits) -> Fields | None:
    names = [str(finding.get("rule")) for finding in facts.data_findings if finding.get("level") == "error"]
    if len(names) < limits["errors"]:
        return None
    return {"names": ", ".join(dict.fromkeys(names))}


DATA_CHECKS: dict[str, Check] = {
    "labels_swapped": _labels_swapped,
    "evaluation_leak": _evaluation_leak,
    "evaluation_too_good": _evaluation_too_good,
    "label_leak": _label_leak,
    "noisy_source": _noisy_source,
    "responses_cut": _responses_cut,
    "reference_drift": _reference_drift,
    "reference_disagrees": _reference_disagrees,
    "doctor_errors": _doctor_errors,
}
"""By rule."""


_SAMPLES = "samples/"
_REFERENCE = "samples/reference_"


def _over_optimised(facts: RunFacts, limits: Limits) -> Fields | None:
    symptoms = []
    start, end = _ends(facts, "length")
    wanted = last(facts.evaluations, "tokens/chosen") or 0.0
    if start and end and end / start >= _least_ratio(facts, limits) and end > wanted:
        symptoms.append(f"sampled responses are {end / start:.1f}x longer ({start:.0f} -> {end:.0f} tokens)")
    start, end = _ends(facts, "finished")
    if (
        start is not None
        and end is not None
        and 1 - end >= limits["unfinished"]
        and _is_enough(facts, 1 - start, 1 - end, limits["unfinished_rise"], limits)
    ):
        symptoms.append(f"{percent(1 - end)} of them do not end by themselves ({percent(1 - start)} before)")
    start, end = _ends(facts, "distinct_3")
    if start and end is not None and end / start <= limits["distinct_fall"]:
        symptoms.append(f"they repeat themselves (distinct 3-grams {percent(start)} -> {percent(end)})")
    return _sampled(facts, symptoms)


def _samples_degrade(facts: RunFacts, limits: Limits) -> Fields | None:
    symptoms = []
    for metric, meaning in (
        ("empty", "are empty"),
        ("refusals", "are refusals"),
        ("language_changed", "are in another language than the chosen response"),
    ):
        start, end = _ends(facts, metric)
        if start is None or end is None:
            continue
        if _is_enough(facts, start, end, limits["rise"], limits):
            symptoms.append(f"{percent(end)} of the sampled responses {meaning} ({percent(start)} before)")
    return _sampled(facts, symptoms)


def _ends(facts: RunFacts, name: str) -> tuple[float | None, float | None]:
    """Return a metric of the reference's responses, or else of the first samples, and of the last ones."""
    # The last ones: settings of samples may change when a run is resumed, and the reference responds again.
    start = last(facts.evaluations, _REFERENCE + name)
    if start is None:
        start = first(facts.evaluations, _SAMPLES + name)
    return start, last(facts.evaluations, _SAMPLES + name)


def _least_ratio(facts: RunFacts, limits: Limits) -> float:
    """Return the ratio of mean lengths that is no chance; without the number of prompts the limit."""
    prompts = last(facts.evaluations, "samples/prompts")
    if not prompts:
        return limits["length_ratio"]
    # Of two responses to one prompt, as of a model that has not changed.
    noise = limits["standard_errors"] * limits["length_spread"] * math.sqrt(2 / prompts)
    return max(limits["length_ratio"], math.exp(noise))


def _is_enough(facts: RunFacts, start: float, end: float, least: float, limits: Limits) -> bool:
    """Return whether a share rose by `least` and, if their number is known, by more than chance."""
    rise, prompts = end - start, last(facts.evaluations, "samples/prompts")
    if prompts is None or rise < least:
        return rise >= least
    noise = math.sqrt((start * (1 - start) + end * (1 - end)) / prompts)
    return round(rise * prompts) >= limits["responses"] and rise > limits["standard_errors"] * noise


def _sampled(facts: RunFacts, symptoms: list[str]) -> Fields | None:
    if not symptoms:
        return None
    row = next(row for row in facts.evaluations if _has_samples(row))
    is_known = any(key.startswith(_REFERENCE) for one in facts.evaluations for key in one)
    return {
        "symptoms": ", ".join(symptoms),
        "start": "the reference" if is_known else f"step {row['step']:.0f}",
    }


def _has_samples(row: Row) -> bool:
    return any(key.startswith(_SAMPLES) for key in row)


SAMPLE_CHECKS: dict[str, Check] = {
    "over_optimised": _over_optimised,
    "samples_degrade": _samples_degrade,
}
"""By rule."""


MOST_FINDINGS = 5
_ADVICE, _NEXT = ". Try: ", "; "
_UP = ("higher", "larger", "more")
_PUSH = re.compile(r"\b(lower|smaller|fewer|higher|larger|more) ([a-z_]+(?:\.[a-z_]+)?)")
_CHECKS = TRAINING_CHECKS | SAMPLE_CHECKS | DATA_CHECKS


@dataclass(frozen=True)
class RunFinding:
    """A rule that a run breaks.

    Attributes:
        rule: its name in `run_rules.RULES`.
        text: one sentence with numbers, then advice.
    """

    rule: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """The verdict about a run.

    Attributes:
        sentence: the worst fault with its numbers, or the result of a run without one.
        findings: at most `MOST_FINDINGS`, the worst first.
    """

    sentence: str
    findings: tuple[RunFinding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the section `verdict` of summary.json."""
        findings = [{"rule": finding.rule, "text": finding.text} for finding in self.findings]
        return {"sentence": self.sentence, "findings": findings}

    def lines(self) -> list[str]:
        """Return the verdict for a screen, at most six lines; the sentence is not repeated by its finding."""
        lines = [f"verdict: {self.sentence}"]
        for finding in self.findings:
            text, _, advice = finding.text.rpartition(_ADVICE)
            is_said = text != "" and self.sentence.endswith(text)
            lines.append(f"  try: {advice}" if is_said else f"  - {finding.text}")
        return lines


def verdict(
    rows: Sequence[Row], summary: Mapping[str, Any], data_findings: Sequence[Mapping[str, Any]] = ()
) -> Verdict:
    """Judge a run by its files; a rule whose inputs are missing finds nothing.

    Args:
        rows: of log_history.json, with nan for null.
        summary: the content of summary.json; `exit` need not be in it.
        data_findings: `findings` of doctor.json.
    """
    facts = RunFacts.of(rows, summary, data_findings)
    broken = _broken(facts, RULES)
    explained = {other for name in broken for other in RULES[name].explains}
    reported = {name: fields for name, fields in broken.items() if name not in explained}
    advice = _agreed_advice(reported)
    findings = [_finding(name, fields, advice[name]) for name, fields in reported.items()]
    worst = next((name for name in reported if not RULES[name].is_remark), None)
    if worst is not None:
        sentence = f"{RULES[worst].headline}: {RULES[worst].text.format_map(broken[worst])}"
    else:
        sentence = sentence_of_success(facts)
    if summary.get("exit") == RunOutcome.preempted:
        sentence = f"stopped after step {facts.total_steps:,}; so far: {sentence}"
    return Verdict(sentence, tuple(findings[:MOST_FINDINGS]))


def sample_alarms(rows: Sequence[Row]) -> list[RunFinding]:
    """Return the faults of the sampled responses by the metrics rows so far: the rules of `SAMPLE_CHECKS`."""
    alarms = _broken(RunFacts.of(rows, {}), SAMPLE_CHECKS)
    return [_finding(name, fields, [RULES[name].remedy]) for name, fields in alarms.items()]


def _broken(facts: RunFacts, names: Iterable[str]) -> dict[str, Fields]:
    """Return the fields of each of these rules that the run breaks."""
    checked = {name: _CHECKS[name](facts, RULES[name].limits) for name in names}
    return {name: fields for name, fields in checked.items() if fields is not None}


def _finding(name: str, fields: Fields, advice: Sequence[str]) -> RunFinding:
    text = RULES[name].text.format_map(fields)
    return RunFinding(name, f"{text}{_ADVICE}{_NEXT.join(advice)}" if advice else text)


def _agreed_advice(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the remedies of these rules, without what pushes a key against a rule named before."""
    pushed: dict[str, bool] = {}
    advice = {}
    for name in names:
        pushes = [(piece, _PUSH.search(piece)) for piece in RULES[name].remedy.split(_NEXT)]
        advice[name] = [
            piece
            for piece, push in pushes
            if push is None or pushed.setdefault(push[2], push[1] in _UP) == (push[1] in _UP)
        ]
    return advice
