"""What each form of a record becomes: prompt and responses, or the reason why it is dropped."""

import copy
import csv
import json
import pickle
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dpo_dist.data.config import DataConfig, DataFormat, SourceConfig, TextTemplate, Truncation
from dpo_dist.data.formats import parse_prompt, parse_record, read_records
from dpo_dist.data.read import values
from dpo_dist.data.read.fields import FIELDS, IMAGES_OF_SIDES
from dpo_dist.data.read.sources import DataSource
from dpo_dist.data.records import BadRecord, Dialogue, Message, Origin, PreferenceRecord
from dpo_dist.encoded.build import encode_records
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.pages import ROOT
from tests.support.records import TEXT, assistant, bad, good, jsonl, user
from tests.support.shared_data import shared_data_dir

HERE = Origin("here", 1)
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


def read(fields: Any, format_: DataFormat = DataFormat.auto) -> tuple[Any, list[Any]]:
    record = good(fields, format_)
    return seen(record.prompt), list(map(seen, record.responses))


CORPUS = [json.loads(line) for line in (Path(__file__).parent / "formats.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", CORPUS, ids=lambda row: str(row["record"])[:80])
def test_a_record_of_the_corpus_becomes_what_its_row_says(row: dict[str, Any]) -> None:
    if "reason" in row:
        found = bad(row["record"])
        assert "secret" not in str(found)  # it never quotes a text
        detail = str(found).partition(f" {found.reason}")[2].strip(" ()")
        expected = (row["reason"], row.get("unread", []), row.get("detail", detail))
        assert (found.reason, list(found.unread), detail) == expected
        return
    record = good(row["record"])
    assert isinstance(record.prompt, Dialogue) == row.get("hh", False)
    prompt = record.prompt.text if isinstance(record.prompt, Dialogue) else seen(record.prompt)
    scores = None if record.scores is None else list(record.scores)
    expected = (row["prompt"], row["responses"], row.get("scores", scores))
    assert (prompt, list(map(seen, record.responses)), scores) == expected
    if row["prompt"] == [Q]:
        with_system = good(row["record"] | {"system": "be kind"})
        assert (seen(with_system.prompt), with_system.responses) == ([KIND, Q], record.responses)


# The examples of formats in docs/data.md, each with the name that stands above it.
PAGE = (ROOT / "docs" / "data.md").read_text()
ROWS = [
    (name, example.strip())
    for name, examples in re.findall(r"^\*\*`(\w+)`\*\*(?:.+\n)+\n((?: {4}\{.+\}\n)+)", PAGE, re.MULTILINE)
    for example in examples.splitlines()
]


@pytest.mark.parametrize(("name", "example"), ROWS)
def test_the_example_of_a_format_is_read_by_detection_and_by_name(name: str, example: str) -> None:
    record = good(json.loads(example))
    assert good(json.loads(example), DataFormat(name)) == record
    assert "2 + 2" in (record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content)
    best, *others = map(str, record.responses)
    assert "4" in best or "add" in best
    assert not others or "5" in others[0]


def test_every_format_and_field_is_on_the_page() -> None:
    assert {name for name, _ in ROWS} == set(DataFormat) - {DataFormat.auto}
    listed = PAGE.split("The fields are ", 1)[1].split(".\n", 1)[0]
    assert sorted(re.findall(r"`([^`]+)`", listed)) == sorted(FIELDS)
    written = " ".join(re.findall(r"columns: {(.*?)}", PAGE))
    assert set(re.findall(r"(\w+): (?!null)", written)) <= {*FIELDS, "COLUMN"}
    [row] = re.findall(r"\| (.*) of a call \| its `arguments`", PAGE)
    assert ("arguments", *re.findall(r"`(\w+)`", row)) == values.ARGUMENTS


@pytest.mark.parametrize("name", ["score_{}", "{}_score", "{}_rating", "rating_{}", "{}-rating"])
def test_scores_of_a_pair_are_in_the_order_of_its_responses(name: str) -> None:
    chosen, rejected = name.format("chosen"), name.format("rejected")
    for scores in ({rejected: 2, chosen: 4.5}, {"metadata": {rejected: 2, chosen: 4.5}}):
        assert good(TEXT | scores).scores == (4.5, 2.0)
    assert good(TEXT | {chosen: "", rejected: ""}).scores is None
    half = TEXT | {chosen: 8.0, rejected: None}
    if name == "score_{}":
        assert bad(half).reason == "invalid_scores"
    else:
        assert good(half).scores is None
    assert bad(TEXT | {chosen: 8.0, rejected: "good"}).reason == "invalid_scores"


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


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, "[]", "{}", "null"])
@pytest.mark.parametrize("fields", [TEXT, CHAT, WHOLE, RANKED, COMPLETION, HH])
def test_fields_without_effect_are_accepted(fields: dict[str, Any], nothing: Any) -> None:
    names = ("tools", "images", "system", "history", "input", "chat_template_kwargs")
    neutral = {"weight": "1.0", "margin": 0, "sample_weight": None, "instruction": " q "}
    assert good(fields | dict.fromkeys(names, nothing) | neutral) == good(fields)


