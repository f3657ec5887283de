"""Formats of records: detection, pairs, completions, and the reasons of bad records."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataFormat, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, Dialogue, Message, PreferenceRecord
from tests.support.records import TEXT, assistant, outcomes, read_good, read_one, reason_against, user
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
needs_shared_data = pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")


def test_sides_that_repeat_a_dialogue_as_prompt_are_whole(tmp_path: Path) -> None:
    dialogue = "Human: hi\n\nAssistant:"
    for start in ("\n\n", ""):
        sides = {name: f"{start}{dialogue} {name}" for name in ("chosen", "rejected")}
        record = read_good(tmp_path, {"prompt": "\n\n" + dialogue, **sides})
        assert (record.prompt, record.responses) == (Dialogue("\n\n" + dialogue), (" chosen", " rejected"))


def test_an_hh_dialogue_is_split_at_its_last_response(tmp_path: Path) -> None:
    history = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    record = read_one(tmp_path, {"chosen": history + " yes", "rejected": history + " no "})
    assert isinstance(record, PreferenceRecord)
    assert record.prompt == Dialogue(history)
    assert record.responses == (" yes", " no ")
    assert isinstance(record.prompt, Dialogue)
    assert tuple(record.prompt) == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")},
        {"prompt": [user("q")], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {
            "prompt": [user("q")],
            "chosen": [user("q"), assistant("good")],
            "rejected": [user("q"), assistant("bad")],
        },
    ],
)
def test_all_forms_of_a_conversation_give_the_same_record(tmp_path: Path, fields: dict[str, Any]) -> None:
    record = read_one(tmp_path, fields)
    assert isinstance(record, PreferenceRecord)
    assert record.prompt == (Message("user", "q"),)
    assert record.responses == ("good", "bad")


D = "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    ("fields", "responses"),
    [
        ({"prompt": D, "chosen": " I do", "rejected": " I don't"}, (" I do", " I don't")),
        ({"prompt": D + " ", "chosen": "I do", "rejected": "I don't"}, (" I do", " I don't")),
        ({"prompt": D, "chosen": D + " I do", "rejected": D + " I don't"}, (" I do", " I don't")),
        ({"chosen": D.strip() + " I do", "rejected": D.strip() + " I don't"}, (" I do", " I don't")),
        ({"prompt": D, "completion": " I do"}, (" I do",)),
        ({"prompt": D, "responses": [" I do", " I don't", " no"]}, (" I do", " I don't", " no")),
    ],
)
def test_a_dialogue_may_be_in_the_prompt_or_stripped(tmp_path: Path, fields: Any, responses: Any) -> None:
    record = read_good(tmp_path, fields)
    assert (record.prompt, record.responses) == (Dialogue(D), responses)
    if "rejected" in fields and "prompt" in fields:
        assert read_good(tmp_path, fields, DataFormat.text).prompt == fields["prompt"]


def test_a_response_that_is_a_story_of_a_dialogue_is_a_text(tmp_path: Path) -> None:
    told = {"prompt": "Write a talk.", "chosen": D.strip() + " a", "rejected": D.strip() + " b"}
    assert read_good(tmp_path, told).prompt == "Write a talk."
    further = {"prompt": D, "chosen": " a\n\nHuman: more", "rejected": " b"}
    assert reason_against(tmp_path, further) == "not_one_answer"


def test_messages_before_two_responses_are_their_prompt(tmp_path: Path) -> None:
    fields = {"messages": [user("q")], "chosen_response": "good", "rejected_response": "bad"}
    record = read_one(tmp_path, fields)
    assert isinstance(record, PreferenceRecord)
    assert (record.prompt, record.responses) == ((Message("user", "q"),), ("good", "bad"))


def test_empty_cells_are_no_scores(tmp_path: Path) -> None:
    record = read_one(tmp_path, TEXT | {"score_chosen": "", "score_rejected": ""})
    assert isinstance(record, PreferenceRecord)
    assert record.scores is None
    half = read_one(tmp_path, TEXT | {"score_chosen": "", "score_rejected": 0})
    assert isinstance(half, BadRecord)
    assert half.reason == "invalid_scores"


@pytest.mark.parametrize("name", ["chosen_score", "chosen_rating", "rating_chosen", "chosen-rating"])
def test_a_score_of_the_chosen_side_alone_is_no_score(tmp_path: Path, name: str) -> None:
    other = name.replace("chosen", "rejected")
    for fields in ({name: 8.0}, {name: 8.0, other: None}, {name: None, other: 1.0}):
        assert read_good(tmp_path, TEXT | fields).scores is None
    assert read_good(tmp_path, TEXT | {name: 8.0, other: 1.0}).scores == (8.0, 1.0)
    assert reason_against(tmp_path, TEXT | {name: 8.0, other: "good"}) == "invalid_scores"


def test_plain_text_is_unchanged(tmp_path: Path) -> None:
    fields = {"prompt": " q\u00a0\r\n", "chosen": "\u200bgood\n", "rejected": " bad\u2028"}
    record = read_one(tmp_path, fields)
    assert isinstance(record, PreferenceRecord)
    assert (record.prompt, *record.responses) == (fields["prompt"], fields["chosen"], fields["rejected"])


@pytest.mark.parametrize("where", ["record", "metadata"])
@pytest.mark.parametrize("name", ["score_{}", "{}_score", "{}_rating", "rating_{}", "{}-rating"])
def test_scores_are_in_the_order_of_the_responses(tmp_path: Path, name: str, where: str) -> None:
    scores = {name.format("rejected"): 2, name.format("chosen"): 4.5}
    record = read_one(tmp_path, TEXT | (scores if where == "record" else {"metadata": scores}))
    assert isinstance(record, PreferenceRecord)
    assert record.scores == (4.5, 2.0)


H = "\n\nHuman: q\n\nAssistant:"
CONVERSATION = [user("q"), assistant("good")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([1, 2], "unparsable"),
        ({"messages": [user("q"), assistant("a")], "label": True}, "unpaired"),
        ({"prompt": "q", "completion": "a", "kto_tag": False}, "unpaired"),
        ({"prompt": "q", "completion": "a", "label": " Bad "}, "unpaired"),
        ({"prompt": "q", "completion": "a", "label": -1.0}, "unpaired"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "unread_content"),
        ({"x": "q", "chosen": "good", "rejected": "bad"}, "unknown_format"),
        ({"question": "", "chosen": "good", "rejected": "bad"}, "empty_prompt"),
        ({"chosen": "good", "rejected": "bad"}, "empty_prompt"),
        (
            {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
            "empty_prompt",
        ),
        ({"prompt": "q", "chosen": "good"}, "missing_field"),
        (TEXT | {"rejected": None}, "missing_field"),
        ({"messages": CONVERSATION, "rejected_response": None}, "missing_field"),
        ({"messages": CONVERSATION, "rejected_messages": None}, "missing_field"),
        ({"query": "q", "response": "a", "rejected_response": None}, "missing_field"),
        ({"chosen": H + " a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "history_differs"),
        ({"chosen": H + " a", "rejected": H + " a\n\nHuman: q"}, "not_one_answer"),
        ({"chosen": H + " a", "rejected": H + "  \n"}, "empty_response"),
        ({"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"}, "empty_prompt"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
            "history_differs",
        ),
        (
            {
                "prompt": "other",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            "history_differs",
        ),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q")]}, "not_one_answer"),
        ({"prompt": [user("q")], "chosen": [], "rejected": []}, "not_one_answer"),
        (
            {"prompt": [user("q")], "chosen": assistant("a") | {"tool_calls": [{}]}, "rejected": "b"},
            "invalid_tool_call",
        ),
        ({"prompt": [{"role": "user", "content": [1]}], "chosen": "a", "rejected": "b"}, "unread_content"),
        (TEXT | {"prompt": " \n"}, "empty_prompt"),
        (TEXT | {"chosen": "\t"}, "empty_response"),
        (TEXT | {"chosen": " bad\n"}, "identical_responses"),
        (TEXT | {"score_chosen": 1.0}, "invalid_scores"),
        (TEXT | {"score_chosen": float("nan"), "score_rejected": 0}, "invalid_scores"),
        (TEXT | {"score_chosen": 10**400, "score_rejected": 0}, "invalid_scores"),
        (TEXT | {"chosen": "\ud800"}, "invalid_unicode"),
    ],
)
def test_a_bad_record_has_its_reason(tmp_path: Path, fields: Any, reason: str) -> None:
    record = read_one(tmp_path, fields)
    assert isinstance(record, BadRecord)
    assert record.reason == reason


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        (TEXT | {"chosen": "\t"}, "no text in chosen"),
        (TEXT | {"rejected": ""}, "no text in rejected"),
        ({"prompt": "q", "completion": " "}, "no text in the completion"),
        ({"prompt": "q", "responses": ["a", " ", "c"]}, "no text in response 2 of the ranking"),
    ],
)
def test_an_empty_response_is_named(tmp_path: Path, fields: Any, detail: str) -> None:
    record = read_one(tmp_path, fields)
    assert isinstance(record, BadRecord)
    assert record.detail == detail


def test_an_unknown_format_names_the_fields_found(tmp_path: Path) -> None:
    record = read_one(tmp_path, {"label": "x", "text": []})
    assert isinstance(record, BadRecord)
    assert record.detail == "fields: label (text), text (list)"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"quest": "secret", "chosen": "secret", "rejected": "secret"},
            "text or messages: prompt, chosen",
        ),
        ({"prompt": "secret", "chosen": 1, "rejected": {"a": "secret"}}, "chosen (value), rejected (object)"),
        ({"instruction": "secret", "outputs": "secret"}, "instruction, input, output"),
        ({"prompt": "secret", "answer": "secret"}, "completion: prompt, completion"),
        ({"x": "secret", "y": None}, "fields: x (text), y (null)"),
        ({"a secret text of a file without header": "secret"}, "fields: a name of 38 characters (text)"),
        ({str(n): "secret" for n in range(100)}, "11 (text), ..."),
        ({}, "fields: none"),
    ],
)
def test_an_unknown_format_names_the_nearest_ones(
    tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    record = read_one(tmp_path, fields)
    assert isinstance(record, BadRecord)
    assert record.reason == "unknown_format"
    assert expected in record.detail
    assert "secret" not in record.detail


def test_an_explicit_format_is_not_detected(tmp_path: Path) -> None:
    fields = {"prompt": "q", "chosen": H + " a", "rejected": H + " b"}
    as_text = read_one(tmp_path, fields, DataFormat.text)
    as_hh = read_one(tmp_path, fields, DataFormat.hh)
    assert isinstance(as_text, PreferenceRecord)
    assert as_text.prompt == "q"
    assert isinstance(as_hh, PreferenceRecord)
    assert as_hh.prompt == Dialogue(H)
    forced = read_one(tmp_path, fields, DataFormat.messages)
    assert isinstance(forced, PreferenceRecord)
    assert forced.prompt == (Message("user", "q"),)
    assert isinstance(read_one(tmp_path, {"chosen": 1, "rejected": 2}, DataFormat.messages), BadRecord)
    assert isinstance(read_one(tmp_path, {"chosen": 0, "rejected": 0}, DataFormat.hh), BadRecord)
    assert isinstance(read_one(tmp_path, {"chosen": 1, "rejected": 2}, DataFormat.text), BadRecord)


@pytest.mark.parametrize("format_", [DataFormat.auto, DataFormat.completion])
@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, (Message("user", "q"),)),
        ({"prompt": [user("q")], "completion": "a", "label": None}, (Message("user", "q"),)),
        ({"messages": [user("q"), assistant("a")]}, (Message("user", "q"),)),
        ({"prompt": "q", "messages": [user("q"), assistant("a")]}, (Message("user", "q"),)),
        ({"completion": H + "a"}, Dialogue(H)),
    ],
)
def test_a_completion_is_a_record_of_one_response(
    tmp_path: Path, format_: DataFormat, fields: Any, prompt: Any
) -> None:
    record = read_good(tmp_path, fields, format_)
    assert (record.prompt, record.responses, record.scores) == (prompt, ("a",), None)


def test_the_chosen_side_is_a_completion_only_by_configuration(tmp_path: Path) -> None:
    pair = TEXT | {"score_chosen": 2, "score_rejected": 1}
    assert read_good(tmp_path, pair).responses == ("good", "bad")
    assert read_good(tmp_path, pair, DataFormat.completion).responses == ("good",)
    alone = {"prompt": "q", "chosen": "good"}
    assert reason_against(tmp_path, alone) == "missing_field"
    assert read_good(tmp_path, alone, DataFormat.completion).responses == ("good",)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "q"}, "missing_field"),
        ({"prompt": "q", "completion": " "}, "empty_response"),
        ({"prompt": "q", "completion": "a", "label": False}, "unpaired"),
        ({"messages": [user("q")]}, "not_one_answer"),
        ({"messages": [assistant("a")]}, "empty_prompt"),
        ({"completion": "a"}, "unknown_format"),
    ],
)
def test_a_bad_completion_has_its_reason(tmp_path: Path, fields: Any, reason: str) -> None:
    assert reason_against(tmp_path, fields, DataFormat.completion) == reason


@pytest.mark.parametrize(
    "fields",
    [
        TEXT | {"responses": ["x", "y"]},
        TEXT | {"completion": "z"},
        TEXT | {"messages": CONVERSATION},
        TEXT | {"chosen_response": "x", "rejected_response": "y"},
        {"prompt": "q", "messages": CONVERSATION, "completion": "z"},
        {"prompt": "q", "messages": CONVERSATION, "responses": ["x", "y"]},
        {"prompt": "q", "completion": "z", "responses": ["x", "y"]},
    ],
)
def test_a_record_of_two_formats_is_none_of_them(tmp_path: Path, fields: Any) -> None:
    record = read_one(tmp_path, fields)
    assert isinstance(record, BadRecord)
    assert record.reason == "ambiguous_format"


def test_a_null_side_is_named_unless_the_format_is_a_completion(tmp_path: Path) -> None:
    fields = {"messages": CONVERSATION, "rejected_response": None}
    record = read_one(tmp_path, fields)
    assert isinstance(record, BadRecord)
    assert record.detail == "rejected_response"
    assert read_good(tmp_path, fields, DataFormat.completion).responses == ("good",)
    # A table fills the columns of its other records.
    filled = {"messages": CONVERSATION, "chosen": None, "rejected": None, "completion": None}
    assert read_good(tmp_path, filled).responses == ("good",)


def test_the_configured_format_decides_between_two(tmp_path: Path) -> None:
    fields = TEXT | {"responses": ["x", "y"]}
    assert read_good(tmp_path, fields, DataFormat.text).responses == ("good", "bad")
    assert read_good(tmp_path, fields, DataFormat.ranked).responses == ("x", "y")


def test_a_copy_of_a_side_is_no_other_format(tmp_path: Path) -> None:
    fields = {"prompt": "q", "chosen": CONVERSATION, "rejected": [user("q"), assistant("bad")]}
    record = read_good(tmp_path, fields | {"messages": CONVERSATION})
    assert (record.prompt, record.responses) == ((Message("user", "q"),), ("good", "bad"))


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "kept", "faults"),
    [
        (
            "hh_rlhf_sample.jsonl",
            1491,
            {
                "empty_response": [58, 332, 606, 714],
                "history_differs": [804, 1080, 1258, 1260, 1318],
            },
        ),
        (
            "ultrafeedback_plain_scored.jsonl",
            293,
            {"identical_responses": [84, 171, 227, 246, 261], "empty_response": [134, 213]},
        ),
        ("templated_near_duplicates.jsonl", 40, {}),
        ("derived/trl_conversational_from_hh.jsonl", 200, {}),
        ("derived/ultrafeedback_binarized_messages.jsonl", 100, {}),
        ("llama_factory_kto_en.json", 0, {"unpaired": list(range(60))}),
    ],
)
def test_real_files_have_the_known_bad_records(name: str, kept: int, faults: dict[str, list[int]]) -> None:
    assert SHARED is not None
    found: dict[str, list[int]] = {}
    for line, reason in outcomes(read_records(str(SHARED / name))):
        found.setdefault(reason, []).append(line - 1)
    assert len(found.pop("", [])) == kept
    assert found == faults


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("hh_rlhf_sample.jsonl", {"empty_response": [58, 332, 606, 714]}),
        ("ultrafeedback_plain_scored.jsonl", {"empty_response": [213]}),
        ("derived/ultrafeedback_binarized_messages.jsonl", {}),
        ("llama_factory_kto_en.json", {"unpaired": list(range(60))}),
    ],
)
def test_real_pairs_are_read_as_completions(name: str, faults: dict[str, list[int]]) -> None:
    assert SHARED is not None
    found: dict[str, list[int]] = {}
    for line, reason in outcomes(read_records(SourceConfig(str(SHARED / name), DataFormat.completion))):
        found.setdefault(reason, []).append(line - 1)
    found.pop("", None)
    assert found == faults
