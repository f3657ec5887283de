"""Words of a text in any language, their hashes, n-grams and MinHash signatures."""

import re
import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

SIGNATURE_NUMBERS = 64
SHINGLE_WORDS = 2

# A letter of a script without spaces (kana, Chinese, Hangul excluded) is a word of its own.
_WORD = re.compile(r"[^\W\d_\u3040-\u30ff\u3400-\u9fff]+|\d+|[\u3040-\u30ff\u3400-\u9fff]|[^\w\s]|_")
_WORD_ONLY = re.compile(r"[^\W\d_\u3040-\u30ff\u3400-\u9fff]+|\d+|[\u3040-\u30ff\u3400-\u9fff]")
_NUMBER = re.compile(r"\d+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HIGH = np.uint64(32)

Hashes = npt.NDArray[np.uint64]
Signature = npt.NDArray[np.uint32]


def words_of(text: str) -> list[str]:
    """Return the words, numbers and punctuation marks of a text, in their case."""
    return _WORD.findall(text)


def numbers_of(text: str) -> list[str]:
    """Return the whole numbers of a text; a decimal number is two of them."""
    return _NUMBER.findall(text)


def signature(text: str) -> Signature:
    """Return the MinHash signature of a text's shingles: two consecutive words (Broder 1997).

    Args:
        text: its case and punctuation are ignored; all numbers count as the same word.

    Returns:
        uint32 [64]; the share of equal numbers of two signatures estimates the Jaccard similarity of the two
        sets of shingles, with a standard error of at most 0.06. All are the largest value for no words.
    """
    words = ["0" if word.isdecimal() else word for word in _WORD_ONLY.findall(text.casefold())]
    words = words or words_of(text)
    hashes = ngrams(np.fromiter(map(_hash, words), np.uint64, len(words)), SHINGLE_WORDS)
    sketch = _empty_sketch().copy()
    sketch.update_batch(np.unique(hashes >> _HIGH).tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


def normalised_words(text: str) -> Hashes:
    """Return hashes of the words of a text without case and punctuation, uint64 [words]."""
    words = _WORD_ONLY.findall(text.casefold())
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def ngrams(hashes: Hashes, words: int) -> Hashes:
    """Return a hash of every `words` consecutive words; of all words if there are fewer. Order matters."""
    if not len(hashes):
        return hashes
    words = min(words, len(hashes))
    count = len(hashes) - words + 1
    mixed = np.full(count, np.uint64(words), dtype=np.uint64)
    for offset in range(words):
        mixed = (mixed ^ hashes[offset : offset + count]) * _MULTIPLIER
        mixed ^= mixed >> _HIGH
    return mixed


@lru_cache(maxsize=1 << 16)
def _hash(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "replace"))


@lru_cache(maxsize=1)
def _empty_sketch() -> MinHash:
    # The values are hashes already.
    return MinHash(SIGNATURE_NUMBERS, seed=1, hashfunc=_as_it_is)


def _as_it_is(value: int) -> int:
    return value
