"""Facts of responses, and their means as metrics."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.generation.text_facts import TextFacts, longest_repeat, sample_metrics, text_facts

ENGLISH = "The weather in the mountains changes quickly, so take a warm jacket and enough water with you."
GERMAN = "Das Wetter in den Bergen wechselt schnell, also nimm eine warme Jacke und genug Wasser mit."


def slow_repeat(words: list[str]) -> int:
    spans = [tuple(words[a:b]) for a, b in itertools.combinations(range(len(words) + 1), 2)]
    return max((len(span) for span in spans if spans.count(span) > 1), default=0)


def test_the_longest_repeat_is_that_of_a_search_through_all_passages() -> None:
    random = np.random.default_rng(0)
    for letters, length in itertools.product((1, 2, 4), (0, 1, 2, 3, 7, 16)):
        words = [str(letter) for letter in random.integers(0, letters, length)]
        assert longest_repeat(words) == slow_repeat(words), words


@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_the_longest_repeat_of_any_words(words: list[str]) -> None:
    found = longest_repeat(words)
    for length, occurs in ((found, found > 0), (found + 1, False)):
        passages = [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]
        assert (len(set(passages)) < len(passages)) == occurs or length == 0


def test_facts_of_a_loop() -> None:
    facts = text_facts("go on and on " * 10, 40, is_finished=False)
    assert facts.distinct_3 == pytest.approx(4 / 38)
    assert facts.longest_repeat == 36 / 40
    assert not facts.is_finished
    assert facts.tokens == 40


def test_facts_of_usual_empty_and_refusing_responses() -> None:
    usual = text_facts(ENGLISH, 20, is_finished=True)
    assert usual == TextFacts(20, True, 1.0, 1 / 19, False, False, "en", 17, False, False)
    assert text_facts(" \n", 1, is_finished=True) == TextFacts(
        1, True, None, 0.0, True, False, None, 0, False, False
    )
    assert text_facts("I'm sorry, but I cannot help.", 9, is_finished=True).is_refusal
    assert text_facts("\u5929\u6c14\u5929\u6c14\u5929\u6c14", 3, is_finished=True).distinct_3 == 2 / 4


@pytest.mark.parametrize("unit", ["\n", "[", "|\n", "- "])
def test_the_time_of_a_response_that_repeats_a_sign_grows_with_its_length(unit: str) -> None:
    """With time that grows with the square of the length, this takes minutes."""
    text_facts(unit * 100_000, 1, is_finished=False)


def test_lists_after_empty_lines_and_links_in_brackets() -> None:
    """Empty lines and indents are no matter; a link may have brackets before it."""
    lists = [text_facts(text, 1, is_finished=True).has_list for text in ("\n\n - a\n\n  2) b", "- a\nb - c")]
    links = [text_facts(text, 1, is_finished=True).has_markdown for text in ("[[1](a.b)", "see [1] (a.b)")]
    assert (lists, links) == ([True, False], [True, False])


def test_metrics_are_means_of_what_is_known() -> None:
    facts = [
        text_facts(ENGLISH, 30, is_finished=True),
        text_facts(GERMAN, 20, is_finished=True),
        text_facts("", 0, is_finished=True),
        text_facts("I cannot do that", 10, is_finished=False),
    ]
    metrics = sample_metrics(facts, ["en", "en", "en", None])
    assert metrics == pytest.approx(
        {
            "length": 15,
            "finished": 0.75,
            "distinct_3": 1.0,
            "longest_repeat": np.mean([fact.longest_repeat for fact in facts]),
            "language_changed": 0.5,
            "refusals": 0.25,
            "empty": 0.25,
        }
    )
    assert "language_changed" not in sample_metrics(facts[2:], ["en", None])


@pytest.mark.parametrize(
    ("text", "has_list", "has_markdown"),
    [
        ("Buy:\n- milk\n- bread", True, False),
        ("1. first\n2) second", True, False),
        ("- one item only", False, False),
        ("It costs 3.5 - not\n4.5 - a lot.", False, False),
        ("# Title\ntext", False, True),
        ("a **bold** word", False, True),
        ("```\ncode\n```", False, True),
        ("see [this](https://example.org)", False, True),
        ("2 * 3 ** 2 and a#b", False, False),
    ],
)
def test_lists_and_markdown(text: str, has_list: bool, has_markdown: bool) -> None:
    facts = text_facts(text, 9, is_finished=True)
    assert (facts.has_list, facts.has_markdown) == (has_list, has_markdown)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It is 5 o'clock, \u5929\u6c14.", 6),
        ("\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e!", 2),  # Devanagari
        ("\u0e19\u0e49\u0e33 \u0e17\u0e35\u0e48", 2),  # Thai: letters with marks
        ("e\u0301te\u0301 _ ...", 1),
    ],
)
def test_words_are_counted_with_their_marks_and_without_punctuation(text: str, words: int) -> None:
    assert text_facts(text, 9, is_finished=True).words == words


def test_a_loop_in_a_script_with_marks_is_seen() -> None:
    loop = "\u0e19\u0e49\u0e33\u0e17\u0e35\u0e48" * 10
    assert text_facts(loop, 9, is_finished=False).longest_repeat == pytest.approx(18 / 20, abs=0.11)


@pytest.mark.parametrize("loop", ["ha", "_", "0", "fi\u00df"])
def test_a_loop_without_spaces_is_seen(loop: str) -> None:
    facts = text_facts(loop * 60, 60, is_finished=False)
    assert facts.longest_repeat > 0.9
    assert facts.distinct_3 is not None
    assert facts.distinct_3 < 0.1
    assert facts.words == (loop != "_")


def test_a_long_word_repeats_nothing() -> None:
    facts = text_facts("Donaudampfschifffahrtsgesellschaft is a word", 9, is_finished=True)
    assert (facts.longest_repeat, facts.distinct_3, facts.words) == (0.0, 1.0, 4)
