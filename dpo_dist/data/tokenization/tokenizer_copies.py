"""Copies of a tokenizer that encode special tokens as text, or add no space before a text."""

import copy
import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def literal_copy(
    tokenizer: "PreTrainedTokenizerBase", aliases: dict[str, str], also: Collection[str] = ()
) -> "PreTrainedTokenizerBase":
    """Return a copy that can encode special tokens as text, and that has an alias for each of them.

    Args:
        tokenizer: the original, not changed.
        aliases: alias of each special token; it becomes one token, which strips spaces as the original does.
        also: further strings that become one token each.
    """
    changed = copy.deepcopy(tokenizer)
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    if tokenizer.is_fast and any(token in added and not added[token].special for token in aliases):
        _set_backend(changed, _with_special(_backend_of(changed), set(aliases)))
    known = [AddedToken(text, normalized=False, special=False) for text in also]
    for token, alias in aliases.items():
        strip = {"lstrip": added[token].lstrip, "rstrip": added[token].rstrip} if token in added else {}
        known.append(AddedToken(alias, normalized=False, special=False, **strip))
    changed.add_tokens(known)
    return changed


def continuation_copy(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Return a copy that adds no space at the start of a text or after an added token."""
    if not tokenizer.is_fast:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    _set_backend(changed, _without_first_space(_backend_of(tokenizer)))
    return changed


def _backend_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return backend


def _set_backend(tokenizer: "PreTrainedTokenizerBase", backend: dict[str, Any]) -> None:
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))


def _with_special(backend: dict[str, Any], tokens: Collection[str]) -> dict[str, Any]:
    known = [
        {**token, "special": token["special"] or token["content"] in tokens}
        for token in backend["added_tokens"]
    ]
    return {**backend, "added_tokens": known}


def _without_first_space(part: Any) -> Any:
    """Return a tokenizer's description, or a part of it, without the parts that add a space before a text."""
    if isinstance(part, list):
        return [_without_first_space(one) for one in part if not _prepends(one)]
    if not isinstance(part, dict):
        return part
    # The model is the vocabulary, which is large.
    changed = {
        key: one if key == "model" else None if _prepends(one) else _without_first_space(one)
        for key, one in part.items()
    }
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return changed


def _prepends(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"
