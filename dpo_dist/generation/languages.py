"""Languages of texts, by py3langid (langid.py, Lui and Baldwin 2012)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# Shorter texts are often mistaken.
_MIN_CHARACTERS = 60
_MIN_WIDE_CHARACTERS = 12
_MIN_PROBABILITY = 0.95
# Written in the same characters; short texts are mistaken for each other.
_SAME = {"wuu": "zh", "yue": "zh"}


def language_of(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language; None if it is not clear."""
    bare = text.strip()
    wide = sum(character > "\u2e7f" for character in bare)
    if len(bare) < _MIN_CHARACTERS and wide < _MIN_WIDE_CHARACTERS:
        return None
    language, probability = _identifier().classify(bare)
    return _SAME.get(str(language), str(language)) if probability >= _MIN_PROBABILITY else None


def shares(languages: Sequence[str | None]) -> Mapping[str, float]:
    """Return the share of each language among those known, the largest first."""
    known = [language for language in languages if language is not None]
    return {language: count / len(known) for language, count in Counter(known).most_common()}


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
