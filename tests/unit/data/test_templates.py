"""Chat templates: ids of the tokenizer and of TRL, prompts that depend on responses, text that stays text."""

import json
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from dpo_dist.data.config import TEMPLATE_DATE, DataConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.records import BadRecord, Message, Origin, PreferenceRecord, Prompt, Response
from dpo_dist.data.text.render import trained_stops
from dpo_dist.data.text.template import pin_clock
from dpo_dist.data.text.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError
from tests.support import tiny
from tests.support.cache import prepare
from tests.support.chat_tokenizers import FAMILIES, tokenizer_of
from tests.support.pairs import CHAT, WIDE, encode, flags, reason_against, record, texts
from tests.support.records import TEXT, jsonl

CALL_ID = "call12345"
CITY = {"type": "string", "description": "its name"}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
CALLED = {"type": "function", "id": CALL_ID, "function": {"name": "weather", "arguments": {"city": "Bern"}}}
QUESTION, SYSTEM = Message("user", "What is the weather?"), Message("system", "Be brief.")
CALL = Message("assistant", "", {"tool_calls": [CALLED]})
RESULT = Message("tool", "umbrella", {"name": "weather", "tool_call_id": CALL_ID})
ANSWER, DOUBT = Message("assistant", "It rains."), Message("user", "Are you sure?")
LOOK, OFF = {"reasoning_content": "Look."}, {"enable_thinking": False}


def pair(*responses: Response, prompt: Prompt = (QUESTION,), **fields: Any) -> PreferenceRecord:
    return PreferenceRecord(prompt, responses, Origin("here", 1), **fields)


TURNS = (ANSWER, DOUBT, Message("assistant", "Yes."))
RECORDS = {
    "plain": pair("Rain.", "No."),
    "system": pair("Rain.", "No.", prompt=(SYSTEM, QUESTION)),
    "multi_turn": pair("Yes.", "No.", prompt=(QUESTION, ANSWER, DOUBT)),
    "tools": pair("Rain.", "No.", prompt=(QUESTION, CALL, RESULT), tools=(TOOL,)),
    "call": pair((CALL,), "No.", tools=(TOOL,)),
    "turns_with_tool": pair((CALL, RESULT, ANSWER), "No.", tools=(TOOL,)),
    "turns": pair(TURNS, "I do not know."),
    "thought": pair((Message("assistant", "Rain.", LOOK),), (Message("assistant", "No.", LOOK),)),
}
# Their contents are lists of parts.
IN_PARTS = ["idefics3", "llava_next", "smolvlm"]
WITHOUT_TOOLS = ["gemma3", "phi3", "deepseek_r1_distill", "cohere2", *IN_PARTS]
# These templates write thoughts of a field; DeepSeek's continue the thought that the prompt opens.
WITH_THOUGHTS = ["qwen3", "qwen3_5_nothink_training", "qwen3_6", "gptoss", "glm4moe", "nemotron_3_nano"]
WITH_THOUGHTS += ["qwen3_5_think"]
# These end an empty thought in the prompt if thinking is off.
ENDING = ["qwen3", "qwen3_6", "glm4moe", "smollm3", "nemotron_3_nano"]
TURN_ENDS = ("<|eot_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|user|>")
# The stop token of a turn, if it is not the last one of the template's output.
ADDED_END = {"glm4moe": "<|endoftext|>"}
CASES = [
    (family, case)
    for family in FAMILIES
    for case, one in RECORDS.items()
    if not (one.tools and family in WITHOUT_TOOLS) and (case != "thought" or family in WITH_THOUGHTS)
]


def as_dict(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **message.fields}


def turns_of(record: PreferenceRecord, side: int) -> list[dict[str, Any]]:
    response = record.responses[side]
    turns = (Message("assistant", response),) if isinstance(response, str) else response
    return list(map(as_dict, turns))


def template_of(tokenizer: PreTrainedTokenizerFast) -> str:
    return pin_clock(str(tokenizer.chat_template), TEMPLATE_DATE)


