"""No field of a row that would change what the model reads is ignored in silence."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.schema import DataFormat, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, Message, PreferenceRecord
from tests.support.records import TEXT, assistant, jsonl, user

CHAT = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
WHOLE = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
RANKED = {"prompt": "q", "responses": ["a", "b", "c"]}
COMPLETION = {"prompt": "q", "completion": "a"}
SYSTEM = {"role": "system", "content": "be kind"}
KIND = Message("system", "be kind")
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
MADE = {"instruction": "q", "output": ["a", "b"]}
WITH_SYSTEM = CHAT | {"prompt": [SYSTEM, user("q")]}
EVERY = {"text": TEXT, "chat": CHAT, "whole": WHOLE, "ranked": RANKED, "completion": COMPLETION, "hh": HH}


def read_one(folder: Path, row: Any, layout: DataFormat = DataFormat.auto) -> PreferenceRecord | BadRecord:
    [record] = read_records(SourceConfig(path=jsonl(folder, row), format=layout))
    return record


def unread(folder: Path, row: Any, layout: DataFormat = DataFormat.auto) -> tuple[str, ...]:
    record = read_one(folder, row, layout)
    assert isinstance(record, BadRecord), record
    assert record.reason == "unread_content"
    assert all(name in record.detail for name in record.unread)
    return record.unread


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tools", '[{"type": "function"}]'),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("images", ["a.png"]),
        ("image", {"bytes": "x"}),
        ("documents", [{"text": "x"}]),
    ],
)
@pytest.mark.parametrize("kind", EVERY)
def test_a_field_that_no_format_reads_is_counted_by_its_name(
    tmp_path: Path, kind: str, name: str, value: Any
) -> None:
    assert unread(tmp_path, EVERY[kind] | {name: value}) == (name,)


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, "[]", "{}", "null"])
@pytest.mark.parametrize("kind", EVERY)
def test_empty_fields_say_nothing(tmp_path: Path, kind: str, nothing: Any) -> None:
    row = EVERY[kind]
    names = ("tools", "images", "system", "history", "input", "chat_template_kwargs")
    with_empty, without = read_one(tmp_path, row | dict.fromkeys(names, nothing)), read_one(tmp_path, row)
    assert with_empty == without
    assert isinstance(without, PreferenceRecord)


@pytest.mark.parametrize("row", [TEXT, CHAT, WHOLE, RANKED, COMPLETION, WITH_SYSTEM, MADE])
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_becomes_the_system_message(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    record = read_one(tmp_path, row | {name: "be kind"})
    assert isinstance(record, PreferenceRecord)
    assert record.prompt == (KIND, Message("user", "q"))


def test_turns_before_a_text_are_its_history(tmp_path: Path) -> None:
    history = [["one", "two"], ["three", "four"]]
    for row in (TEXT, CHAT):
        record = read_one(tmp_path, row | {"history": history, "system": "be kind"})
        assert isinstance(record, PreferenceRecord)
        roles = ["system", "user", "assistant", "user", "assistant", "user"]
        texts = ["be kind", "one", "two", "three", "four", "q"]
        assert record.prompt == tuple(map(Message, roles, texts))


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (WITH_SYSTEM | {"system": "be brief"}, ("system",)),
        (TEXT | {"system": "be kind", "system_prompt": "be brief"}, ("system_prompt",)),
        (TEXT | {"system": ["be kind"]}, ("system",)),
        (HH | {"system": "be kind"}, ("system",)),
        (HH | {"history": [["a", "b"]]}, ("history",)),
        (TEXT | {"history": ["a", "b"]}, ("history",)),
        (TEXT | {"history": "a"}, ("history",)),
        (TEXT | {"history": [["a", 1]]}, ("history",)),
        (WITH_SYSTEM | {"history": [["a", "b"]]}, ("history",)),
        (TEXT | {"input": "more"}, ("input",)),
        (CHAT | {"input": "more", "tools": ["x"]}, ("tools", "input")),
        (RANKED | {"instruction": "do"}, ("instruction",)),
        (WHOLE | {"instruction": "do"}, ("instruction",)),
        (HH | {"input": "more"}, ("input",)),
        (MADE | {"system": "be kind", "system_prompt": "be brief"}, ("system_prompt",)),
    ],
)
def test_what_has_no_plain_place_is_refused(tmp_path: Path, row: Any, names: tuple[str, ...]) -> None:
    assert unread(tmp_path, row) == names


def test_a_plain_text_has_no_place_for_a_system_text(tmp_path: Path) -> None:
    assert unread(tmp_path, TEXT | {"system": "be kind"}, DataFormat.text) == ("system",)
    assert unread(tmp_path, HH | {"prompt": "something else"}, DataFormat.hh) == ("prompt",)


def test_fields_that_repeat_the_prompt_lose_nothing(tmp_path: Path) -> None:
    for row in (TEXT, CHAT, RANKED, WHOLE, HH):
        record = read_one(tmp_path, row | {"input": "q", "instruction": " q "})
        assert isinstance(record, PreferenceRecord)


@pytest.mark.parametrize(
    "key", ["tool_calls", "function_call", "tool_call_id", "reasoning_content", "images"]
)
def test_parts_of_a_message_that_are_not_read_are_named(tmp_path: Path, key: str) -> None:
    answer = assistant("a") | {key: [{"name": "f"}]}
    assert unread(tmp_path, CHAT | {"chosen": [answer]}) == (key,)
    scored = [answer | {"score": 2}, {"content": "b", "score": 1}]
    assert unread(tmp_path, {"prompt": "q", "responses": scored}) == (key,)
    assert unread(tmp_path, {"messages": [user("q"), answer]}) == (key,)


def test_content_that_is_no_text_is_named(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    assert unread(tmp_path, CHAT | {"prompt": [parts]}) == ("content",)
