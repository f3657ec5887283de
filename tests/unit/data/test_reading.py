"""What each form of a record becomes: prompt and responses, or the reason why it is dropped."""

import copy
import csv
import json
import pickle
import random
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.config import DataConfig, SourceConfig, Truncation
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.messages import ARGUMENTS as ARGUMENT_KEYS
from dpo_dist.data.read.reading import FIELDS
from dpo_dist.data.read.sources import DataSource
from dpo_dist.data.records import BadRecord, Message, PreferenceRecord
from dpo_dist.encoded.build import encode_records
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.pages import ROOT
from tests.support.records import TEXT, assistant, bad, good, jsonl, parsed, user
from tests.support.shared_data import shared_data_dir

H = "\n\nHuman: q\n\nAssistant:"
Q, KIND = ["user", "q"], ["system", "be kind"]
PAIR = {"chosen": "good", "rejected": "bad"}
CHAT = PAIR | {"prompt": [user("q")]}
WHOLE = {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
HH = {"chosen": H + " good", "rejected": H + " bad"}
RANKED = {"prompt": "q", "responses": ["good", "bad", "worse"], "scores": [3, 2, 1]}
COMPLETION = {"prompt": "q", "completion": "good"}
DONE = [user("q"), assistant("good")]


def seen(turns: str | tuple[Message, ...]) -> Any:
    if isinstance(turns, str):
        return turns
    return [[one.role, one.content, *([one.fields] if one.fields else [])] for one in turns]


# The examples of shapes in docs/data.md.
PAGE = (ROOT / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"^ {4}(\{\".+\})$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_of_a_shape_is_read(example: str) -> None:
    record = good(json.loads(example))
    assert "2 + 2" in (record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content)
    best, *others = map(str, record.responses)
    assert "4" in best or "add" in best
    assert not others or "5" in others[0]


def test_the_page_has_the_fields_and_the_keys() -> None:
    listed = PAGE.split("The fields are ", 1)[1].split(".\n", 1)[0]
    assert sorted(re.findall(r"`([^`]+)`", listed)) == sorted([*FIELDS, "keys", "form"])
    [row] = re.findall(r"\| (.*) of a call \| its `arguments`", PAGE)
    assert ["arguments", *re.findall(r"`(\w+)`", row)] == ARGUMENT_KEYS


@pytest.mark.parametrize("name", ["score_{}", "{}_score", "{}_rating", "rating_{}", "{}-rating"])
def test_scores_of_a_pair_are_in_the_order_of_its_responses(name: str) -> None:
    chosen, rejected = name.format("chosen"), name.format("rejected")
    assert good(TEXT | {rejected: 2, chosen: 4.5}).scores == (4.5, 2.0)
    assert good(TEXT | {chosen: "", rejected: ""}).scores is None
    half = TEXT | {chosen: 8.0, rejected: None}
    if name == "score_{}":
        assert bad(half).reason == "invalid_scores"
    else:
        assert good(half).scores is None
    assert bad(TEXT | {chosen: 8.0, rejected: "good"}).reason == "invalid_scores"


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}])
@pytest.mark.parametrize("fields", [TEXT, CHAT, WHOLE, RANKED, COMPLETION, HH])
def test_columns_without_a_value_say_nothing(fields: dict[str, Any], nothing: Any) -> None:
    names = ("winner", "images", "context", "weight", "rejected_tools", "chosen_audio")
    assert good(fields | dict.fromkeys(names, nothing) | {"margin": 0}) == good(fields)


def test_a_source_with_a_column_of_turns_has_turns_also_where_it_is_empty(tmp_path: Path) -> None:
    rows = [TEXT | {"system": system} for system in ("", "be kind", None)]
    for order in (rows, rows[::-1]):
        found = list(read_records(jsonl(tmp_path, *order)))
        assert sorted(len(record.prompt) for record in found) == [1, 1, 2]  # type: ignore[union-attr]
        assert all(isinstance(record.prompt, tuple) for record in found)  # type: ignore[union-attr]


