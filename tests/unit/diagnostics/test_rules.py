"""Levels of findings by threshold."""

from dataclasses import replace

from dpo_dist.insight.doctor.findings import Level
from dpo_dist.insight.doctor.rules import RULES, Judge, most_serious_first


def test_a_share_below_the_threshold_is_a_note() -> None:
    judge = Judge(RULES | {"duplicates": replace(RULES["duplicates"], threshold=0.1)})
    [below], [above] = (judge.count("duplicates", count, 100, "a") for count in (10, 11))
    assert (below.level, above.level) == (Level.note, Level.warning)
    assert judge.count("duplicates", 0, 100, "a") == []
    assert most_serious_first([below, above]) == (above, below)


def test_a_value_below_the_threshold_is_no_finding() -> None:
    judge = Judge(RULES)
    assert judge.value("label_leak", 0.65, 100, "a", "") == []
    assert len(judge.value("label_leak", 0.66, 100, "a", "")) == 1
