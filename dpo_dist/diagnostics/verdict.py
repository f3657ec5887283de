"""The verdict about a run: one sentence and at most five findings, by the rules of `run_rules`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_dist.diagnostics.run_checks import TRAINING_CHECKS, Fields, sentence_of_success
from dpo_dist.diagnostics.run_data_checks import DATA_CHECKS
from dpo_dist.diagnostics.run_facts import Row, RunFacts
from dpo_dist.diagnostics.run_rules import RULES
from dpo_dist.diagnostics.run_sample_checks import SAMPLE_CHECKS
from dpo_dist.errors import RunOutcome

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