@pytest.mark.parametrize(
    ("fields", "unread"),
    [
        (TEXT | {"id": 0, "answer": "2", "empty": "[]", "none": None, "flag": False}, "id answer"),
        (TEXT | {"loss_weight": 2, "votes_chosen": 3, "votes_rejected": 1, "context": "q"}, ""),
        (TEXT | {"chosen_score": 3, "metadata": {"a": 1}, "label": 1}, "chosen_score metadata label"),
        (TEXT | {"chosen_score": 3, "rejected_score": 2, "metadata": {"a": 1}, "scores": [1]}, "scores"),
        (RANKED | {"label": "x", "output": "y"}, "label output"),
        (COMPLETION | {"label": True}, ""),
        (COMPLETION | {"topic": "physics", "score_chosen": 1}, "topic score_chosen"),
        (CHAT | {"tools": [{"name": "f"}], "rejected_tools": '[{"name": "f"}]', "system": "be kind"}, ""),
        (PAIR | {"question": "q", "history": [["a", "b"]], "system_prompt": "be kind"}, ""),
        (HH | {"prompt": "q", "idx": 3}, "idx"),
        (
            CHAT
            | {
                "prompt": [user("q") | {"id": 3}],
                "chosen": [assistant("good") | {"tool_plan": "look it up", "refusal": None, "weight": 1}],
                "history": [user("p") | {"spans": [{"a": None}], "empty": []}, assistant("a") | {"id": 4}],
            },
            "messages[].id messages[].tool_plan messages[].spans",
        ),
        (
            {
                "prompt": [user("q")],
                "responses": [
                    {"text": "good", "thinking": "hm", "score": 2, "rank": 1, "plan": "look it up"},
                    {"text": "bad", "score": 1, "rank": 2},
                ],
            },
            "messages[].plan",
        ),
        *((TEXT | {"*": value, "vector": np.zeros(2)}, "* vector") for value in (3, "ab", [{}])),
        (TEXT | {"*": None}, ""),
    ],
)
def test_fields_of_which_nothing_is_read_are_named(fields: dict[str, Any], unread: str) -> None:
    assert good(fields).unread == tuple(unread.split())


