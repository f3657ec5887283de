"""Words of a text in any language, their hashes, n-grams and MinHash signatures."""

import csv
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

from dpo_dist.data.records import Fields
from dpo_dist.foundation.errors import DataError

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


LARGEST_NGRAM = 13
SMALLEST_NGRAM = 8
_FIELDS = ("prompt", "question", "problem", "instruction", "input", "text", "query", "turns", "messages")


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Hashes of the n-grams of benchmark items.

    Attributes:
        items: origin (``file:line``) of each item.
        grams: by number of words: ascending hashes and the item of each.
        whole: hash of all words of each short item, ascending, and its item.
    """

    items: tuple[str, ...]
    grams: Mapping[int, tuple[Hashes, npt.NDArray[np.int64]]]
    whole: tuple[Hashes, npt.NDArray[np.int64]]

    def items_in(self, prompt: str, *others: str) -> list[int]:
        """Return the items that overlap with a record's texts, each once."""
        found: set[int] = set()
        prompt_words = normalised_words(prompt)
        found |= _found(ngrams(prompt_words, max(len(prompt_words), 1)), *self.whole)
        for words in (prompt_words, *map(normalised_words, others)):
            for size, (hashes, items) in self.grams.items():
                if len(words) >= size:
                    found |= _found(ngrams(words, size), hashes, items)
        return sorted(found)


def read_benchmarks(files: Sequence[Path]) -> Benchmark | None:
    """Return the items of benchmark files; None without files.

    Args:
        files: .jsonl (an object with a field `prompt`, `question`, `problem`, `instruction`, `input`, `text`,
            `query`, `turns` or `messages`, or a text), .csv with such a column, or .txt with one item a line.

    Raises:
        DataError: a file cannot be read, or a line has no such field.
    """
    if not files:
        return None
    items: list[str] = []
    grams: dict[int, list[tuple[Hashes, int]]] = {}
    whole: list[tuple[Hashes, int]] = []
    for file in files:
        for number, text in _texts(file):
            words = normalised_words(text)
            if not len(words):
                continue
            if len(words) < SMALLEST_NGRAM:
                whole.append((ngrams(words, len(words)), len(items)))
            else:
                size = min(len(words), LARGEST_NGRAM)
                grams.setdefault(size, []).append((ngrams(words, size), len(items)))
            items.append(f"{file}:{number}")
    if not items:
        raise DataError(
            "a file of benchmark prompts has no item",
            where=", ".join(map(str, files)),
            expected="one prompt in each line",
            remedy="check the file",
        )
    return Benchmark(tuple(items), {size: _sorted(found) for size, found in grams.items()}, _sorted(whole))


def check_benchmarks(files: Sequence[Path]) -> None:
    """Check that the files can be opened. Raises DataError."""
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise _unreadable(file, error.strerror or type(error).__name__) from error


def _found(hashes: Hashes, known: Hashes, items: npt.NDArray[np.int64]) -> set[int]:
    if not len(known) or not len(hashes):
        return set()
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return set(items[at[known[at] == hashes]].tolist())


def _sorted(found: Iterable[tuple[Hashes, int]]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    found = list(found)
    hashes = np.concatenate([np.empty(0, np.uint64), *(grams for grams, _item in found)])
    items = np.concatenate([np.empty(0, np.int64), *(np.full(len(grams), item) for grams, item in found)])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], items[order]


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the line number and the text of each item. Raises DataError."""
    number = 0
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            if file.suffix == ".csv":
                reader = csv.DictReader(lines)
                for row in reader:
                    yield reader.line_num, _text(row, file, reader.line_num)
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    content = json.loads(line) if file.suffix == ".jsonl" else line
                    yield number, _text(content, file, number)
    except OSError as error:
        raise _unreadable(file, error.strerror or type(error).__name__) from error
    except UnicodeDecodeError as error:
        raise _unreadable(file, "bytes that are not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _unreadable(file, f"line {number} is not JSON") from error
    except csv.Error as error:
        raise _unreadable(file, f"not CSV: {error}") from error


def _unreadable(file: Path, got: str) -> DataError:
    return DataError(
        "a file of benchmark prompts cannot be read",
        where=f"doctor.benchmarks: {file}",
        got=got,
        expected="UTF-8 text: .jsonl, .csv or .txt with one prompt a line",
        remedy="check the path and the file",
    )


def _text(content: Any, file: Path, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_text(part, file, number) for part in content)
    if isinstance(content, Mapping):
        if isinstance(content.get("content"), str):
            return str(content["content"])
        for name in _FIELDS:
            if content.get(name):
                return _text(content[name], file, number)
    raise DataError(
        "a benchmark item has no prompt",
        where=f"{file}:{number}",
        expected=f"a field {', '.join(_FIELDS)}",
        remedy="rename the field of the prompt",
    )


_RATING = re.compile(r"score|rating|reward|quality|grade|preference", re.IGNORECASE)
_LISTS = ("completions", "responses", "output")
_OVERALL = ("overall_score", "score", "fine-grained_score", "rating")

Scores = tuple[float, ...] | None


def ratings_contradict(fields: Fields, scores: Scores) -> bool:
    """Return whether a rating in the record ranks its responses in another order than the record does.

    Numbers of both sides, such as `chosen_rating` and `rejected_rating` (also in `metadata`), are compared
    with the order of the pair; inside a list of responses the overall score with the mean of the ratings by
    aspect. The scores by which the record was read are not compared with themselves.
    """
    nested = [value for value in fields.values() if isinstance(value, Mapping)]
    pairs = [pair for part in (fields, *nested) for pair in _side_ratings(part)]
    if any(chosen < rejected for chosen, rejected in pairs if (chosen, rejected) != scores):
        return True
    return any(
        (one[0] - other[0]) * (one[1] - other[1]) < 0
        for name in _LISTS
        for one, other in combinations(_response_ratings(fields.get(name)), 2)
    )


def _side_ratings(part: Fields) -> Iterator[tuple[float, float]]:
    """Yield the two numbers of each rating that both sides have."""
    for name, value in part.items():
        if isinstance(name, str) and "chosen" in name and _RATING.search(name):
            chosen, rejected = _number(value), _number(part.get(name.replace("chosen", "rejected")))
            if chosen is not None and rejected is not None:
                yield chosen, rejected


def _response_ratings(responses: Any) -> list[tuple[float, float]]:
    """Return the overall score and the mean rating by aspect of each response that has both."""
    found = []
    for response in responses if isinstance(responses, list) else []:
        annotations = response.get("annotations") if isinstance(response, Mapping) else None
        if not isinstance(annotations, Mapping):
            continue
        aspects = [_number(part.get("Rating")) for part in annotations.values() if isinstance(part, Mapping)]
        given = [rating for rating in aspects if rating is not None]
        overall = next(filter(None, (_number(response.get(name)) for name in _OVERALL)), None)
        if given and overall is not None:
            found.append((overall, sum(given) / len(given)))
    return found


def _number(value: Any) -> float | None:
    """Return a finite number; None for anything else, also for true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
