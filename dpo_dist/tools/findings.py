"""Findings about data or about a run: the broken rule, numbers, and a remedy."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from dpo_dist.foundation.types import Fields
from dpo_dist.tools.pages.blocks import Text

_SHOWN_EXAMPLES = 5  # on a page

Level = StrEnum("Level", ["note", "warning", "error"])
"""`note`: good to know; `warning`: look at it; `error`: training is likely to fail or to mislead."""


@dataclass(frozen=True)
class Finding:
    """A broken rule; doctor.json has these fields.

    Attributes:
        text: one sentence with numbers, without texts of records; only a label leak quotes single words,
            by `repr`.
        source: the source's label; None if the finding is about several sources.
        count: number of records that break the rule (for a label leak: of records examined).
        share: `count` divided by the records that the rule looks at (for a label leak: held-out accuracy).
        examples: origins (``file:line``) of some of these records; a group of records is joined by ", ".
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
        """The text and, in a second sentence, the advice."""
        return f"{self.text}. Try: {self.remedy}" if self.remedy else self.text


def most_serious_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings sorted by level, then by share."""
    levels = list(Level)
    return sorted(findings, key=lambda finding: (-levels.index(finding.level), -(finding.share or 0)))


def finding_block(fields: Fields) -> Text:
    """Return a finding for a page, from its fields in doctor.json."""
    text = f"{fields['text']}\nTo do: {fields['remedy']}"
    examples = fields.get("examples") or ()
    if examples:
        text += f"\nFirst: {'; '.join(examples[:_SHOWN_EXAMPLES])}"
    source = fields.get("source") or "several sources"
    return Text(text, fields["level"], f"{fields['level']} {fields['rule'].replace('_', ' ')}, {source}")
