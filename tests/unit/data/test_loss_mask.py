"""The tokens that the loss counts: roles, markers, formatting, and what a record says itself."""

from dataclasses import replace
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig
from dpo_dist.data.encode import encode_pair
from dpo_dist.data.records import BadRecord, Message, Messages, Origin, PreferenceRecord
from tests.support.chat_tokenizers import tokenizer_of
from tests.support.pairs import encode

QUESTION = (Message("user", "What is the weather?"),)
ANSWER, DOUBT, LAST = (
    Message("assistant", "It rains."),
    Message("user", "Are you sure?"),
    Message("assistant", "Yes, <note>I think</note> so."),
)
TURNS = (ANSWER, DOUBT, LAST)


def counted(response: Messages | str, family: str = "qwen2_5", **data: Any) -> str:
    """Return the text of a response that the loss counts."""
    tokenizer = tokenizer_of(family)
    what = PreferenceRecord(QUESTION, (response, "another"), Origin("here", 1))
    pair = encode(what, tokenizer, DataConfig(**data))
    ids = pair.responses[0]
    return str(tokenizer.decode(ids[pair.trained[0]] if pair.trained else ids))


NOTE, THOUGHT = ["<note>...</note>"], "<think>\nLook.\n</think>\n\n"
IN_FIELD = (replace(ANSWER, fields={"reasoning_content": "Look."}),)
SAID = (replace(ANSWER, is_trained=False), replace(DOUBT, is_trained=True), LAST)
LITERAL = (Message("assistant", "a <|im_end|> b"), Message("user", "<|im_start|>c"), LAST)
RAIN, YES, END = "It rains.<|im_end|>", "Yes, <note>I think</note> so.<|im_end|>", "<|im_end|>"


@pytest.mark.parametrize(
    ("response", "family", "data", "expected"),
    [
        (TURNS, "qwen2_5", {}, RAIN + YES),
        (TURNS, "qwen2_5", {"trained_roles": ["user", "assistant"]}, f"{RAIN}Are you sure?{END}{YES}"),
        (SAID, "qwen2_5", {}, f"Are you sure?{END}{YES}"),
        (LITERAL, "qwen2_5", {}, f"a <|im_end|> b{END}{YES}"),
        (TURNS, "qwen2_5", {"untrained": ["formatting"]}, "It rains.Yes, <note>I think</note> so."),
        ((ANSWER,), "llama3_1", {"untrained": ["formatting"]}, "It rains."),
        (TURNS, "qwen2_5", {"untrained": NOTE}, f"{RAIN}Yes,  so.{END}"),
        # White space after a marker's end belongs to the text.
        ("<note>x</note>\n\nyes", "qwen2_5", {"untrained": NOTE}, f"\n\nyes{END}"),
        ("yes <note>cut", "qwen2_5", {"untrained": NOTE}, "yes "),
        ("a <note>b [c] d</note> e", "qwen2_5", {"untrained": [*NOTE, "[...]"]}, f"a  e{END}"),
        # An empty thought is the template's only at the start.
        ("yes\n<think>\n\n</think>\nno", "qwen2_5", {}, f"yes\n<think>\n\n</think>\nno{END}"),
        ("It rains.", "qwen3", {}, RAIN),
        ("It rains.", "qwen3", {"untrained": []}, f"<think>\n\n</think>\n\n{RAIN}"),
        *((turns, "qwen3", {}, THOUGHT + RAIN) for turns in (IN_FIELD, f"{THOUGHT}It rains.")),
        (f"{THOUGHT}It rains.", "qwen3", {"untrained": ["<think>...</think>"]}, RAIN),
        *((turns, "qwen3", {"untrained": ["thoughts"]}, RAIN) for turns in (IN_FIELD, f"{THOUGHT}It rains.")),
    ],
)
def test_counted_text(response: Messages | str, family: str, data: dict[str, Any], expected: str) -> None:
    assert counted(response, family, **data) == expected


@pytest.mark.parametrize(
    "turns", [(replace(ANSWER, is_trained=False),), (replace(ANSWER, is_trained=False), DOUBT)]
)
def test_a_response_without_counted_tokens_is_a_bad_record(turns: Messages) -> None:
    what = PreferenceRecord(QUESTION, (turns, "another"), Origin("here", 1))
    found = encode_pair(what, tokenizer_of("qwen2_5"), DataConfig())
    assert isinstance(found, BadRecord)
    assert found.reason == "no_trained_token"


@pytest.mark.parametrize(
    ("family", "data"),
    [
        ("qwen3", {"template_arguments": {"enable_thinking": False}}),
        ("qwen3_6", {}),
        ("deepseek_r1_distill", {}),
    ],
)
@pytest.mark.parametrize("start", ["<table>", "</p>", "<"])
def test_a_turn_may_start_like_the_tag_of_a_prompt(start: str, family: str, data: dict[str, Any]) -> None:
    first = replace(ANSWER, content=f"{start} It rains.")
    assert counted((first, DOUBT, LAST), family, **data).startswith(f"{start} It rains.")


def test_the_mask_is_cut_with_its_response() -> None:
    what = PreferenceRecord(QUESTION, (TURNS, "No. " * 40), Origin("here", 1))
    tokenizer = tokenizer_of("qwen2_5")
    whole = encode(what, tokenizer)
    length = len(whole.prompt_ids) + 6
    cut = encode(what, tokenizer, DataConfig(max_length=length))
    assert [len(mask) for mask in cut.trained] == [len(ids) for ids in cut.responses]
    assert cut.trained[0].tolist() == whole.trained[0][:6].tolist()
