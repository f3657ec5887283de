"""Counts of responses and pairs in words; docs/pairs.md has their names."""

from collections.abc import Mapping

from dpo_dist.data.count_words import in_words
from dpo_dist.number_text import counted

_TOTALS = {
    "prompts": ("prompt", "prompts"),
    "samples": ("response", "responses"),
    "comparisons_decided": ("comparison decided", "comparisons decided"),
    "comparisons_tied": ("comparison tied", "comparisons tied"),
    "comparisons_without_majority": ("comparison without majority", "comparisons without majority"),
    "comparisons_skipped": ("comparison skipped", "comparisons skipped"),
    "comparisons_not_judged": ("comparison not judged", "comparisons not judged"),
}
"""Singular and plural."""
_WORDS = {
    "samples_unfinished": "responses not used: they did not end within pairs.max_new_tokens",
    "samples_empty": "responses not used: they are empty",
    "samples_identical": "responses not used: equal to another one to the same prompt",
    "samples_encoded_differently": "responses not used: training encodes them as other tokens",
    "samples_without_score": "responses not used: without a usable score",
    "encoded_differently": "responses that training encodes as other tokens than were generated",
    "prompts_all_tied": "prompts without a pair: all scores are equal",
    "prompts_below_margin": "prompts without a pair: no two scores differ by more than pairs.margin",
    "prompts_too_few_responses": "prompts without a pair: too few usable responses",
    "tied_pairs": "two responses to a prompt with equal scores",
    "without_scores": "records without scores",
    "order_changed": "pairs whose order in the record was not that of their scores",
    "requests": "requests to the judge",
    "refused": "requests that the judge refused",
    "unreadable": "replies of the judge without a readable verdict",
    "position_disagreements": "verdicts that changed with the order of the responses: ties",
}
_NOT_ASKED = "prompts_dropped_"


def describe_totals(counts: Mapping[str, int]) -> str:
    """Return prompts, responses and comparisons: "18 prompts, 54 responses"; empty without any."""
    return ", ".join(counted(counts[name], *nouns) for name, nouns in _TOTALS.items() if counts.get(name))


def describe_counts(counts: Mapping[str, int]) -> list[str]:
    """Return lines for the screen: the totals, then each other count with its name and meaning."""
    totals = describe_totals(counts)
    named = sorted(name for name, number in counts.items() if number and name not in _TOTALS)
    return [
        *([totals] if totals else []),
        *(f"  {counts[name]:,} {name}: {_meaning(name)}" for name in named),
    ]


def _meaning(name: str) -> str:
    if name.startswith(_NOT_ASKED):
        return f"prompts that are not asked: {in_words(name.removeprefix(_NOT_ASKED))}"
    return _WORDS.get(name) or in_words(name)
