"""Judgements of a comparison; means, intervals and the win rate from the rows of answers.jsonl."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from dpo_dist.data.records import Origin, PreferenceRecord
from dpo_dist.tools.compare.models import LOST, TIED, WON, comparison, credit
from dpo_dist.tools.sampling.judges import Judgement, Question
from dpo_dist.tools.sampling.keys import DropOrKeep
from dpo_dist.tools.sampling.respond import Completion, Completions
from dpo_dist.tools.sampling.scores import joined_completions, score
from tests.support.comparison_files import answer

Row = dict[str, Any]


def results(*pairs: tuple[tuple[str, float | None], tuple[str, float | None]]) -> Row:
    rows = []
    for first, second in pairs:
        verdict = credit((first[0], second[0]), (first[1], second[1]))
        rows.append({"responses": {"base": answer(*first), "a": answer(*second)}, "credit": verdict})
    return comparison(rows, ["base", "a"])


def test_scores_decide_wins_and_ties_count_half() -> None:
    scores = [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0), (5.0, None), (0.0, 9.0)]
    found = results(*((("x", one), ("y", two)) for one, two in scores))
    assert [found[name] for name in ("wins", "ties", "losses", "not_judged")] == [2, 1, 1, 1]
    assert (found["prompts"], found["rate"], found["interval"]) == (5, 2.5 / 4, None)
    assert [model["score"] for model in found["models"]] == [2.2, 3.75]
    assert [model["name"] for model in found["models"]] == ["base", "a"]


def test_intervals_are_over_prompts() -> None:
    levels = [float(3 * at % 11) for at in range(12)]
    found = results(*((("x", level), ("y", level + (-1) ** (at % 3))) for at, level in enumerate(levels)))
    low, high = found["interval"]
    assert 0.0 < low < found["rate"] == 8 / 12 < high < 1.0
    low, high = found["models"][0]["score_interval"]
    assert low < found["models"][0]["score"] < high


def test_an_empty_response_has_the_lowest_score() -> None:
    """A model that is silent when it would be bad must not have a better mean for it."""
    found = results((("x", 5.0), ("y", 6.0)), (("x", 2.0), ("", None)), (("x", 4.0), ("not read", None)))
    assert [model["score"] for model in found["models"]] == [pytest.approx(11 / 3), 4.0]
    assert found["models"][1]["empty"] == pytest.approx(1 / 3)
    assert [found[name] for name in ("wins", "losses", "not_judged")] == [1, 1, 1]
    silent = results((("", None), ("", None)))
    assert (silent["models"][0]["score"], silent["rate"]) == (None, 0.5)


def test_a_rate_of_0_is_not_certain() -> None:
    """Six losses of six happen by chance, and the page would call the model worse."""
    loss = (("x", 2.0), ("y", 1.0))
    found = results(*[loss] * 6, (("x", None), ("y", None)))  # one without a verdict
    assert (found["rate"], found["interval"]) == (0.0, (0.0, pytest.approx(0.390, abs=1e-3)))
    assert results(*[loss] * 5)["interval"] is None


RECORDS = [PreferenceRecord(f"prompt {number}", (), Origin("file", number)) for number in range(5)]


class ByLength:
    client = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        self.asked += [question.responses for question in questions]
        scores = [
            [None if "?" in text else float(len(text)) for text in each.responses] for each in questions
        ]
        return [Judgement(each, Counter(requests=1, refused=0)) for each in scores]


def answers(*texts: str | None) -> Completions:
    """The answers of two models; None: a model cannot be asked."""
    by_model = []
    for text in texts:
        asked = [] if text is None else [Completion(0, text, 1, finished=False, same_ids=True)]
        by_model.append(Completions(asked, "too_long" if text is None else None))
    return joined_completions(by_model, DropOrKeep.keep)


def test_the_judge_sees_each_different_answer_once_and_no_empty_one() -> None:
    judge: Any = ByLength()
    pairs = [("aa", "b"), (" ", "why?"), (None, "asked"), ("same", "same"), ("", " ")]
    rows = score(RECORDS, [answers(*pair) for pair in pairs], judge)
    assert judge.asked == [("aa", "b"), ("why?",), ("asked",), ("same",)]
    scores = [[each.score for each in row.completions] for row in rows]
    assert scores == [[2.0, 1.0], [None, None], [5.0], [4.0, 4.0], [None, None]]
    assert [row.counts for row in rows] == [*[{"requests": 1}] * 4, {}]
    assert [row.dropped for row in rows] == [None, None, "too_long", None, None]
    verdicts = [
        credit([str(text) for text in pair], own)
        for pair, own in zip(pairs, scores, strict=True)
        if None not in pair
    ]
    assert verdicts == [LOST, WON, TIED, TIED]
    assert score(RECORDS[:1], [answers("a", "b")], None) == [answers("a", "b")]