def test_all_prompts_of_a_source_are_texts_or_turns(tmp_path: Path) -> None:
    """Texts become turns beside messages among the first records; later messages are bad records."""
    first, *others = read_records(jsonl(tmp_path, TEXT, CHAT, TEXT))
    assert [seen(record.prompt) for record in (first, *others)] == [[Q]] * 3  # type: ignore[union-attr]
    *texts, last = read_records(jsonl(tmp_path, *[TEXT] * 20, CHAT))
    assert {record.prompt for record in texts} == {"q"}  # type: ignore[union-attr]
    assert isinstance(last, BadRecord)
    assert last.reason == "other_shape"


def test_a_later_record_of_another_shape_is_a_bad_one(tmp_path: Path) -> None:
    *_, last = read_records(jsonl(tmp_path, *[TEXT] * 20, TEXT | {"prompt": H}))
    assert isinstance(last, BadRecord)
    assert last.reason == "other_shape"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (CHAT | {"chosen": [assistant("good") | {"mood": "calm"}]}, "unknown_key ([].mood)"),
        ({"messages": [user("q"), assistant("bad") | {"chosen": False}]}, "unknown_key ([].chosen)"),
        (TEXT | {"winner": "rejected", "id": 3}, "unread_column (winner)"),
        (TEXT | {"label": "B"}, "unread_column (label)"),
        (TEXT | {"tie": False}, "unread_column (tie)"),
        (TEXT | {"response": "x", "chosen_thinking": "y"}, "unread_column (response, chosen_thinking)"),
        (TEXT | {"system": "a", "system_prompt": "b"}, "unread_column (system_prompt)"),
        (HH | {"system": "be kind"}, "unread_column (system)"),
        (PAIR | {"prompt": json.dumps([user("q")])}, "spelled_messages (prompt)"),
        (
            TEXT | {"chosen": "rejected"},
            "expression_failed (chosen is the name of a column, rejected, not a text)",
        ),
        (TEXT | {"chosen": {"text": "good"}}, "unknown_format (chosen: neither texts nor messages)"),
        (TEXT | {"images": ["a.png"], "prompt": "<image> <bbox>"}, "unread_content"),
        (CHAT | {"prompt": [user("q"), *DONE], "history": [["a", "b"]]}, "unread_content"),
        ({"a": 1}, "unknown_shape"),
    ],
)
def test_what_nothing_reads_is_an_error_by_name(record: dict[str, Any], why: str) -> None:
    assert bad(record).why.startswith(why)


VALUES_BASE: list[dict[str, Any]] = [TEXT, CHAT, WHOLE, HH, RANKED, COMPLETION, {"messages": DONE}]


CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOL = {"name": "weather", "parameters": {"type": "object"}}
TOOLS = ({"type": "function", "function": TOOL},)


@pytest.mark.parametrize("name", ["loss_weight", "loss", "weight", "loss_scale", "train", "training"])
def test_weights_of_messages_say_which_turns_are_trained(name: str) -> None:
    turns = [user("q") | {name: 0.0}, assistant("a") | {name: False}, user("m"), assistant("b") | {name: 1.0}]
    record = good({"chosen": turns, "rejected": [user("q"), assistant("bad")]})
    assert seen(record.prompt) == [Q]
    assert [one.is_trained for one in record.responses[0]] == [False, None, True]  # type: ignore[union-attr]
    # A trained turn that both sides share is a part of the prompt.
    shared = [user("q"), assistant("a") | {name: 1.0}, user("m")]
    record = good({"chosen": [*shared, assistant("b")], "rejected": [*shared, assistant("c")]})
    assert (len(seen(record.prompt)), record.responses) == (3, ("b", "c"))


@pytest.mark.parametrize("tools", [[TOOL], [*TOOLS], json.dumps([TOOL]), [json.dumps(TOOL)]])
@pytest.mark.parametrize("fields", [TEXT, CHAT, RANKED, PAIR | {"instruction": "q"}])
def test_tools_are_objects_with_a_function(fields: dict[str, Any], tools: Any) -> None:
    record = good(fields | {"tools": tools})
    assert (record.tools, seen(record.prompt)) == (TOOLS, [Q])


