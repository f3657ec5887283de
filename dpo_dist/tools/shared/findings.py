"""Findings: rules that the data or a run break, with numbers and a remedy; the doctor's rules."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

Level = StrEnum("Level", ["note", "warning", "error"])
"""`note`: good to know; `warning`: look at it; `error`: training is likely to fail or to mislead."""


@dataclass(frozen=True)
class FindingRule:
    """A rule about data or about a run: level of its finding, the fault in a few words, and advice."""

    level: Level
    text: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """A rule that is broken; doctor.json has these fields.

    Attributes:
        text: one sentence with its numbers. It has no text of a record, except that of a label leak, which
            quotes single words by `repr`.
        source: its label; None if the finding is about several.
        count: number of records concerned (for a label leak: of records examined).
        share: `count` as a share of the records that the rule is about; of a label leak: held-out accuracy.
        examples: origins (``file:line``) of some of these records; of a group of records, joined by ", ".
    """

    rule: str
    level: Level
    text: str
    source: str | None = None
    count: int = 0
    share: float | None = None
    examples: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def with_remedy(self) -> str:
        """The text and the advice as one sentence each."""
        return f"{self.text}. Try: {self.remedy}" if self.remedy else self.text


def most_serious_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings by level, then by share."""
    levels = list(Level)
    return sorted(findings, key=lambda finding: (-levels.index(finding.level), -(finding.share or 0)))