def whole(tokenizer: PreTrainedTokenizerFast, record: PreferenceRecord, side: int, **more: Any) -> list[int]:
    turns, template = [*map(as_dict, record.prompt), *turns_of(record, side)], template_of(tokenizer)  # type: ignore[arg-type]
    if "['content'][0]" in template:
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return tokenizer.apply_chat_template(  # type: ignore[return-value]
        turns,
        chat_template=template,
        tools=list(record.tools) or None,
        return_dict=False,
        **more,
    )


def trained_text(tokenizer: PreTrainedTokenizerFast, example: EncodedExample, side: int = 0) -> str:
    return str(tokenizer.decode(example.responses[side][example.masks[side]]))


def assert_starts_whole(
    tokenizer: PreTrainedTokenizerFast,
    record: PreferenceRecord,
    found: EncodedExample,
    end: str | None = None,
    **more: Any,
) -> None:
    for side, response in enumerate(found.responses):
        ids, expected = [*found.prompt_ids, *response], whole(tokenizer, record, side, **more)
        if end is not None:
            assert ids.pop() == tokenizer.convert_tokens_to_ids(end)
        assert ids == expected[: len(ids)]
        assert str(tokenizer.decode(expected[len(ids) :])).strip() in ("", "<|endoftext|>")


@pytest.fixture(autouse=True)
def _arguments_as_text(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "deepseekv3" in request.node.name:
        text = json.dumps(CALLED["function"]["arguments"])  # type: ignore[index]
        monkeypatch.setitem(CALLED["function"], "arguments", text)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_ids_are_those_of_the_tokenizer_and_turns_of_the_assistant_count(family: str, case: str) -> None:
    tokenizer, what = tokenizer_of(family), RECORDS[case]
    found = encode(what, tokenizer)
    assert_starts_whole(tokenizer, what, found, ADDED_END.get(family))
    for side in (0, 1):
        text = trained_text(tokenizer, found, side)
        for turn in turns_of(what, side):
            part = "Bern" if turn.get("tool_calls") else turn["content"]
            assert (part in text) is (turn["role"] == "assistant"), (part, text)
        marks = ("<think>\n\n</think>", "<think></think>", "assistant<|end_header_id|>", "<|im_start|>")
        assert not any(mark in text for mark in marks)
        assert case != "thought" or "Look." in text
    if case == "turns":
        ends = tokenizer.convert_tokens_to_ids([str(tokenizer.eos_token), *TURN_ENDS])
        counted = found.responses[0][found.trained[0]].tolist()
        assert sum(token in ends for token in counted) == 2
        assert counted[-1] in ends


# TRL has no BOS that the template does not write, and keeps the text after the last turn.
@pytest.mark.parametrize("family", ["qwen3", "llama3_1", "mistral", "gptoss", "gemma3"])
@pytest.mark.parametrize("case", ["multi_turn", "tools", "turns_with_tool", "thought", "text"])
def test_ids_are_those_of_trl(family: str, case: str) -> None:
    if case != "text" and (family, case) not in CASES:
        pytest.skip("this template does not write all of the record")
    tokenizer = tokenizer_of(family)
    what = RECORDS.get(case, pair(" the answer\n", " I cannot", prompt="Q: What is it?\nA:"))
    row: dict[str, Any] = {"prompt": what.prompt, "chosen": what.responses[0], "rejected": what.responses[1]}
    if case != "text":
        row = {
            "prompt": list(map(as_dict, what.prompt)),  # type: ignore[arg-type]
            "chosen": turns_of(what, 0),
            "rejected": turns_of(what, 1),
            "tools": json.dumps(what.tools) if what.tools else None,
            "chat_template_kwargs": {"chat_template": template_of(tokenizer)},
        }
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    [prepared] = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list([row]), tokenizer, options, "train"
    )
    found = encode(what, tokenizer)
    prompt = found.prompt_ids.tolist()
    has_bos = case == "text" and tokenizer.bos_token_id is not None
    assert prompt[has_bos:] == prepared["prompt_ids"][prepared["prompt_ids"][:1] == prompt[:1] and has_bos :]
    for ids, name in zip(found.responses, ("chosen_ids", "rejected_ids"), strict=True):
        assert ids.tolist() == prepared[name][: len(ids)]


