"""Lists of responses: which of them is the best is said by scores, by ranks, or by the source."""

from typing import Any

import pytest

from tests.support.records import assistant, bad, good, user

FRUITS = {"prompt": "Name a fruit.", "responses": ["Apple", "Fruit", "Car"]}
TURNS = list(map(assistant, FRUITS["responses"]))
LISTS: list[dict[str, Any]] = [
    FRUITS,
    {"prompt": [user("Name a fruit.")], "completions": TURNS},
    {"responses": [[user("Name a fruit."), turn] for turn in TURNS]},
    FRUITS | {"responses": [{"content": text, "quality": 1} for text in FRUITS["responses"]]},
]


@pytest.mark.parametrize("record", LISTS, ids=str)
def test_a_list_without_scores_has_no_known_shape(record: dict[str, Any]) -> None:
    assert bad(record).reason == "unknown_shape"


def test_a_list_is_best_first_only_if_the_source_says_so() -> None:
    ranked = good(FRUITS, fields="ranked")
    assert (ranked.responses, ranked.scores) == (("Apple", "Fruit", "Car"), None)
    assert bad(FRUITS | {"winner": "b"}, fields="ranked").reason == "unread_column"
    assert good(FRUITS | {"ranking": [3, 1, 2]}, fields="ranked").unread == ("ranking",)


def test_scores_say_which_response_is_better() -> None:
    beside = good(FRUITS | {"scores": ["1", 2, 3.5]})
    assert (beside.responses, beside.scores) == (("Car", "Fruit", "Apple"), (3.5, 2, 1))
    ranks = good(
        FRUITS | {"n": [3, 1, 2]}, fields={"prompt": "prompt", "responses": "responses", "ranks": "n"}
    )
    assert (ranks.responses, ranks.scores) == (("Fruit", "Car", "Apple"), (-1, -2, -3))


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([1, 1, 1], "all_tied"),
        ([1, 2], "invalid_scores"),
        ([1, 2, None], "invalid_scores"),
        ([1, 2, True], "invalid_scores"),
        ([1, 2, "nan"], "invalid_scores"),
        ("many", "expression_failed"),
    ],
)
def test_scores_that_order_nothing_are_refused(scores: Any, reason: str) -> None:
    assert bad(FRUITS | {"scores": scores}).reason == reason


def test_a_ranking_has_two_responses_at_least() -> None:
    assert bad(FRUITS | {"responses": ["Apple"], "scores": [1]}).reason == "no_ranking"
    assert bad(FRUITS | {"responses": ["Apple", None], "scores": [1, 2]}).reason == "missing_field"
