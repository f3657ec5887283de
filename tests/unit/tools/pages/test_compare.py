"""The page of a comparison: its headline, tables, picture, responses; limits and hostile texts."""

import random
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.tools.compare import page as compare
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.page import comparison_table, headline, write_comparison_page
from tests.support.comparison_files import answer, model, results, row, win, write_comparison
from tests.unit.tools.pages.made_run import HOSTILE


def page_of(folder: Path, content: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    file = write_comparison(folder, content, rows)
    write_comparison_page(ComparisonFolder(folder), content)
    return file.read_text(encoding="utf-8")


def two(scores: tuple[float | None, float | None] = (None, None)) -> dict[str, dict[str, Any]]:
    return {"a": answer("one cat", scores[0]), "b": answer("one dog", scores[1])}


def pair(**others: object) -> dict[str, Any]:
    return results([model("a", None, 0.4), model("b", 3, 0.6)], [win("a", "b", 0.4)], **others)


BASE, ENDED = model("base", None, 0.5), model("a", 5, 0.4)
UNENDED = model("a", 5, 0.9, finished=0.0)
NO_SCORES = [model("base"), model("a")]  # a judge that compares gives none


@pytest.mark.parametrize(
    ("models", "rates", "sentences"),
    [
        ([BASE, ENDED], [0.6], "base has the highest score, 0.5. All others are clearly worse."),
        # The base has the higher mean and loses most prompts.
        ([BASE, ENDED], [0.4], "base has the highest score, 0.5. Not clearly worse: a."),
        (NO_SCORES, [0.3], "a has the highest win rate over base, 0.7. All others are clearly worse."),
        (NO_SCORES, [], "Without a judge, models can be compared by KL and style only."),
        ([BASE, UNENDED], [0.1], "base has the highest score, 0.5. Not ranked, because no response ends: a."),
        ([UNENDED], [], "No response ends within sampling.max_new_tokens, so the models are not ranked."),
        # Of equal scores the model of least KL is named first.
        (
            [BASE, model("a", 3, 0.9), model("b", 2, 0.9)],
            [0.2, 0.2, 0.5],
            "b has the highest score, 0.9. Not clearly worse: a.",
        ),
    ],
)
def test_the_headline(models: list[dict[str, Any]], rates: list[float], sentences: str) -> None:
    pairs = combinations([each["name"] for each in models], 2)
    wins = [win(*names, rate) for names, rate in zip(pairs, rates, strict=False)]
    content = results(models, wins, prompts=1, not_judged={})
    assert " ".join(headline(content)) == sentences
    console = comparison_table(content)
    assert [*headline(content)] == console[-len(headline(content)) :], "the console ranks as the page does"
    assert f" {round(models[0]['style']['finished'])} of 1 " in console[2], "no percent of a single prompt"


def test_a_model_that_was_trained_on_the_prompts_is_named() -> None:
    trained = {"base": None, "a": 0, "b": 12}
    seen = results([BASE, ENDED], [], not_judged={}, prompts_also_in_train=trained)
    sentence = "Not all prompts are held out: b was trained on 12 of them."
    assert headline(seen)[-1] == sentence
    assert sentence in comparison_table(seen)


def test_responses_are_side_by_side_with_their_facts_and_labels(tmp_path: Path) -> None:
    rows = [
        row(1, two((0.2, 0.9)), source="code", verdicts=[{"first": "a", "second": "b", "credit": 0.0}]),
        row(2, two((0.9, 0.8)), verdicts=[{"first": "a", "second": "b", "credit": None}]),
        row(3, {"a": answer("", 0.1), "b": answer("x", 0.1, finished=False)}),
    ]
    page = page_of(tmp_path, pair(), rows)
    assert "<h4>a <small>2 tokens; score 0.2</small></h4>" in page
    assert "2 tokens; score 0.9; log-ratio 5 nats; 50 % of its words not in a" in page
    assert "one <mark>dog</mark>" in page
    heads = re.findall("<th>([^<]*)</th>", page)
    assert heads[:3] == ["model", "KL estimate, nats per response", "score"]
    assert heads[3:8] == ["tokens", "ended", "refusals", "empty", "win rate over a"], "none without a value"
    for cell in ("<td>3 <small>[2.7, 3.3]</small></td>", "<td>2 % <small>[1.9, 2.1]</small></td>"):
        assert cell in page
    assert "<td>60 % <small>[54, 66]</small></td>" in page
    assert "sampling.temperature=0 takes the likeliest" in page
    assert "<h4>chosen</h4>" in page
    assert re.findall(r'data-labels="([^"]*)" data-order="([^"]*)"', page) == [
        ("source code|b wins over a", "-0.7"),
        ("source qa", "-0.1"),
        ("source qa|a response does not end|a response is empty", "0"),
    ]
    options = re.findall(r'<option value="([^"]+)">[^<]*\((\d)\)', page)
    assert ("source qa", "2") in options
    assert ("b wins over a", "1") in options


def test_the_page_is_bounded_and_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "MOST_BYTES", 2_000_000)
    source = random.Random(0)
    words = [f"word{number}" for number in range(300)]
    names = [f"model {number}" for number in range(6)]

    def text() -> str:
        return " ".join(source.choices(words, k=400))

    rows = [row(at, {name: answer(text()) for name in names}) for at in range(160)]
    rows[1]["prompt"] = "q" * 7000
    rows[2]["responses"][names[0]] = answer("\u202e" * 200_000)
    content = results([model(name, at) for at, name in enumerate(names)], [])
    page = page_of(tmp_path, content, rows)
    assert 1_800_000 < len(page.encode()) < 2_000_000
    [omitted] = re.findall(
        r"([\d,]+) prompts at the end of answers\.jsonl would make this page too large", page
    )
    assert page.count('<details class="prompt') + int(omitted) == 160
    assert "first 6,000 of 200,000 characters" in page
    assert "q" * 6000 in page
    assert "q" * 6001 not in page


def test_texts_and_names_are_inert(tmp_path: Path) -> None:
    other = f"{HOSTILE}2"
    models = [model(HOSTILE, None, 0.4), model(other, 3, 0.6)]
    content = results(models, [win(HOSTILE, other, 0.4)], judge=HOSTILE, counts={HOSTILE: 3})
    rows = [row(1, {HOSTILE: answer(HOSTILE, 1), other: answer(HOSTILE, 2)}, prompt=HOSTILE, source=HOSTILE)]
    page = page_of(tmp_path, content, rows)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert page.count("<svg") == page.count("</svg>") == 1
    assert "\u202e" not in page
    assert "<i" not in page[page.index("<svg") : page.index("</svg>")]