SPELLED = "<think>\nhm\n</think>\n\nRain."
IN_FIELD = (Message("assistant", "Rain.", {"reasoning_content": "hm"}),)
HALF, OTHER = "hm\n</think>\n\nRain.", "<think>\nno\n</think>\n\nNo."


@pytest.mark.parametrize("family", ENDING)
@pytest.mark.parametrize(("thinking", "by"), [(SPELLED, "run"), (IN_FIELD, "row")])
def test_a_thought_after_the_end_of_one_is_said(family: str, thinking: Response, by: str) -> None:
    if family == "smollm3" and thinking is IN_FIELD:
        return  # Its template omits such thoughts, which makes a bad record.
    tokenizer = tokenizer_of(family)
    config = replace(WIDE, template_arguments=OFF if by == "run" else None)
    fields = {"template_arguments": OFF} if by == "row" else {}
    for responses in ((thinking, "No."), ("No.", thinking), (thinking, OTHER)):
        found = encode(pair(*responses, **fields), tokenizer, config)
        assert "ended_thought_reopened" in found.changes
        prompt, *following = texts(found, tokenizer)
        assert prompt.rstrip().endswith("</think>")
        assert "hm" in following[responses.index(thinking)]
    assert "ended_thought_reopened" not in encode(pair("Rain.", "No.", **fields), tokenizer, config).changes
    assert "ended_thought_reopened" not in encode(pair(thinking, "No."), tokenizer).changes


@pytest.mark.parametrize("family", sorted({*WITH_THOUGHTS, *ENDING, "deepseek_r1_distill", "llama3_1"}))
@pytest.mark.parametrize("thinking", [SPELLED, IN_FIELD, HALF, "<think>\nhm", "a <think> b"])
def test_a_thought_of_one_side_is_encoded_alike_on_both(family: str, thinking: Response) -> None:
    tokenizer = tokenizer_of(family)
    one, other = (
        encode_pair(pair(*sides), WIDE, tokenizer) for sides in ((thinking, "No."), ("No.", thinking))
    )
    if isinstance(one, BadRecord) or isinstance(other, BadRecord):
        assert one == other
        return
    prompt, first, second = texts(one, tokenizer)
    assert texts(other, tokenizer) == [prompt, second, first]
    assert one.changes == other.changes
    assert "hm" in first or "<think>" in first or "content_not_rendered" in one.changes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinking", [Message("assistant", SPELLED), *IN_FIELD], ids=["spelled", "field"])
def test_the_thought_of_a_last_turn_is_written_or_counted(family: str, thinking: Message) -> None:
    tokenizer = tokenizer_of(family)
    found = encode(pair((ANSWER, DOUBT, thinking), OTHER), tokenizer, WIDE)
    _, first, _ = texts(found, tokenizer)
    assert ("hm" in first) is ("content_not_rendered" not in found.changes)


@pytest.mark.parametrize("family", ["qwen3_5_think", "qwen3_6", "nemotron_3_nano"])
@pytest.mark.parametrize(
    ("sides", "is_counted"),
    [
        (("Rain.", "No."), True),
        ((IN_FIELD, "No."), True),
        (("No.", SPELLED), True),
        (((CALL, RESULT, ANSWER), "No."), True),
        ((IN_FIELD, (Message("assistant", "No.", LOOK),)), False),
        (((replace(CALL, fields=CALL.fields | LOOK), RESULT, ANSWER), IN_FIELD), False),
    ],
)
def test_responses_without_a_thought_after_an_opened_one_are_counted(
    family: str, sides: tuple[Response, Response], is_counted: bool
) -> None:
    counted = "opened_thought_removed" in encode(pair(*sides), tokenizer_of(family)).changes
    assert counted is is_counted
    off = encode(pair("Rain.", "No.", template_arguments=OFF), tokenizer_of(family))
    assert "opened_thought_removed" not in off.changes


