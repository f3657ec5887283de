"""What each form of a record becomes: prompt and responses, or the reason why it is dropped."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dpo_dist.config.data import DataFormat
from dpo_dist.config.rules import OTHER_ROLE_NAMES
from dpo_dist.data.formats import read_records
from dpo_dist.data.prompts import parse_prompt
from dpo_dist.data.records import BadRecord, Dialogue, Message, Origin, PreferenceRecord
from tests.support.records import TEXT, assistant, bad, good, jsonl, user

H = "\n\nHuman: q\n\nAssistant:"
SYSTEM = {"role": "system", "content": "be kind"}
Q, KIND = ["user", "q"], ["system", "be kind"]
PAIR = {"chosen": "good", "rejected": "bad"}
CHAT = PAIR | {"prompt": [user("q")]}
WHOLE = {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
HH = {"chosen": H + " good", "rejected": H + " bad"}
RANKED = {"prompt": "q", "responses": ["good", "bad", "worse"]}
COMPLETION = {"prompt": "q", "completion": "good"}
EVERY = {"text": TEXT, "chat": CHAT, "whole": WHOLE, "ranked": RANKED, "completion": COMPLETION, "hh": HH}
DONE = [user("q"), assistant("good")]


def turn(role: str, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


def seen(turns: str | tuple[Message, ...]) -> Any:
    """Return a text, or role, content and other fields of messages."""
    if isinstance(turns, str):
        return turns
    return [[one.role, one.content, *([one.fields] if one.fields else [])] for one in turns]


def read(fields: Any, format_: DataFormat = DataFormat.auto) -> tuple[Any, list[Any]]:
    record = good(fields, format_)
    return seen(record.prompt), list(map(seen, record.responses))


CORPUS = [json.loads(line) for line in (Path(__file__).parent / "formats.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", CORPUS, ids=lambda row: str(row["record"])[:80])
def test_a_record_of_the_corpus_becomes_what_its_row_says(row: dict[str, Any]) -> None:
    """A row has a record, and either its prompt, responses and scores or the reason why it is dropped."""
    if "reason" in row:
        found = bad(row["record"])
        expected = (row["reason"], row.get("unread", []), row.get("detail", found.detail))
        assert (found.reason, list(found.unread), found.detail) == expected
        return
    record = good(row["record"])
    if row.get("hh"):
        assert isinstance(record.prompt, Dialogue)
    prompt = record.prompt.text if isinstance(record.prompt, Dialogue) else seen(record.prompt)
    scores = None if record.scores is None else list(record.scores)
    expected = (row["prompt"], row["responses"], row.get("scores", scores))
    assert (prompt, list(map(seen, record.responses)), scores) == expected
    if row["prompt"] == [Q]:
        with_system = good(row["record"] | {"system": "be kind"})
        assert (seen(with_system.prompt), with_system.responses) == ([KIND, Q], record.responses)


def test_a_dialogue_is_split_at_its_last_response() -> None:
    history = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    prompt, responses = read({"chosen": history + " yes", "rejected": history + " no "})
    assert prompt == [["user", "a"], ["assistant", "b"], ["user", "c"]]
    assert responses == [" yes", " no "]
    told = PAIR | {"prompt": "Write a talk.", "chosen": H.strip() + " a"}
    assert read(told)[0] == "Write a talk."


def test_texts_alone_part_as_in_trl() -> None:
    from trl.data_utils import extract_prompt  # slow to import

    fields = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    split = extract_prompt(fields)
    assert read(fields) == (split["prompt"], [split["chosen"], split["rejected"]])


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
    compared = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 3, "score_B": 12}
    assert good(compared | {"labels": 0}).scores == (12.0, 3.0)


CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLS = [{"type": "function", "function": CALL}]
CALLING = ["assistant", "", {"tool_calls": CALLS}]
TOOL = {"name": "weather", "parameters": {"type": "object"}}


def test_turns_of_sharegpt_are_messages() -> None:
    turns = [turn("system", "be kind"), turn("human", "q"), turn("function_call", json.dumps(CALL))]
    record = good(
        PAIR | {"conversations": [*turns, turn("observation", "rain")], "tools": json.dumps([TOOL])}
    )
    assert seen(record.prompt) == [KIND, Q, CALLING, ["tool", "rain"]]
    assert record.tools == ({"type": "function", "function": TOOL},)


def test_every_other_name_of_a_role_becomes_one_of_a_template() -> None:
    for name in OTHER_ROLE_NAMES:
        content = json.dumps(CALL) if "call" in name else "x"
        found = good(PAIR | {"prompt": [{"role": name, "content": content}]})
        assert found.prompt[0].role in ("user", "assistant", "tool")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["loss_weight", "loss", "weight", "loss_scale", "train", "training"])
def test_weights_of_messages_say_which_turns_are_trained(name: str) -> None:
    turns = [user("q") | {name: 0.0}, assistant("a") | {name: False}, user("m"), assistant("b") | {name: 1.0}]
    record = good({"chosen": turns, "rejected": [user("q"), assistant("bad")]})
    assert seen(record.prompt) == [Q]
    assert [one.is_trained for one in record.responses[0]] == [False, None, True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "tools", [[TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL]), [json.dumps(TOOL)]]
)
@pytest.mark.parametrize("fields", [TEXT, CHAT, RANKED, PAIR | {"instruction": "q"}])
def test_tools_are_objects_with_a_function(fields: dict[str, Any], tools: Any) -> None:
    record = good(fields | {"tools": tools})
    assert record.tools == ({"type": "function", "function": TOOL},)
    assert seen(record.prompt) == [Q]


@pytest.mark.parametrize("thinking", [False, "false", "False", 0, "0"])
def test_arguments_of_the_template_are_read(thinking: Any) -> None:
    for arguments in ({"depth": 2}, '{"depth": 2, "enable_thinking": false}'):
        record = good(TEXT | {"chat_template_kwargs": arguments, "enable_thinking": thinking})
        assert record.template_arguments == {"depth": 2, "enable_thinking": False}
        assert seen(record.prompt) == [Q]
    assert good(TEXT | {"enable_thinking": None}).prompt == "q"


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, "[]", "{}", "null"])
@pytest.mark.parametrize("kind", EVERY)
def test_fields_without_effect_are_accepted(kind: str, nothing: Any) -> None:
    names = ("tools", "images", "system", "history", "input", "chat_template_kwargs")
    neutral = {"weight": "1.0", "margin": 0, "sample_weight": None, "instruction": " q "}
    assert good(EVERY[kind] | dict.fromkeys(names, nothing) | neutral) == good(EVERY[kind])


def test_a_field_that_repeats_a_part_of_the_prompt_is_accepted() -> None:
    for prompt in ("Question: {} Answer:", '"{}"', "Use this: {} Where?"):
        for name in ("input", "instruction", "question", "context"):
            assert good(TEXT | {"prompt": prompt.format("2 + 2?"), name: "2 + 2?"})


def test_the_configured_format_decides() -> None:
    fields = PAIR | {"prompt": "q", "chosen": H + " a", "rejected": H + " b"}
    assert read(fields, DataFormat.text)[0] == "q"
    assert good(fields, DataFormat.hh).prompt == Dialogue(H)
    assert read(fields, DataFormat.messages)[0] == [Q]
    both = TEXT | {"responses": ["x", "y"], "score_chosen": 2, "score_rejected": 1}
    assert read(both, DataFormat.text)[1] == ["good", "bad"]
    assert read(both, DataFormat.ranked)[1] == ["x", "y"]
    for one in (TEXT, {"prompt": "q", "chosen": "good"}, {"messages": DONE, "rejected_response": None}):
        assert read(one, DataFormat.completion)[1] == ["good"]


def test_plain_text_has_no_system_text() -> None:
    assert bad(TEXT | {"system": "be kind"}, DataFormat.text).unread == ("system",)
    assert bad(HH | {"prompt": "something else"}, DataFormat.hh).unread == ("prompt",)


def test_a_null_argument_is_kept_but_not_one_that_fills_a_table(tmp_path: Path) -> None:
    arguments = {"city": "Oslo", "date": None}
    as_object, as_text = (
        assistant("") | {"tool_calls": [{"function": CALL | {"arguments": given}}]}
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
        assert record.tools == ({"type": "function", "function": TOOL},)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "q"}, "q"),
        ({"prompt": [user("q")]}, [Q]),
        ({"messages": [user("q")]}, [Q]),
        ({"messages": DONE}, [Q]),
        ({"prompt": "q", "system": "be kind"}, [KIND, Q]),
        (TEXT, "q"),
        (TEXT | {"chosen": "bad"}, "q"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, "q"),
        (WHOLE, [Q]),
        (HH, [Q]),
        ({"text": "q"}, "unknown_format"),
        ({"prompt": 3}, "unknown_format"),
        ({"prompt": "  "}, "empty_prompt"),
        ({"prompt": "q", "images": ["a.png"]}, "unread_content"),
    ],
)
def test_the_prompt_of_a_record_needs_no_response(fields: dict[str, Any], expected: Any) -> None:
    found = parse_prompt(fields, DataFormat.auto, Origin("here", 1))
    if isinstance(found, BadRecord):
        assert found.reason == expected
    else:
        assert (seen(found.prompt), found.responses, found.scores) == (expected, (), None)
