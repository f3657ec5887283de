"""The page of a comparison: its headline, table and answers."""

from typing import Any

import pytest

from dpo_dist.tools.compare.page import comparison_table, headline
from tests.support.comparison_files import model, results

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
