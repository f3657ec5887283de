"""Copies of a tokenizer that read texts as it never would: special tokens as text, no space put before."""

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
    """A copy that reads spelt special tokens as text where it is asked to, and knows each by its alias.

    Args:
        tokenizer: is not changed.
        aliases: other spellings by special token; each becomes one token, which strips spaces as
            its original.
        also: more spellings that become one token each.
    """
    twin = copy.deepcopy(tokenizer)
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    if tokenizer.is_fast and any(token in added and not added[token].special for token in aliases):
        _set_backend(twin, _with_special(_backend_of(twin), set(aliases)))
    known = [AddedToken(spelling, normalized=False, special=False) for spelling in also]
    for token, alias in aliases.items():
        strip = {"lstrip": added[token].lstrip, "rstrip": added[token].rstrip} if token in added else {}
        known.append(AddedToken(alias, normalized=False, special=False, **strip))
    twin.add_tokens(known)
    return twin


def continuation_copy(twin: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """A copy that puts no space before the first word of a text or before that after an added token."""
    if not twin.is_fast:
        return twin
    continuing = copy.deepcopy(twin)
    _set_backend(continuing, _without_first_space(_backend_of(twin)))
    return continuing


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
    """A tokenizer's description, or a part of it, without what writes a space before a text."""
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