def test_a_tool_of_a_server_stays_as_it_is() -> None:
    search = {"type": "web_search", "max_uses": 2}
    assert good(CHAT | {"tools": [search, TOOL]}).tools == (search, *TOOLS)


def test_arguments_of_the_template_are_read() -> None:
    for arguments in ({"depth": 2}, '{"depth": 2}'):
        record = good(TEXT | {"chat_template_kwargs": arguments})
        assert (record.template_arguments, seen(record.prompt)) == ({"depth": 2}, [Q])
    assert good(TEXT | {"enable_thinking": None}).prompt == "q"


# Values that no one expects in a record.
VALUES: list[Any] = [
    *(None, True, -1, 10**400, float("nan"), float("inf"), "", " ", [], {}, [None], [[None]], [[]]),
    *("\ud800", "\x00", "a\u2028b", "\ufdd0", "\ufeff", "</s><|im_end|><|im_start|>", "<think>", "</think>"),
    *("[" * 5000, "[" * 400 + "]" * 400, '{"a":' * 500, "[{'" * 2000, "[1,", "-" * 3000 + "1", b"bytes"),
    *({"role": None, "content": None}, user("\ud800"), {"role": "\ud800", "content": "x"}, [user("x")] * 3),
    *({"a": None}, [[user("x")]], [assistant("x") | {"tool_calls": [None]}], [["a"]], [["a", "b"]], [1, 2]),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def damaged(generator: random.Random) -> dict[str, Any]:
    record: dict[str, Any] = copy.deepcopy(generator.choice(VALUES_BASE))
    for _ in range(generator.randrange(1, 3)):
        *outside, last = generator.choice(list(paths(record)))
        part: Any = record
        for key in outside:
            part = part[key]
        part[last] = copy.deepcopy(generator.choice(VALUES))
    return record


@pytest.mark.parametrize("seed", range(2))
def test_no_record_raises(seed: int) -> None:
    generator = random.Random(seed)
    tokenizers = [tiny.qwen(), tiny.llama3(), tiny.mistral()]
    for _ in range(400):
        found = parsed(damaged(generator))
        pickle.dumps(found)  # it is sent to other processes
        config = DataConfig(
            max_length=generator.choice([16, 512]),
            max_prompt_length=generator.choice([None, 10]),
            truncation=generator.choice(list(Truncation)),
            text_as_messages=generator.choice(["auto", True, False]),
        )
        encode_records([found], config, generator.choice(tokenizers))


ARGUMENTS = {"city": "Oslo"}
CALLS: dict[str, dict[str, Any]] = {
    "OpenAI": {
        "id": "c",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    },
    "a stream of OpenAI": {"index": 0, "function": {"name": "weather", "arguments": ARGUMENTS}},
    "OpenAI, outside": {"function": {"name": "weather"}, "arguments": ARGUMENTS},
    "LangChain": {"name": "weather", "args": ARGUMENTS, "id": "c", "type": "tool_call"},
    "Anthropic": {"type": "tool_use", "id": "c", "name": "weather", "input": ARGUMENTS},
    "Gemini": {"name": "weather", "args": ARGUMENTS},
    "Responses": {
        "type": "function_call",
        "call_id": "c",
        "name": "weather",
        "arguments": '{"city": "Oslo"}',
    },
    "Llama": {"name": "weather", "parameters": ARGUMENTS},
    "an agent": {"name": "weather", "action_input": '{"city": "Oslo"}'},
    "another agent": {"name": "weather", "kwargs": ARGUMENTS},
    "a table": {"name": "weather", "arguments": None, "args": ARGUMENTS, "payload": None},
    "no arguments": {"name": "weather"},
    "null": {"name": "weather", "arguments": None, "id": "c"},
    "empty": {"name": "weather", "input": "{}", "extra_content": {"signature": "s"}},
}
BAD_CALLS: dict[str, dict[str, Any]] = {
    "another key": {"name": "weather", "payload": ARGUMENTS},
    "another key in the function": {"type": "function", "function": {"name": "weather", "arg": ARGUMENTS}},
    "two arguments": {"name": "weather", "arguments": ARGUMENTS, "args": {"city": "Rome"}},
    "a text": {"type": "custom", "name": "weather", "input": "ls"},
    "a custom tool": {"type": "custom", "custom": {"name": "weather", "input": "ls"}},
    "another name": {"action": "weather", "action_input": ARGUMENTS},
}


@pytest.mark.parametrize("where", ["beside", "within"])
def test_an_id_within_the_arguments_is_an_argument(where: str) -> None:
    given = {"name": "weather", "input": {"id": "a", **ARGUMENTS}} | (
        {"id": "c"} if where == "beside" else {}
    )
    turn = {"role": "assistant", "content": "", "tool_calls": [given]}
    record = good({"prompt": [user("q")], "chosen": [turn], "rejected": [assistant("no")]})
    [call] = record.responses[0][0].fields["tool_calls"]  # type: ignore[union-attr]
    assert call.get("id") == given.get("id")
    assert call["function"]["arguments"] == {"id": "a", **ARGUMENTS}


@pytest.mark.parametrize("name", CALLS | BAD_CALLS)
@pytest.mark.parametrize("key", ["tool_calls", "function_call", "role", "part"])
def test_the_arguments_of_a_call_are_read_or_the_record_is_bad(tmp_path: Path, name: str, key: str) -> None:
    call = (CALLS | BAD_CALLS)[name]
    turns = {
        "tool_calls": assistant("I look.") | {"tool_calls": [call]},
        "function_call": assistant("I look.") | {"function_call": call},
        "role": {"role": "function_call", "content": json.dumps(call)},
        "part": {"role": "assistant", "content": [{"type": "tool_call", "tool_call": call}]},
    }
    fields = {"prompt": [user("q")], "chosen": [turns[key]], "rejected": [assistant("no")]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fields]), table := tmp_path / "table.parquet")
    for path in (jsonl(tmp_path, fields), str(table)):
        [record] = read_records(path)
        if name in BAD_CALLS:
            assert isinstance(record, BadRecord)
            assert record.reason == "invalid_tool_call"
            continue
        assert isinstance(record, PreferenceRecord), record
        [read_call] = record.responses[0][0].fields["tool_calls"]  # type: ignore[union-attr]
        expected = {} if name in ("no arguments", "null", "empty") else ARGUMENTS
        assert read_call["function"] == {"name": "weather", "arguments": expected}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": [{"type": "text", "text": "I look.", "functionCall": CALL}]},
        {"role": "assistant", "content": [{"functionCall": CALL}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I"}, CALLS["Anthropic"]]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "rain"}]},
    ],
)
def test_a_call_that_no_format_reads_is_not_dropped_from_its_turn(turn: dict[str, Any]) -> None:
    found = bad({"prompt": [user("q")], "chosen": [turn], "rejected": [assistant("no")]})
    assert (found.reason, len(found.unread)) == ("unread_content", 1)


