"""Findings: rules that the data or a run break, with numbers and a remedy; the doctor's rules."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.foundation.text import percent

Level = StrEnum("Level", ["note", "warning", "error"])
"""`note`: good to know; `warning`: look at it; `error`: training is likely to fail or to mislead."""


@dataclass(frozen=True)
class Rule:
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


_MAX_EXAMPLES = 20


@dataclass(frozen=True)
class DataRule(Rule):
    """A rule about data with its name and threshold."""

    name: str
    threshold: float

    def count(
        self,
        count: int,
        of: int,
        source: str | None,
        examples: Sequence[object] = (),
        detail: str = "",
        records: str = "records",
    ) -> Iterator[Finding]:
        """Yield the finding if any of `of` records break the rule; up to the threshold it is a note."""
        if count:
            level = self.level if count > self.threshold * of else Level.note
            text = f"{count} of {of} {records} ({percent(count / of)}) {self.text}"
            text += f": {detail}" if detail else ""
            shown = tuple(map(str, examples[:_MAX_EXAMPLES]))
            yield Finding(self.name, level, text, source, count, count / of, shown, self.remedy)

    def value(self, value: float, count: int, source: str | None, detail: str) -> Iterator[Finding]:
        """Yield the finding if `value` is above the threshold; `count` records were examined."""
        if value > self.threshold:
            text = f"{self.text}: {detail}"
            yield Finding(self.name, self.level, text, source, count, value, (), self.remedy)


_TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"))
KINDS: Mapping[str, list[str]] = _TABLE.pop("kinds")
RULE_OF = {kind: rule for rule, kinds in KINDS.items() for kind in kinds}
RULES = {
    name: DataRule(Level(level), text, remedy, name, threshold)
    for name, (level, threshold, text, remedy) in _TABLE.items()
}
