"""Truncation to the configured lengths, and records refused because nothing would be left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dpo_dist.batching.pack import packed_tokens
from dpo_dist.config.data import DataConfig, Truncation
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.data.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError
from tests.support import tiny
from tests.support.pairs import CHAT, encode, flags, reason_against, record


def numbered(tokenizer: PreTrainedTokenizerFast, prompt: int, *responses: int) -> PreferenceRecord:
    """Return a plain record with these numbers of tokens, including BOS and EOS."""
    prefix = len(tokenizer_facts(tokenizer).prefix_ids)
    made = record(
        "".join(str(number % 10) for number in range(prompt - prefix)),
        *(str(rank) * (length - 1) for rank, length in enumerate(responses, start=1)),
    )
    pair = encode(made, tokenizer)
    assert [len(pair.prompt_ids), *map(len, pair.responses)] == [prompt, *responses]
    return made


def test_keep_start_cuts_the_responses() -> None:
    tokenizer = tiny.llama3()
    whole = numbered(tokenizer, 10, 6, 12)
    pair = encode(whole, tokenizer, DataConfig(max_length=18))
    full = encode(whole, tokenizer)
    assert pair.prompt_ids.tolist() == full.prompt_ids.tolist()
    assert [ids.tolist() for ids in pair.responses] == [ids.tolist()[:8] for ids in full.responses]
    assert flags(pair) == (False, True, False)
    assert pair.responses[0][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in pair.responses[1]
    assert pair.truncated == (False, True)


def test_keep_end_cuts_the_prompt_and_keeps_its_bos() -> None:
    tokenizer = tiny.llama3()
    whole = numbered(tokenizer, 10, 6, 12)
    pair = encode(whole, tokenizer, DataConfig(max_length=18, truncation=Truncation.keep_end))
    full = encode(whole, tokenizer)
    assert pair.prompt_ids.tolist() == [tokenizer.bos_token_id, *full.prompt_ids.tolist()[-5:]]
    assert [ids.tolist() for ids in pair.responses] == [ids.tolist() for ids in full.responses]
    assert flags(pair) == (True, False, False)


def test_max_prompt_length_cuts_the_start_of_the_prompt() -> None:
    tokenizer = tiny.llama3()
    pair = encode(numbered(tokenizer, 10, 6, 12), tokenizer, DataConfig(max_prompt_length=4))
    assert tokenizer.decode(pair.prompt_ids) == "<|begin_of_text|>678"
    assert flags(pair) == (True, False, False)


def test_truncation_keeps_the_bos_of_the_template() -> None:
    backend = tiny.qwen().backend_tokenizer
    writes_bos = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template="{{ bos_token }}" + tiny.CHATML,
    )
    for tokenizer in (writes_bos, tiny.llama3()):
        full = encode(record(CHAT), tokenizer).prompt_ids.tolist()
        cut = encode(record(CHAT), tokenizer, DataConfig(max_prompt_length=5)).prompt_ids.tolist()
        assert cut == [tokenizer.bos_token_id, *full[-4:]]


def test_a_limit_with_space_for_bos_only_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_prompt_length") as raised:
        encode_pair(record("one two three"), tiny.llama3(), DataConfig(max_prompt_length=1))
    assert raised.value.where == "data.max_prompt_length"
    assert isinstance(
        encode_pair(record("one"), tiny.llama3(), DataConfig(max_prompt_length=2)), EncodedExample
    )


def test_a_prompt_without_tokens_is_a_bad_record() -> None:
    assert reason_against(record(""), tiny.qwen()) == "empty_prompt"
    assert reason_against(record(""), tiny.llama3()) == "empty_prompt"


@pytest.mark.parametrize("truncation", list(Truncation))
def test_an_exact_fit_is_not_truncated(truncation: Truncation) -> None:
    whole = numbered(tiny.llama3(), 10, 6, 12)
    config = DataConfig(max_length=22, max_prompt_length=10, truncation=truncation)
    pair = encode(whole, tiny.llama3(), config)
    assert [len(pair.prompt_ids), *map(len, pair.responses)] == [10, 6, 12]
    assert flags(pair) == (False, False, False)


@pytest.mark.parametrize(
    ("truncation", "max_length", "reason"),
    [
        (Truncation.drop, 21, "too_long"),
        (Truncation.keep_start, 10, "prompt_fills_max_length"),
        (Truncation.keep_end, 13, "response_fills_max_length"),
        (Truncation.keep_end, 5, "response_fills_max_length"),
    ],
)
def test_truncation_that_leaves_no_example_is_a_bad_record(
    truncation: Truncation, max_length: int, reason: str
) -> None:
    whole = numbered(tiny.llama3(), 10, 6, 12)
    assert (
        reason_against(whole, tiny.llama3(), DataConfig(max_length=max_length, truncation=truncation))
        == reason
    )
    wider = encode_pair(whole, tiny.llama3(), DataConfig(max_length=max_length + 1, truncation=truncation))
    assert isinstance(wider, EncodedExample) == (max_length != 5)


def test_responses_equal_after_truncation_or_template_are_a_bad_record() -> None:
    same_start = record("q", "the answer is one", "the answer is two")
    assert reason_against(same_start, tiny.qwen(), DataConfig(max_length=4)) == "identical_after_truncation"
    trimmed = record(CHAT, "yes", "yes ")
    assert reason_against(trimmed, tiny.llama3()) == "identical_after_encoding"


@pytest.mark.parametrize("truncation", [Truncation.keep_start, Truncation.keep_end, Truncation.drop])
@given(st.integers(0, 80), st.integers(1, 80), st.integers(1, 80), st.integers(4, 60))
def test_no_example_needs_twice_max_length_in_a_micro_batch(
    truncation: Truncation, prompt: int, chosen: int, rejected: int, max_length: int
) -> None:
    what = record("a " * prompt + "b", *(f" {word}" * n for word, n in (("yes", chosen), ("no", rejected))))
    pair = encode_pair(what, tiny.base(), DataConfig(max_length=max_length, truncation=truncation))
    if isinstance(pair, EncodedExample):
        taken = packed_tokens(len(pair.prompt_ids), [len(ids) for ids in pair.responses])
        assert taken <= 2 * max_length - len(pair.prompt_ids) - 2
