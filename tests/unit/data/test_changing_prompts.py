"""Prompts that a template renders differently when a response follows: thoughts, system texts, turns."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpo_dist.data.records import BadRecord, Message, Messages, Origin, PreferenceRecord, Response
from dpo_dist.generation.pairs.prompts import encode_prompt
from tests.support import tiny
from tests.support.chat_tokenizers import FAMILIES, tokenizer_of
from tests.support.pairs import WIDE, encode, reason_against, texts
from tests.unit.data.test_real_templates import ANSWER, DOUBT, QUESTION, SYSTEM, Oracle, as_dict

HERE = Origin("here", 1)
OFF: dict[str, Any] = {"enable_thinking": False}
SPELLED = "<think>\nhm\n</think>\n\nRain."
IN_FIELD = (Message("assistant", "Rain.", {"reasoning_content": "hm"}),)
# These templates end an empty thought in the prompt if thinking is off.
ENDING = ["qwen3", "qwen3_6", "glm4moe", "smollm3", "nemotron_3_nano"]


def pair(*responses: Response, prompt: Messages = (QUESTION,), **fields: Any) -> PreferenceRecord:
    return PreferenceRecord(prompt, responses, HERE, **fields)


@pytest.mark.parametrize("family", ENDING)
@pytest.mark.parametrize("thinking", [SPELLED, IN_FIELD])
@pytest.mark.parametrize("by", ["run", "row"])
def test_a_thought_after_the_end_of_one_is_said(family: str, thinking: Response, by: str) -> None:
    if family == "smollm3" and thinking is IN_FIELD:
        return  # Its template omits such thoughts, which makes a bad record.
    tokenizer = tokenizer_of(family)
    fields, config = (
        ({}, replace(WIDE, template_arguments=OFF)) if by == "run" else ({"template_arguments": OFF}, WIDE)
    )
    for responses in ((thinking, "No."), ("No.", thinking), (thinking, "<think>\nno\n</think>\n\nNo.")):
        found = encode(pair(*responses, **fields), tokenizer, config)
        assert "ended_thought_reopened" in found.changes
        prompt, *following = texts(found, tokenizer)
        assert prompt.rstrip().endswith("</think>")
        assert "hm" in following[responses.index(thinking)]
    assert "ended_thought_reopened" not in encode(pair("Rain.", "No.", **fields), tokenizer, config).changes
    assert "ended_thought_reopened" not in encode(pair(thinking, "No."), tokenizer).changes


@pytest.mark.parametrize("thinking", [SPELLED, IN_FIELD, "hm\n</think>\n\nRain."])
@pytest.mark.parametrize("other", ["No.", "<think>\nno\n</think>\n\nNo."])
def test_a_thought_is_encoded_as_a_template_writes_it_that_ends_thoughts_by_itself(
    thinking: Response, other: str
) -> None:
    tokenizer = tokenizer_of("qwen3_5_nothink_training")
    for responses in ((thinking, other), (other, thinking)):
        record = pair(*responses)
        found = encode(record, tokenizer)
        assert "ended_thought_reopened" in found.changes
        for side, ids in enumerate(found.responses):
            whole = Oracle(tokenizer).whole(record, side)
            assert [*found.prompt_ids, *ids] == whole[: len(found.prompt_ids) + len(ids)]
    alone = tokenizer.apply_chat_template([as_dict(QUESTION)], tokenize=False, add_generation_prompt=True)
    assert texts(encode(pair("Rain.", "No."), tokenizer), tokenizer)[0] == alone
    prompt = encode_prompt(pair(), tokenizer, WIDE)  # of a model that responds
    assert not isinstance(prompt, BadRecord)
    assert tokenizer.decode(prompt) == alone


@pytest.mark.parametrize("family", ["qwen3", "qwen3_6", "glm4moe", "nemotron_3_nano"])
def test_the_thought_of_a_later_turn_counts_with_its_tags(family: str) -> None:
    tokenizer = tokenizer_of(family)
    turns = [(ANSWER, DOUBT, replace(IN_FIELD[0], content=text)) for text in ("Yes.", "No.")]
    found = encode(pair(*turns), tokenizer, replace(WIDE, template_arguments=OFF))
    for ids, mask in zip(found.responses, found.trained, strict=True):
        text = tokenizer.decode(ids[mask])
        assert text.count("<think>") == text.count("</think>") == 1
        assert text.index("It rains.") < text.index("<think>") < text.index("hm")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "thinking", [SPELLED, IN_FIELD, "hm\n</think>\n\nRain.", "<think>\nhm", "a <think> b"]
)
def test_a_thought_of_one_side_is_encoded_alike_on_both(family: str, thinking: Response) -> None:
    tokenizer = tokenizer_of(family)
    found = [encode_or_reason(pair(*sides), tokenizer) for sides in ((thinking, "No."), ("No.", thinking))]
    if isinstance(found[0], str):
        assert found[0] == found[1]
        return
    one, other = found
    assert one[:2] == (other[0], other[1][::-1])
    assert one[2] == other[2]
    assert "hm" in one[1][0] or "<think>" in one[1][0] or "content_not_rendered" in one[2]


def encode_or_reason(record: PreferenceRecord, tokenizer: PreTrainedTokenizerFast) -> Any:
    try:
        found = encode(record, tokenizer)
    except AssertionError:
        return reason_against(record, tokenizer)
    prompt, *following = texts(found, tokenizer)
    return prompt, following, found.changes


def test_a_control_token_in_an_opened_thought_before_a_call_is_text() -> None:
    tokenizer = tokenizer_of("deepseekv3")
    called = {"type": "function", "id": "c", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    fields = {"tool_calls": [called], "reasoning_content": f"hm {tokenizer.eos_token}"}
    turns = [(Message("assistant", f"I look{end}", fields),) for end in (".", "!")]
    found = encode(pair(*turns), tokenizer)
    assert "opened_thought_joined" in found.changes
    assert found.responses[0].tolist().count(tokenizer.eos_token_id) == 1
    text = str(tokenizer.decode(found.responses[0]))
    assert text.startswith(f"hm {tokenizer.eos_token}\n</think>\n\nI look.")


TWICE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
)


def test_turns_that_a_template_writes_twice_are_not_found() -> None:
    turns = [(ANSWER, DOUBT, replace(ANSWER, content=text)) for text in ("Yes.", "No.")]
    tokenizer = tiny.with_template(tiny.qwen(), TWICE)
    assert reason_against(pair(*turns), tokenizer) == "turns_not_found"


def with_system(place: str) -> PreTrainedTokenizerFast:
    """Return Mistral's tokenizer with the system text in another user turn than the first."""
    usual = tokenizer_of("mistral")
    return tiny.with_template(
        usual, str(usual.chat_template).replace("system if loop.first", f"system if {place}")
    )


