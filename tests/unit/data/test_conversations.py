"""No field that would change the input of the model is ignored silently."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataFormat, SourceConfig
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


def read_one(
    folder: Path, fields: Any, format_: DataFormat = DataFormat.auto
) -> PreferenceRecord | BadRecord:
    [record] = read_records(SourceConfig(path=jsonl(folder, fields), format=format_))
    return record


def unread(folder: Path, fields: Any, format_: DataFormat = DataFormat.auto) -> tuple[str, ...]:
    record = read_one(folder, fields, format_)
    assert isinstance(record, BadRecord), record
    assert record.reason == "unread_content"
    assert all(name in record.detail for name in record.unread)
    return record.unread


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", ["a.png"]),
        ("image", {"bytes": "x"}),
        ("documents", [{"text": "x"}]),
        ("rejected_images", ["b.png"]),
        ("chosen_video", "c.mp4"),
        ("margin", 0.5),
        ("weight", "2"),
        ("sample_weight", 0),
        ("context", "Oslo is a town."),
    ],
)
@pytest.mark.parametrize("kind", EVERY)
def test_a_field_that_no_format_reads_is_counted_by_its_name(
    tmp_path: Path, kind: str, name: str, value: Any
) -> None:
    assert unread(tmp_path, EVERY[kind] | {name: value}) == (name,)


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, "[]", "{}", "null"])
@pytest.mark.parametrize("kind", EVERY)
def test_empty_fields_are_ignored(tmp_path: Path, kind: str, nothing: Any) -> None:
    fields = EVERY[kind]
    names = ("tools", "images", "system", "history", "input", "chat_template_kwargs")
    with_empty, without = (
        read_one(tmp_path, fields | dict.fromkeys(names, nothing)),
        read_one(tmp_path, fields),
    )
    assert with_empty == without
    assert isinstance(without, PreferenceRecord)


@pytest.mark.parametrize("fields", [TEXT, CHAT, WHOLE, RANKED, COMPLETION, WITH_SYSTEM, MADE])
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_becomes_the_system_message(tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    record = read_one(tmp_path, fields | {name: "be kind"})
    assert isinstance(record, PreferenceRecord)
    assert record.prompt == (KIND, Message("user", "q"))


def test_turns_before_a_text_are_its_history(tmp_path: Path) -> None:
    history = [["one", "two"], ["three", "four"]]
    for fields in (TEXT, CHAT):
        record = read_one(tmp_path, fields | {"history": history, "system": "be kind"})
        assert isinstance(record, PreferenceRecord)
        roles = ["system", "user", "assistant", "user", "assistant", "user"]
        texts = ["be kind", "one", "two", "three", "four", "q"]
        assert record.prompt == tuple(map(Message, roles, texts))


@pytest.mark.parametrize(
    ("fields", "names"),
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
        (CHAT | {"input": "more", "images": ["x"]}, ("images", "input")),
        (CHAT | {"question": "more"}, ("question",)),
        (HH | {"tools": [{"name": "f"}]}, ("tools",)),
        (HH | {"chat_template_kwargs": {"a": 1}}, ("chat_template_kwargs",)),
        (HH | {"prompt": "another"}, ("prompt",)),
        (TEXT | {"tools": [{"name": "f"}], "functions": [{"name": "g"}]}, ("functions",)),
        (TEXT | {"chat_template_kwargs": ["a"]}, ("chat_template_kwargs",)),
        (CHAT | {"conversations": [user("more")]}, ("conversations",)),
        (RANKED | {"instruction": "do"}, ("instruction",)),
        (WHOLE | {"instruction": "do"}, ("instruction",)),
        (HH | {"input": "more"}, ("input",)),
        (MADE | {"system": "be kind", "system_prompt": "be brief"}, ("system_prompt",)),
    ],
)
def test_ambiguous_context_is_refused(tmp_path: Path, fields: Any, names: tuple[str, ...]) -> None:
    assert unread(tmp_path, fields) == names


def test_plain_text_refuses_a_system_text(tmp_path: Path) -> None:
    assert unread(tmp_path, TEXT | {"system": "be kind"}, DataFormat.text) == ("system",)
    assert unread(tmp_path, HH | {"prompt": "something else"}, DataFormat.hh) == ("prompt",)


def test_fields_that_repeat_the_prompt_are_accepted(tmp_path: Path) -> None:
    for fields in (TEXT, CHAT, RANKED, WHOLE, HH):
        record = read_one(tmp_path, fields | {"input": "q", "instruction": " q "})
        assert isinstance(record, PreferenceRecord)


@pytest.mark.parametrize(
    "prompt",
    [
        "Question: {} Answer:",
        "**Question:** {}",
        'Answer this: "{}"',
        "1. {}\n2. Say why.",
        "Notes.\n- {}",
        "Q:\t{}\tA:",
        "\u95ee\uff1a{} \u7b54\uff1a",
    ],
)
def test_a_prompt_made_of_a_question_and_labels_repeats_it(tmp_path: Path, prompt: str) -> None:
    for part in ("2 + 2?", "What is the capital of Norway?"):
        record = read_one(tmp_path, TEXT | {"prompt": prompt.format(part), "question": part})
        assert isinstance(record, PreferenceRecord), part


def test_a_long_text_anywhere_in_the_prompt_repeats_it(tmp_path: Path) -> None:
    text = "Oslo is the capital of Norway."
    for prompt in (f"Use this: {text} Where is it?", f"{text} Where is it?", f"In short: ({text})"):
        for name in ("input", "instruction", "question", "context"):
            assert isinstance(read_one(tmp_path, TEXT | {"prompt": prompt, name: text}), PreferenceRecord)


def test_a_weight_or_margin_without_effect_is_accepted(tmp_path: Path) -> None:
    for kind in EVERY.values():
        record = read_one(tmp_path, kind | {"weight": "1.0", "margin": 0, "sample_weight": None})
        assert isinstance(record, PreferenceRecord)


@pytest.mark.parametrize("key", ["image", "images", "audio", "videos"])
def test_unread_fields_of_a_message_are_named(tmp_path: Path, key: str) -> None:
    answer = assistant("a") | {key: [{"name": "f"}]}
    assert unread(tmp_path, CHAT | {"chosen": [answer]}) == (key,)
    scored = [answer | {"score": 2}, {"content": "b", "score": 1}]
    assert unread(tmp_path, {"prompt": "q", "responses": scored}) == (key,)
    assert unread(tmp_path, {"messages": [user("q"), answer]}) == (key,)


def test_content_that_is_not_text_is_named(tmp_path: Path) -> None:
    for part in ({"type": "image_url", "text": "q"}, {"type": "text", "text": 1}, 1):
        parts = {"role": "user", "content": [{"type": "text", "text": "q"}, part]}
        assert unread(tmp_path, CHAT | {"prompt": [parts]}) == ("content",)


@pytest.mark.parametrize("value", [5, 0, ["a", "b"], {"a": 1}])
@pytest.mark.parametrize(
    "fields", [{"chosen": "a", "rejected": "b"}, {"output": ["a", "b"]}, {"output": "a"}]
)
def test_an_input_that_is_no_text_is_not_lost(tmp_path: Path, fields: dict[str, Any], value: Any) -> None:
    assert unread(tmp_path, {"instruction": "q", "input": value} | fields) == ("input",)


@pytest.mark.parametrize("form", [str, json.dumps])
@pytest.mark.parametrize("wrap", [lambda turn: turn, lambda turn: [turn]])
def test_a_cell_may_spell_one_message_or_a_list(tmp_path: Path, form: Any, wrap: Any) -> None:
    fields = {
        name: form(wrap(turn)) for name, turn in (("chosen", assistant("a")), ("rejected", assistant("b")))
    }
    record = read_one(tmp_path, {"prompt": form(wrap(user("q")))} | fields)
    assert isinstance(record, PreferenceRecord)
    assert (record.prompt, record.responses) == ((Message("user", "q"),), ("a", "b"))


@pytest.mark.parametrize(
    "text", ['{"role": "admin", "content": "x"}', '{"role": "user", "content": "x", "id": 1}']
)
def test_a_response_may_be_an_object_in_json(tmp_path: Path, text: str) -> None:
    record = read_one(tmp_path, {"prompt": "q", "chosen": text, "rejected": "b"})
    assert isinstance(record, PreferenceRecord)
    assert record.responses == (text, "b")


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_a_lone_surrogate_beside_the_turns_is_found(tmp_path: Path, name: str) -> None:
    value = {"tools": [{"name": "f\ud800"}], "chat_template_kwargs": {"style": "\ud800"}}[name]
    record = read_one(tmp_path, CHAT | {name: value})
    assert isinstance(record, BadRecord)
    assert record.reason == "invalid_unicode"
