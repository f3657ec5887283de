"""Two responses and a field that names the better one are a pair."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Message, PreferenceRecord
from tests.support.records import assistant, jsonl, read_good, reason_against, user

SAFE = {"prompt": "q", "response_0": "zero", "response_1": "one", "is_response_0_safe": False}
FORUM = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 3, "score_B": 12, "domain": "d"}
STEERED = {"context": [user("q"), assistant("a"), user("q2")], "response1": "r1", "response2": "r2"}
ARENA = {
    "conversation_a": [user("q"), assistant("a")],
    "conversation_b": [user("q"), assistant("b")],
    "model_a": "x",
    "model_b": "y",
}


@pytest.mark.parametrize(
    ("fields", "responses"),
    [
        (SAFE | {"better_response_id": 0}, ("zero", "one")),
        (SAFE | {"better_response_id": 1, "safer_response_id": 0}, ("one", "zero")),
        (SAFE | {"better_response_id": "1"}, ("one", "zero")),
        (FORUM | {"labels": 1}, ("a", "b")),
        (FORUM | {"labels": 0}, ("b", "a")),
        (STEERED | {"overall_preference": -1}, ("r1", "r2")),
        (STEERED | {"overall_preference": 3.0}, ("r2", "r1")),
        (ARENA | {"winner": "model_a"}, ("a", "b")),
        (ARENA | {"winner": "model_b"}, ("b", "a")),
    ],
)
def test_the_better_response_is_chosen(tmp_path: Path, fields: dict[str, Any], responses: Any) -> None:
    record = read_good(tmp_path, fields)
    assert record.responses == responses
    last = record.prompt if isinstance(record.prompt, str) else record.prompt[-1]  # type: ignore[index]
    assert last in ("q", Message("user", "q"), Message("user", "q2"))


def test_scores_follow_the_responses(tmp_path: Path) -> None:
    assert read_good(tmp_path, FORUM | {"labels": 0}).scores == (12.0, 3.0)
    assert read_good(tmp_path, SAFE | {"better_response_id": 0}).scores is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (SAFE | {"better_response_id": None}, "missing_field"),
        (SAFE | {"better_response_id": -1}, "invalid_scores"),
        (SAFE | {"better_response_id": 0, "response_1": None}, "unknown_format"),
        (SAFE, "unknown_format"),
        (FORUM | {"labels": 0.5}, "invalid_scores"),
        (STEERED | {"overall_preference": 0}, "all_tied"),
        (STEERED | {"overall_preference": 4}, "invalid_scores"),
        (STEERED | {"overall_preference": 1, "prompt": "another"}, "unread_content"),
        (ARENA | {"winner": "tie (bothbad)"}, "all_tied"),
        (ARENA | {"winner": "model_x"}, "invalid_scores"),
        (SAFE | {"better_response_id": 0, "chosen": "one", "rejected": "zero"}, "ambiguous_format"),
        (SAFE | {"better_response_id": 0, "completion": "three"}, "ambiguous_format"),
    ],
)
def test_without_a_better_response_a_record_is_bad(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    assert reason_against(tmp_path, fields) == reason


def test_the_same_pair_may_be_there_twice(tmp_path: Path) -> None:
    fields = SAFE | {"better_response_id": 0, "chosen": "zero", "rejected": "one"}
    assert read_good(tmp_path, fields).responses == ("zero", "one")


def test_columns_read_a_comparison_with_other_names(tmp_path: Path) -> None:
    columns = {"response_0": "left", "response_1": "right", "better_response_id": "vote"}
    path = jsonl(tmp_path, {"prompt": "q", "left": "l", "right": "r", "vote": 1})
    [record] = read_records(SourceConfig(path=path, columns=columns))
    assert isinstance(record, PreferenceRecord)
    assert record.responses == ("r", "l")


@pytest.mark.parametrize("name", ["conversation", "conversations"])
def test_exchanges_are_turns(tmp_path: Path, name: str) -> None:
    talk = [{"human": "q", "assistant": "a"}, {"tool": "result", "assistant": "good"}]
    record = read_good(tmp_path, {"system": "be kind", name: talk, "rejected_response": "bad"})
    roles = [(turn.role, turn.content) for turn in record.prompt]  # type: ignore[union-attr]
    assert roles == [("system", "be kind"), ("user", "q"), ("assistant", "a"), ("tool", "result")]
    assert record.responses == ("good", "bad")
    # A copy of the turns in another layout beside a pair is not read.
    other = [{"input": "q", "output": "a"}]
    assert (
        read_good(tmp_path, {name[:12]: other, "prompt": "q", "chosen": "a", "rejected": "b"}).prompt == "q"
    )
