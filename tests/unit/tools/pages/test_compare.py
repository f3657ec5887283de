"""The page of a comparison: its headline, tables and responses."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.page import comparison_table, headline, write_comparison_page
from tests.support.comparison_files import answer, model, results, row, win, write_comparison
from tests.unit.tools.pages.made_run import text_of

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


def test_the_page_has_the_models_their_differences_and_the_labels_of_prompts(tmp_path: Path) -> None:
    def two(first: float, second: float, **options: Any) -> dict[str, Any]:
        return {"a": answer("one cat", first), "b": answer("one dog", second, **options)}

    rows = [
        row(1, two(0.9, 0.8), verdicts=[{"first": "a", "second": "b", "credit": None}]),
        row(2, two(0.2, 0.9), source="code", verdicts=[{"first": "a", "second": "b", "credit": 0.0}]),
        row(3, {"a": answer("", 0.1), "b": answer("x", 0.1, finished=False)}),
    ]
    content = results([model("a", None, 0.4), model("b", 3, 0.6)], [win("a", "b", 0.4)])
    file = write_comparison(tmp_path, content, rows)
    write_comparison_page(ComparisonFolder(tmp_path), content)
    page = text_of(file)
    titles = "model KL estimate, nats per response score tokens ended refusals empty win rate over a"
    assert titles in page, "none without a value"
    assert "b output/b/model 3 [2.7, 3.3] 0.6 [0.57, 0.63] 100 [95, 105]" in page
    assert "2 % [1.9, 2.1] 0 % [0, 0] 60 % [54, 66]" in page
    assert "b minus a 60 % * [54, 66]" in page, "the interval excludes one half"
    assert "2 tokens; score 0.9; log-ratio 5 nats; 50 % of its words not in a one dog" in page
    assert "sampling.temperature=0 takes the likeliest" in page
    assert "chosen" in page
    labels = ["Question 2? source code; b wins over a", "Question 1? source qa prompt"]
    labels.append("Question 3? source qa; a response does not end; a response is empty")
    places = [page.index(label) for label in labels]
    assert places == sorted(places), "the largest differences of scores come first"
