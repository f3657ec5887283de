"""Planted label leaks are found and named; noise, length and content are not mistaken for them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_dist.data.config import DataConfig
from dpo_dist.data.records import Origin
from dpo_dist.objective.intervals import wilson_interval
from dpo_dist.tools.doctor.measures.observe import PairFacts, RecordFacts
from dpo_dist.tools.doctor.measures.sources import ExaminedSource, leak_findings, leak_tests
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


# By source: what the finding names, and the change.
LEAKS: list[list[tuple[str, Change]]] = [
    [
        ("leading space (the chosen side has less;", on("rejected", lambda text: " " + text)),
        ("'sir' (the chosen side has more;", on("chosen", lambda text: text + " Yes, sir.")),
        ("model name (the chosen side has less;", on("rejected", lambda text: amid(text, "as an AI model"))),
    ],
    [
        ("'Sure' (the chosen side has less;", on("rejected", lambda text: "Sure, " + text)),
        ("odd characters", on("chosen", lambda text: text.replace(" ", "\u00a0", 1))),
    ],
    [("typographic", on("chosen", lambda text: amid(text, "\u2014 \u2014")))],
    [("bold (the chosen side has more;", on("chosen", lambda text: amid(text, "**bold**")))],
]


@pytest.mark.parametrize("leaks", LEAKS, ids=lambda leaks: leaks[0][0])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_forms_on_one_side_are_named_also_if_they_are_rare(
    leaks: list[tuple[str, Change]], share: float, tmp_path: Path
) -> None:
    report = examined(tmp_path, planted(share, *(change for _, change in leaks)))
    [found] = of_rule(report, "label_leak")
    assert found.level is Level.warning
    assert found.share == pytest.approx(0.5 + share / 2, abs=0.06)
    assert all(feature in found.text for feature, _ in leaks)
    features = [test["feature"] for test in report.sources[0]["leaks"]]
    assert len(features) == len(set(features))


def test_a_feature_that_is_more_often_on_one_side_is_a_leak_above_the_threshold(tmp_path: Path) -> None:
    for share, is_leak in ((0.6, False), (0.8, True)):
        pairs, rng = clean_pairs(400), random.Random(1)
        for pair in pairs:
            side = "chosen" if rng.random() < share else "rejected"
            pair[side] = "\n" + pair[side]
        found = of_rule(examined(tmp_path, pairs), "label_leak")
        assert [finding.text.count("leading newline") for finding in found] == [1] * is_leak


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


def test_a_leak_due_to_length_is_said_as_length(tmp_path: Path) -> None:
    pairs = clean_pairs(200)
    for pair in pairs:
        pair["chosen"], pair["rejected"] = sorted((pair["chosen"], pair["rejected"]), key=len, reverse=True)
    report = examined(tmp_path, pairs)
    [finding] = of_rule(report, "length_bias")
    assert "the one with more characters is chosen in 100 %" in finding.text
    assert not of_rule(report, "label_leak")


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
    [finding] = of_rule(examined(tmp_path, pairs), "label_leak")
    assert "leading space (the chosen side has more; it guesses 72 % of all pairs" in finding.text
    assert "and differs in 18 of 40" in finding.text
    assert "leading space" in of_rule(examined(tmp_path, pairs[:10]), "label_leak")[0].text
    assert not of_rule(examined(tmp_path, pairs[:9]), "label_leak")


def test_repeated_prompts_do_not_narrow_the_interval(tmp_path: Path) -> None:
    pairs = clean_pairs(200)
    for pair in pairs:
        pair["prompt"] = f"question number {'one' if len(pair['prompt']) % 2 else 'two'}"
        pair["rejected"] = " " + pair["rejected"]
    assert examined(tmp_path, pairs).sources[0]["leaks"] == []


def test_intervals_count_prompts_not_pairs() -> None:
    prompts = [number // 6 for number in range(360)]
    [test] = leak_tests([{"leading space": 1.0 if at % 10 < 7 else -1.0} for at in range(360)], prompts)
    assert (round(test.accuracy, 2), test.pairs) == (0.7, 360)
    assert (test.low, test.high) == wilson_interval(test.accuracy * 60, 60, 3.0)


def test_a_form_that_follows_the_length_is_no_leak_of_its_own() -> None:
    gaps = [{"characters": 1.0, "share of capitals": -1.0} for _ in range(40)]
    [finding] = leak_findings(leak_tests(gaps, range(40)), "a")
    assert finding.rule == "length_bias"


@pytest.mark.parametrize(("count", "is_leak"), [(12, False), (18, True)])
def test_a_rare_form_on_one_side_may_be_chance(count: int, is_leak: bool) -> None:
    gaps = [{"bold": 1.0}] * count + [{"tabs": 1.0}, {"tabs": -1.0}] * 140
    found = list(leak_findings(leak_tests(gaps, range(len(gaps))), "a"))
    assert [finding.rule for finding in found] == ["label_leak"] * is_leak
