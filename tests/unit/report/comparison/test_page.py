"""The page of a comparison: tables, picture, filters, limits, hostile and damaged files."""

import random
import re
from pathlib import Path

import pytest

from dpo_dist.insight.pages.compare import read_results
from dpo_dist.insight.pages.compare_page import (
    MOST_BYTES,
    Box,
    place_labels,
    prompts_section,
    write_comparison_page,
)
from tests.support.comparison_files import (
    answer,
    betas,
    differing,
    model,
    results,
    row,
    win,
    write_comparison,
)

NAMES = [each["name"] for each in betas()["models"]]


def page_of(folder: Path, content: dict[str, object], rows: list[dict[str, object]]) -> str:
    file = write_comparison(folder, content, rows)
    write_comparison_page(file.parent)
    return file.read_text(encoding="utf-8")


def two(scores: tuple[float | None, float | None] = (None, None)) -> dict[str, dict[str, object]]:
    return {"a": answer("one cat", scores[0]), "b": answer("one dog", scores[1])}


def pair(**others: object) -> dict[str, object]:
    return results([model("a", None, 0.4), model("b", 3, 0.6)], [win("a", "b", 0.4)], **others)


def test_the_first_screen_and_the_tables(tmp_path: Path) -> None:
    page = page_of(tmp_path, betas(), [row(1, {name: answer(f"{name} text", 0.5) for name in NAMES})])
    head = page[: page.index("<h2>")]
    assert "5 models, 100 prompts, judge: reward model helpfulness" in head
    assert "beta 0.1 has the highest score" in head
    assert head.count("<li>") == 5
    assert "<td>14<small>[12.6, 15.4]</small></td>" in page
    assert '<span class="better">71 %<small>[65, 77]</small></span>' in page
    assert '<span class="worse">29 %<small>[23, 35]</small></span>' in page
    assert '<span class="open">52 %' in page
    assert "2.60 times" in page
    assert page.count("<circle") == 5
    assert page.count('class="behind"') == 1
    assert "no positions are swapped" in page
    assert "position disagreements: 31" in page


def test_a_judge_that_compares_and_no_judge(tmp_path: Path) -> None:
    compared = results([model("a"), model("b", 3)], [win("a", "b", 0.4)], judge_compares=True)
    page = page_of(tmp_path, compared, [row(1, two())])
    assert "every two responses in both positions" in page
    assert "win rate over a against KL" in page
    page = page_of(tmp_path, results([model("a"), model("b", 3)], []), [row(1, two())])
    assert "no judge" in page
    assert "<h2>Win rates" not in page
    assert "<svg" not in page


def test_a_biased_kl_is_said(tmp_path: Path) -> None:
    page = page_of(tmp_path, pair(sampling={"temperature": 0.7}), [row(1, two())])
    assert "a temperature of 0.7: the KL is that of likelier responses" in page
    assert "likelier" not in page_of(tmp_path, pair(sampling={"temperature": 1.0}), [row(1, two())])


def test_responses_are_side_by_side_with_their_facts(tmp_path: Path) -> None:
    responses = two((0.2, 0.9))
    responses["b"] |= {"finished": False}
    page = page_of(tmp_path, pair(), [row(7, responses)])
    assert "<h4>a <small>2 tokens; score 0.2</small></h4>" in page
    assert "2 tokens, did not end; score 0.9; log-ratio 5 nats; 50 % of its words not in a" in page
    assert "one <mark>dog</mark>" in page
    assert "chosen in the data" in page


def test_filters_need_no_script(tmp_path: Path) -> None:
    rows = [
        row(1, two((0.2, 0.9)), source="code"),
        row(2, two((0.9, 0.2))),
        row(3, {"a": answer("", 0.1), "b": answer("x", 0.1, finished=False)}),
    ]
    page = page_of(tmp_path, pair(), rows)
    labels = dict(re.findall(r'<label for="filter-(\w+)">(.*?)</label>', page))
    assert list(labels.values()) == [
        "all (3)",
        "source qa (2)",
        "source code (1)",
        "a response does not end (1)",
        "a response is empty (1)",
        "b wins over a (1)",
        "b ties with a (1)",
        "b loses to a (1)",
    ]
    [empty] = [name for name, label in labels.items() if label.startswith("a response is empty")]
    assert f"#filter-{empty}:checked ~ .prompts > :not(.{empty}) {{ display: none; }}" in page
    [kinds] = re.findall(r'<details class="prompt ([^"]*)"><summary dir="auto">Question 3', page)
    assert empty in kinds.split()


def test_verdicts_of_a_judge_that_compares_are_filters(tmp_path: Path) -> None:
    rows = [
        row(at, two(), verdicts=[{"first": "a", "second": "b", "credit": credit}])
        for at, credit in enumerate((1.0, 0.0, 0.0, 0.5, None))
    ]
    page = page_of(tmp_path, pair(judge_compares=True), rows)
    for label in ("b wins over a (2)", "b ties with a (1)", "b loses to a (1)"):
        assert f">{label}</label>" in page


def test_filters_by_verdict_show_the_largest_differences_first(tmp_path: Path) -> None:
    scores = [(0.5, 0.6), (0.1, 0.9), (0.9, 0.2), (0.5, 0.5)]
    page = page_of(tmp_path, pair(), [row(at, two(each)) for at, each in enumerate(scores)])
    kinds = [each.split() for each in re.findall(r'<details class="prompt ([^"]*)"', page)]
    assert [[kind for kind in each if kind.startswith("m")] for each in kinds] == [
        *(["m0p2"], ["m0p0"], ["m0p1"], [])
    ]
    assert ".m0p1 { --order0: 1; }" in page
    assert ":checked ~ .prompts > * { order: var(--order0, 50); }" in page


