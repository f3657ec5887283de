"""Checks of a run's data by its results: swapped labels, leaks, noise, cut responses, reference log-probs.

A check returns the fields of its rule's text, or None if the run does not break the rule or the facts are
unknown.
"""

import math

from dpo_dist.diagnostics.run_checks import Check, Fields, Limits
from dpo_dist.diagnostics.run_facts import ACCURACY, Accuracy, RunFacts, mean, number, pooled
from dpo_dist.number_text import percent

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
