"""Encoding only the last words of a prompt with each response changes no id."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_dist.data.escape import has_local_tokens, last_words, token_ids
from dpo_dist.data.tokenizer import TokenizerFacts
from tests.support import tiny

# Published patterns of splitting: GPT-4o's, DeepSeek's, Tekken's.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = ["the", "weather", "don't", "I'm", "a", "Größe", "é", "e\u0301", "12345", "...", "\n\n", "\r\n", "  "]
WORDS += ["你好", "answer", ":", "Assistant:", "\t", "\u200b", "\u00a0", "x", "I", "'", "'s", "<", "capital"]


def byte_level(pattern: str | None, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the vocabulary of `tiny.qwen` and another splitting."""
    backend = Tokenizer.from_str(tiny.qwen().backend_tokenizer.to_str())
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def texts(number: int, seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    for _ in range(number):
        count = generator.choice((3, 10, 30, 100))
        yield generator.choice(("", " ")).join(generator.choice((" ", *WORDS)) for _ in range(count))


@pytest.mark.parametrize(
    "tokenizer",
    [
        tiny.qwen(),
        tiny.llama3(),
        byte_level(None),
        byte_level(O200K),
        byte_level(DEEPSEEK, normalizers.NFC()),
    ],
    ids=["qwen", "llama3", "gpt2", "gpt4o", "deepseek"],
)
def test_the_last_words_give_the_ids_of_the_whole_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert has_local_tokens(tokenizer)
    fast, whole = TokenizerFacts(tokenizer, None).encoder, TokenizerFacts(tokenizer, None).encoder
    whole.__dict__["_has_local_tokens"] = False
    shortened = 0
    for start, one, other in zip(texts(300, 0), texts(300, 1), texts(300, 2), strict=True):
        prompt = f"start of {start}"
        assert fast.encode_after(prompt, [one, other]) == whole.encode_after(prompt, [one, other])
        shortened += last_words(prompt) > 0
    assert shortened > 50


def test_a_tokenizer_whose_words_depend_on_text_before_is_encoded_as_a_whole() -> None:
    assert not has_local_tokens(tiny.mistral())  # one word with SentencePiece's marks of spaces
    assert not has_local_tokens(byte_level(O200K, normalizers.StripAccents()))
    assert not has_local_tokens(tiny.unigram())


def test_limits_that_a_tokenizer_file_sets_do_not_cut() -> None:
    tokenizer = copy.deepcopy(tiny.qwen())
    expected = token_ids(tokenizer, ["hello there, the weather"])
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert token_ids(tokenizer, ["hello there, the weather"]) == expected
