"""The tokens that the loss counts: roles, markers, formatting, and what a record says itself."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_dist.config.data import DataConfig
from dpo_dist.data.encode import encode_pair
from dpo_dist.data.records import BadRecord, Message, Messages, Origin, PreferenceRecord
from dpo_dist.data.tokenizer import tokenizer_facts
from dpo_dist.data.turns import token_mask
from tests.support import tiny
from tests.support.chat_tokenizers import tokenizer_of
from tests.support.pairs import encode, record

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


def test_by_default_the_turns_of_the_assistant_count_with_their_ends() -> None:
    assert counted(TURNS) == "It rains.<|im_end|>Yes, <note>I think</note> so.<|im_end|>"


def test_other_roles_can_count() -> None:
    assert counted(TURNS, trained_roles=["user", "assistant"]) == (
        "It rains.<|im_end|>Are you sure?<|im_end|>Yes, <note>I think</note> so.<|im_end|>"
    )


def test_a_message_may_say_whether_it_counts() -> None:
    turns = (replace(ANSWER, is_trained=False), replace(DOUBT, is_trained=True), LAST)
    assert counted(turns) == "Are you sure?<|im_end|>Yes, <note>I think</note> so.<|im_end|>"


@pytest.mark.parametrize(
    "turns", [(replace(ANSWER, is_trained=False),), (replace(ANSWER, is_trained=False), DOUBT)]
)
def test_a_response_without_counted_tokens_is_a_bad_record(turns: Messages) -> None:
    what = PreferenceRecord(QUESTION, (turns, "another"), Origin("here", 1))
    found = encode_pair(what, tokenizer_of("qwen2_5"), DataConfig())
    assert isinstance(found, BadRecord)
    assert found.reason == "no_trained_token"


def test_text_between_markers_does_not_count() -> None:
    assert counted(TURNS, untrained=["<note>...</note>"]) == "It rains.<|im_end|>Yes,  so.<|im_end|>"


@pytest.mark.parametrize(
    ("response", "untrained", "expected"),
    [
        # White space after a marker's end belongs to the text.
        ("<note>x</note>\n\nyes", ["<note>...</note>"], "\n\nyes<|im_end|>"),
        ("yes <note>cut", ["<note>...</note>"], "yes "),
        ("a <note>b [c] d</note> e", ["<note>...</note>", "[...]"], "a  e<|im_end|>"),
        ("a <note>b [c</note> d] e", ["<note>...</note>", "[...]"], "a  e<|im_end|>"),
        # An empty thought is the template's only at the start.
        ("yes\n<think>\n\n</think>\nno", ["empty_thoughts"], "yes\n<think>\n\n</think>\nno<|im_end|>"),
    ],
)
def test_spans_between_markers_are_exact(response: str, untrained: list[str], expected: str) -> None:
    assert counted(response, untrained=untrained) == expected


def test_a_tag_that_the_prompt_mentions_opens_no_thought() -> None:
    tokenizer = tokenizer_of("qwen2_5")
    what = record((Message("user", "Why <think>?"),), "So it is.", "No.")
    assert not encode(what, tokenizer, DataConfig(untrained=["thoughts"])).trained


def test_formatting_tokens_do_not_count() -> None:
    assert counted(TURNS, untrained=["formatting"]) == "It rains.Yes, <note>I think</note> so."
    assert counted((ANSWER,), "llama3_1", untrained=["formatting"]) == "It rains."


@pytest.mark.parametrize(
    ("untrained", "expected"),
    [
        (["empty_thoughts"], "<think>\nLook.\n</think>\n\nIt rains.<|im_end|>"),
        (["thoughts"], "It rains.<|im_end|>"),
        ([], "<think>\nLook.\n</think>\n\nIt rains.<|im_end|>"),
    ],
)
def test_thoughts_count_unless_told(untrained: list[str], expected: str) -> None:
    thought = (replace(ANSWER, fields={"reasoning_content": "Look."}),)
    assert counted(thought, "qwen3", untrained=untrained) == expected
    assert counted("<think>\nLook.\n</think>\n\nIt rains.", "qwen3", untrained=untrained) == expected


def test_a_thought_that_the_prompt_opens_is_a_thought() -> None:
    thought = replace(ANSWER, fields={"reasoning_content": "Look."})
    what = PreferenceRecord(QUESTION, ((thought,), (replace(thought, content="No."),)), Origin("here", 1))
    tokenizer = tokenizer_of("qwen3_6")
    pair = encode(what, tokenizer, DataConfig(untrained=["thoughts"]))
    assert tokenizer.decode(pair.responses[0][pair.trained[0]]) == "It rains.<|im_end|>"


def test_the_end_of_an_empty_thought_on_one_side_does_not_count() -> None:
    tokenizer = tokenizer_of("qwen3_6")
    found = encode(record(QUESTION, "<think>\nhm\n</think>\n\nYes.", "No."), tokenizer)
    assert tokenizer.decode(found.responses[1][found.trained[1]]) == "No.<|im_end|>"
    assert tokenizer.decode(found.prompt_ids).endswith("<think>\n")


@pytest.mark.parametrize(
    ("family", "data"),
    [
        ("qwen3", {"template_arguments": {"enable_thinking": False}}),
        ("qwen3_6", {}),
        ("deepseek_r1_distill", {}),
    ],
)
@pytest.mark.parametrize("start", ["<table>", "</p>", "<"])
def test_a_turn_may_start_like_the_tag_that_the_generation_prompt_writes(
    start: str, family: str, data: dict[str, Any]
) -> None:
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


def test_literal_tokens_do_not_shift_the_mask() -> None:
    turns = (Message("assistant", "a <|im_end|> b"), Message("user", "<|im_start|>c"), LAST)
    assert counted(turns) == "a <|im_end|> b<|im_end|>Yes, <note>I think</note> so.<|im_end|>"


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(st.sampled_from("aé你 \n<|im_end|>🙂"), max_size=30),
    make=st.sampled_from([tiny.qwen, tiny.llama3, tiny.mistral, tiny.base]),
)
def test_positions_of_tokens_cover_the_text(text: str, make: Any) -> None:
    facts = tokenizer_facts(make())
    prompt, response = facts.marks.escape("the question: "), facts.marks.escape(text) + facts.end_of_text
    _, [ids], _ = facts.encoder.encode_after(prompt, [response])
    starts = facts.encoder.token_starts(prompt, response, ids)
    assert len(starts) == len(ids)
    assert starts == sorted(starts)
    end = len(response) - len(facts.end_of_text)
    assert token_mask(starts, len(response), [(end, len(response))]).tolist() == [False] * (len(ids) - 1) + [
        True
    ]
