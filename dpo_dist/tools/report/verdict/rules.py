"""The verdict about a run: one sentence and at most five findings; see docs/watching.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.foundation.text import pluralize
from dpo_dist.tools.findings import Finding, FindingRule, Level
from dpo_dist.tools.report.verdict.data import DATA_RULES
from dpo_dist.tools.report.verdict.facts import (
    FEWEST_STEPS,
    Find,
    RunFacts,
    digits,
    first,
    last,
)
from dpo_dist.tools.report.verdict.optimisation import OPTIMISATION_RULES, lost_weights
from dpo_dist.tools.report.verdict.responses import RESPONSES_RULES
from dpo_dist.training.reporting.metrics_log import MetricsRow

MOST_FINDINGS = 5
NOTHING_TO_JUDGE = "nothing to judge, as no metrics row of a training step was written (trainer.log_every)"


@dataclass(frozen=True)
class RunRule(FindingRule):
    """A rule about a run; the verdict's sentence starts with its `text`, the fault in two to five words.

    `find` yields the signs of the fault. Rules that it `explains` are its consequences, and not reported.
    """

    find: Find
    explains: tuple[str, ...] = ()


_TABLE = yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"))
_FIND = {find.__name__.strip("_"): find for find in (*OPTIMISATION_RULES, *DATA_RULES, *RESPONSES_RULES)}
RUN_RULES = {
    name: RunRule(Level(level), text, remedy, _FIND[name], tuple(explained))
    for name, (level, text, remedy, *explained) in _TABLE.items()
}
"""The rules by name, in the order of rules.yaml: a verdict reports the worst fault first."""


@dataclass(frozen=True)
class Verdict:
    """A sentence on the worst fault, or on the result if there is no fault; findings, the worst first."""

    sentence: str
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the section `verdict` of summary.json."""
        findings = [{"rule": finding.rule, "text": finding.with_remedy} for finding in self.findings]
        return {"sentence": self.sentence, "findings": findings}

    def lines(self) -> list[str]:
        """Return the verdict for a screen, at most six lines; the sentence's own finding is not repeated."""
        return [
            f"verdict: {self.sentence}",
            *(
                f"  try: {fault.remedy}" if self.sentence.endswith(fault.text) else f"  - {fault.with_remedy}"
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
    return Verdict(sentence, tuple(findings[:MOST_FINDINGS]))


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
        return NOTHING_TO_JUDGE
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