def test_differences_are_a_table(tmp_path: Path) -> None:
    differences = [differing("a", "b", score=(0.1, 0.3), refusals=(-0.02, 0.06))]
    page = page_of(tmp_path, pair(differences=differences), [row(1, two())])
    assert '<span class="clear">+0.2<small>[+0.1, +0.3]</small></span>' in page
    assert '<span class="open">+2<small>[-2, +6]</small></span>' in page
    assert "<h2>Differences" not in page_of(tmp_path, pair(), [row(1, two())])


def test_500_prompts_of_six_models_fit_and_the_omitted_ones_are_named(tmp_path: Path) -> None:
    source = random.Random(0)
    words = [f"word{number}" for number in range(300)]
    names = [f"model {number}" for number in range(6)]

    def text() -> str:
        return " ".join(source.choices(words, k=400))

    rows = [row(at, {name: answer(text()) for name in names}) for at in range(500)]
    rows[2] = row(2, {name: answer("\u202e" * 200_000) for name in names}, prompt="\u202e" * 200_000)
    content = results([model(name, at) for at, name in enumerate(names)], [])
    page = page_of(tmp_path, content, rows)
    assert 0.9 * MOST_BYTES < len(page.encode()) < MOST_BYTES
    shown = page.count('<details class="prompt')
    [note] = re.findall(r"([\d,]+) of 500 prompts are not on this page", page)
    assert shown + int(note) == 500
    assert " to 500 of answers.jsonl" in page
    assert "characters not shown" in page


def test_prompts_stay_within_their_room(tmp_path: Path) -> None:
    """A prompt needs about 7 kB; one of them, of invisible characters, is cut to be shown at all."""
    rows = [row(at, {name: answer(f"{name} {at} word " * 100) for name in "ab"}) for at in range(40)]
    rows[0] = row(0, {name: answer("\u200b" * 5000) for name in "ab"})
    content = results([model("a"), model("b", 3)], [])
    file = write_comparison(tmp_path, content, rows)
    shown = prompts_section(
        file.with_name("answers.jsonl"), read_results(file.with_name("comparison.json")), 100_000
    )
    items = re.findall(r'<details class="prompt.*?</details>', shown.html, re.DOTALL)
    assert 80_000 < sum(len(item.encode()) for item in items) <= 100_000
    assert "Question 0" in items[0]
    assert "4,800 characters not shown" in items[0]


def test_missing_and_damaged_rows(tmp_path: Path) -> None:
    file = write_comparison(
        tmp_path, pair(), [row(1, two()), row(2, {"a": answer("x")}), row(3, {"b": None})]
    )
    answers = file.parent / "answers.jsonl"
    answers.write_bytes(b'\xff\n{"responses": 3}\n' + answers.read_bytes() + b'{"cut')
    write_comparison_page(file.parent)
    page = file.read_text()
    assert "3 lines of answers.jsonl cannot be read" in page
    assert page.count('<details class="prompt') == 3
    assert "not known" in page
    answers.unlink()
    write_comparison_page(file.parent)
    assert "<h2>Responses" not in file.read_text()


def test_texts_and_names_are_inert(tmp_path: Path) -> None:
    hostile = "</text></svg></details><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x07\n"
    content = results(
        [model(hostile, None, 0.4), model(f"{hostile}2", 3, 0.6)],
        [win(hostile, f"{hostile}2", 0.4)],
        judge=hostile,
        counts={hostile: 3},
    )
    rows = [
        row(
            1,
            {hostile: answer(hostile, 1), f"{hostile}2": answer(hostile, 2)},
            prompt=hostile,
            source=hostile,
        )
    ]
    page = page_of(tmp_path, content, rows)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert page.count("<svg") == page.count("</svg>") == 1
    assert "\u202e" not in page
    assert "<i" not in page[page.index("<svg") : page.index("</svg>")]


@pytest.mark.parametrize("seed", range(20))
def test_labels_overlap_neither_each_other_nor_points(seed: int) -> None:
    source = random.Random(seed)
    points = [(source.uniform(60, 700), source.uniform(14, 340)) for _ in range(12)]
    points += [(points[0][0] + 3, points[0][1] + 2), (700, 20), (60, 340)]
    boxes = place_labels([source.uniform(30, 190) for _ in points], points)
    placed = [box for box in boxes if box is not None]
    assert len(placed) >= len(points) - 1
    assert not any(one.overlaps(other) for at, one in enumerate(placed) for other in placed[:at])
    assert not any(box.left < x < box.right and box.top < y < box.bottom for box in placed for x, y in points)


def test_labels_of_close_points_are_in_the_order_of_the_points() -> None:
    lines = [Box(200, 199, 600, 201), Box(299, 100, 301, 300), Box(311, 100, 313, 300)]
    right, left = place_labels([55, 50], [(312, 200), (300, 200)], lines)
    assert left is not None
    assert right is not None
    assert left.right < right.left, "their lines would cross"


def test_a_label_avoids_a_line_if_it_can() -> None:
    [free] = place_labels([50], [(300, 200)])
    assert free is not None
    assert free.left > 300
    line = free._replace(top=199, bottom=201)
    [moved] = place_labels([50], [(300, 200)], [line])
    assert moved is not None
    assert not moved.overlaps(line)
