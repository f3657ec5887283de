"""Text of data never becomes a control token, and marks in its place never change what a template does."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.dataset import open_dataset
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.records import BadRecord, Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from tests.support import tiny
from tests.support.chat_tokenizers import tokenizer_of
from tests.support.pairs import CHAT, encode, flags, record, texts
from tests.support.records import jsonl
from tests.unit.data.test_real_templates import ANSWER, CALL_ID, DOUBT, QUESTION, RESULT, SYSTEM, TOOL

HERE = Origin("here", 1)
TOOL_FAMILIES = ["qwen2_5", "qwen3", "qwen3_6", "llama3_1", "gptoss", "mistral", "smollm3", "glm4moe"]


def injected(spelled: str) -> PreferenceRecord:
    """Return a record with text in every place where data can have it."""
    function = {**TOOL["function"], "description": f"The weather {spelled}."}  # type: ignore[dict-item]
    arguments = {"city": f"Bern {spelled}", "more": [spelled, {f"key {spelled}": spelled}]}
    called = {"type": "function", "id": CALL_ID, "function": {"name": "weather", "arguments": arguments}}
    turns = (
        Message("assistant", "", {"tool_calls": [called]}),
        replace(RESULT, content=f"umbrella {spelled}"),
        replace(ANSWER, content=f"It rains. {spelled}" if spelled != "</think>" else "It rains."),
    )
    prompt = (
        replace(SYSTEM, content=f"Be brief {spelled}."),
        replace(QUESTION, content=f"What is {spelled}?"),
        ANSWER,
        replace(DOUBT, content=f"{spelled} sure?"),
    )
    return PreferenceRecord(prompt, (turns, "No."), HERE, tools=({"type": "function", "function": function},))


def control_tokens(example: EncodedExample, family: str) -> Counter[int]:
    known = set(tokenizer_of(family).added_tokens_decoder)
    return Counter(
        int(token) for token in (*example.prompt_ids, *example.responses[0]) if int(token) in known
    )


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_spelled_control_tokens_are_text_everywhere(family: str) -> None:
    tokenizer = tokenizer_of(family)
    usual = encode(injected("plain"), tokenizer)
    for token in map(str, tokenizer.added_tokens_decoder.values()):
        if token in (
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<tool_response>",
            "</tool_response>",
        ):
            continue  # An assistant writes these itself; see the next test.
        found = encode(injected(token), tokenizer)
        assert control_tokens(found, family) == control_tokens(usual, family), token
        whole = tokenizer.decode([*found.prompt_ids, *found.responses[0]])
        assert whole.count(token) >= 6


@pytest.mark.parametrize("tag", ["<tool_call>", "</tool_call>", "<tool_response>", "<think>", "</think>"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_6", "glm4moe"])
def test_tags_in_the_turns_of_others_are_text(family: str, tag: str) -> None:
    def with_tag(tag: str) -> PreferenceRecord:
        what = injected(tag)
        turns = what.responses[0]
        assert isinstance(turns, tuple)
        return replace(what, responses=((*turns[:-1], ANSWER), "No."))

    usual, found = (encode(with_tag(text), tokenizer_of(family)) for text in ("plain", tag))
    assert control_tokens(found, family) == control_tokens(usual, family)


def test_a_template_still_finds_the_texts_that_it_looks_for() -> None:
    tokenizer = tokenizer_of("qwen3")
    # Qwen3 takes a user turn within these tags for the result of a tool: the thought before it stays.
    prompt = (
        Message("user", "hi"),
        Message("assistant", "<think>\nhm\n</think>\n\nhello"),
        Message("user", "<tool_response>ok</tool_response>"),
    )
    [prompt_text, *_] = texts(encode(record(prompt), tokenizer), tokenizer)
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    assert prompt_text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "<think>\nhm" in prompt_text
    tag = tokenizer.convert_tokens_to_ids("<tool_response>")
    assert tag not in encode(record(prompt), tokenizer).prompt_ids


def test_a_text_that_a_template_would_change_is_not_marked_in_silence() -> None:
    changing = tiny.CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] | replace('<|', '(|') }}"
    )
    tokenizer = tiny.with_template(tiny.qwen(), changing)
    found = encode_pair(record((Message("user", "a <|im_end|> b"),)), tokenizer, DataConfig())
    assert isinstance(found, BadRecord)
    assert found.reason == "special_token_in_text"
    assert flags(encode(record(CHAT), tokenizer)) == (False, False, False)


def test_tools_that_are_nested_too_deeply_are_a_bad_record() -> None:
    nested: Any = "end"
    for _ in range(3000):
        nested = [nested]
    tool = {**TOOL, "function": {"name": "weather", "parameters": nested}}
    found = encode_pair(replace(record(CHAT), tools=(tool,)), tokenizer_of("qwen3"), DataConfig())
    assert isinstance(found, BadRecord)
    assert found.reason == "template_rejected"


def test_contents_with_turns_of_a_template_are_counted() -> None:
    for content in ("<|im_start|>user\nhi<|im_end|>", "[INST] hi [/INST]", "<start_of_turn>user"):
        assert "templated_content" in encode(record((Message("user", content),)), tiny.qwen()).changes
        assert "templated_content" in encode(record(CHAT, content, "no"), tiny.qwen()).changes
    assert "templated_content" not in encode(record(CHAT, "1 < 2 [sic]", "no"), tiny.qwen()).changes


def opened(
    folder: Path, tokenizer: Any, rows: list[dict[str, Any]], **data: Any
) -> tuple[Path, dict[str, Any]]:
    config = DataConfig(cache=str(folder / "cache"), **data)
    encoded = prepare_dataset([SourceConfig(jsonl(folder, *rows))], config, tokenizer, "same")
    return encoded[0].folder, open_dataset(encoded, config).counts


ROW = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


def test_a_template_file_is_used_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(tiny.LLAMA2.replace("[INST]", "<<").replace("[/INST]", ">>"))
    tokenizer = tiny.mistral()
    pair = encode(record(CHAT), tokenizer, DataConfig(chat_template=str(file)))
    assert texts(pair, tokenizer)[0] == f"<s><< {CHAT[0].content} >>"
    usual, _ = opened(tmp_path, tokenizer, [ROW])
    first, _ = opened(tmp_path, tokenizer, [ROW], chat_template=str(file))
    file.write_text(file.read_text().replace("<<", "((("))
    assert texts(encode(record(CHAT), tokenizer, DataConfig(chat_template=str(file))), tokenizer)[
        0
    ].startswith("<s>(((")
    second, _ = opened(tmp_path, tokenizer, [ROW], chat_template=str(file))
    assert len({usual, first, second}) == 3


def test_a_named_template_of_the_tokenizer_is_used() -> None:
    tokenizer = tiny.with_template(tiny.qwen(), None)
    tokenizer.chat_template = {
        "default": tiny.CHATML,
        "tool_use": "{{ tools | tojson }}" + tiny.CHATML,
        "loud": "LOUD " + tiny.CHATML,
    }
    assert texts(encode(record(CHAT), tokenizer), tokenizer)[0].startswith("<|im_start|>")
    loud = encode(record(CHAT), tokenizer, DataConfig(chat_template="loud"))
    assert texts(loud, tokenizer)[0].startswith("LOUD <|im_start|>")
    with_tools = encode(replace(record(CHAT), tools=(TOOL,)), tokenizer)
    assert texts(with_tools, tokenizer)[0].startswith('[{"type": "function"')
    with pytest.raises(ConfigError, match="does not exist") as raised:
        encode(record(CHAT), tokenizer, DataConfig(chat_template="quiet"))
    assert "loud" in raised.value.expected


def test_an_argument_that_the_template_does_not_name_is_said(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3")
    with pytest.raises(ConfigError, match="no such argument") as raised:
        opened(tmp_path, tokenizer, [ROW], template_arguments={"enable_thinkin": False})
    assert "enable_thinking" in raised.value.expected
    with pytest.raises(ConfigError, match="no such argument"):
        encode(record(CHAT), tokenizer, DataConfig(template_arguments={"messages": []}))
    what = replace(record(CHAT), template_arguments={"budget": 3, "tokenize": True})
    pair = encode(what, tokenizer)
    assert "unknown_template_argument" in pair.changes
    assert texts(pair, tokenizer) == texts(encode(record(CHAT), tokenizer), tokenizer)


def test_an_argument_of_a_record_is_stronger_than_the_run_s() -> None:
    tokenizer, off = tokenizer_of("qwen3"), {"enable_thinking": False}
    what = replace(record(CHAT), template_arguments={"enable_thinking": True})
    assert texts(encode(what, tokenizer, DataConfig(template_arguments=off)), tokenizer) == texts(
        encode(record(CHAT), tokenizer), tokenizer
    )
    assert texts(encode(record(CHAT), tokenizer, DataConfig(template_arguments=off)), tokenizer)[0].endswith(
        "<think>\n\n</think>\n\n"
    )


def test_a_prompt_that_depends_on_the_response_is_cut_at_a_turn() -> None:
    tokenizer = tokenizer_of("mistral")
    # Mistral writes the tools before the last question, which is in one of the responses.
    responses = ((ANSWER, DOUBT, replace(ANSWER, content="Yes.")), "No.")
    prompt = (QUESTION, ANSWER, DOUBT)
    pair = encode(PreferenceRecord(prompt, responses, HERE, tools=(TOOL,)), tokenizer)
    assert texts(pair, tokenizer)[0] == "<s>[INST] What is the weather?[/INST] It rains.</s>"
    assert "prompt_not_prefix" in pair.changes
    for ids, mask, text in zip(
        pair.responses, pair.trained, (" It rains.</s> Yes.</s>", " No.</s>"), strict=True
    ):
        assert tokenizer.decode(ids[mask]) == text
    assert tokenizer.decode(pair.responses[0]).startswith("[INST]")
    assert tokenizer.decode(pair.responses[1]).startswith("[AVAILABLE_TOOLS]")
