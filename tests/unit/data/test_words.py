"""Texts encoded word by word get the ids that the tokenizer gives to the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from dpo_dist.data.text.words import WordEncoder, encodes_words
from tests.support import tiny

# The patterns of GPT-2 (inside ByteLevel), Llama 3, Qwen 2.5 and o200k.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": None, "llama3": LLAMA3, "qwen": LLAMA3.replace("{1,3}", ""), "o200k": O200K}
CORPUS = [
    "the cat  sat.\n\nOn a mat, it's 1234 (don't) <end> no",
    "it is   the cat's mat; \tthe    end é 漢字  7     ",
] * 9


def trained(name: str, **changes: bool) -> Tokenizer:
    """A byte-level BPE of a few hundred tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if name == "qwen" else None
    pattern = PATTERNS[name]
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=name == "gpt2", use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, by_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(["<end>"])
    made.add_tokens([AddedToken("<tag>", normalized=False, **changes)])
    return made


TOKENIZERS = {name: trained(name) for name in PATTERNS}
PIECES = ("the", "cat", "it's", " ", " ", "  ", "\n", ".", ",", "7", "123", "<end>", "<tag>", "é", "e\u0301")
PIECES += ("\u0301", "漢", "\t", "\u00a0", "\u0085", "\x1c", "'s", "(", "A", "z", "\u2028", "\r\n", "x y")
TEXTS = st.lists(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=20).map("".join), max_size=4
)


@pytest.mark.parametrize("name", PATTERNS)
@given(lists=st.lists(TEXTS, max_size=3))
def test_the_ids_are_those_of_the_whole_text(name: str, lists: list[list[str]]) -> None:
    tokenizer = TOKENIZERS[name]

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]

    assert encodes_words(tokenizer)
    words = WordEncoder(encode)
    for texts in lists:
        assert words.encode(texts) == encode(texts)


def test_a_frequent_word_is_encoded_once() -> None:
    seen: list[str] = []
    words = WordEncoder(lambda new: seen.extend(new) or [[len(word)] for word in new])
    long = "x" * 100
    assert words.encode(["the cat", "the cat", f"a {long}"]) == [[3, 4], [3, 4], [1, 101]]
    assert words.encode([f"the cat {long}"]) == [[3, 4, 101]]
    assert seen == ["the", " cat", "a", f" {long}", f" {long}"]


def test_tokenizers_that_may_read_words_together_are_left_whole() -> None:
    assert not any(encodes_words(made().backend_tokenizer) for made in (tiny.mistral, tiny.unigram))
    for changes in ({"rstrip": True}, {"single_word": True}):
        assert not encodes_words(trained("llama3", **changes))
    across = trained("llama3")
    across.add_tokens(["the cat"])
    assert not encodes_words(across)
    spelled = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "aĠ": 2}, [("a", "Ġ")]))
    spelled.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)
    assert not encodes_words(spelled)
    behind = trained("llama3")
    split = pre_tokenizers.Split(Regex(r"(?<=the) cat"), "isolated")
    behind.pre_tokenizer = pre_tokenizers.Sequence([split, behind.pre_tokenizer])
    assert not encodes_words(behind)
