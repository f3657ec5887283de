"""The page of a comparison: its headline, table and answers."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.page import comparison_table, headline, write_comparison_page
from tests.support.comparison_files import answer, model, results, row, write_comparison
from tests.unit.tools.pages.made_run import text_of

NO_JUDGE = "Without a judge nothing says which answers are better."
COUNTS = "Of a: 60 wins, 10 ties, 30 losses."


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        (
            results([model("base"), model("a")], 0.65),
            f"a wins over base at a rate of 0.650 [0.590, 0.710]. {COUNTS}",
        ),
        (
            results([model("base"), model("a")], 0.48),
            f"a wins over base at a rate of 0.480 [0.420, 0.540]. This can be chance. {COUNTS}",
        ),
        (
            results([model("base"), model("a")], None),
            "Without a judge nothing says which answers are better.",
        ),
        (
            results([model("base"), model("a", finished=0.0)], 0.2, not_judged=4),
            f"a wins over base at a rate of 0.200 [0.140, 0.260]. {COUNTS} The judge gave no verdict on 4 "
            "prompts. No answer of a ends within sampling.max_new_tokens.",
        ),
        (
            results([model("base"), model("a", prompts_also_in_train=12)], None),
            f"{NO_JUDGE} a was trained on 12 of the prompts.",
        ),
    ],
)
def test_the_headline(content: dict[str, Any], sentences: str) -> None:
    assert " ".join(headline(content)) == sentences
    assert comparison_table(content)[-1] == [*headline(content)][-1], "the console says what the page does"


def test_the_page_has_both_models_and_their_answers(tmp_path: Path) -> None:
    def two(first: float, second: float, **options: Any) -> dict[str, Any]:
        return {"a": answer("one cat", first), "b": answer("one dog", second, **options)}

    rows = [
        row(1, two(0.9, 0.8)),
        row(2, two(0.2, 0.9), source="code", credit=1.0),
        row(3, {"a": answer("", 0.1), "b": answer("x", 0.1, finished=False)}),
    ]
    content = results([model("a", 0.4), model("b", 0.6, finished=0.5)], 0.6)
    file = write_comparison(tmp_path, content, rows)
    write_comparison_page(ComparisonFolder(tmp_path), content)
    page = text_of(file)
    assert "b output/b/model 100 50 % 0 % 0.600 [0.570, 0.630]" in page
    assert "2 tokens; score 0.9 one dog" in page
    assert "sampling.temperature=0 takes the likeliest" in page
    labels = ["Question 2? source code; b wins", "Question 1? source qa prompt"]
    labels.append("Question 3? source qa; an answer does not end")
    places = [page.index(label) for label in labels]
    assert places == sorted(places), "the largest differences of scores come first"
