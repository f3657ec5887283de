"""Find prompts of benchmarks in the data by overlapping n-grams of words.

The method is that of GPT-3 (arXiv:2005.14165, appendix C): words without case and punctuation, n-grams of
13 words; an item with 8 to 12 words is compared as a whole. Shorter items are compared with whole prompts
only, as they occur in other texts by chance.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.diagnostics.measures.words import Hashes, ngrams, normalised_words
from dpo_dist.errors import DataError

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
