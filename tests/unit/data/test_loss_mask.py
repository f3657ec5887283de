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
    Message("user", "Sure?"),
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


END = "<|im_end|>"
NOTES = "Yes, <note>I think</note> so."
OWN = (replace(ANSWER, is_trained=False), replace(DOUBT, is_trained=True), LAST)
LITERAL = (Message("assistant", "a <|im_end|> b"), Message("user", "<|im_start|>c"), LAST)
THOUGHT = (replace(ANSWER, fields={"reasoning_content": "Look."}),)
SPELLED = "<think>\nLook.\n</think>\n\nIt rains."
EMPTY = "<think>\n\n</think>\n\n"
BETWEEN = ["<note>...</note>", "[...]"]


@pytest.mark.parametrize(
    ("family", "response", "data", "expected"),
    [
        ("qwen2_5", TURNS, {}, f"It rains.{END}{NOTES}{END}"),
        (
            "qwen2_5",
            TURNS,
            {"trained_roles": ["user", "assistant"]},
            f"It rains.{END}{DOUBT.content}{END}{NOTES}{END}",
        ),
        # What a message says of itself; tokens that a text spells do not shift the mask.
        ("qwen2_5", OWN, {}, f"Sure?{END}{NOTES}{END}"),
        ("qwen2_5", LITERAL, {}, f"a {END} b{END}{NOTES}{END}"),
        ("qwen2_5", TURNS, {"untrained": ["formatting"]}, f"It rains.{NOTES}"),
        ("llama3_1", (ANSWER,), {"untrained": ["formatting"]}, "It rains."),
        ("qwen2_5", TURNS, {"untrained": BETWEEN}, f"It rains.{END}Yes,  so.{END}"),
        # White space after a marker's end belongs to the text.
        ("qwen2_5", "<note>x</note>\n\nyes", {"untrained": BETWEEN}, f"\n\nyes{END}"),
        ("qwen2_5", "yes <note>cut", {"untrained": BETWEEN}, "yes "),
        ("qwen2_5", "a <note>b [c] d</note> e", {"untrained": BETWEEN}, f"a  e{END}"),
        ("qwen2_5", "a <note>b [c</note> d] e", {"untrained": BETWEEN}, f"a  e{END}"),
        # An empty thought is the template's only at the start.
        ("qwen2_5", f"yes\n{EMPTY}no", {"untrained": ["empty_thoughts"]}, f"yes\n{EMPTY}no{END}"),
        *(
            ("qwen3", response, {"untrained": untrained}, f"{expected}{END}")
            for response in (THOUGHT, SPELLED)
            for untrained, expected in (
                (["empty_thoughts"], SPELLED),
                (["thoughts"], "It rains."),
                ([], SPELLED),
            )
        ),
        ("qwen3", THOUGHT, {"untrained": ["thoughts"]}, f"It rains.{END}"),
        ("qwen3", SPELLED, {"untrained": ["thoughts"]}, f"It rains.{END}"),
        ("qwen3", "It rains.", {"untrained": ["empty_thoughts"]}, f"It rains.{END}"),
        ("qwen3", "It rains.", {"untrained": ["thoughts"]}, f"It rains.{END}"),
        ("qwen3", "It rains.", {"untrained": []}, f"{EMPTY}It rains.{END}"),
    ],
)
def test_the_loss_counts_these_tokens(
    family: str, response: Messages | str, data: dict[str, Any], expected: str
) -> None:
    assert counted(response, family, **data) == expected


@pytest.mark.parametrize(
    "turns", [(replace(ANSWER, is_trained=False),), (replace(ANSWER, is_trained=False), DOUBT)]
)
def test_a_response_without_counted_tokens_is_a_bad_record(turns: Messages) -> None:
    what = PreferenceRecord(QUESTION, (turns, "another"), Origin("here", 1))
    found = encode_pair(what, tokenizer_of("qwen2_5"), DataConfig())
    assert isinstance(found, BadRecord)
    assert found.reason == "no_trained_token"


def test_a_tag_that_the_prompt_mentions_opens_no_thought() -> None:
    tokenizer = tokenizer_of("qwen2_5")
    what = record((Message("user", "Why <think>?"),), "So it is.", "No.")
    assert not encode(what, tokenizer, DataConfig(untrained=["thoughts"])).trained


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
