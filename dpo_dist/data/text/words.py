"""Token ids of texts, put together from those of their words: many tokenizers encode each word by itself."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

# A word ends at a visible ASCII character before one space and a letter.
_WORDS = re.compile(r" ?[!-~]+(?= [A-Za-z])|(?s:.+?)(?:(?<=[!-~])(?= [A-Za-z])|\Z)")
# What a token across the end of a word would have, in text or in the alphabet of bytes.
_ACROSS = re.compile(r"[!-~][ \u0120]")
_LOCAL_STEPS = frozenset({"ByteLevel", "Digits", "NFC", "Punctuation", "Split"})
_MAX_WORDS = 2**16
_MAX_CHARACTERS = 64  # a longer word hardly occurs again


class WordEncoder:
    """Encodes texts word by word, and each frequent word once."""

    def __init__(self, encode: Callable[[Sequence[str]], Sequence[list[int]]]):
        """Args: `encode` returns the token ids of texts."""
        self._encode = encode
        self._ids: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        known, divided = self._ids, [_WORDS.findall(text) for text in texts]
        new = [*dict.fromkeys(word for words in divided for word in words if word not in known)]
        if new:
            known.update(zip(new, self._encode(new), strict=True))
        ids = [list(itertools.chain.from_iterable(map(known.__getitem__, words))) for words in divided]
        is_full = len(known) > _MAX_WORDS
        for word in new:
            if is_full or len(word) > _MAX_CHARACTERS:
                del known[word]
        return ids


def encodes_words(backend: Tokenizer) -> bool:
    """Return whether the ids of any text are those of its words, one after another.

    So it is for byte-level BPE without a token across the end of a word, if each step before reads a text
    from its start to its end and never looks back.
    """
    model = backend.model
    if not isinstance(model, BPE) or model.dropout:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    steps = [part for step in (backend.normalizer, backend.pre_tokenizer) if step for part in _parts(step)]
    kinds = {step["type"] for step in steps}
    looks_back = any("(?<" in json.dumps(step.get("pattern")) for step in steps)
    if "ByteLevel" not in kinds or not kinds <= _LOCAL_STEPS or looks_back:
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(token.rstrip or token.single_word or _ACROSS.search(token.content) for token in added):
        return False
    return not _ACROSS.search("\n".join(backend.get_vocab(with_added_tokens=False)))


def _parts(step: Any) -> list[dict[str, Any]]:
    """Return the descriptions of a normalizer or pre-tokenizer, or of all in a sequence."""
    described = json.loads(step.__getstate__())
    return described.get("normalizers") or described.get("pretokenizers") or [described]