def test_the_configured_format_decides() -> None:
    assert good(TEXT, DataFormat.completion).unread == ("rejected",)
    spelled = {"instruction": "q", "output": json.dumps(["good", "bad"])}
    assert good(spelled, DataFormat.ranked).responses == ("good", "bad")
    fields: dict[str, Any] = {"prompt": "q", "chosen": H + " a", "rejected": H + " b"}
    assert read(fields, DataFormat.text)[0] == "q"
    as_json = json.dumps([user("q")])
    assert read(PAIR | {"prompt": as_json}, DataFormat.text)[0] == as_json
    assert (
        read({"prompt": as_json, "completion": as_json, "label": 1}, DataFormat.labelled_text)[0] == as_json
    )
    assert read(PAIR | {"prompt": as_json})[0] == [Q]
    assert good(fields, DataFormat.hh).prompt == Dialogue(H)
    assert read(fields, DataFormat.messages)[0] == [Q]
    both = TEXT | {"responses": ["x", "y"], "score_chosen": 2, "score_rejected": 1}
    assert read(both, DataFormat.text)[1] == ["good", "bad"]
    assert read(both, DataFormat.ranked)[1] == ["x", "y"]
    for one in (TEXT, {"prompt": "q", "chosen": "good"}, {"messages": DONE, "rejected_response": None}):
        assert read(one, DataFormat.completion)[1] == ["good"]
    assert bad(TEXT | {"system": "be kind"}, DataFormat.text).unread == ("system",)
    assert bad(HH | {"prompt": "something else"}, DataFormat.hh).unread == ("prompt",)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "q"}, "q"),
        ({"messages": DONE}, [Q]),
        ({"prompt": "q", "system": "be kind"}, [KIND, Q]),
        (TEXT, "q"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, "q"),
        (HH, [Q]),
        ({"prompt": "q", "responses": ["a", "b"]}, "q"),
        ({"prompt": "q", "input": "p", "completion": "a"}, "unread_content"),
        (
            {
                "prompt": [user("q")],
                "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "x": 1}]}],
                "rejected": [assistant("b")],
            },
            [Q],
        ),
        ({"text": "q"}, "unknown_format"),
        ({"prompt": "  "}, "empty_prompt"),
        ({"prompt": "q", "images": ["a.png"]}, [["user", "\ufdd1q"]]),
        ({"prompt": "q", "videos": ["a.mp4"]}, "media_not_read"),
    ],
)
def test_the_prompt_of_a_record_needs_no_response(fields: dict[str, Any], expected: Any) -> None:
    found = parse_prompt(fields, DataFormat.auto, HERE)
    assert expected == (found.reason if isinstance(found, BadRecord) else seen(found.prompt))
    if isinstance(parse_record(fields, DataFormat.auto, HERE), BadRecord):
        assert (getattr(found, "responses", ()), getattr(found, "scores", None)) == ((), None)


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
    record: dict[str, Any] = copy.deepcopy(
        generator.choice([row["record"] for row in CORPUS if row["record"]])
    )
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
        found = parse_record(damaged(generator), generator.choice(list(DataFormat)), HERE)
        pickle.dumps(found)  # it is sent to other processes
        config = DataConfig(
            max_length=generator.choice([16, 512]),
            max_prompt_length=generator.choice([None, 10]),
            truncation=generator.choice(list(Truncation)),
            template=generator.choice(list(TextTemplate)),
            text_as_messages=generator.random() < 0.5,
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


def test_calls_only_in_additional_kwargs_are_read_once() -> None:
    """LangChain repeats there the calls of a message, in OpenAI's form, or has them nowhere else."""
    call, other = CALLS["OpenAI"], CALLS["LangChain"]
    for inner in ({"tool_calls": [call]}, {"function_call": call["function"]}):
        for fields in ({}, {"tool_calls": []}, {"tool_calls": [other]}, {"content": None}):
            turn = {"role": "assistant", "content": "", **fields, "additional_kwargs": inner}
            record = good({"prompt": [user("q")], "chosen": [turn], "rejected": [assistant("no")]})
            [read_call] = record.responses[0][0].fields["tool_calls"]  # type: ignore[union-attr]
            assert read_call["function"] == {"name": "weather", "arguments": ARGUMENTS}
            assert not record.unread
    turn = assistant("yes") | {"additional_kwargs": {"reasoning_content": "hm"}}
    assert good({"prompt": [user("q")], "chosen": [turn], "rejected": "no"}).unread == (
        "messages[].additional_kwargs",
    )


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


TEXTS_OF_DETAILS = [{"type": "reasoning.text", "text": "Look "}, {"type": "reasoning.text", "text": "up."}]


@pytest.mark.parametrize(
    "keys",
    [
        {"reasoning_details": TEXTS_OF_DETAILS},
        {"reasoning": "Look up.", "reasoning_details": TEXTS_OF_DETAILS},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Look up.", "signature": "x"}]},
    ],
)
def test_a_list_of_thoughts_is_a_thought_of_the_message(keys: dict[str, Any]) -> None:
    """As OpenRouter and LiteLLM write them, beside the text or alone."""
    record = good({"prompt": [user("q")], "chosen": [assistant("yes") | keys], "rejected": "no"})
    assert record.responses[0] == (Message("assistant", "yes", {"reasoning_content": "Look up."}),)
    assert not record.unread


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking", "thought"])
def test_columns_that_may_have_the_thoughts_of_the_sides_are_not_left_out(name: str) -> None:
    """They may also have the reasons of a judge."""
    found = bad(TEXT | {f"chosen_{name}": "Look it up.", f"rejected_{name}": "A guess."})
    assert (found.reason, found.unread) == ("unread_content", (f"chosen_{name}", f"rejected_{name}"))


def test_other_keys_of_a_message_do_not_divide_a_conversation() -> None:
    """A time or an identifier of the same turn may differ; such a key has no effect on what is shared."""
    first, second = (user("q") | {"time": time, "mood": "calm"} for time in ("1", "2"))
    record = good({"chosen": [first, assistant("yes")], "rejected": [second, assistant("no")]})
    assert (record.prompt, record.responses) == ((Message("user", "q"),), ("yes", "no"))
    assert record.prompt[0].others == {"mood": "calm"}  # type: ignore[union-attr]
    assert record.unread == ("messages[].time", "messages[].mood")


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
    "alpaca, older": {"instruction": QUESTION, **BESIDE, "output": [*TEXTS.values()]},
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
        "responses": [{"text": "no", "score": 1}, {"text": ANSWER, "score": 2}],
    },
}


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
        format_ = DataFormat.ranked if "output" in fields else DataFormat.auto
        [record] = read_records(SourceConfig(str(path), format=format_))
        assert isinstance(record, PreferenceRecord), record
        assert seen(record.prompt) == [[turn["role"], turn["content"]] for turn in BEFORE], path.name
        assert record.responses == (ANSWER, "no"), path.name


