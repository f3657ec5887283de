"""Facts of responses, and their means as metrics."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.tools.text_facts import TextFacts, longest_repeat, sample_metrics, text_facts

ENGLISH = "The weather in the mountains changes quickly, so take a warm jacket and enough water with you."


@given(st.lists(st.sampled_from("abc"), max_size=24))
def test_the_longest_repeat_is_that_of_a_search_through_all_passages(words: list[str]) -> None:
    spans = [tuple(words[a:b]) for a, b in itertools.combinations(range(len(words) + 1), 2)]
    seen, twice = set[tuple[str, ...]](), [0]
    for span in spans:
        twice += [len(span)] if span in seen else []
        seen.add(span)
    assert longest_repeat(words) == max(twice)


def facts(text: str, tokens: int = 9) -> TextFacts:
    return text_facts(text, tokens, is_finished=True)


def test_facts_of_usual_empty_and_repeating_responses() -> None:
    assert facts(ENGLISH, 20) == TextFacts(20, True, 1.0, 1 / 19, False)
    assert facts(" \n", 1) == TextFacts(1, True, None, 0.0, True)
    assert facts("\u5929\u6c14\u5929\u6c14\u5929\u6c14", 3).distinct_3 == 2 / 4
    loop = facts("go on and on " * 10)
    assert (loop.distinct_3, loop.longest_repeat) == (pytest.approx(4 / 38), 36 / 40)
    marks = facts("\u0e19\u0e49\u0e33\u0e17\u0e35\u0e48" * 10)
    assert marks.longest_repeat == pytest.approx(18 / 20, abs=0.11)
    long_word = facts("Donaudampfschifffahrtsgesellschaft is a word")
    assert (long_word.longest_repeat, long_word.distinct_3) == (0.0, 1.0)


def test_metrics_are_means_of_what_is_known() -> None:
    found = [facts(ENGLISH, 30), facts("", 0), text_facts("I cannot do that", 9, is_finished=False)]
    assert sample_metrics(found) == pytest.approx(
        {
            **{"length": 13, "finished": 2 / 3, "distinct_3": 1.0, "empty": 1 / 3},
            **{"longest_repeat": np.mean([fact.longest_repeat for fact in found])},
        }
    )
    assert "distinct_3" not in sample_metrics(found[1:2])
