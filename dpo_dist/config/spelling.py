"""Find the name that a user probably meant by another spelling."""

import difflib
from collections.abc import Iterable

from dpo_dist.config.aliases import VALUE_ALIASES

# A guess of lower similarity misleads more people than it helps.
_SIMILAR, _NEARLY_EQUAL = 0.75, 0.9
# A wrong guess at one of these would end the run early, or late, without a message.
_NOT_GUESSED = frozenset(
    {"trainer.max_steps", "trainer.stop_after_steps", "trainer.max_seconds", "trainer.max_bad_steps"}
)


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return `known`, the most similar to `word` first; for dotted keys the last part counts again."""
    word = VALUE_ALIASES.get(word.lower(), word)
    return sorted(known, key=lambda candidate: sum(_similarities(word, candidate)), reverse=True)


def likely(word: str, known: Iterable[str]) -> list[str]:
    """Return those of `known` that the user probably meant by `word`, the most similar first."""
    candidates = list(known)
    same = VALUE_ALIASES.get(word.lower(), word.lower())
    if same in candidates:
        return [same]
    section, _, last_part = word.rpartition(".")
    # Keys of the same section with the word as a part of their name: loss.alpha, loss.ld_alpha.
    with_part = [
        candidate
        for candidate in candidates
        if candidate.rpartition(".")[0] == section
        and last_part in candidate.rpartition(".")[2].split("_")
        and candidate not in _NOT_GUESSED
    ]
    if with_part and word not in candidates:
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
