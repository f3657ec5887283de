"""Rankings in files: order, scores and the reasons of bad rankings."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataFormat
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Dialogue, Message, PreferenceRecord
from tests.support.records import assistant, outcomes, read_good, reason_against, user
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
needs_shared_data = pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")
H = "\n\nHuman: q\n\nAssistant:"


def scored(text: str, score: str, **answers: Any) -> list[dict[str, Any]]:
    """Return responses and scores under these names."""
    return [{text: answer, score: number, "model": "m"} for answer, number in answers.items()]


@pytest.mark.parametrize("format_", [DataFormat.auto, DataFormat.ranked])
@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({"responses": ["a", "b", "c"]}, None),
        ({"completions": ["a", "b", "c"], "scores": [5, 5, -1.5]}, (5.0, 5.0, -1.5)),
        ({"responses": scored("text", "score", c=1, a=9, b=2)}, (9.0, 2.0, 1.0)),
        ({"completions": scored("response", "overall_score", b=1, c=0, a=4)}, (4.0, 1.0, 0.0)),
        ({"responses": scored("content", "rating", b="3", a="4", c="1")}, (4.0, 3.0, 1.0)),
        ({"responses": scored("text", "reward", b=0.5, c=-1, a=2)}, (2.0, 0.5, -1.0)),
        # A rank is 1 for the best.
        ({"responses": scored("answer", "rank", c=7.0, a=1.0, b=3.0)}, (-1.0, -3.0, -7.0)),
        (
            {
                "responses": [
                    assistant("b") | {"rank": 2},
                    assistant("a") | {"rank": 1},
                    assistant("c") | {"rank": 3},
                ]
            },
            (-1.0, -2.0, -3.0),
        ),
        # Equal scores stay as the file has them.
        ({"responses": scored("text", "score", b=1, c=1, a=2)}, (2.0, 1.0, 1.0)),
    ],
)
def test_responses_are_sorted_best_first(
    tmp_path: Path, format_: DataFormat, fields: Any, scores: Any
) -> None:
    record = read_good(tmp_path, {"prompt": "q", **fields}, format_)
    assert (record.prompt, record.responses, record.scores) == ("q", ("a", "b", "c"), scores)


def rated(text: str, overall: float, *ratings: str) -> dict[str, Any]:
    """Return a response as in UltraFeedback."""
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    aspects = {
        name: {"Rating": rating, "Rationale": "r"} for name, rating in zip(names, ratings, strict=False)
    }
    return {"response": text, "overall_score": overall, "fine-grained_score": 9.0, "annotations": aspects}


def test_ratings_of_aspects_replace_the_overall_score(tmp_path: Path) -> None:
    answers = [
        rated("c", 10, "1", "1", "2", "1"),
        rated("a", 8, "5", "4", "5", "5"),
        rated("b", 7, "3", "N/A", "3"),
    ]
    record = read_good(tmp_path, {"instruction": "q", "completions": answers})
    assert (record.responses, record.scores) == (("a", "b", "c"), (4.75, 3.0, 1.25))
    unrated = [rated("a", 8, "5"), rated("b", 7, "N/A")]
    assert reason_against(tmp_path, {"instruction": "q", "completions": unrated}) == "invalid_scores"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [user("q")], "responses": ["a", "b", "c"]},
        {"prompt": [user("q")], "responses": [assistant("a"), assistant("b"), assistant("c")]},
        {"prompt": "q", "responses": [[assistant("a")], [assistant("b")], [assistant("c")]]},
        {"responses": [[user("q"), assistant(text)] for text in "abc"]},
        {"prompt": [user("q")], "responses": scored("content", "score", c=0, b=1, a=2)},
        {"prompt": [user("q")], "responses": [assistant(t) | {"score": -ord(t)} for t in "cab"]},
        {"instruction": "q", "completions": scored("response", "overall_score", b=1, c=0, a=2)},
        {"instruction": "q", "input": "", "output": ["a", "b", "c"], "history": []},
    ],
)
def test_all_forms_of_a_ranked_conversation_give_the_same_record(tmp_path: Path, fields: Any) -> None:
    record = read_good(tmp_path, fields)
    assert (record.prompt, record.responses) == ((Message("user", "q"),), ("a", "b", "c"))


def test_ranked_dialogues_are_split_at_their_last_response(tmp_path: Path) -> None:
    record = read_good(tmp_path, {"responses": [f"{H} {text}" for text in "abc"]})
    assert (record.prompt, record.responses) == (Dialogue(H), (" a", " b", " c"))


def test_an_instruction_follows_its_history(tmp_path: Path) -> None:
    fields = {"system": "be kind", "history": [["one", "two"]], "instruction": "do", "input": "this"}
    record = read_good(tmp_path, fields | {"output": ["a", "b"]})
    roles = ("system", "user", "assistant", "user")
    assert record.prompt == tuple(map(Message, roles, ("be kind", "one", "two", "do\nthis")))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"responses": ["a"]}, "no_ranking"),
        ({"responses": []}, "no_ranking"),
        ({"responses": ["a", None]}, "missing_field"),
        ({"responses": [{"text": "a", "score": 1}, {"words": "b", "score": 0}]}, "missing_field"),
        ({"responses": ["a", "b"], "scores": [1, 2]}, "invalid_scores"),
        ({"responses": ["a", "b"], "scores": [1]}, "invalid_scores"),
        ({"responses": ["a", "b"], "scores": [1, float("nan")]}, "invalid_scores"),
        ({"responses": ["a", "b"], "scores": [1, "N/A"]}, "invalid_scores"),
        ({"responses": [{"text": "a", "score": 1}, {"text": "b"}]}, "invalid_scores"),
        ({"responses": [{"text": "a", "score": 1}, "b"]}, "invalid_scores"),
        ({"responses": ["a", "b"], "scores": "53"}, "invalid_scores"),
        ({"responses": ["a", "b"], "scores": {"5": 1, "3": 1}}, "invalid_scores"),
        ({"responses": ["a", "b"], "scores": [10**400, 1]}, "invalid_scores"),
        ({"responses": ["a", "b"], "scores": [True, False]}, "invalid_scores"),
        ({"responses": [{"text": "a", "score": 10**400}, {"text": "b", "score": 1}]}, "invalid_scores"),
        ({"responses": ["a", "b"], "scores": [1, 1]}, "all_tied"),
        ({"responses": [{"text": t, "score": 3} for t in "abc"]}, "all_tied"),
        # Without scores the order of such a list says nothing.
        ({"responses": [{"text": "a"}, {"text": "b"}]}, "unknown_format"),
        ({"responses": ["a", 2]}, "unknown_format"),
        ({"responses": ["a", "b"], "ranks": [2, 1]}, "unread_content"),
        ({"responses": ["a", "b"], "rewards": [1, 2]}, "unread_content"),
        ({"responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": None}]}, "invalid_scores"),
        ({"responses": [{"text": "a", "rank": "first"}, {"text": "b", "rank": 2}]}, "invalid_scores"),
        ({"responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]}, "all_tied"),
        ({"responses": ["a", "b"], "completions": ["c", "d"]}, "ambiguous_format"),
        (
            {"responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}], "scores": [2, 1]},
            "invalid_scores",
        ),
        ({"responses": ["a", " ", "c"]}, "empty_response"),
        ({"responses": ["a", "b", " a"]}, "identical_responses"),
        ({"responses": [[user("p"), assistant("a")], [user("q"), assistant("b")]]}, "history_differs"),
        ({"prompt": None, "responses": ["a", "b"]}, "unknown_format"),
        ({"prompt": None, "instruction": 3, "responses": ["a", "b"]}, "unread_content"),
        ({"prompt": None, "instruction": "q", "history": ["q"], "responses": ["a", "b"]}, "unread_content"),
        (
            {"prompt": None, "instruction": "q", "history": [["a", 1]], "responses": ["a", "b"]},
            "unread_content",
        ),
    ],
)
def test_a_bad_ranking_has_its_reason(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    assert reason_against(tmp_path, {"prompt": "q", **fields}) == reason


@needs_shared_data
def test_real_rankings_are_read_with_all_responses(tmp_path: Path) -> None:
    assert SHARED is not None
    records = list(read_records(str(SHARED / "ranked_oasst_history_zh.json")))
    good = [record for record in records if isinstance(record, PreferenceRecord)]
    faults = [line - 1 for line, reason in outcomes(records) if reason == "identical_responses"]
    assert faults == [49, 97, 101, 102, 186, 248]
    assert len(good) + len(faults) == len(records) == 250
    assert {len(record.responses) for record in good} == {2, 3, 4, 5, 6, 8, 10}
