"""Counts of responses and pairs in words."""

from dpo_dist.generation.pairs.files import describe_counts, describe_totals


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
