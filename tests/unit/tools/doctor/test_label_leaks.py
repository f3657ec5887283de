"""Planted label leaks are found and named; noise, length and content are not mistaken for them."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.data.config import DataConfig
from dpo_dist.data.records import Origin
from dpo_dist.objective.intervals import wilson_interval
from dpo_dist.tools.doctor.measures.observe import PairFacts, RecordFacts
from dpo_dist.tools.doctor.measures.sources import ExaminedSource, LeakTest, leak_findings, leak_tests
from dpo_dist.tools.findings import Level
from tests.support import tiny
from tests.support.doctor_data import Pair, clean_pairs, examined, of_rule

pytestmark = pytest.mark.slow

Change = Callable[[Pair], None]


def on(side: str, change: Callable[[str], str]) -> Change:
    return lambda pair: pair.update({side: change(pair[side])})


def planted(share: float, *changes: Change) -> list[Pair]:
    pairs, rng = clean_pairs(400), random.Random(3)
    for change in changes:
        for pair in pairs:
            if rng.random() < share:
                change(pair)
    return pairs


def amid(text: str, word: str) -> str:
    words = text.split(" ")
    return " ".join([*words[: len(words) // 2], word, *words[len(words) // 2 :]])


# By source: rule, what the finding names, and the change; no two of a source are of one group of features.
LEAKS: list[list[tuple[str, str, Change]]] = [
    [
        ("label_leak", "leading space", on("rejected", lambda text: " " + text)),
        ("label_leak", "'sir'", on("chosen", lambda text: text + " Yes, sir.")),
        ("label_leak", "(model name, ", on("rejected", lambda text: amid(text, "as an AI model"))),
        ("style_bias", "bold", on("chosen", lambda text: amid(text, "**bold**"))),
    ],
    [
        ("label_leak", "'Sure'", on("rejected", lambda text: "Sure, " + text)),
        ("label_leak", "(odd characters, ", on("chosen", lambda text: text.replace(" ", "\u00a0", 1))),
        ("style_bias", "typographic", on("chosen", lambda text: amid(text, "\u2014 \u2014"))),
    ],
    [
        (
            "style_bias",
            "(refusal, the chosen side has more,",
            on("chosen", lambda text: "I can't help. " + text),
        ),
    ],
]


@pytest.mark.parametrize("leaks", LEAKS, ids=lambda leaks: leaks[0][1])
def test_leaks_in_half_of_the_pairs_are_named(leaks: list[tuple[str, str, Change]], tmp_path: Path) -> None:
    report = examined(tmp_path, planted(0.5, *(change for _, _, change in leaks)))
    for rule, feature, _ in leaks:
        [found] = [one for one in of_rule(report, rule) if feature in one.text]
        assert found.share is not None
        assert 0.65 < found.share < 0.9
    features = [test["feature"] for test in report.sources[0]["leaks"]]
    assert len(features) == len(set(features))


def test_forms_on_one_side_of_few_pairs_are_found(tmp_path: Path) -> None:
    forms = [
        (on("rejected", lambda text: text + " Cheers"), "last word 'Cheers' (the chosen side has less"),
        (on("chosen", lambda text: "Certainly! " + text), "first word 'Certainly' (the chosen side has more"),
        (on("rejected", lambda text: amid(text, "as an AI language model")), "model name"),
    ]
    report = examined(tmp_path, planted(0.1, *(form for form, _ in forms)))
    [finding] = of_rule(report, "one_sided_form")
    assert all(shown in finding.text for _, shown in forms), finding.text
    assert finding.level is Level.warning
    assert not of_rule(report, "label_leak")


def test_a_large_source_is_judged_by_the_pairs_with_the_smallest_keys() -> None:
    keys = [*range(20_300)]
    random.Random(0).shuffle(keys)
    source = ExaminedSource("a", "a.jsonl", DataConfig(), is_eval=False)
    facts = [
        RecordFacts(
            Origin("a.jsonl", key), pair=PairFacts(key, key, {"characters": 1.0 - 2 * (key >= 20_000)})
        )
        for key in keys
    ]
    for start in range(0, len(facts), 700):
        source.add(facts[start : start + 700])
    [test] = source.leaks
    assert (test.pairs, test.accuracy) == (20_000, 1.0)


def test_words_that_reveal_the_chosen_response_only_together_are_found() -> None:
    [finding] = leak_findings([LeakTest("first words", "first words", 0.9, 0.8, 0.95, 100, 1.0, 100)], "a")
    guessed = "from first words alone, the chosen response is guessed in 90 % [80 %, 95 %] of held-out pairs"
    assert guessed in finding.text


def test_a_leak_due_to_length_is_said_as_length(tmp_path: Path) -> None:
    pairs = clean_pairs(200)
    for pair in pairs:
        pair["chosen"], pair["rejected"] = sorted((pair["chosen"], pair["rejected"]), key=len, reverse=True)
    report = examined(tmp_path, pairs)
    [finding] = of_rule(report, "length_bias")
    assert "the one with more characters is chosen in 100 %" in finding.text
    assert not of_rule(report, "label_leak")
    assert not of_rule(report, "style_bias")


def test_with_a_tokenizer_length_is_the_number_of_tokens_that_the_loss_counts(tmp_path: Path) -> None:
    pairs = clean_pairs(80)
    for pair in pairs:  # the one with more characters has fewer tokens
        pair["chosen"], pair["rejected"] = "7 " * 20 + pair["chosen"], "the " * 20 + pair["chosen"]
    [finding] = of_rule(examined(tmp_path, pairs), "length_bias")
    assert "the one with fewer characters is chosen in 100 %" in finding.text
    [finding] = of_rule(examined(tmp_path, pairs, tokenizer=tiny.qwen()), "length_bias")
    assert "the one with more tokens is chosen in 100 %" in finding.text


def test_few_pairs_are_enough_for_a_form_on_one_side_of_all_of_them(tmp_path: Path) -> None:
    pairs = clean_pairs(40)
    for pair in pairs[:18]:
        pair["chosen"] = " " + pair["chosen"]
    [finding] = of_rule(examined(tmp_path, pairs), "one_sided_form")
    assert "leading space (the chosen side has more in 100 % of the 18 pairs" in finding.text
    assert "leading space" in of_rule(examined(tmp_path, pairs[:10]), "label_leak")[0].text
    assert not of_rule(examined(tmp_path, pairs[:9]), "label_leak")


def test_repeated_prompts_do_not_narrow_the_interval(tmp_path: Path) -> None:
    pairs = clean_pairs(200)
    for pair in pairs:
        pair["prompt"] = f"question number {'one' if len(pair['prompt']) % 2 else 'two'}"
        pair["rejected"] = " " + pair["rejected"]
    assert examined(tmp_path, pairs).sources[0]["leaks"] == []


def test_folds_share_no_prompt_and_intervals_count_prompts() -> None:
    """Else what tells a prompt's pairs apart is learnt from its other pairs, and each of them is a proof."""
    prompts = np.repeat(np.arange(60, dtype=np.uint64), 6)
    words = [{f"first word 'w{prompt}'": 1.0 - 2 * (prompt % 2)} for prompt in prompts.tolist()]
    [of_words] = [test for test in leak_tests(words, prompts) if test.feature == "first words"]
    assert of_words.accuracy == 0.5
    spaces = [{"leading space": 1.0 if at % 10 < 7 else -1.0} for at in range(len(prompts))]
    [of_space] = leak_tests(spaces, prompts)
    assert (round(of_space.accuracy, 2), of_space.pairs) == (0.7, 360)
    assert (of_space.low, of_space.high) == wilson_interval(of_space.accuracy * 60, 60, 3.0)
