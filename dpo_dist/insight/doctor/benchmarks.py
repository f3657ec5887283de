"""Prompts of benchmarks that training data should not contain, found by runs of equal words."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import DataError
from dpo_dist.insight.doctor.texts import plain_words

_MOST_WORDS, _FEWEST_WORDS = 13, 8
_FIELDS = ("prompt", "question", "problem", "instruction", "input", "text", "query", "turns", "messages")


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Runs of words of benchmark items.

    Attributes:
        items: origin (``file:line``) of each item.
        runs: by number of words, 8 to 13: each run of so many words and its item.
        whole: the words of each shorter item, and the item.
    """

    items: list[str] = field(default_factory=list)
    runs: dict[int, dict[str, int]] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)

    def add(self, text: str, origin: str) -> None:
        """Add an item with its origin."""
        words = plain_words(text)
        if not words:
            return
        if len(words) < _FEWEST_WORDS:
            self.whole[" ".join(words)] = len(self.items)
        else:
            size = min(len(words), _MOST_WORDS)
            self.runs.setdefault(size, {}).update(dict.fromkeys(_runs(words, size), len(self.items)))
        self.items.append(origin)

    def item_in(self, prompt: str, *responses: str) -> int | None:
        """Return an item that overlaps with a record's texts, or None; a short one has to be the prompt."""
        item = self.whole.get(" ".join(plain_words(prompt)))
        if item is not None:
            return item
        for text in (prompt, *responses):
            words = plain_words(text)
            for size, known in self.runs.items():
                found = next((known[run] for run in _runs(words, size) if run in known), None)
                if found is not None:
                    return found
        return None


def _runs(words: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(words[at : at + size]) for at in range(len(words) - size + 1))


def read_benchmarks(files: Sequence[Path]) -> Benchmark | None:
    """Return the items of benchmark files; None without files.

    Args:
        files: .jsonl (an object with a field `prompt`, `question`, `problem`, `instruction`, `input`, `text`,
            `query`, `turns` or `messages`, or a text), .csv with such a column, or .txt with one item a line.

    Raises:
        DataError: a file cannot be read or has no item, or a line has no such field.
    """
    benchmark = Benchmark()
    for file in files:
        before = len(benchmark.items)
        try:
            for number, content in _lines(file):
                benchmark.add(_text(content), f"{file}:{number}")
        except (OSError, ValueError, csv.Error) as error:
            raise _unreadable(file, str(error)) from error
        if len(benchmark.items) == before:
            raise _unreadable(file, "no item")
    return benchmark if files else None


def check_benchmarks(files: Sequence[Path]) -> None:
    """Check that the files can be opened. Raises DataError."""
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise _unreadable(file, error.strerror or type(error).__name__) from error


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the content of each item."""
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix == ".csv":
            reader = csv.DictReader(lines)
            yield from ((reader.line_num, row) for row in reader)
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, json.loads(line) if file.suffix == ".jsonl" else line


def _text(content: Any) -> str:
    """Return the text of an item. Raises ValueError if it has none."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(map(_text, content))
    if isinstance(content, Mapping):
        for name in ("content", *_FIELDS):
            if content.get(name):
                return _text(content[name])
    raise ValueError(f"an item has no field {', '.join(_FIELDS)}")


def _unreadable(file: Path, got: str) -> DataError:
    return DataError(
        "a file of benchmark prompts cannot be read",
        where=f"doctor.benchmarks: {file}",
        got=got,
        expected="UTF-8 text: .jsonl, .csv or .txt with one prompt a line",
        remedy="check the path and the file",
    )
