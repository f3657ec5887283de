"""Make findings of the rules that counts and values break."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from dpo_dist.diagnostics.findings import Finding, Level, Measure, Rule
from dpo_dist.diagnostics.rules import RULES
from dpo_dist.errors import ConfigError
from dpo_dist.number_text import percent

_LEVELS = tuple(reversed(Level))
_MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Judge:
    """Applies rules.

    Attributes:
        rules: by name, with the thresholds of the configuration.
    """

    rules: Mapping[str, Rule]

    @classmethod
    def with_thresholds(cls, thresholds: Mapping[str, float]) -> "Judge":
        """Return a judge with other thresholds for some rules. Raises ConfigError for an unknown rule."""
        check_thresholds(thresholds)
        changed = {name: replace(RULES[name], threshold=float(value)) for name, value in thresholds.items()}
        return cls(RULES | changed)

    def threshold(self, name: str) -> float:
        """Return the threshold of a rule."""
        return self.rules[name].threshold

    def count(
        self,
        name: str,
        count: int,
        of: int,
        source: str | None,
        examples: Sequence[str] = (),
        *,
        detail: str = "",
        records: str = "records",
    ) -> list[Finding]:
        """Return the finding of a rule that `count` of `of` records break, if any does.

        At or below the threshold it is a note; `detail` follows the text after a colon.
        """
        rule = self.rules[name]
        if not count or (rule.measure is Measure.value and count <= rule.threshold * of):
            return []
        level = rule.level if count > rule.threshold * of else Level.note
        text = (
            f"{count} of {of} {records} ({percent(count / of)}) {rule.text}{f': {detail}' if detail else ''}"
        )
        shown = tuple(examples[:_MAX_EXAMPLES])
        return [Finding(name, level, text, source, count, count / of, shown, rule.remedy)]

    def value(
        self,
        name: str,
        value: float,
        count: int,
        source: str | None,
        detail: str,
        examples: Sequence[str] = (),
    ) -> list[Finding]:
        """Return the finding of a rule if `value` is above its threshold; `count` records were examined."""
        rule = self.rules[name]
        if value <= rule.threshold:
            return []
        text = f"{rule.text}: {detail}" if detail else rule.text
        shown = tuple(examples[:_MAX_EXAMPLES])
        return [Finding(name, rule.level, text, source, count, value, shown, rule.remedy)]


def check_thresholds(thresholds: Mapping[str, float]) -> None:
    """Check that each threshold is of a rule. Raises ConfigError."""
    unknown = [name for name in thresholds if name not in RULES]
    if unknown:
        near = get_close_matches(unknown[0], RULES, n=3)
        raise ConfigError(
            "the doctor has no such rule",
            where="doctor.thresholds",
            got=unknown[0],
            expected="a rule of docs/doctor.md",
            remedy=f"did you mean {' or '.join(near)}?" if near else "see docs/doctor.md",
        )


def most_serious_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return the findings by level, then by share."""
    return tuple(sorted(findings, key=lambda one: (_LEVELS.index(one.level), -(one.share or 0))))