@pytest.mark.parametrize("name", ["input_schema", "inputSchema"])
def test_a_schema_of_another_name_becomes_the_parameters_of_a_tool(name: str) -> None:
    tool = {"name": "weather", "parameters": None, name: {"type": "object"}}
    for tools in ([tool], [{"type": "function", "function": tool}], json.dumps([tool])):
        assert good(CHAT | {"tools": tools}).tools == TOOLS
    empty = {"name": "weather", name: {"type": "object"}, "parameters": {}}
    assert good(CHAT | {"tools": [empty]}).tools == TOOLS
    both = TOOL | {name: {"type": "array"}}
    assert good(CHAT | {"tools": [both]}).tools == ({"type": "function", "function": both},)


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
def test_a_null_argument_is_kept_but_not_one_that_fills_a_table(tmp_path: Path, key: str) -> None:
    arguments = {"city": "Oslo", "date": None}
    as_object, as_text = (
        assistant("") | {"tool_calls": [{"function": {"name": "weather", key: given}}]}
        for given in (arguments, json.dumps(arguments))
    )
    fields = {
        "prompt": [user("q")],
        "chosen": [as_object],
        "rejected": [as_text, user("x"), assistant("y")],
        "tools": [TOOL | {"parameters": {"type": "object", "required": None}}],
    }
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fields]), table)
    for path, kept in (jsonl(tmp_path, fields), arguments), (str(table), {"city": "Oslo"}):
        [record] = read_records(path)
        assert isinstance(record, PreferenceRecord), record
        given = [one[0].fields["tool_calls"][0]["function"]["arguments"] for one in record.responses]  # type: ignore[union-attr]
        assert given == [kept, arguments]
        assert record.tools == TOOLS


