"""Names that users meant: those of other trainers (names.yaml), and names that are nearly right."""

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import yaml


@cache
def _table(section: str) -> dict[str, tuple[str, ...]]:
    """Return, for each name of a section of names.yaml, what it stands for."""
    content = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
    found: dict[str, tuple[str, ...]] = {}
    for meant, names in content[section].items():
        for name in names.split():
            found[name] = (*found.get(name, ()), meant)
    return found


def _alias(name: str, table: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return what the whole name stands for, else its last part."""
    plain = name.lower().replace("-", "_")
    found = table.get(plain) or table.get(plain.rpartition(".")[2])
    return found[0] if found else None


def key_of(name: str) -> str | None:
    """Return the key with the meaning of an option of another trainer."""
    return _alias(name, _table("keys"))


def answer_to(name: str) -> str | None:
    """Return the answer to an option of another trainer without such a key; `{value}` is its value."""
    return _alias(name, _table("answers"))


def source_key_of(name: str) -> str | None:
    """Return the key of a source with the meaning of one of another trainer."""
    return _alias(name, _table("sources"))


def values_of(word: str) -> tuple[str, ...]:
    """Return the values for which a word of other trainers stands."""
    return _table("values").get(word.lower(), ())


def foreign_names() -> set[str]:
    """Return every option of another trainer that gets an answer."""
    return {*_table("keys"), *_table("answers")}


# A guess of lower similarity misleads more people than it helps.
_SIMILAR, _NEARLY_EQUAL = 0.75, 0.9
# A wrong guess at one of these would end the run early, or late, without a message.
_NOT_GUESSED = frozenset({"trainer.max_steps", "trainer.stop_after_steps", "trainer.max_seconds"})


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return `known`, the most similar to `word` first; for dotted keys the last part counts again."""
    return sorted(known, key=lambda candidate: sum(_similarities(word, candidate)), reverse=True)


def likely(word: str, known: Iterable[str]) -> list[str]:
    """Return those of `known` that the user probably meant by `word`, the most similar first."""
    candidates = list(known)
    if same := [name for name in (word.lower(), *values_of(word)) if name in candidates]:
        return same[:1]
    section, _, last_part = word.rpartition(".")
    # Keys of the same section with the word as a part of their name: loss.alpha, loss.ld_alpha.
    with_part = [
        candidate
        for candidate in candidates
        if candidate.rpartition(".")[0] == section
        and last_part in candidate.rpartition(".")[2].split("_")
        and candidate not in _NOT_GUESSED
    ]
    if with_part:
        return with_part
    for candidate in nearest(word, candidates)[:3]:
        whole, last = _similarities(word, candidate)
        similarity = last if "." in word or "." not in candidate else max(whole, last)
        elsewhere = section in candidates and candidate.rpartition(".")[0] != section
        if similarity > (_NEARLY_EQUAL if elsewhere or candidate in _NOT_GUESSED else _SIMILAR):
            return [candidate]
    return []


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a question after the likely names of `known`, with a space after it; empty if there are none."""
    found = likely(word, known)
    return f"did you mean {' or '.join(found)}? " if found else ""


def _similarities(word: str, candidate: str) -> tuple[float, float]:
    """Return the similarity of the whole keys and that of their last parts, each from 0 to 1."""
    whole = difflib.SequenceMatcher(None, word, candidate).ratio()
    last = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return whole, last
