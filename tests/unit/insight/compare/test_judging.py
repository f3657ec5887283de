"""Judges see different responses with text only; credits follow scores, or verdicts in both positions."""

from collections import Counter
from collections.abc import Sequence

import pytest

from dpo_dist.config.verb_options import EndpointConfig, PairsConfig, Verdicts
from dpo_dist.data.records import Origin, PreferenceRecord
from dpo_dist.generation.judges.endpoint import EndpointJudge, describe_endpoint
from dpo_dist.generation.judges.judge import Judgement, Question
from dpo_dist.insight.compare.judging import (
    LOSS,
    TIE,
    WIN,
    compare_texts,
    compares,
    credit,
    describe,
    score_texts,
)
from tests.support.judge_server import judge_server

RECORDS = [PreferenceRecord(f"prompt {number}", (), Origin("file", number)) for number in range(3)]


class ByLength:
    """Scores a response by its length; those with a question mark get none."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        self.asked += [question.responses for question in questions]
        scores = [
            [None if "?" in text else float(len(text)) for text in each.responses] for each in questions
        ]
        return [Judgement(each, Counter(requests=1, refused=0)) for each in scores]


def test_each_different_text_is_scored_once_and_an_empty_one_never() -> None:
    judge = ByLength()
    rows = score_texts(RECORDS, [["aa", "b", "aa"], [" ", "why?", "c"], []], judge)
    assert judge.asked == [("aa", "b"), ("why?", "c")]
    assert rows == [
        {"scores": [2.0, 1.0, 2.0], "credits": [WIN, TIE, LOSS], "counts": {"requests": 1}},
        {"scores": [None, None, 1.0], "credits": [LOSS, LOSS, None], "counts": {"requests": 1}},
        {"scores": [], "credits": [], "counts": {}},
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (("a", 2.0), ("b", 1.0), WIN),
        (("a", 1.0), ("b", 1.0), TIE),
        (("a", 0.0), ("b", 1.0), LOSS),
        (("a", None), ("b", 1.0), None),
        (("a", None), ("a", None), TIE),
        (("", None), ("b", None), LOSS),
        (("a", 1.0), (" \n", None), WIN),
        (("", None), (" ", None), TIE),
    ],
)
def test_the_credit_of_the_first(
    first: tuple[str, float | None], second: tuple[str, float | None], expected: float | None
) -> None:
    assert credit(first, second) == expected


def test_an_endpoint_compares_every_two_responses_in_both_positions() -> None:
    """The judge prefers "good" wherever it is, and the first position otherwise."""

    def answer(asked: dict[str, str], _: int) -> str:
        if "broken" in asked.values():
            return "no verdict"
        return "[[B]]" if asked["response_B"] == "good" else "[[A]]"

    texts = [["good", "bad", "worse"], ["good", "good", ""], ["broken", "bad", "bad"]]
    with judge_server(answer) as server:
        rows = compare_texts(RECORDS, texts, EndpointJudge(EndpointConfig(url=server.url, model="judge")))
    assert len(server.bodies) == 2 * (3 + 0 + 2)
    assert [row["credits"] for row in rows] == [[WIN, WIN, TIE], [TIE, WIN, WIN], [None, None, TIE]]
    assert [row["counts"] for row in rows] == [
        {"position_disagreements": 1, "requests": 6},
        {},
        {"requests": 4, "unreadable": 4},
    ]


def test_a_judge_that_grades_compares_nothing() -> None:
    comparing = EndpointConfig(url="http://h/v1", model="m")
    grading = EndpointConfig(url="http://h/v1", model="m", verdicts=Verdicts.grade)
    judges = (comparing, grading)
    assert [compares(PairsConfig(endpoint=endpoint)) for endpoint in judges] == [True, False]
    assert not compares(PairsConfig(function="a:b"))
    assert [describe(describe_endpoint(endpoint)) for endpoint in judges] == [
        "m at http://h/v1: each two responses in both positions",
        "m at http://h/v1: grades from 1 to 10",
    ]