SHARED = shared_data_dir()
RANKED_FAULTS = {"identical_responses": 6}
BAD_FAULTS = {"history_differs": 5, "empty_response": 7, "identical_responses": 5, "no_scores": 6}
# Kept and dropped records of each file, and of each entry of dataset_info.json.
FILES: list[tuple[str, dict[str, Any], int, dict[str, int]]] = [
    ("hh_rlhf_sample.jsonl", {}, 1491, {"empty_response": 4, "history_differs": 5}),
    ("llama_factory_sharegpt_en.json", {}, 150, {}),
    ("llama_factory_sharegpt_zh.json", {}, 300, {}),
    ("llama_factory_v1_message_pairs.jsonl", {}, 10, {}),
    ("llama_factory_kto_en.json", {}, 60, {}),
    ("llama_factory_kto_en.json", {"format": DataFormat.labelled}, 60, {}),
    ("ultrafeedback_plain_scored.jsonl", {}, 293, {"identical_responses": 5, "empty_response": 2}),
    ("ranked_oasst_history_zh.json", {"format": DataFormat.ranked}, 244, RANKED_FAULTS),
    ("system_history_question_zh.jsonl", {}, 150, {}),
    ("sharegpt_string_answers_zh.jsonl", {}, 80, {}),
    ("toolcall_pairs_zh.jsonl", {}, 11, {}),
    ("orca_system_question.csv", {}, 60, {}),
    ("templated_near_duplicates.jsonl", {}, 40, {}),
    ("bad_records.jsonl", {"columns": {"record": "record"}}, 23, BAD_FAULTS),
    ("derived/trl_conversational_from_hh.jsonl", {}, 200, {}),
    ("derived/ultrafeedback_binarized_messages.jsonl", {}, 100, {}),
    ("derived/llama_factory_alpaca_chosen_rejected.json", {}, 100, {}),
    ("", {"name": "dpo_en_demo"}, 150, {}),
    ("", {"name": "dpo_zh_demo"}, 300, {}),
    ("dataset_info.json", {"name": "ultrafeedback"}, 100, {}),
    ("", {"name": "orca_pairs"}, 60, {}),
    ("", {"name": "oaast_rm_zh", "format": DataFormat.ranked}, 244, RANKED_FAULTS),
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


@pytest.mark.parametrize("nothing", [None, "", [], {}, False], ids=repr)
@pytest.mark.parametrize("name", [*IMAGES_OF_SIDES, "chosen_audio", "chosen_tools", "chosen_thinking"])
def test_an_empty_cell_of_a_side_says_nothing(name: str, nothing: Any) -> None:
    record = good(TEXT | {name: nothing})
    assert record == good(TEXT)


@pytest.mark.parametrize("nothing", [{}, {"ref": [], "bbox": []}, {"ref": None, "bbox": None}], ids=repr)
def test_places_in_images_without_a_place_are_none(nothing: Any) -> None:
    answers = {"prompt": [user("<image>q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    record = answers | {"images": ["a.jpg"], "objects": nothing}
    assert good(record).responses == ("a", "b")
    assert bad(record | {"objects": {"ref": ["x"], "bbox": [[1, 2, 3, 4]]}}).unread == ("objects",)
