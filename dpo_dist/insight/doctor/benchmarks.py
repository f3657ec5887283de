"""Prompts of benchmarks that training data should not contain, found by runs of equal words."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import DataError
from dpo_dist.insight.doctor.texts import plain_words

_MOST_WORDS, _FEWEST_WORDS = 13, 8
_FIELDS = ("content", "prompt", "question", "problem", "instruction", "input", "text", "turns", "messages")


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Runs of words of benchmark items, each with the origin (``file:line``) of its item."""

    runs: dict[int, dict[str, str]] = field(default_factory=dict)  # by number of words, 8 to 13
    whole: dict[str, str] = field(default_factory=dict)  # the words of shorter items

    def add(self, text: str, origin: str) -> None:
        """Add an item with its origin."""
        words = plain_words(text)
        size = min(len(words), _MOST_WORDS)
        if size >= _FEWEST_WORDS:
            self.runs.setdefault(size, {}).update(dict.fromkeys(_runs(words, size), origin))
        elif words:
            self.whole[" ".join(words)] = origin

    def item_in(self, prompt: str, *responses: str) -> str | None:
        """Return the origin of an item that overlaps with a record; a short one has to be the prompt."""
        if (item := self.whole.get(" ".join(plain_words(prompt)))) is not None:
            return item
        for words in map(plain_words, (prompt, *responses)):
            for size, known in self.runs.items():
                if (run := next((run for run in _runs(words, size) if run in known), None)) is not None:
                    return known[run]
        return None


def _runs(words: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(words[at : at + size]) for at in range(len(words) - size + 1))


def read_benchmarks(files: Sequence[str]) -> Benchmark:
    """Return the items of files: .jsonl (texts or objects with one of `_FIELDS`), or .txt with one a line."""
    benchmark = Benchmark()
    for file in files:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
            if not any(map(str.strip, lines)):
                raise ValueError("no item")
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _text(json.loads(line)) if file.endswith(".jsonl") else line
                    benchmark.add(text, f"{file}:{number}")
        except (OSError, ValueError) as error:
            raise DataError(
                "a file of benchmark prompts cannot be read",
                where=f"doctor.benchmarks: {file}",
                got=getattr(error, "strerror", None) or str(error),
                expected="UTF-8 text: .jsonl or .txt with one prompt a line",
                remedy="check the path and the file",
            ) from error
    return benchmark


def _text(content: Any) -> str:
    """Return the text of an item. Raises ValueError if it has none."""
    if isinstance(content, list):
        return "\n".join(map(_text, content))
    if isinstance(content, dict):
        return _text(next((content[name] for name in _FIELDS if content.get(name)), None))
    if not isinstance(content, str):
        raise ValueError(f"an item has no field {', '.join(_FIELDS)}")
    return content