THOUGHT = Message("assistant", "", LOOK)
SAYING = tiny.CHATML.replace("{{ message['content'] }}", "says: {{ message['content'] }}")


@pytest.mark.parametrize(
    ("family", "response"),
    [
        ("phi3", (CALL,)),
        ("smolvlm", (CALL, RESULT, ANSWER)),
        ("phi3", (THOUGHT,)),
        ("of a template with words around a content", (CALL,)),
        ("cohere2", (THOUGHT,)),
        ("smolvlm", (CALL,)),
    ],
)
def test_a_turn_of_which_the_template_writes_nothing_is_no_response(family: str, response: Response) -> None:
    tokenizer = tokenizer_of(family) if family in FAMILIES else tiny.with_template(tiny.qwen(), SAYING)
    for responses in ((response, "No."), ("No.", response), ("No.", "Rain.", response), (response,)):
        assert reason_against(pair(*responses, tools=(TOOL,)), tokenizer) == "turn_not_rendered"
    spoken = replace(response[0], content="I look.")
    found = encode(pair((spoken, *response[1:]), "No.", tools=(TOOL,)), tokenizer)
    assert "content_not_rendered" in found.changes
    untrained = replace(CALL, is_trained=False)
    assert encode(pair((untrained, RESULT, ANSWER), "No."), tokenizer_of("smolvlm")).prompt_ids.size


# Ends of turns, and the tokens that end a response, without EOS.
ENDS = {
    "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", set()),
    "gptoss": ("<|return|>", {"<|call|>"}),
    "llama3_1": ("<|eot_id|>", set()),
    "gemma3": ("<end_of_turn>", {"<end_of_turn>"}),
    "phi3": ("<|end|>", {"<|end|>"}),
    "glm4moe": ("<|endoftext|>", set()),
    "qwen3": ("<|im_end|>", set()),
}


@pytest.mark.parametrize("family", ENDS)
def test_tokens_that_end_a_response(family: str) -> None:
    tokenizer = tokenizer_of(family)
    end, stops = ENDS[family]
    assert tokenizer_facts(tokenizer).end_of_turn == end
    found = tokenizer.convert_ids_to_tokens(trained_stops(tokenizer, WIDE))
    assert set(found) >= {tokenizer.eos_token} | stops


@pytest.mark.parametrize(("family", "case"), CASES)
def test_each_trained_turn_ends_where_generation_stops(family: str, case: str) -> None:
    """Also a call before its result; gpt-oss ends an earlier answer by a token that stands within turns."""
    tokenizer = tokenizer_of(family)
    stops, found = trained_stops(tokenizer, WIDE), encode(RECORDS[case], tokenizer)
    for ids, mask in zip(found.responses, found.masks, strict=True):
        starts = [0, *np.flatnonzero(np.diff(mask)) + 1]
        ends = [*starts[1:], len(ids)]
        for start, end in zip(starts, ends, strict=True):
            is_idle = (family, case, end < len(ids)) == ("gptoss", "turns", True)
            expected = [end - 1] if mask[start] and not is_idle else []
            assert [at for at in range(start, end) if mask[at] and ids[at] in stops] == expected


def test_a_response_ends_as_an_earlier_turn_does() -> None:
    """Not with a prompt that a template always writes, nor twice if its end of text is the end of a turn."""
    always = tiny.LLAMA3.replace("{% if add_generation_prompt %}", "{% if true %}")
    tokenizer = tiny.with_template(tiny.llama3(), always)
    assert texts(encode(record(CHAT), tokenizer), tokenizer)[1] == "It is Paris.<|eot_id|>"
    closing = tiny.CHATML.replace(
        "{% if", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if", 1
    )
    lined = tiny.CHATML.replace("<|im_end|>", "<|im_end|>--")
    for template in (closing, closing.replace("<|im_end|>\n", "<|im_end|>"), lined):
        tokenizer = tiny.with_template(tiny.qwen(), template)
        assert texts(encode(record(CHAT), tokenizer), tokenizer)[1] == "It is Paris.<|im_end|>"