# One conversation as other programs write it.
KINDLY, QUESTION = "Be kind. ", "What is\nit? "
BEFORE = [{"role": "system", "content": KINDLY}, user("hello"), assistant("hello there"), user(QUESTION)]
ANSWER = "Paris 你好\u2028two\x00\u0085"
GOOD, BAD = assistant(ANSWER), assistant("no")
TURNS = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": TURNS[turn["role"]], "value": turn["content"]} for turn in [*BEFORE, GOOD, BAD]]
BESIDE = {"system": KINDLY, "history": [["hello", "hello there"]]}
TEXTS = {"chosen": GOOD["content"], "rejected": BAD["content"]}


def weighted(turns: list[dict[str, str]], weight: int) -> list[dict[str, Any]]:
    return [
        turn | {"content": [{"type": "text", "value": turn["content"]}], "loss_weight": weight}
        for turn in turns
    ]


FORMS: dict[str, dict[str, Any]] = {
    "TRL": {"prompt": BEFORE, "chosen": [GOOD], "rejected": [BAD]},
    "TRL, implicit": {"chosen": [*BEFORE, GOOD], "rejected": [*BEFORE, BAD]},
    "OpenRLHF": {"prompt": BEFORE, "chosen": [*BEFORE, GOOD], "rejected": [*BEFORE, BAD]},
    "alpaca": {"instruction": QUESTION, "input": "", **BESIDE, **TEXTS},
    "alpaca of two parts": {"instruction": "What is", "input": "it? ", **BESIDE, **TEXTS},
    "sharegpt": {"conversations": SHAREGPT[:4], "chosen": SHAREGPT[4], "rejected": SHAREGPT[5]},
    "sharegpt, system beside": {"system": KINDLY, "conversations": SHAREGPT[1:4], **TEXTS},
    "weights": {
        "chosen_messages": [*weighted(BEFORE, 0), *weighted([GOOD], 1)],
        "rejected_messages": [*weighted(BEFORE, 0), *weighted([BAD], 1)],
    },
    "ms-swift": {"messages": [*BEFORE, GOOD], "rejected_response": "no"},
    "ms-swift, query": {"query": QUESTION, "response": ANSWER, "rejected_response": "no", **BESIDE},
    "axolotl": {"messages": BEFORE, "chosen": GOOD, "rejected": BAD},
    "question": {"question": QUESTION, "response_chosen": ANSWER, "response_rejected": "no", **BESIDE},
    "ranked": {
        "prompt": BEFORE,
        "responses": [{"content": "no", "score": 1}, {"content": ANSWER, "score": 2}],
    },
}


# What the columns of a table mean whose cells have these as JSON.
CELLS: dict[str, dict[str, str]] = {
    "sharegpt": {
        "prompt": "conversations|fromjson",
        "chosen": "chosen|fromjson",
        "rejected": "rejected|fromjson",
    },
    "sharegpt, system beside": {
        "system": "system",
        "prompt": "conversations|fromjson",
        "chosen": "chosen",
        "rejected": "rejected",
    },
    "ms-swift": {
        "prompt": "(messages|fromjson)[:-1]",
        "chosen": "(messages|fromjson)[-1]",
        "rejected": "rejected_response",
    },
    "axolotl": {"prompt": "messages|fromjson", "chosen": "chosen|fromjson", "rejected": "rejected|fromjson"},
    "ranked": {
        "prompt": "prompt|fromjson",
        "responses": "responses|fromjson|map(attribute='content')",
        "scores": "responses|fromjson|map(attribute='score')",
    },
}


