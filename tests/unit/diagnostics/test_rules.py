"""The table of rules in docs/doctor.md is that of the code; a rule has one meaning."""

from pathlib import Path

from dpo_dist.insight.doctor.findings import Level
from dpo_dist.insight.doctor.rules import RULES, Judge, most_serious_first

PAGE = Path(__file__).parents[3] / "docs" / "doctor.md"


def test_the_page_has_every_rule_with_level_threshold_and_text() -> None:
    rules = PAGE.read_text().partition("\n## Rules\n")[2].splitlines()
    rows = [line.strip("|").split(" | ") for line in rules if line.startswith("| `")]
    described = {
        row[0].strip(" `"): (row[1], float(row[2]), row[3])
        for row in rows
        if len(row) == 5 and row[4].strip()
    }
    assert described == {name: (rule.level, rule.threshold, rule.text) for name, rule in RULES.items()}


def test_a_share_below_the_threshold_is_a_note() -> None:
    judge = Judge.with_thresholds({"duplicates": 0.1})
    [below], [above] = (judge.count("duplicates", count, 100, "a") for count in (10, 11))
    assert (below.level, above.level) == (Level.note, Level.warning)
    assert judge.count("duplicates", 0, 100, "a") == []
    assert most_serious_first([below, above]) == (above, below)


def test_a_value_below_the_threshold_is_no_finding() -> None:
    judge = Judge.with_thresholds({})
    assert judge.value("label_leak", 0.65, 100, "a", "") == []
    assert len(judge.value("label_leak", 0.66, 100, "a", "")) == 1
