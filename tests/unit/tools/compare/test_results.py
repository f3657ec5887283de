"""Judgements of a comparison; means, intervals and win rates from the rows of answers.jsonl."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from dpo_dist.data.records import Origin, PreferenceRecord
from dpo_dist.tools.compare.results import LOST, TIED, WON, comparison, credit, judge_texts
from dpo_dist.tools.sampling.judges import Judgement, Question

Row = dict[str, Any]
OUTCOMES = ("wins", "ties", "losses", "not_judged")


def response(text: str, ratio: float | None = 0.0, score: float | None = None, tokens: int = 4) -> Row:
    logp = {"logp": -5.0, "base_logp": None if ratio is None else -5.0 - ratio, "logp_tokens": tokens}
    return {"text": text, "tokens": tokens, "finished": True, "score": score, **logp}


def results(rows: list[dict[str, Row]], judged: bool = True) -> Row:
    found: list[Row] = []
    for responses in rows:
        scored = {name: (each["text"], each["score"]) for name, each in responses.items()}
        verdicts = [
            {"first": one, "second": two, "credit": credit(scored[one], scored[two])}
            for one, two in itertools.combinations(responses, 2)
        ]
        found.append({"responses": responses} | ({"verdicts": verdicts} if judged else {}))
    return comparison(found, list(rows[0]))


def test_kl_per_response_and_per_token() -> None:
    rows = [
        {"base": response("x"), "a": response("long", 6.0, tokens=10)},
        {"base": response("x"), "a": response("short", 1.0, tokens=2)},
        {"base": response("x"), "a": response("none", None, tokens=50)},
    ] * 5
    found = results(rows, judged=False)
    base, model = found["models"]
    assert (base["kl"], base["kl_per_token"], base["kl_interval"]) == (0.0, 0.0, [0.0, 0.0])
    assert (model["kl"], model["kl_per_token"], model["score"]) == (3.5, 7 / 12, None)
    low, high = model["kl_interval"]
    assert 1.0 <= low < 3.5 < high <= 6.0
    assert (found["prompts"], found["wins"]) == (15, [])


def test_scores_decide_wins_and_ties_count_half() -> None:
    scores = [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0), (5.0, None)]
    found = results(
        [{"base": response("x", score=one), "a": response("y", score=two)} for one, two in scores]
    )
    (win,) = found["wins"]
    assert [win[name] for name in OUTCOMES] == [1, 1, 1, 1]
    assert win["rate"] == 0.5
    assert found["not_judged"] == {"base and a": 1}
    assert [model["score"] for model in found["models"]] == [2.75, 2.0]


def test_differences_are_paired_over_prompts() -> None:
    """Scores vary much from prompt to prompt; the second model is better by 1 on each one."""
    levels = [float(3 * at % 11) for at in range(12)]
    rows = [
        {"base": response("x", score=level), "a": response("xy", 1.0 + at % 2, score=level + 1, tokens=6)}
        for at, level in enumerate(levels)
    ]
    rows.append({"base": response("x", score=1.0), "a": response("refused", None)})
    found = results(rows)
    (difference,) = found["differences"]
    assert (difference["first"], difference["second"]) == ("base", "a")
    assert (difference["score"], difference["score_interval"]) == (1.0, [1.0, 1.0])
    assert found["models"][0]["score_interval"][1] - found["models"][0]["score_interval"][0] > 2
    assert (difference["kl"], difference["refusals"]) == (1.5, 0)
    assert 1.0 <= difference["kl_interval"][0] < 1.5 < difference["kl_interval"][1] <= 2.0
    low, high = found["differences"][0]["empty_interval"]
    assert low == -high < 0, "a share without a difference may differ in both directions"
    few = results(rows[:5])["differences"][0]
    assert (few["score"], few["score_interval"]) == (1.0, None)
    [without] = results([{"base": response("x"), "a": response("y", None)}])["differences"]
    assert not {"score", "kl"} & set(without)


def test_an_empty_response_has_the_lowest_score() -> None:
    """A model that is silent when it would be bad must not have a better mean for it."""
    rows = [
        {"base": response("x", score=5.0), "a": response("y", score=6.0)},
        {"base": response("x", score=2.0), "a": response("", score=None)},
        {"base": response("x", score=4.0), "a": response("not read", score=None)},
    ]
    found = results(rows)
    assert [model["score"] for model in found["models"]] == [pytest.approx(11 / 3), 4.0]
    assert (found["empty_score"], found["differences"][0]["score"]) == (2.0, 0.5)
    assert found["models"][1]["style"]["empty"] == pytest.approx(1 / 3)
    assert results([{"base": response(""), "a": response("")}])["empty_score"] is None


def test_a_rate_of_0_is_not_certain() -> None:
    """Five wins of five happen by chance, and the page would call the model better."""
    rows = [{"base": response("x", score=1.0), "a": response("y", score=2.0)}] * 6
    (win,) = results([*rows, {"base": response("x"), "a": response("y")}])["wins"]  # one without a verdict
    assert (win["rate"], win["interval"]) == (0.0, [0.0, pytest.approx(0.390, abs=1e-3)])
    assert results(rows[:5])["wins"][0]["interval"] is None


RECORDS = [PreferenceRecord(f"prompt {number}", (), Origin("file", number)) for number in range(4)]


class ByLength:
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
    rows = judge_texts(
        RECORDS, [["aa", "b", "aa"], [" ", "why?", "c"], [], ["aa", "bb", ""]], judge, in_pairs=False
    )
    assert judge.asked == [("aa", "b"), ("why?", "c"), ("aa", "bb")]
    assert rows == [
        {"scores": [2.0, 1.0, 2.0], "credits": [WON, TIED, LOST], "counts": {"requests": 1}},
        {"scores": [None, None, 1.0], "credits": [LOST, LOST, None], "counts": {"requests": 1}},
        {"scores": [], "credits": [], "counts": {}},
        {"scores": [2.0, 2.0, None], "credits": [TIED, WON, WON], "counts": {"requests": 1}},
    ]


def test_every_two_different_texts_are_compared_once() -> None:
    judge = ByLength()
    texts = [["good", "bad", "worse"], ["good", "good", ""], ["why?", "bad", "bad"]]
    rows = judge_texts(RECORDS[:3], texts, judge, in_pairs=True)
    assert judge.asked == [("good", "bad"), ("good", "worse"), ("bad", "worse"), ("why?", "bad")]
    assert [row["credits"] for row in rows] == [[4.0, 4.0, 3.0], [TIED, WON, WON], [None, None, TIED]]
    assert [row["counts"] for row in rows] == [{"requests": 3}, {}, {"requests": 1}]
