"""Fast encoding by a tokenizer's Rust backend, and the parts of a text whose tokens depend on no text before.

A response is tokenised after its prompt. In byte-level BPE (GPT-2, Llama 3, Qwen) a regular expression splits
a text into words from left to right, and each word is tokenised by itself. So of a long prompt only its last
words have to be tokenised again with each response.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A space between two ASCII words, with some text after it that no match of a word looks beyond.
_WORD_START = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_TAIL_CHARACTERS = 16
_SEARCHED_CHARACTERS = 256
_CHARACTER_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")
_LOOKS_BACK = re.compile(r"\(\?<|[\^$]|\\[bBAGK]")


def token_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, literal: bool = False
) -> list[list[int]]:
    """Return the token ids of each text, without added tokens.

    Args:
        tokenizer: any tokenizer.
        texts: to encode.
        literal: whether special tokens spelled in a text are encoded as text.
    """
    backend = _backend(tokenizer)
    if backend is None:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=literal,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = literal
    # Without offsets, which take a fifth of the time.
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def has_local_tokens(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the tokens of each word of a text depend on this word only: byte-level BPE."""
    backend = _backend(tokenizer)
    if backend is None or not isinstance(backend.model, models.BPE) or backend.model.dropout:
        return False
    normalizer, splitter = _described(backend.normalizer), _described(backend.pre_tokenizer)
    if splitter is None or (normalizer is not None and normalizer["type"] != "NFC"):
        return False
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    return parts[-1]["type"] == "ByteLevel" and all(map(_splits_words, parts))


def last_words(text: str) -> int:
    """Return the start of the last words of a text, a space between two ASCII letters; 0 if there is none."""
    first = max(len(text) - _SEARCHED_CHARACTERS, 0)
    starts = [found.start() for found in _WORD_START.finditer(text, first, len(text) - _TAIL_CHARACTERS)]
    return starts[-1] if starts else 0


def _splits_words(part: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer splits at places that depend on no text before the last place."""
    match part["type"]:
        case "ByteLevel":
            return not part["add_prefix_space"]
        case "Digits":
            return True
        case "Split":
            pattern = part["pattern"].get("Regex", "")
            return part["behavior"] == "Isolated" and not _LOOKS_BACK.search(
                _CHARACTER_CLASS.sub("", pattern)
            )
    return False


def _backend(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer | None:
    """Return the Rust tokenizer that alone decides the ids; None if the tokenizer's class does more."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: PLC0415  # slow to import

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    is_plain = (
        kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
    backend: Tokenizer = tokenizer.backend_tokenizer
    return backend if is_plain else None


def _described(component: Any) -> dict[str, Any] | None:
    """Return the description of a component of a tokenizer, which has no other access to its settings."""
    if component is None:
        return None
    described: dict[str, Any] = json.loads(component.__getstate__())
    return described
