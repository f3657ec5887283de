"""Languages of texts, by py3langid (langid.py, Lui and Baldwin 2012)."""

from collections import Counter
from collections.abc import Mapping, Sequence

import py3langid

# Shorter texts are often mistaken.
_MIN_CHARACTERS = 60
_MIN_WIDE_CHARACTERS = 12


def language_of(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language; None if the text is too short to say."""
    bare = text.strip()
    wide = sum(character > "\u2e7f" for character in bare)
    if len(bare) < _MIN_CHARACTERS and wide < _MIN_WIDE_CHARACTERS:
        return None
    return str(py3langid.classify(bare)[0])


def shares(languages: Sequence[str | None]) -> Mapping[str, float]:
    """Return the share of each language among those known, the largest first."""
    known = [language for language in languages if language is not None]
    return {language: count / len(known) for language, count in Counter(known).most_common()}
