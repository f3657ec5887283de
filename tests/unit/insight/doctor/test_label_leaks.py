"""Planted label leaks are found and named; noise, length and content are not mistaken for them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_dist.insight.doctor.findings import Level
from dpo_dist.insight.doctor.label_leaks import interval
from tests.support.doctor_data import Pair, clean_pairs, examined, of_rule


def planted(count: int, share: float, change: Callable[[Pair], None]) -> list[Pair]:
    """Return pairs of which a share is changed."""
    pairs, rng = clean_pairs(count), random.Random(3)
    for pair in pairs:
        if rng.random() < share:
            change(pair)
    return pairs


def on(side: str, change: Callable[[str], str]) -> Callable[[Pair], None]:
    return lambda pair: pair.update({side: change(pair[side])})


FRENCH = "Le petit chat est assis sur la table et il regarde par la porte ouverte. "
LEAKS: dict[str, tuple[str, str, Callable[[Pair], None]]] = {
    "leading space": ("label_leak", "leading space", on("rejected", lambda text: " " + text)),
    "trailing newline": ("label_leak", "trailing newline", on("chosen", lambda text: text + "\n")),
    "carriage return": ("label_leak", "carriage return", on("chosen", lambda text: text + "\r\nok.")),
    "first word": ("label_leak", "'Sure'", on("rejected", lambda text: "Sure, " + text)),
    "last word": ("label_leak", "'sir'", on("chosen", lambda text: text + " Yes, sir")),
    "model name": ("label_leak", "model name", on("rejected", lambda text: "As an AI model, " + text)),
    "no-break space": (
        "label_leak",
        "odd characters",
        on("chosen", lambda text: text.replace(" ", "\u00a0", 1)),
    ),
    "bold": ("style_bias", "bold", on("chosen", lambda text: f"**{text[:9]}**{text[9:]}")),
    "full stop": ("style_bias", "ends with", on("rejected", lambda text: text[:-1])),
    "quotation": ("style_bias", "typographic", on("chosen", lambda text: text.replace(" ", " \u2014 ", 3))),
    "language": (
        "style_bias",
        "share of other scripts",
        on("rejected", lambda text: "".join(map(chr, range(0x430, 0x430 + len(text) // 4))) + text),
    ),
    "other language": (
        "style_bias",
        "language of the prompt",
        on("rejected", lambda text: (FRENCH * 9)[: len(text)]),
    ),
    "refusal": ("style_bias", "refusal", on("chosen", lambda text: "I can't help. " + text)),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_in_half_of_the_pairs_is_named(name: str, tmp_path: Path) -> None:
    rule, feature, change = LEAKS[name]
    report = examined(tmp_path, planted(400, 0.5, change))
    [found] = [one for one in of_rule(report, rule) if feature in one.text]
    assert found.share is not None
    assert 0.65 < found.share < 0.9
    features = [test["feature"] for test in report.sources[0]["leaks"]]
    assert len(features) == len(set(features))
    if name in ("no-break space", "refusal"):  # groups of one feature
        assert f"({feature}, the chosen side has more," in found.text


@pytest.mark.parametrize(
    ("side", "change", "shown"),
    [
        ("rejected", lambda text: "As an AI language model, " + text, "model name"),
        ("chosen", lambda text: "Certainly! " + text, "first word 'Certainly' (the chosen side has more"),
        ("rejected", lambda text: text + " Cheers", "last word 'Cheers' (the chosen side has less"),
        ("rejected", lambda text: text + " \u597d", "last word '\u597d' (the chosen side has less"),
        ("chosen", lambda text: "# Title\n" + text, "headers (the chosen side has more"),
        ("rejected", lambda text: text.replace(" ", " \u201c", 1), "typographic marks"),
    ],
)
def test_a_form_on_one_side_of_few_pairs_is_found(
    side: str, change: Callable[[str], str], shown: str, tmp_path: Path
) -> None:
    report = examined(tmp_path, planted(400, 0.1, on(side, change)))
    [finding] = of_rule(report, "one_sided_form")
    assert shown in finding.text
    assert finding.level is Level.warning
    assert not of_rule(report, "label_leak")


def test_a_leak_due_to_length_is_said_as_length(tmp_path: Path) -> None:
    pairs = clean_pairs(400)
    for pair in pairs:
        pair["chosen"], pair["rejected"] = sorted((pair["chosen"], pair["rejected"]), key=len, reverse=True)
    report = examined(tmp_path, pairs)
    [finding] = of_rule(report, "length_bias")
    assert "the longer one is chosen in 9" in finding.text or "100 %" in finding.text
    assert not of_rule(report, "label_leak")
    assert not of_rule(report, "style_bias")


def test_repeated_prompts_do_not_narrow_the_interval(tmp_path: Path) -> None:
    pairs = clean_pairs(200)
    for pair in pairs:
        pair["prompt"] = f"question number {'one' if len(pair['prompt']) % 2 else 'two'}"
        pair["rejected"] = " " + pair["rejected"]
    assert examined(tmp_path, pairs).sources[0]["leaks"] == []


def test_a_form_in_pairs_of_few_prompts_is_no_finding(tmp_path: Path) -> None:
    pairs = clean_pairs(480)
    for number, pair in enumerate(pairs):
        pair["prompt"] = f"question of {pairs[number % 12]['chosen']}"
        pair["chosen"] = pairs[number % 12]["chosen"].removesuffix("!")
    forms = of_rule(examined(tmp_path, pairs), "one_sided_form")
    assert not forms, forms[0].text
    for number, pair in enumerate(pairs):
        pair["prompt"] += str(number)
    assert of_rule(examined(tmp_path, pairs), "one_sided_form")


def test_few_pairs_are_enough_for_a_form_on_one_side_of_all_of_them(tmp_path: Path) -> None:
    pairs = clean_pairs(40)
    for pair in pairs[:18]:
        pair["chosen"] = " " + pair["chosen"]
    [finding] = of_rule(examined(tmp_path, pairs), "one_sided_form")
    assert "leading space (the chosen side has more in 100 % of the 18 pairs" in finding.text
    assert "leading space" in of_rule(examined(tmp_path, pairs[:10]), "label_leak")[0].text
    assert not of_rule(examined(tmp_path, pairs[:9]), "label_leak")


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857), table I, method 3: 81 of 263.
    low, high = interval(81, 263, 1.959964)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert interval(0, 0) == (0, 1)
