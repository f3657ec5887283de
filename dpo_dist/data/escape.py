"""Escaped texts: control tokens that data spell stay text; their encoding as token ids."""

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from dpo_dist.data.template import THOUGHT_TAGS, any_of
from dpo_dist.foundation.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A Unicode noncharacter, never part of interchanged text: it delimits marks.
RESERVED_CHARACTER = "\ufdd0"
RESERVED = re.compile(RESERVED_CHARACTER)

_LITERAL = re.compile(f"{RESERVED_CHARACTER}literal(\\d+){RESERVED_CHARACTER}")
_ESCAPED_CHARACTER = "\\ufdd0"
_BEFORE = f"{RESERVED_CHARACTER}before{RESERVED_CHARACTER}"
_AFTER = f"{RESERVED_CHARACTER}after{RESERVED_CHARACTER}"


class Marks:
    """The control tokens of a tokenizer and its chat template; marks in their place.

    Attributes:
        tokens: every control token, sorted; its index is the number in its mark.
        in_text: pattern of the tokens that are marked in any text.
        in_response: those that are marked in an assistant turn, where the model itself writes the tags of
            thoughts and of tool calls.
        anywhere: pattern of all of them, marked in all other turns, in tools and in arguments.
        token_or_mark: pattern of any control token, or of the mark of one.
    """

    def __init__(self, special: Collection[str], written_by_template: Collection[str]):
        """Args: special tokens and tokens around turns; further added tokens that the template writes."""
        self.tokens = sorted({*special, *written_by_template})
        self._numbers = {token: number for number, token in enumerate(self.tokens)}
        self.in_text = any_of(special)
        self.in_response = any_of(set(special) - set(THOUGHT_TAGS))
        self.anywhere = any_of(self.tokens)
        token = self.anywhere.pattern
        self.token_or_mark = re.compile(f"{_LITERAL.pattern}|{token}")
        self._in_place = re.compile(f"{_BEFORE}({token})|({token}){_AFTER}")

    def escape(self, text: str) -> str:
        """Return a text with a mark in place of each special token or token around turns."""
        return self.in_text.sub(self._mark, text)

    def replaced(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Return a value with each token that matches `pattern` replaced by its mark."""
        return _mapped(value, partial(pattern.sub, self._mark))

    def in_place(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Return a value with a mark beside each token, so that a template still finds it in the text.

        The mark is after a token at the start of a text and before any other one.
        """
        return _mapped(value, partial(pattern.sub, _beside))

    def settle(self, rendered: str) -> str:
        """Return the output of a template for marked values with marks only in place of tokens."""
        # Some templates write tools by `tojson` in ASCII or as Python would.
        rendered = rendered.replace(_ESCAPED_CHARACTER, RESERVED_CHARACTER)
        return self._in_place.sub(lambda found: self._mark_of(found.group(1) or found.group(2)), rendered)

    def spell(self, escaped: str) -> str:
        """Return the text that an escaped text spells."""
        return _LITERAL.sub(self._literal, escaped)

    def _mark(self, found: re.Match[str]) -> str:
        return self._mark_of(found.group())

    def _mark_of(self, token: str) -> str:
        return f"{RESERVED_CHARACTER}literal{self._numbers[token]}{RESERVED_CHARACTER}"

    def _literal(self, found: re.Match[str]) -> str:
        return self.tokens[int(found.group(1))]


def any_text(value: Any, pattern: re.Pattern[str]) -> bool:
    """Return whether a text of a nested value, or a key of it, matches `pattern`."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(any_text(part, pattern) for item in value.items() for part in item)
    return isinstance(value, list | tuple) and any(any_text(part, pattern) for part in value)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(name, change): _mapped(part, change) for name, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list | tuple) else value


def _beside(found: re.Match[str]) -> str:
    token, before = found.group(), found.string[: found.start()]
    return _BEFORE + token if before.strip() else token + _AFTER


# A space between two ASCII words, with some text after it that no match of a word looks beyond.
_WORD_START = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_TAIL_CHARACTERS = 16
_SEARCHED_CHARACTERS = 256


def token_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, literal: bool = False
) -> list[list[int]]:
    """Return the token ids of each text, without added tokens.

    Args:
        tokenizer: any tokenizer.
        texts: to encode.
        literal: whether special tokens spelled in a text are encoded as text.
    """
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


def has_local_tokens(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the tokens of each word of a text depend on this word only: byte-level BPE."""
    if not tokenizer.is_fast:
        return False
    backend = tokenizer.backend_tokenizer
    splitter = backend.pre_tokenizer
    if isinstance(splitter, pre_tokenizers.Sequence):
        *_, splitter = splitter  # type: ignore[misc]
    return (
        isinstance(backend.model, models.BPE)
        and not backend.model.dropout
        and isinstance(backend.normalizer, normalizers.NFC | None)
        and isinstance(splitter, pre_tokenizers.ByteLevel)
        and not splitter.add_prefix_space
    )


def last_words(text: str) -> int:
    """Return the start of the last words of a text, a space between two ASCII letters; 0 if there is none."""
    first = max(len(text) - _SEARCHED_CHARACTERS, 0)
    starts = [found.start() for found in _WORD_START.finditer(text, first, len(text) - _TAIL_CHARACTERS)]
    return starts[-1] if starts else 0


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


_ANCHOR = f"{RESERVED_CHARACTER}anchor{RESERVED_CHARACTER}"


class SpecialTokenInTextError(Exception):
    """A content spells a special token, and the tokenizer has no other tokens for that text."""


class EscapedEncoder:
    """A tokenizer, and copies of it that encode spelled control tokens as text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", marks: Marks, added: re.Pattern[str]):
        """Args: the tokenizer, its control tokens, and the pattern of all its added tokens."""
        self._tokenizer = tokenizer
        self._marks = marks
        self._added = added

    def encode(self, escaped: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without added tokens. Raises SpecialTokenInTextError."""
        if any(RESERVED_CHARACTER in text for text in escaped):
            return self._encode_literally(escaped)
        return token_ids(self._tokenizer, escaped)

    def encode_continuation(self, escaped: str) -> list[int]:
        """Return the token ids of a text that continues another one: no space is added before it."""
        # Text after an added token is encoded as usual, with a space if the tokenizer adds one.
        cut = self._start_of_added(escaped)
        ids = self._encode_literally([_ANCHOR + escaped[:cut]], self._continuation_copy)[0][1:]
        return ids + (self.encode([escaped[cut:]])[0] if cut < len(escaped) else [])

    def encode_after(self, prompt: str, responses: Sequence[str]) -> tuple[list[int], list[list[int]], bool]:
        """Return the ids of an escaped prompt and of each response; whether a response was resplit.

        A response is tokenised together with the prompt. If that would change the prompt's own tokens (a
        token across the boundary), the response is tokenised by itself.
        """
        # Tokens after the last special token do not depend on the text before it.
        tail = prompt[self._start_of_last_special(prompt) :]
        words = tail[last_words(tail) :] if self._has_local_tokens else tail
        prompt_ids, joint, tail_ids = self._encode_joint(prompt, words, responses)
        if prompt_ids[len(prompt_ids) - len(tail_ids) :] != tail_ids:
            prompt_ids, joint, tail_ids = self._encode_joint(prompt, tail, responses)
        response_ids, resplit = [], False
        for response, ids in zip(responses, joint, strict=True):
            if ids[: len(tail_ids)] == tail_ids:
                response_ids.append(ids[len(tail_ids) :])
            else:
                response_ids.append(self.encode_continuation(response))
                resplit = True
        return prompt_ids, response_ids, resplit

    def _encode_joint(
        self, prompt: str, tail: str, responses: Sequence[str]
    ) -> tuple[list[int], list[list[int]], list[int]]:
        """Return the ids of a prompt, of its `tail` with each response, and of the tail itself."""
        texts = [prompt, *(tail + response for response in responses)]
        if tail == prompt:
            prompt_ids, *joint = self.encode(texts)
            return prompt_ids, joint, prompt_ids
        prompt_ids, *joint, tail_ids = self.encode([*texts, tail])
        return prompt_ids, joint, tail_ids

    @cached_property
    def _has_local_tokens(self) -> bool:
        return has_local_tokens(self._tokenizer)

    def token_starts(self, prompt: str, response: str, ids: list[int]) -> list[int]:
        """Return the position in an escaped response of the first character of each of its tokens.

        A token that starts before the response, with a space of the prompt, has a negative one.

        Args:
            prompt: escaped.
            response: escaped.
            ids: of the response, by `encode_after`.

        Raises:
            ConfigError: the tokenizer cannot return positions.
        """
        tail = prompt[self._start_of_last_special(prompt) :]
        joint, starts = self._with_starts(tail + response)
        first = len(joint) - len(ids)
        if joint[first:] == ids:
            return [start - len(tail) for start in starts[first:]]
        # The response was tokenised by itself, as in `encode_continuation`.
        cut = self._start_of_added(response)
        _, starts = self._with_starts(_ANCHOR + response[:cut], self._continuation_copy)
        _, later = self._with_starts(response[cut:])
        return [start - len(_ANCHOR) for start in starts[1:]] + [cut + start for start in later]

    def _start_of_added(self, escaped: str) -> int:
        first = self._added.search(escaped)
        return first.start() if first else len(escaped)

    def _start_of_last_special(self, escaped: str) -> int:
        last = 0
        for found in self._marks.in_text.finditer(escaped):
            last = found.start()
        return last

    def _encode_literally(
        self, escaped: Sequence[str], tokenizer: "PreTrainedTokenizerBase | None" = None
    ) -> list[list[int]]:
        real_ids = self._real_ids
        spelled = [self._marks.spell(self._marks.anywhere.sub(_alias, text)) for text in escaped]
        encoded = token_ids(tokenizer or self._literal_copy, spelled, literal=True)
        # Some vocabularies have special tokens as ordinary pieces; these cannot be encoded as text.
        special_ids = set(real_ids.values()) - {self._tokenizer.unk_token_id}
        if any(not special_ids.isdisjoint(ids) for ids in encoded):
            raise SpecialTokenInTextError
        return [[real_ids.get(token, token) for token in ids] for ids in encoded]

    def _with_starts(
        self, escaped: str, tokenizer: "PreTrainedTokenizerBase | None" = None
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of a text, and the position of each token's first character in it."""
        if not self._tokenizer.is_fast:
            raise _no_positions()
        if tokenizer is None and RESERVED_CHARACTER not in escaped:
            encoded = self._tokenizer(escaped, add_special_tokens=False, return_offsets_mapping=True)
            return encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
        pieces = list(self._pieces(escaped))
        spelled = "".join(text for text, _, _ in pieces)
        starts = list(accumulate((len(text) for text, _, _ in pieces), initial=0))[:-1]
        encoded = (tokenizer or self._literal_copy)(
            spelled, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        found = []
        for position, _ in encoded["offset_mapping"]:
            index = bisect_right(starts, position) - 1
            _, origin, is_text = pieces[index]
            found.append(origin + (position - starts[index]) * is_text)
        return [self._real_ids.get(token, token) for token in encoded["input_ids"]], found

    def _pieces(self, escaped: str) -> Iterator[tuple[str, int, bool]]:
        """Yield parts of the text to encode, each with its position in the escaped text, and whether it is
        the same there: an alias replaces a control token, and a spelled token its mark."""
        done = 0
        for found in self._marks.token_or_mark.finditer(escaped):
            if done < found.start():
                yield escaped[done : found.start()], done, True
            done = found.end()
            token = self._marks.spell(found.group())
            yield token if token != found.group() else _alias_of(token), found.start(), False
        yield escaped[done:], done, True

    @cached_property
    def _literal_copy(self) -> "PreTrainedTokenizerBase":
        """Encodes spelled special tokens as text, and their aliases as special tokens."""
        aliases = {token: _alias_of(token) for token in self._marks.tokens}
        return literal_copy(self._tokenizer, aliases, [_ANCHOR])

    @cached_property
    def _continuation_copy(self) -> "PreTrainedTokenizerBase":
        return continuation_copy(self._literal_copy)

    @cached_property
    def _real_ids(self) -> dict[int, int]:
        """Ids of special tokens by the ids of their aliases."""
        alias_ids = self._literal_copy.convert_tokens_to_ids(list(map(_alias_of, self._marks.tokens)))
        real_ids = self._tokenizer.convert_tokens_to_ids(self._marks.tokens)
        return dict(zip(alias_ids, real_ids, strict=True))


def _alias_of(token: str) -> str:
    return f"{RESERVED_CHARACTER}{token}{RESERVED_CHARACTER}"


def _alias(found: re.Match[str]) -> str:
    return _alias_of(found.group())


def _no_positions() -> ConfigError:
    return ConfigError(
        "the loss is to count a part of the responses, but the tokenizer does not return token positions",
        where="tokenizer of model.path",
        got="a tokenizer without a fast version",
        expected="a tokenizer with tokenizer.json",
        remedy="use a fast tokenizer, or set data.untrained=[] for data with responses of one turn",
    )
