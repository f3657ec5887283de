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
        return [
            Judgement(
                [None if "?" in text else float(len(text)) for text in question.responses],
                Counter(requests=1, refused=0),
            )
            for question in questions
        ]


def test_each_different_text_is_scored_once_and_an_empty_one_never() -> None:
    judge = ByLength()
    rows = score_texts(RECORDS, [["aa", "b", "aa"], [" ", "why?", "c"], []], judge)
    assert judge.asked == [("aa", "b"), ("why?", "c")]
    assert rows == [
        {"scores": [2.0, 1.0, 2.0], "counts": {"requests": 1}},
        {"scores": [None, None, 1.0], "counts": {"requests": 1}},
        {"scores": [], "counts": {}},
    ]


@pytest.mark.parametrize(
    ("first", "second", "scores", "expected"),
    [
        ("a", "b", (2.0, 1.0), WIN),
        ("a", "b", (1.0, 1.0), TIE),
        ("a", "b", (0.0, 1.0), LOSS),
        ("a", "b", (None, 1.0), None),
        ("a", "a", (None, None), TIE),
        ("", "b", (None, None), LOSS),
        ("a", " \n", (1.0, None), WIN),
        ("", " ", (None, None), TIE),
    ],
)
def test_the_credit_of_the_first(
    first: str, second: str, scores: tuple[float | None, float | None], expected: float | None
) -> None:
    assert credit(first, second, scores) == expected


def test_an_endpoint_compares_every_two_responses_in_both_positions() -> None:
    """The judge prefers "good" wherever it is, and the first position otherwise."""

    def answer(asked: dict[str, str], _: int) -> str:
        if "broken" in asked.values():
            return "no verdict"
        return "[[B]]" if asked["response_B"] == "good" else "[[A]]"

    with judge_server(answer) as server:
        judge = EndpointJudge(EndpointConfig(url=server.url, model="judge"))
        rows = compare_texts(
            RECORDS, [["good", "bad", "worse"], ["good", "good", ""], ["broken", "bad", "bad"]], judge
        )
    assert len(server.bodies) == 2 * (3 + 0 + 2)
    assert rows[0]["credits"] == [WIN, WIN, TIE]
    assert rows[0]["counts"] == {"position_disagreements": 1, "requests": 6}
    assert rows[1] == {"credits": [TIE, WIN, WIN], "counts": {}}
    assert rows[2]["credits"] == [None, None, TIE]
    assert rows[2]["counts"] == {"requests": 4, "unreadable": 4}


def test_a_judge_that_grades_compares_nothing() -> None:
    grading = EndpointConfig(url="http://h/v1", model="m", verdicts=Verdicts.grade)
    assert not compares(PairsConfig(endpoint=grading))
    assert not compares(PairsConfig(function="a:b"))
    comparing = EndpointConfig(url="http://h/v1", model="m")
    assert compares(PairsConfig(endpoint=comparing))
    assert describe(describe_endpoint(grading)) == "m at http://h/v1: grades from 1 to 10"
    assert describe(describe_endpoint(comparing)) == "m at http://h/v1: each two responses in both positions"