def test_a_turn_ends_with_the_start_of_the_next_one_where_nothing_else_ends_it() -> None:
    """In Nemotron's form a line end stands before that token."""
    form = "{% for m in messages %}{% if m.role == 'user' %}{{ '\\n<extra_id_1>User\\n' + m.content + "
    form += "'\\n<extra_id_1>Assistant\\n' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = tiny.with_template(tiny.qwen(), form)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_1>"]})
    found = encode(RECORDS["turns"], tokenizer)
    ids, mask = found.responses[0], found.masks[0]
    first = tokenizer.decode(ids[: np.flatnonzero(np.diff(mask))[0] + 1])
    assert first.endswith("\n<extra_id_1>")


def test_a_header_that_is_written_in_the_loop_is_not_trained() -> None:
    """As those of Zephyr, Tulu and OLMo 2."""
    loop, prompt = tiny.CHATML.split("{% endfor %}")
    inside = prompt.replace("if add", "if loop.last and add") + "{% endfor %}"
    usual, found = (
        encode(RECORDS["turns"], tiny.with_template(tiny.qwen(), template))
        for template in (tiny.CHATML, loop + inside)
    )
    assert texts(found, tiny.qwen()) == texts(usual, tiny.qwen())
    assert found.masks[0].tolist() == usual.masks[0].tolist()
    assert found.changes == usual.changes


LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MIXED = tiny.CHATML.replace(
    "{{ message['content'] }}",
    "{% if message.role == 'user' %}{{ message.content[0].text }}{% else %}{{ message.content }}{% endif %}",
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAVA, ["USER: What is the capital? ASSISTANT:", " It is Paris.<|im_end|>"]),
        (
            MIXED,
            [
                "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n",
                "It is Paris.<|im_end|>",
            ],
        ),
    ],
)
def test_contents_are_parts_where_the_template_reads_no_other(template: str, expected: list[str]) -> None:
    tokenizer = tiny.with_template(tiny.qwen(), template)
    found = encode(record(CHAT), tokenizer)
    assert texts(found, tokenizer)[:2] == expected
    assert found.changes == set()


# As DeepSeek-R1's distilled models: thoughts of earlier answers are cut, the prompt opens the next one.
R1 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|im_start|>{{ message['content'] }}"
    "{% else %}<|im_end|>{{ message['content'].split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
ASKED = "<|im_start|>What is the capital?<|im_end|>"


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", ""])
def test_responses_continue_an_opened_thought(opening: str) -> None:
    tokenizer, sides = tiny.with_template(tiny.qwen(), R1), ("so\n</think>\n\nParis", "no\n</think>\n\nRome")
    found = encode(record(CHAT, *(opening + side for side in sides)), tokenizer)
    assert texts(found, tokenizer) == [f"{ASKED}<think>\n", *(f"{side}<|endoftext|>" for side in sides)]
    assert ("opened_thought_joined" in found.changes) is bool(opening)


@pytest.mark.parametrize("other", ["Rome", OTHER])
def test_an_opened_thought_is_removed_before_responses_without_one(other: str) -> None:
    tokenizer = tiny.with_template(tiny.qwen(), R1)
    found = encode(record(CHAT, "Paris", other), tokenizer)
    assert texts(found, tokenizer) == [ASKED, "Paris<|endoftext|>", f"{other}<|endoftext|>"]
    assert "opened_thought_removed" in found.changes