LAST_TURN, LAST_USER = "loop.last", "loop.index0 == place.last_user"


@pytest.mark.parametrize("place", [LAST_TURN, LAST_USER])
@pytest.mark.parametrize("before", [(), (QUESTION, ANSWER)])
def test_a_response_follows_the_prompt_with_its_system_text(place: str, before: Messages) -> None:
    tokenizer, prompt = with_system(place), (SYSTEM, *before, DOUBT)
    found = encode(pair("Yes.", "No.", prompt=prompt), tokenizer)
    alone = tokenizer.apply_chat_template(
        list(map(as_dict, prompt)), tokenize=False, add_generation_prompt=True
    )
    assert texts(found, tokenizer) == [alone, " Yes.</s>", " No.</s>"]
    assert "Be brief.\n\nAre you sure?" in str(alone)
    assert ("prompt_not_prefix" in found.changes) is (place == LAST_TURN)
    assert "content_not_rendered" not in found.changes


def test_a_system_text_that_only_one_side_has_before_the_response_is_in_its_prompt() -> None:
    tokenizer = with_system(LAST_USER)
    turns = [(ANSWER, DOUBT, replace(ANSWER, content=text)) for text in ("Yes.", "Perhaps.")]
    record = pair(*turns, "No.", prompt=(SYSTEM, QUESTION))
    found = encode(record, tokenizer)
    for side, text in enumerate((" It rains.</s> Yes.</s>", " It rains.</s> Perhaps.</s>", " No.</s>")):
        ids, mask = found.responses[side], found.trained[side]
        assert [*found.prompt_ids, *ids] == Oracle(tokenizer).whole(record, side)
        assert tokenizer.decode(ids[mask]) == text
    assert texts(found, tokenizer)[0] == "<s>[INST]"
    assert "prompt_not_prefix" in found.changes


def test_a_system_text_that_the_template_omits_is_counted() -> None:
    turns = tuple((ANSWER, DOUBT, replace(ANSWER, content=text)) for text in ("Yes.", "No."))
    record = pair(*turns, prompt=(SYSTEM, QUESTION))
    assert "content_not_rendered" in encode(record, with_system(LAST_TURN)).changes
    assert "content_not_rendered" not in encode(record, with_system(LAST_USER)).changes
    without = tiny.with_template(
        tiny.qwen(),
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}<|im_end|>"
        "{% endfor %}",
    )
    assert "content_not_rendered" in encode(pair("a", "b", prompt=(SYSTEM, QUESTION)), without).changes
    assert "content_not_rendered" not in encode(pair("a", "b"), without).changes


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1", "mistral", "gptoss", "phi3", "smollm3"])
def test_a_response_after_an_assistant_turn_is_another_turn(family: str) -> None:
    tokenizer, record = tokenizer_of(family), pair("Rain.", "No.", prompt=(QUESTION, ANSWER))
    found = encode(record, tokenizer)
    for side, ids in enumerate(found.responses):
        whole = Oracle(tokenizer).whole(record, side)
        assert [*found.prompt_ids, *ids] == whole[: len(found.prompt_ids) + len(ids)]
        assert str(tokenizer.decode(whole[len(found.prompt_ids) + len(ids) :])).strip() in (
            "",
            "<|endoftext|>",
        )
