"""Turns of conversations: tool calls, thoughts, weights, several turns of a response, ShareGPT's roles."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dpo_dist.config.rules import OTHER_ROLE_NAMES
from dpo_dist.data import messages
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, Message, PreferenceRecord
from tests.support.records import TEXT, assistant, jsonl, read_good, read_one, reason_against, user

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLS = [{"type": "function", "function": CALL}]
TOOL = {"name": "weather", "parameters": {"type": "object"}}
TOOLS = ({"type": "function", "function": TOOL},)
CALLING = Message("assistant", "", {"tool_calls": CALLS})
QUESTION = Message("user", "q")


def turn(role: str, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


@pytest.mark.parametrize(
    "tools", [[TOOL], list(TOOLS), json.dumps([TOOL]), json.dumps(TOOL), [json.dumps(TOOL)]]
)
@pytest.mark.parametrize(
    "fields",
    [
        TEXT,
        TEXT | {"prompt": [user("q")]},
        {"prompt": "q", "responses": ["good", "bad"]},
        {"instruction": "q", "chosen": "good", "rejected": "bad"},
        {"conversations": [turn("human", "q")], "chosen": "good", "rejected": "bad"},
    ],
)
def test_definitions_of_tools_are_objects_with_a_function(tmp_path: Path, fields: Any, tools: Any) -> None:
    record = read_good(tmp_path, fields | {"tools": tools})
    assert record.tools == TOOLS
    assert (record.prompt, record.responses) == ((QUESTION,), ("good", "bad"))


@pytest.mark.parametrize("tools", ["weather", [1], 3, "[", '"x"'])
def test_other_tools_are_invalid(tmp_path: Path, tools: Any) -> None:
    assert reason_against(tmp_path, TEXT | {"tools": tools}) == "invalid_tools"


@pytest.mark.parametrize("arguments", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_arguments_of_the_template_are_read(tmp_path: Path, arguments: Any) -> None:
    record = read_good(tmp_path, TEXT | {"chat_template_kwargs": arguments})
    assert record.template_arguments == {"enable_thinking": False}
    assert record.prompt == (QUESTION,)


@pytest.mark.parametrize("given", [False, "false", "False", 0, "0"])
def test_a_column_enable_thinking_is_an_argument_of_the_template(tmp_path: Path, given: Any) -> None:
    same = {"chat_template_kwargs": {"enable_thinking": False, "depth": 2}}
    record = read_good(tmp_path, TEXT | {"enable_thinking": given} | same)
    assert record.template_arguments == {"enable_thinking": False, "depth": 2}
    assert record.template_arguments["enable_thinking"] is False
    assert read_good(tmp_path, TEXT | {"enable_thinking": None}).prompt == "q"
    for other in ({"enable_thinking": True} | same, {"enable_thinking": "maybe"}):
        bad = read_one(tmp_path, TEXT | other)
        assert isinstance(bad, BadRecord)
        assert bad.unread == ("enable_thinking",)


@pytest.mark.parametrize(
    "calling",
    [
        {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"arguments": '{"city": "Oslo"}'}]},
        {"role": "assistant", "tool_calls": json.dumps(CALLS)},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "tool_call", "content": json.dumps(CALL)},
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL)}]},
        turn("function_call", json.dumps(CALL)),
        turn("function_call", json.dumps([CALL])),
    ],
)
def test_tool_calls_have_one_form(tmp_path: Path, calling: dict[str, Any]) -> None:
    record = read_good(tmp_path, {"prompt": [user("q")], "chosen": calling, "rejected": "no"})
    assert record.responses == ((CALLING,), "no")


def test_a_null_argument_is_kept_but_not_one_that_fills_a_table(tmp_path: Path) -> None:
    arguments = {"city": "Oslo", "date": None}
    as_object, as_text = (
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL | {"arguments": given}}]}
        for given in (arguments, json.dumps(arguments | {"city": "Rome"}))
    )
    tool = {"name": "weather", "parameters": {"type": "object", "required": None}}
    fields = {"prompt": [user("q")], "chosen": [as_object], "rejected": [as_text], "tools": [tool]}
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fields]), table)
    for path, kept in (jsonl(tmp_path, fields), arguments), (str(table), {"city": "Oslo"}):
        [record] = read_records(path)
        assert isinstance(record, PreferenceRecord), record
        chosen, rejected = (next(iter(one)).fields["tool_calls"][0]["function"] for one in record.responses)  # type: ignore[union-attr]
        assert (chosen["arguments"], rejected["arguments"]) == (kept, arguments | {"city": "Rome"})
        assert record.tools == TOOLS


@pytest.mark.parametrize(
    "text",
    ['{"role": "user", "content": "x"}', '[{"role": "admin", "content": "x"}]', "[]", "[1", "[{'role': x}]"],
)
def test_a_response_in_json_is_a_text(tmp_path: Path, text: str) -> None:
    record = read_good(tmp_path, TEXT | {"chosen": text})
    assert (record.prompt, record.responses) == ("q", (text, "bad"))


def test_the_id_and_the_result_of_a_call_are_kept(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "c1", "function": CALL}]}
    result = {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"}
    record = read_good(
        tmp_path, {"prompt": [user("q"), calling, result], "chosen": "It rains.", "rejected": "no"}
    )
    asked, called, answered = record.prompt
    assert asked == QUESTION
    assert called == Message("assistant", "I look.", {"tool_calls": [{"id": "c1", **CALLS[0]}]})
    assert answered == Message("tool", "rain", {"tool_call_id": "c1", "name": "weather"})
    assert record.responses == ("It rains.", "no")


@pytest.mark.parametrize(
    "call", ["f()", [], [1], {"arguments": {}}, CALL | {"arguments": "Oslo"}, CALL | {"arguments": [1]}]
)
def test_a_call_that_no_template_could_render_is_invalid(tmp_path: Path, call: Any) -> None:
    fields = {"conversations": [turn("human", "q")], "chosen": turn("function_call", call), "rejected": "b"}
    assert reason_against(tmp_path, fields) == "invalid_tool_call"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("reasoning_content", "reasoning_content"),
        ("reasoning", "reasoning_content"),
        ("thinking", "thinking"),
    ],
)
def test_thoughts_are_read(tmp_path: Path, name: str, kept: str) -> None:
    fields = {"prompt": [user("q")], "chosen": assistant("a") | {name: "hm"}, "rejected": "b"}
    record = read_good(tmp_path, fields)
    assert record.responses == ((Message("assistant", "a", {kept: "hm"}),), "b")
    scored = [assistant("a") | {name: "hm", "score": 2}, {"content": "b", "score": 1}]
    assert read_good(tmp_path, {"prompt": [user("q")], "responses": scored}).responses == record.responses


def test_only_messages_of_the_final_channel_are_read(tmp_path: Path) -> None:
    final = {"prompt": [user("q")], "chosen": assistant("a") | {"channel": "final"}, "rejected": "b"}
    assert read_good(tmp_path, final).responses == ("a", "b")
    # A channel of a chat room is nothing to read.
    assert read_good(tmp_path, final | {"prompt": [user("q") | {"channel": "#help"}]}).responses == ("a", "b")
    thought = assistant("hm") | {"channel": "analysis"}
    found = read_one(tmp_path, final | {"chosen": [thought, assistant("a") | {"channel": "final"}]})
    assert isinstance(found, BadRecord)
    assert (found.reason, found.unread) == ("unread_content", ("channel",))


def test_parts_of_a_content_are_one_text(tmp_path: Path) -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "text": "a"},
        {"type": "text", "value": "b"},
    ]
    fields = {"prompt": [user("q")], "chosen": [{"role": "assistant", "content": parts}], "rejected": "b"}
    record = read_good(tmp_path, fields)
    assert record.responses == ((Message("assistant", "ab", {"reasoning_content": "hm"}),), "b")


def weighed(role: str, text: str, weight: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}


def test_weights_of_messages_say_which_turns_are_trained(tmp_path: Path) -> None:
    start = [weighed("user", "q", 0.0)]
    middle = [weighed("assistant", "a", 0.0), weighed("user", "more", 0.0)]
    fields = {
        "chosen_messages": [*start, *middle, weighed("assistant", "good", 1.0)],
        "rejected_messages": [*start, weighed("assistant", "bad", 1.0)],
    }
    record = read_good(tmp_path, fields)
    assert record.prompt == (QUESTION,)
    turns = (
        Message("assistant", "a", is_trained=False),
        Message("user", "more", is_trained=False),
        Message("assistant", "good", is_trained=True),
    )
    assert record.responses == (turns, "bad")


@pytest.mark.parametrize("name", ["loss_weight", "loss", "weight", "loss_scale", "train", "training"])
def test_the_weight_of_a_message_has_several_names(tmp_path: Path, name: str) -> None:
    turns = [user("q"), assistant("a") | {name: False}, user("more"), assistant("good") | {name: True}]
    record = read_good(tmp_path, {"chosen": turns, "rejected": [user("q"), assistant("bad")]})
    assert [turn.is_trained for turn in record.responses[0]] == [False, None, True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "weights",
    [
        {"mask": True},
        {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
        {"train": True, "weight": 0},
    ],
)
def test_unclear_weights_of_a_message_are_refused(tmp_path: Path, weights: dict[str, Any]) -> None:
    record = read_one(tmp_path, TEXT | {"prompt": [user("q")], "chosen": [assistant("a") | weights]})
    assert isinstance(record, BadRecord)
    assert (record.reason, record.unread) == ("unread_content", tuple(weights)[::-1][-2:])


@pytest.mark.parametrize(
    ("weight", "reason"), [(0, "untrained_response"), (0.5, "unread_content"), ("1", "unread_content")]
)
def test_other_weights_are_refused(tmp_path: Path, weight: Any, reason: str) -> None:
    fields = {
        "chosen_messages": [weighed("user", "q", 0), weighed("assistant", "good", weight)],
        "rejected_messages": [weighed("user", "q", 0), weighed("assistant", "bad", 1)],
    }
    record = read_one(tmp_path, fields)
    assert isinstance(record, BadRecord)
    assert record.reason == reason
    assert record.unread == (("loss_weight",) if reason == "unread_content" else ())


ONE = [user("q"), assistant("a")]
NEXT = [user("more"), assistant("good")]


@pytest.mark.parametrize(
    ("fields", "prompt", "responses"),
    [
        # From where the sides part.
        (
            {"chosen": [*ONE, *NEXT], "rejected": [user("q"), assistant("b"), *NEXT]},
            ["q"],
            (["a", "more", "good"], ["b", "more", "good"]),
        ),
        (
            {"chosen": [*ONE, *NEXT], "rejected": [*ONE, user("more"), assistant("bad")]},
            ["q", "a", "more"],
            ("good", "bad"),
        ),
        ({"chosen": [*ONE, *NEXT], "rejected": ONE}, ["q"], (["a", "more", "good"], "a")),
        (
            {"prompt": [user("q")], "chosen": [assistant("a"), *NEXT], "rejected": [assistant("b")]},
            ["q"],
            (["a", "more", "good"], "b"),
        ),
        (
            {"prompt": "q", "chosen": [*ONE, *NEXT], "rejected": [*ONE, user("more"), assistant("bad")]},
            ["q", "a", "more"],
            ("good", "bad"),
        ),
        (
            {
                "prompt": ONE[:1],
                "chosen": [*ONE[1:], *NEXT],
                "rejected": [*ONE[1:], user("more"), assistant("bad")],
            },
            ["q", "a", "more"],
            ("good", "bad"),
        ),
        # ms-swift: another response instead of the last one.
        ({"messages": [*ONE, *NEXT], "rejected_response": "bad"}, ["q", "a", "more"], ("good", "bad")),
        ({"messages": ONE, "rejected_messages": [user("q"), assistant("b")]}, ["q"], ("a", "b")),
        # A completion.
        ({"messages": [*ONE, *NEXT]}, ["q", "a", "more"], ("good",)),
        ({"messages": [ONE[0], ONE[1] | {"loss": True}, *NEXT]}, ["q"], (["a", "more", "good"],)),
    ],
)
def test_a_response_starts_where_the_sides_part(
    tmp_path: Path, fields: Any, prompt: list[str], responses: Any
) -> None:
    record = read_good(tmp_path, fields)
    found = tuple(
        one if isinstance(one, str) else [message.content for message in one] for one in record.responses
    )
    assert isinstance(record.prompt, tuple)
    assert ([message.content for message in record.prompt], found) == (prompt, responses)


@pytest.mark.parametrize(
    "fields",
    [
        {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"chosen": [*ONE, *NEXT], "rejected": [*ONE, user("less"), assistant("bad")]},
        {"chosen": [*ONE, *NEXT], "rejected": [{"role": "system", "content": "s"}, *ONE, *NEXT]},
        {"prompt": "p", "chosen": [*ONE, *NEXT], "rejected": [user("q"), assistant("b")]},
    ],
)
def test_sides_that_part_at_another_turn_than_the_assistants_are_refused(tmp_path: Path, fields: Any) -> None:
    assert reason_against(tmp_path, fields) == "history_differs"


def test_responses_of_turns_are_compared_and_checked_whole(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": CALLS}
    same = {"prompt": [user("q")], "chosen": [calling], "rejected": [calling | {"content": " "}]}
    assert reason_against(tmp_path, same) == "identical_responses"
    empty = {
        "prompt": [user("q")],
        "chosen": [calling],
        "rejected": [assistant(" "), user("m"), assistant("")],
    }
    assert reason_against(tmp_path, empty) == "empty_response"
    broken = {"prompt": [user("q")], "chosen": assistant("a") | {"thinking": "\ud800"}, "rejected": "b"}
    assert reason_against(tmp_path, broken) == "invalid_unicode"


def test_sharegpt_turns_become_messages(tmp_path: Path) -> None:
    turns = [
        turn("system", "be kind"),
        turn("human", "q"),
        turn("function_call", json.dumps(CALL)),
        turn("observation", "rain"),
    ]
    fields = {"conversations": turns, "tools": json.dumps([TOOL])}
    for good, bad in (("good", "bad"), (turn("gpt", "good"), turn("gpt", "bad"))):
        record = read_good(tmp_path, fields | {"chosen": good, "rejected": bad})
        assert record.prompt == (Message("system", "be kind"), QUESTION, CALLING, Message("tool", "rain"))
        assert (record.responses, record.tools) == (("good", "bad"), TOOLS)
    asked = [turn("human", "q")]
    sides = {"chosen": turn("function_call", json.dumps(CALL)), "rejected": turn("gpt", "bad")}
    assert read_good(tmp_path, {"conversations": asked, **sides}).responses == ((CALLING,), "bad")
    assert read_good(tmp_path, {"conversations": [*asked, turn("gpt", "good")]}).responses == ("good",)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([turn("human", "q"), turn("human", "p")], "roles_out_of_turn"),
        ([turn("gpt", "a"), turn("gpt", "b"), turn("human", "p")], "roles_out_of_turn"),
        ([turn("human", "q"), turn("judge", "p")], "roles_out_of_turn"),
        ([turn("human", "q"), turn("system", "p")], "roles_out_of_turn"),
        ([turn("human", "q"), turn("gpt", "another")], "ambiguous_format"),
    ],
)
def test_roles_and_order_of_sharegpt_are_checked(tmp_path: Path, turns: Any, reason: str) -> None:
    fields = {"conversations": turns, "chosen": "a", "rejected": "b"}
    assert reason_against(tmp_path, fields) == reason


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "be kind", "question": "q", "chosen": "good", "rejected": "bad"},
        {
            "system": "be kind",
            "history": [],
            "question": "q",
            "response_chosen": "good",
            "response_rejected": "bad",
        },
        {"system": "be kind", "input": "q", "chosen": "good", "rejected": "bad"},
        {"system": "be kind", "instruction": "q", "chosen_response": "good", "rejected_response": "bad"},
        {"system": "be kind", "query": "q", "response": "good", "rejected_response": "bad"},
        {"system": "be kind", "instruction": "", "input": "q", "chosen": "good", "rejected": "bad"},
        {"system": "be kind", "instruction": "q", "input": "", "output": ["good", "bad"]},
        {"system": "be kind", "messages": "q", "chosen": assistant("good"), "rejected": assistant("bad")},
        {"system": "be kind", "prompt": json.dumps([user("q")]), "chosen": "good", "rejected": "bad"},
        {
            "prompt": None,
            "chosen": json.dumps([{"role": "system", "content": "be kind"}, user("q"), assistant("good")]),
            "rejected": str([{"role": "system", "content": "be kind"}, user("q"), assistant("bad")]),
        },
    ],
)
def test_pairs_of_other_programs_give_the_same_record(tmp_path: Path, fields: Any) -> None:
    record = read_good(tmp_path, fields)
    assert record.prompt == (Message("system", "be kind"), QUESTION)
    assert record.responses == ("good", "bad")
    assert record.scores is None


def test_a_question_is_a_users_turn_also_without_a_system_text(tmp_path: Path) -> None:
    fields = {"system": "", "question": "q", "chosen": "good", "rejected": "bad"}
    assert read_good(tmp_path, fields).prompt == (QUESTION,)


def test_a_history_of_messages_or_in_json_precedes_the_question(tmp_path: Path) -> None:
    fields = {"question": "q", "chosen": "good", "rejected": "bad"}
    for history in ([["one", "two"]], [user("one"), assistant("two")], '[["one", "two"]]'):
        record = read_good(tmp_path, fields | {"history": history})
        assert record.prompt == (Message("user", "one"), Message("assistant", "two"), QUESTION)


def test_texts_alone_are_split_where_they_part(tmp_path: Path) -> None:
    from trl.data_utils import extract_prompt  # slow to import

    fields = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    record = read_good(tmp_path, fields)
    assert isinstance(record, PreferenceRecord)
    assert (record.prompt, record.responses) == ("The sky is", (" blue.", " green."))
    split = extract_prompt(fields)
    assert (record.prompt, *record.responses) == (split["prompt"], split["chosen"], split["rejected"])
    # With another text in the record, that might be the prompt.
    assert reason_against(tmp_path, fields | {"topic": "weather"}) == "unknown_format"


def test_roles_with_another_name_are_refused_as_trained_roles() -> None:
    assert {*messages._ROLES, *messages._CALLING} == OTHER_ROLE_NAMES
