"""Counts of responses and pairs in words."""

import re
from pathlib import Path

from dpo_dist.generation.pairs.files import describe_counts, describe_totals

PAGE = Path(__file__).parents[3] / "docs" / "pairs.md"


def test_totals_come_first_and_other_counts_have_name_and_meaning() -> None:
    counts = {"tied_pairs": 1200, "samples": 54, "prompts": 1, "refused": 0, "prompts_dropped_too_long": 2}
    assert describe_counts(counts) == [
        "1 prompt, 54 responses",
        "  2 prompts_dropped_too_long: prompts that are not asked: longer than data.max_length",
        "  1,200 tied_pairs: two responses to a prompt with equal scores",
    ]
    assert describe_counts({"refused": 0}) == []
    counts = {"comparisons_not_judged": 2, "comparisons_decided": 1}
    assert describe_totals(counts) == "1 comparison decided, 2 comparisons not judged"


def test_every_count_of_the_page_has_words() -> None:
    table = PAGE.read_text().partition("| count | meaning |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"prompts_dropped_REASON"}
    assert len(names) > 10
    for name in names:
        assert describe_counts({name: 2}) != [f"  2 {name}: {name.replace('_', ' ')}"]