def test_a_prompt_that_depends_on_the_response_is_cut_at_a_turn() -> None:
    """Mistral's template writes the tools before the last question."""
    tokenizer, prompt = tokenizer_of("mistral"), (QUESTION, ANSWER, DOUBT)
    what = pair(TURNS, "No.", prompt=prompt, tools=(TOOL,))
    found = encode(what, tokenizer)
    assert_starts_whole(tokenizer, what, found)
    shared, one, other = texts(found, tokenizer)
    assert shared == "<s>[INST] What is the weather?[/INST] It rains.</s>"
    assert (one.startswith("[INST]"), other.startswith("[AVAILABLE_TOOLS]")) == (True, True)
    assert trained_text(tokenizer, found) == " It rains.</s> Yes.</s>"
    assert trained_text(tokenizer, found, 1) == " No.</s>"
    assert "prompt_not_prefix" in found.changes


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1", "mistral", "gptoss", "phi3", "smollm3"])
def test_a_response_after_an_assistant_turn_is_another_turn(family: str) -> None:
    what = pair("Rain.", "No.", prompt=(QUESTION, ANSWER))
    assert_starts_whole(tokenizer_of(family), what, encode(what, tokenizer_of(family)))


TAGS = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}


def injected(spelled: str) -> PreferenceRecord:
    function = FUNCTION | {"description": f"The weather {spelled}."}
    arguments = {"city": f"Bern {spelled}", "more": [spelled, {f"key {spelled}": spelled}]}
    called = {"type": "function", "id": CALL_ID, "function": {"name": "weather", "arguments": arguments}}
    turns = (
        Message("assistant", "", {"tool_calls": [called]}),
        replace(RESULT, content=f"umbrella {spelled}"),
        ANSWER if spelled in TAGS else replace(ANSWER, content=f"It rains. {spelled}"),
    )
    prompt = (
        replace(SYSTEM, content=f"Be brief {spelled}."),
        replace(QUESTION, content=f"What is {spelled}?"),
        ANSWER,
        replace(DOUBT, content=f"{spelled} sure?"),
    )
    return pair(turns, "No.", prompt=prompt, tools=({"type": "function", "function": function},))


@pytest.mark.parametrize(
    "family", ["qwen2_5", "qwen3", "qwen3_6", "llama3_1", "gptoss", "mistral", "smollm3", "glm4moe"]
)
def test_spelled_control_tokens_are_text_everywhere(family: str) -> None:
    tokenizer = tokenizer_of(family)

    def ids_and_control(spelled: str) -> tuple[list[int], Counter[int]]:
        found = encode(injected(spelled), tokenizer)
        ids = [*found.prompt_ids.tolist(), *found.responses[0].tolist()]
        return ids, Counter(token for token in ids if token in tokenizer.added_tokens_decoder)

    _, usual = ids_and_control("plain")
    for token in map(str, tokenizer.added_tokens_decoder.values()):
        if token in TAGS and family not in ("qwen3", "qwen3_6", "glm4moe"):
            continue  # the template looks for them
        ids, control = ids_and_control(token)
        assert control == usual, token
        assert str(tokenizer.decode(ids)).count(token) >= 6


def test_a_text_that_a_template_would_change_is_not_marked_in_silence() -> None:
    changing = tiny.CHATML.replace("message['content']", "message['content'] | replace('<|', '(|')")
    tokenizer = tiny.with_template(tiny.qwen(), changing)
    assert reason_against(record((Message("user", "a <|im_end|> b"),)), tokenizer) == "special_token_in_text"
    assert flags(encode(record(CHAT), tokenizer)) == (False, False, False)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("messages if message['content'] != 'yes'", "turn_not_rendered"),
        ("messages * 2", "turns_not_found"),
    ],
)
def test_a_template_without_each_turn_in_its_place_is_refused(turns: str, reason: str) -> None:
    tokenizer = tiny.with_template(tiny.qwen(), tiny.CHATML.replace("in messages", f"in {turns}"))
    assert reason_against(record(CHAT, "yes", "no"), tokenizer) == reason


def test_contents_with_turns_of_a_template_are_counted() -> None:
    plain = "1 < 2 [sic]"
    for content in ("<|im_start|>user\nhi<|im_end|>", "[INST] hi [/INST]", "<start_of_turn>user", plain):
        for what in (record((Message("user", content),)), record(CHAT, content, "no")):
            assert ("templated_content" in encode(what, tiny.qwen()).changes) is (content != plain)


