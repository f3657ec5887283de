"""The rule between the keys of a sweep."""

from dpo_dist.kit import Rule, RunConfig
from dpo_dist.tools.sweep.extension import SweepConfig


def _has_no_such_part(config: RunConfig) -> bool:
    index, parts = config.section_of(SweepConfig).share
    return index >= parts


_RULES = [
    Rule("sweep.part", "there is no such part", "set sweep.part to I/N with I from 1 to N", _has_no_such_part)
]


def rules_of_verb(_verb: str) -> list[Rule]:
    """Return the rule, which is the same for every verb."""
    return _RULES
