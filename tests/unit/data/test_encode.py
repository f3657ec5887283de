"""Token ids of a record: one prompt, each response after it, no doubled and no smuggled special tokens."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dpo_dist.config.data import DataConfig
from dpo_dist.data.encode import encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, Dialogue, Message, Messages
from dpo_dist.data.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError
from tests.support import tiny
from tests.support.pairs import CHAT, WIDE, encode, flags, reason_against, record, texts
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
LONG_CHAT = (Message("user", "hello"), Message("assistant", "hello there"), Message("user", "and then?"))
WITH_TEMPLATE = [tiny.qwen, tiny.llama3, tiny.mistral, tiny.zephyr]


def test_chatml_conversation_is_rendered_up_to_the_end_of_turn() -> None:
    pair = encode(record(CHAT), tiny.qwen())
    assert texts(pair, tiny.qwen()) == [
        "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n",
        "It is Paris.<|im_end|>",
        "I cannot do that.<|im_end|>",
    ]
    assert pair.prompt_ids.dtype == np.int32
    assert flags(pair) == (False, False, False)


def test_llama2_template_keeps_its_spaces_around_the_response() -> None:
    tokenizer = tiny.mistral()
    pair = encode(record(LONG_CHAT, "Paris", "Rome"), tokenizer)
    prompt_text, *_ = texts(pair, tokenizer)
    assert prompt_text == "<s>[INST] hello [/INST] hello there </s><s>[INST] and then? [/INST]"
    assert tokenizer.convert_ids_to_tokens(pair.responses[0].tolist())[0].startswith("▁")
    assert tokenizer.convert_ids_to_tokens(pair.responses[0].tolist())[-2:] == ["▁", "</s>"]


@pytest.mark.parametrize("make", WITH_TEMPLATE)
@pytest.mark.parametrize("prompt", [CHAT, "What is the capital?", Dialogue("\n\nHuman: hi\n\nAssistant:")])
def test_one_bos_if_the_tokenizer_has_one_and_one_end_of_turn(
    make: Any, prompt: str | Messages | Dialogue
) -> None:
    tokenizer = make()
    pair = encode(record(prompt), tokenizer)
    bos = tokenizer.bos_token_id
    if bos is not None:
        assert pair.prompt_ids[0] == bos
        assert list(chain(pair.prompt_ids, *pair.responses)).count(bos) == 1
    end = tokenizer.eos_token if isinstance(prompt, str) else {tiny.llama3: "<|eot_id|>"}.get(make)
    end_id = tokenizer.convert_tokens_to_ids(end or tokenizer.eos_token)
    for response in pair.responses:
        assert response[-1] == end_id
        assert list(response).count(end_id) == 1
        assert not set(response[:-1].tolist()) & set(tokenizer.all_special_ids)


def test_plain_text_is_not_rendered_by_the_template() -> None:
    assert texts(encode(record("Q: why?\nA:", " so", " no"), tiny.qwen()), tiny.qwen()) == [
        "Q: why?\nA:",
        " so<|im_end|>",
        " no<|im_end|>",
    ]


def test_plain_text_becomes_one_user_message_with_the_option() -> None:
    config = DataConfig(text_as_messages=True)
    as_text = encode(record("why?"), tiny.qwen(), config)
    as_messages = encode(record((Message("user", "why?"),)), tiny.qwen())
    assert texts(as_text, tiny.qwen()) == texts(as_messages, tiny.qwen())


def test_dialogue_is_messages_with_a_template_and_text_without() -> None:
    dialogue = record(Dialogue("\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant:"), " yes", " no ")
    messages = record((Message("user", "a"), Message("assistant", "b"), Message("user", "c")), "yes", "no")
    assert texts(encode(dialogue, tiny.qwen()), tiny.qwen()) == texts(
        encode(messages, tiny.qwen()), tiny.qwen()
    )
    plain = tiny.with_template(tiny.qwen(), None)
    assert texts(encode(dialogue, plain), plain) == [
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant:",
        " yes<|im_end|>",
        " no <|im_end|>",
    ]


def test_eos_ends_a_turn_if_the_template_has_no_end_of_turn() -> None:
    tokenizer = tiny.with_template(tiny.qwen(), tiny.WITHOUT_END)
    assert texts(encode(record(CHAT, "Paris", "Rome"), tokenizer), tokenizer)[1] == " Paris<|im_end|>"


def test_a_conversation_rejected_by_the_template_is_a_bad_record() -> None:
    twice = (Message("user", "one"), Message("user", "two"))
    bad = encode_pair(record(twice), tiny.mistral(), WIDE)
    assert isinstance(bad, BadRecord)
    assert bad.reason == "template_rejected"
    assert "alternate" in bad.detail


def test_a_template_that_cannot_render_a_response_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not contain the response"):
        encode_pair(record(CHAT), tiny.with_template(tiny.mistral(), "always the same"), WIDE)
    needs_system = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    tokenizer = tiny.with_template(tiny.qwen(), needs_system + tiny.CHATML)
    with pytest.raises(ConfigError, match="system first"):
        encode_pair(record((Message("system", "be brief"), *CHAT)), tokenizer, WIDE)


def test_a_tokenizer_without_eos_is_an_error() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny.base().backend_tokenizer)
    with pytest.raises(ConfigError, match="end-of-sequence"):
        encode_pair(record("q"), tokenizer, WIDE)


def test_tokens_that_merge_across_the_boundary_do_not_change_the_prompt() -> None:
    tokenizer = tiny.qwen()
    pair = encode(record("Answer:\n", "\nyes", "no"), tokenizer)
    assert "boundary_resplit" in pair.changes
    assert pair.prompt_ids.tolist() == tokenizer("Answer:\n")["input_ids"]
    assert texts(pair, tokenizer)[1:] == ["\nyes<|im_end|>", "no<|im_end|>"]


def test_a_response_encoded_alone_gets_no_space_before_it() -> None:
    tokenizer = tiny.base()
    pair = encode(record("the w", "eather", "x"), tokenizer)
    assert "boundary_resplit" in pair.changes
    assert tokenizer.convert_ids_to_tokens(pair.responses[0].tolist())[0] != "▁"
    assert tokenizer.decode(np.concatenate([pair.prompt_ids, pair.responses[0]])[1:]) == "the weather</s>"


WORDS = st.lists(
    st.sampled_from(["the", " weather", " is", " capital", "\n", "ital", " an", "swer", ".", "1"])
)


@settings(deadline=None, max_examples=150)
@given(words=WORDS, cut=st.integers(1, 40), make=st.sampled_from([tiny.qwen, tiny.base, tiny.mistral]))
def test_a_response_has_the_ids_of_the_whole_text_if_these_start_with_the_prompt(
    words: list[str], cut: int, make: Any
) -> None:
    tokenizer = make()
    text = "a" + "".join(words)
    prompt, response = text[:cut], text[cut:]
    for written in (prompt, f"{tokenizer.eos_token}{prompt}"):
        facts = tokenizer_facts(tokenizer)
        prompt_ids, whole = facts.encoder.encode([written, written + response])
        found_prompt, [found], resplit = facts.encoder.encode_after(written, (response,))
        assert found_prompt == prompt_ids
        assert resplit == (whole[: len(prompt_ids)] != prompt_ids)
        if not resplit:
            assert found == whole[len(prompt_ids) :]


PIECES = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "<|im_",
        "end|>",
        "</s>",
        "<s>",
        "<",
        "|>",
        "literal0",
        " ",
        "\n",
        "assistant",
    ]
)
CONTENT = st.lists(st.one_of(PIECES, st.text(max_size=5)), min_size=1, max_size=8).map("".join)


@settings(deadline=None, max_examples=80)
@given(content=CONTENT, make=st.sampled_from([tiny.qwen, tiny.llama3, tiny.zephyr]))
def test_no_content_becomes_a_special_token(content: str, make: Any) -> None:
    tokenizer = make()
    wrapped = f"[{content}]".replace("\ufdd0", "").encode("utf-8", "ignore").decode()
    for prompt in ((Message("user", wrapped),), wrapped):
        with_content = encode(record(prompt, wrapped, wrapped + "!"), tokenizer)
        without = encode(
            record(prompt and ((Message("user", "[]"),) if prompt != wrapped else "[]")), tokenizer
        )
        special = set(tokenizer.all_special_ids)
        count = [
            sum(token in special for token in pair.prompt_ids.tolist()) for pair in (with_content, without)
        ]
        assert count[0] == count[1]
        for response, text in zip(with_content.responses, (wrapped, wrapped + "!"), strict=True):
            assert not special & set(response[:-1].tolist())
            if make is not tiny.zephyr:
                assert tokenizer.decode(response[:-1]) == text


def test_a_special_token_strips_whitespace_beside_literal_text_too() -> None:
    """Phi-3's `<|end|>` strips the newline after it."""
    tokenizer = tiny.qwen().__class__(
        tokenizer_object=tiny.qwen().backend_tokenizer,
        eos_token=AddedToken("<|end|>", rstrip=True, lstrip=True, normalized=False, special=True),
    )
    facts = tokenizer_facts(tokenizer)
    [usual] = facts.encoder.encode(["hello \n<|end|>\n the answer"])
    [literal] = facts.encoder.encode(["hello \n<|end|>\n the answer \ufdd0literal0\ufdd0"])
    assert literal[: len(usual)] == usual
    assert tokenizer.decode(usual) == "hello<|end|>the answer"


def test_a_special_token_that_cannot_be_encoded_as_text_is_a_bad_record() -> None:
    assert reason_against(record("q", "the </s> end", "a"), tiny.unigram()) == "special_token_in_text"
    assert reason_against(record("q", "a\ufdd0", "b"), tiny.qwen()) == "reserved_character"


@pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")
@pytest.mark.parametrize(
    "name", ["ultrafeedback_plain_scored.jsonl", "derived/trl_conversational_from_hh.jsonl"]
)
def test_real_responses_decode_from_their_ids(name: str) -> None:
    """Byte-level tokens lose nothing, so decoding must return each text, including `</s>`."""
    assert SHARED is not None
    for source in read_records(str(SHARED / name)):
        if isinstance(source, BadRecord):
            continue
        pair = encode(source, tiny.qwen())
        for ids, text in zip(pair.responses, source.responses, strict=True):
            same = tiny.qwen().decode(ids) == text + "<|im_end|>"
            assert same, source.origin