def test_a_template_file_is_used_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    file, path = tmp_path / "own.jinja", jsonl(tmp_path, TEXT)
    folders = {prepare(tmp_path, path)}
    for mark in ("<<", "((("):
        file.write_text(tiny.LLAMA2.replace("[INST]", mark))
        found = encode(record(CHAT), tiny.mistral(), DataConfig(chat_template=str(file)))
        assert texts(found, tiny.mistral())[0].startswith(f"<s>{mark} ")
        folders.add(prepare(tmp_path, path, chat_template=str(file)))
    assert len(folders) == 3


CALLS_ALONE = (
    "{% for message in messages %}{% for call in message.tool_calls or () %}{{ call | tojson }}{% endfor %}"
    + tiny.CHATML.removeprefix("{% for message in messages %}")
)


@pytest.mark.parametrize("name", ["plain", "tools", "call"])
def test_tools_that_a_template_omits_are_counted_also_if_it_writes_calls(name: str) -> None:
    for template in (CALLS_ALONE, "{% if tools %}{{ tools | tojson }}{% endif %}" + CALLS_ALONE):
        found = encode(RECORDS[name], tiny.with_template(tiny.qwen(), template))
        is_omitted = name != "plain" and template == CALLS_ALONE
        assert ("tools_not_rendered" in found.changes) == is_omitted


def test_the_template_of_the_tokenizer_for_tools_is_used() -> None:
    tokenizer = tiny.with_template(tiny.qwen(), None)
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": "{{ tools | tojson }}" + tiny.CHATML}
    with_tools = replace(record(CHAT), tools=(TOOL,))
    for what, start in ((record(CHAT), "<|im_start|>"), (with_tools, '[{"type": "function"')):
        assert texts(encode(what, tokenizer), tokenizer)[0].startswith(start)
    # Each template of the tokenizer reads an argument that the other one does not.
    tokenizer.chat_template["tool_use"] += "{{ volume }}"
    tokenizer.chat_template["default"] += "{{ tone }}"
    arguments = {"volume": "high", "tone": "low"}
    assert encode(record(CHAT), tokenizer, DataConfig(template_arguments=arguments)).prompt_ids.size
    with pytest.raises(ConfigError, match="does not exist"):
        encode(record(CHAT), tokenizer, DataConfig(chat_template="tool_use"))


def test_arguments_of_a_template(tmp_path: Path) -> None:
    tokenizer, usual = tokenizer_of("qwen3"), texts(encode(record(CHAT), tokenizer_of("qwen3")), tiny.qwen())
    off = DataConfig(template_arguments=OFF)
    for arguments in ({"enable_thinking": True}, {"enable_thinking": True, "budget": 3, "tokenize": True}):
        found = encode(replace(record(CHAT), template_arguments=arguments), tokenizer, off)
        assert texts(found, tiny.qwen()) == usual
        assert ("unknown_template_argument" in found.changes) is (len(arguments) > 1)
    assert texts(encode(record(CHAT), tokenizer, off), tokenizer)[0].endswith("<think>\n\n</think>\n\n")
    with pytest.raises(ConfigError, match="no such argument") as raised:
        encode(record(CHAT), tokenizer, DataConfig(template_arguments={"enable_thinkin": False}))
    assert "enable_thinking" in raised.value.expected
    with pytest.raises(ConfigError, match="no such argument"):
        prepare(tmp_path, jsonl(tmp_path, TEXT), template_arguments={"messages": []})


def test_the_clock_of_a_template_stands_still() -> None:
    date = "100%%, %%Y, %%%Y, %R %D %h %C %e"
    pinned = pin_clock(f"{{% if x %}}\n{{{{ strftime_now('{date}') }}}}", "2031-01-02")
    assert json.dumps(datetime(2031, 1, 2).strftime(date)) in pinned
    with_clock = tiny.with_template(tiny.qwen(), "{{ strftime_now('%d %b %Y') }}" + tiny.CHATML)
    assert texts(encode(record(CHAT), with_clock), with_clock)[0].startswith("26 Jul 2024")
