"""The rules about data that the doctor looks for, from rules.yaml beside this file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.text import percent
from dpo_dist.tools.findings import Finding, Level

MAX_EXAMPLES = 20
"""Examples of a finding."""


@dataclass(frozen=True)
class DataRule:
    """A rule about data: its level above the threshold, the fault in a few words, and advice."""

    level: Level
    text: str
    remedy: str
    name: str
    threshold: float

    def count(
        self,
        count: int,
        total: int,
        source: str | None,
        examples: Sequence[object] = (),
        detail: str = "",
    ) -> Iterator[Finding]:
        """Yield a finding if any record breaks the rule: a note unless the share is above the threshold."""
        if count:
            level = self.level if count > self.threshold * total else Level.note
            text = f"{count} of {total} records ({percent(count / total)}) {self.text}"
            if detail:
                text += f": {detail}"
            origins = tuple(map(str, examples[:MAX_EXAMPLES]))
            yield Finding(self.name, level, text, source, count, count / total, origins, self.remedy)

    def value(self, value: float, count: int, source: str | None, detail: str) -> Iterator[Finding]:
        """Yield a finding if `value` is above the threshold; `count` records were examined."""
        if value > self.threshold:
            text = f"{self.text}: {detail}"
            yield Finding(self.name, self.level, text, source, count, value, (), self.remedy)


_TABLE = own_table(Path(__file__).with_suffix(".yaml"))
KINDS_BY_RULE: Mapping[str, list[str]] = _TABLE.pop("kinds")
RULE_BY_KIND = {kind: rule for rule, kinds in KINDS_BY_RULE.items() for kind in kinds}
DOCTOR_RULES = {
    name: DataRule(Level(level), text, remedy, name, threshold)
    for name, (level, threshold, text, remedy) in _TABLE.items()
}
