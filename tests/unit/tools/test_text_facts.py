"""Facts of responses, and their means as metrics; refusals are told from texts that share words with them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.tools.text_facts import TextFacts, is_refusal, longest_repeat, sample_metrics, text_facts

ENGLISH = "The weather in the mountains changes quickly, so take a warm jacket and enough water with you."
GERMAN = "Das Wetter in den Bergen wechselt schnell, also nimm eine warme Jacke und genug Wasser mit."


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
    assert facts(ENGLISH, 20) == TextFacts(20, True, False, 1.0, 1 / 19, False, "en")
    assert facts(" \n", 1) == TextFacts(1, True, False, None, 0.0, True, None)
    assert facts("I'm sorry, but I cannot help.").refusals
    assert facts("\u5929\u6c14\u5929\u6c14\u5929\u6c14", 3).distinct_3 == 2 / 4
    loop = facts("go on and on " * 10)
    assert (loop.distinct_3, loop.longest_repeat) == (pytest.approx(4 / 38), 36 / 40)
    marks = facts("\u0e19\u0e49\u0e33\u0e17\u0e35\u0e48" * 10)
    assert marks.longest_repeat == pytest.approx(18 / 20, abs=0.11)
    long_word = facts("Donaudampfschifffahrtsgesellschaft is a word")
    assert (long_word.longest_repeat, long_word.distinct_3) == (0.0, 1.0)


def test_metrics_are_means_of_what_is_known() -> None:
    found = [facts(ENGLISH, 30), facts(GERMAN, 20), facts("", 0)]
    found.append(text_facts("I cannot do that", 10, is_finished=False))
    assert sample_metrics(found, ["en", "en", "en", None]) == pytest.approx(
        {
            **{"length": 15, "finished": 0.75, "distinct_3": 1.0, "language_changed": 0.5},
            **{"longest_repeat": np.mean([fact.longest_repeat for fact in found])},
            **{"refusals": 0.25, "empty": 0.25},
        }
    )
    assert "language_changed" not in sample_metrics(found[2:], ["en", None])


REFUSALS = """
I'm sorry, but I can't help with that.
I won't help with this.
I don't feel comfortable discussing this topic.
As an AI, I'm not able to browse the internet.
I'd rather not talk about that.
That goes against my guidelines.
I\u2019m sorry, but I can\u2019t comply.
I'm sorry, but I don't have access to your files.
I cannot and will not provide instructions for harming others.
\u5f88\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u63d0\u4f9b\u76f8\u5173\u4fe1\u606f\u3002
\u6211\u4e0d\u80fd\u63d0\u4f9b\u533b\u7597\u5efa\u8bae\u3002
\u5bf9\u4e0d\u8d77\uff0c\u6211\u4e0d\u4f1a\u53c2\u4e0e\u8fd9\u6837\u7684\u8ba8\u8bba\u3002
"""
RESPONSES = """
I'm so sorry you had a bad day! What happened?
I can't help but notice that the sum is wrong.
"I'm sorry, but I can't help you," he whispered.
Dear Anna, I'm sorry that I could not come to your party.
I will not be at home tomorrow, so call me in the evening.
To say "I can't" in French, use "je ne peux pas".
I will not only list the steps but also explain them.
\u5f88\u62b1\u6b49\u542c\u5230\u4f60\u4eca\u5929\u5fc3\u60c5\u4e0d\u597d\u3002
\u5bf9\u4e0d\u8d77\uff0c\u4e4b\u524d\u7684\u56de\u7b54\u6709\u8bef\uff0c\u6b63\u786e\u7684\u662f\u5df4\u9ece\u3002
\u4e0d\u80fd\u628a\u6c34\u5012\u8fdb\u53bb\uff0c\u8981\u5148\u5173\u7535\u6e90\u3002
\u6211\u4e0d\u80fd\u540c\u610f\u66f4\u591a\uff0c\u8fd9\u672c\u4e66\u5f88\u597d\u3002
"""


@pytest.mark.parametrize(("texts", "refuses"), [(REFUSALS, True), (RESPONSES, False)])
def test_refusals_are_told_from_other_responses(texts: str, refuses: bool) -> None:
    assert [text for text in texts.strip().splitlines() if is_refusal(text) != refuses] == []


@pytest.mark.parametrize("repeated", ["\n", "however, as an ", "I can't "])
def test_a_text_that_repeats_itself_takes_no_time(repeated: str) -> None:
    """A model that collapses writes such texts; with time that grows with a power, they take minutes."""
    facts(repeated * 50_000)
    for number in range(100):
        assert not is_refusal(f"Sorry, {repeated * 40}{number}")