def source_of(path: Path, name: str) -> SourceConfig:
    """Return a source; a table whose cells spell messages by its fields, or by the line of its error."""
    source = SourceConfig(str(path))
    if path.suffix != ".csv":
        return source
    try:
        list(read_records(source))
    except DataError as error:
        if name in CELLS:
            return SourceConfig(str(path), fields=CELLS[name])
        [word, *_] = [shlex.split(f"data.train={rest}")[0] for rest in error.remedy.split("data.train=")[1:]]
        [source] = load_run_config(["model.path=m", word.removesuffix(";")]).data.train
    return source


@pytest.mark.parametrize("name", FORMS)
def test_a_conversation_is_the_same_in_each_format_and_kind_of_file(tmp_path: Path, name: str) -> None:
    fields = FORMS[name]
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    with (tmp_path / "cells.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(cells))
        table.writeheader()
        table.writerow(cells)
    (tmp_path / "array.json").write_text(json.dumps([fields]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([fields]), tmp_path / "table.parquet")
    jsonl(tmp_path, fields)
    for path in tmp_path.iterdir():
        [record] = read_records(source_of(path, name))
        assert isinstance(record, PreferenceRecord), record
        assert seen(record.prompt) == [[turn["role"], turn["content"]] for turn in BEFORE], path.name
        assert record.responses == (ANSWER, "no"), path.name


SHARED = shared_data_dir()
RANKED_FAULTS = {"identical_responses": 6}
RANKED_OASST = {"prompt": "instruction|turn", "history": "history", "responses": "output", "best_first": True}
# Kept and dropped records of each file, and of each entry of dataset_info.json.
FILES: list[tuple[str, dict[str, Any], int, dict[str, int]]] = [
    ("hh_rlhf_sample.jsonl", {}, 1491, {"empty_response": 4, "history_differs": 5}),
    ("llama_factory_sharegpt_en.json", {}, 150, {}),
    ("llama_factory_sharegpt_zh.json", {}, 300, {}),
    ("llama_factory_v1_message_pairs.jsonl", {}, 10, {}),
    ("llama_factory_kto_en.json", {}, 60, {}),
    ("ultrafeedback_plain_scored.jsonl", {}, 293, {"identical_responses": 5, "empty_response": 2}),
    ("ranked_oasst_history_zh.json", {"fields": RANKED_OASST, "ignore": ["*"]}, 244, RANKED_FAULTS),
    ("system_history_question_zh.jsonl", {}, 150, {}),
    ("sharegpt_string_answers_zh.jsonl", {}, 80, {}),
    ("toolcall_pairs_zh.jsonl", {}, 11, {}),
    ("orca_system_question.csv", {}, 60, {}),
    ("templated_near_duplicates.jsonl", {}, 40, {}),
    ("derived/trl_conversational_from_hh.jsonl", {}, 200, {}),
    ("derived/ultrafeedback_binarized_messages.jsonl", {}, 100, {}),
    ("derived/llama_factory_alpaca_chosen_rejected.json", {}, 100, {}),
    ("", {"name": "dpo_en_demo"}, 150, {}),
    ("", {"name": "dpo_zh_demo"}, 300, {}),
    ("dataset_info.json", {"name": "ultrafeedback"}, 100, {}),
    ("", {"name": "orca_pairs"}, 60, {}),
    ("", {"name": "kto_en_demo"}, 60, {}),
]


@pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")
@pytest.mark.parametrize(("name", "options", "kept", "dropped"), FILES, ids=str)
def test_real_files_have_the_known_faults(
    name: str, options: dict[str, Any], kept: int, dropped: dict[str, int]
) -> None:
    source = SourceConfig(f"{SHARED}/{name}", **options)
    if kept:
        DataSource(source).check(DataConfig(max_bad_share=1.0))
    else:
        with pytest.raises(DataError, match="pair good and bad responses"):
            DataSource(source).check(DataConfig())
    outcomes = Counter(
        record.reason if isinstance(record, BadRecord) else "kept" for record in read_records(source)
    )
    assert outcomes.pop("kept", 0) == kept
    assert outcomes == dropped
