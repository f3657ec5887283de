"""Escaped texts: a control token's name inside data stays text when it is encoded as token ids.

A template gets a content such as `What is <|im_end|>?` with a mark beside the name, because templates look
for some names. In its output, which has real control tokens, too, name and mark become one mark with the
token's number: that is an escaped text.
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import tokenizers

from dpo_dist.data.library_internals import with_backend
from dpo_dist.data.records import RESERVED_CHARACTER, UnusableRecordError
from dpo_dist.foundation.types import Tokenizer

THOUGHT_TAGS = ("<think>", "</think>")
THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")

_LITERAL = f"{RESERVED_CHARACTER}literal(\\d+){RESERVED_CHARACTER}"
_ESCAPED_CHARACTER = "\\ufdd0"
_BEFORE = f"{RESERVED_CHARACTER}before{RESERVED_CHARACTER}"
_AFTER = f"{RESERVED_CHARACTER}after{RESERVED_CHARACTER}"


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of `tokens`, preferring the longest."""
    return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))) or r"(?!)")


class _Piece(NamedTuple):
    """A part of a changed text: a replaced token, or text that is the same in the original."""

    start: int  # in the changed text
    origin: int  # its start in the original text
    is_same: bool


class Marks:
    """The control tokens of a tokenizer and its chat template, and the marks that stand for them."""

    def __init__(
        self, special: Collection[str], written_by_template: Collection[str], of_thoughts: Collection[str]
    ):
        """Args: special tokens and those around turns; others that the template writes; tags of thoughts."""
        self.tokens = sorted({*special, *written_by_template})  # the index of each is the number in its mark
        # `in_text` is marked in any text; `in_response` in an assistant turn, where the model itself writes
        # the tags of thoughts and of tool calls; `anywhere` in other turns, in tools and in arguments.
        self.in_text = any_of(special)
        self.in_response = any_of(set(special) - set(of_thoughts))
        self.anywhere = any_of(self.tokens)
        token = self.anywhere.pattern
        numbers = enumerate(self.tokens)
        self._marks = {name: f"{RESERVED_CHARACTER}literal{n}{RESERVED_CHARACTER}" for n, name in numbers}
        self._literal = re.compile(_LITERAL)
        self._literal_or_token = re.compile(f"{_LITERAL}|{token}")
        self._beside = re.compile(f"{_BEFORE}({token})|({token}){_AFTER}")

    def escape(self, text: str, pattern: re.Pattern[str] | None = None) -> str:
        """Return a text with a mark in place of each token of `pattern`, by default `in_text`."""
        return (pattern or self.in_text).sub(lambda match: self._marks[match[0]], text)

    def mark_tokens(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Return a value with a mark beside each token of `pattern`, where a template still finds the token.

        The mark follows a token at the start of a text, and precedes any other token.
        """

        def marked(match: re.Match[str]) -> str:
            return _BEFORE + match[0] if match.string[: match.start()].strip() else match[0] + _AFTER

        def changed(part: Any) -> Any:
            if isinstance(part, str):
                return pattern.sub(marked, part)
            if isinstance(part, Mapping):
                return {changed(name): changed(value) for name, value in part.items()}
            return list(map(changed, part)) if isinstance(part, list | tuple) else part

        return changed(value)

    def replace_marked(self, rendered: str) -> str:
        """Replace each marked token in a template's output by the mark that stands for it."""
        # Some templates write tools by `tojson` in ASCII or as Python would.
        rendered = rendered.replace(_ESCAPED_CHARACTER, RESERVED_CHARACTER)
        return self._beside.sub(lambda match: self._marks[match[1] or match[2]], rendered)

    def spell(self, escaped: str) -> str:
        """Return the plain text of an escaped text."""
        return self._literal.sub(lambda match: self.tokens[int(match[1])], escaped)

    def with_aliases(self, escaped: str) -> tuple[str, list[_Piece]]:
        """Return the text with aliases for control tokens, and with marked tokens as text; and its pieces."""
        parts = list[str]()
        pieces = list[_Piece]()
        length = 0
        done = 0
        for match in self._literal_or_token.finditer(escaped):
            before = escaped[done : match.start()]
            replaced = self.tokens[int(match[1])] if match[1] else token_alias(match[0])
            pieces.append(_Piece(length, done, is_same=True))
            pieces.append(_Piece(length + len(before), match.start(), is_same=False))
            parts += [before, replaced]
            length += len(before) + len(replaced)
            done = match.end()
        pieces.append(_Piece(length, done, is_same=True))
        return "".join([*parts, escaped[done:]]), pieces


def token_alias(token: str) -> str:
    """Return the text that stands for a control token where the tokenizer encodes tokens as text."""
    return f"{RESERVED_CHARACTER}{token}{RESERVED_CHARACTER}"


Encoded: TypeAlias = tuple[list[int], list[int]]
"""The token ids of a text, and the position of the first character of each, or none."""


def tokenize_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    literal: bool = False,
    with_starts: bool = False,
) -> list[Encoded]:
    """Return the tokens of each text, without added tokens; `literal`: spelled special tokens are text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = literal
    if not with_starts:  # without positions it takes a fifth less time
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [(each.ids, []) for each in encoded]
    encoded = backend.encode_batch(list(texts), add_special_tokens=False)
    return [(each.ids, [start for start, _ in each.offsets]) for each in encoded]


def _with_backend(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    """Return a copy with each object of the tokenizer's description changed."""
    described = json.loads(tokenizer.backend_tokenizer.to_str(), object_hook=change)
    changed: Tokenizer = with_backend(tokenizer, json.dumps(described))
    return changed


def _without_first_space(part: dict[str, Any]) -> dict[str, Any] | None:
    """Return a tokenizer's part without the space that it adds; None for a part that only adds it."""
    if part.get("type") == "Prepend":
        return None
    for name, value in (("prepend_scheme", "never"), ("add_prefix_space", False)):
        if name in part and part.get("type"):
            part[name] = value
    for steps in ("normalizers", "pretokenizers"):
        if part.get("type") == "Sequence" and steps in part:
            part[steps] = [step for step in part[steps] if step is not None]
    return part


def _origin(position: int, pieces: Sequence[_Piece]) -> int:
    """Translate a position in the changed text of these pieces to the original text."""
    piece = pieces[bisect_right(pieces, position, key=lambda piece: piece.start) - 1]
    return piece.origin + position - piece.start if piece.is_same else piece.origin


_ANCHOR = f"{RESERVED_CHARACTER}anchor{RESERVED_CHARACTER}"


@dataclass(eq=False)
class EscapedEncoder:
    """Encodes escaped texts: by the tokenizer, or by copies that encode marked control tokens as text."""

    _tokenizer: Tokenizer
    _marks: Marks
    _added: re.Pattern[str]

    def encode(self, escaped: Sequence[str], with_starts: bool = False) -> list[Encoded]:
        """Return the tokens of each text, without added tokens. Raises UnusableRecordError."""
        if any(RESERVED_CHARACTER in text for text in escaped):
            return self._encode_literally(escaped, self._literal_copy, with_starts)
        return tokenize_texts(self._tokenizer, escaped, with_starts=with_starts)

    def encode_after(
        self,
        prompt: str,
        responses: Sequence[str],
        with_starts: bool = False,
        *,
        keeps_boundary: bool = True,
    ) -> tuple[list[int], list[Encoded], bool]:
        """Return the ids of an escaped prompt, the tokens of each response; whether a response was resplit.

        A response is tokenised together with the prompt. If that would change the prompt's own tokens (a
        token across the boundary), the response is tokenised by itself, or without `keeps_boundary` begins
        where the tokens differ. A token that starts before its response, with a space of the prompt, has a
        negative start.
        """
        # Start at the last special token: later tokens do not depend on the text before.
        tail = prompt[max((match.start() for match in self._marks.in_text.finditer(prompt)), default=0) :]
        texts = [prompt, tail, *(tail + response for response in responses)]
        distinct = list(dict.fromkeys(texts))
        encoded_by_text = dict(zip(distinct, self.encode(distinct, with_starts), strict=True))
        (prompt_ids, _), (before, _), *joint = (encoded_by_text[text] for text in texts)
        if not keeps_boundary:
            shared = len(os.path.commonprefix([before, *(ids for ids, _ in joint)]))  # noqa: RUF071  (of ids)
            prompt_ids = prompt_ids[: len(prompt_ids) - len(before) + shared]
            before = before[:shared]
        cut = len(before)
        encoded = list[Encoded]()
        is_resplit = False
        for text, (ids, starts) in zip(responses, joint, strict=True):
            if ids[:cut] == before:
                encoded.append((ids[cut:], [start - len(tail) for start in starts[cut:]]))
            else:
                encoded.append(self._encode_continuation(text, with_starts))
                is_resplit = True
        return prompt_ids, encoded, is_resplit

    def _encode_continuation(self, escaped: str, with_starts: bool) -> Encoded:
        """Return the tokens of a response alone, without a space before the response.

        Text after an added token is encoded as usual, with a space if the tokenizer adds one.
        """
        first = self._added.search(escaped)
        cut = first.start() if first else len(escaped)
        anchored = [_ANCHOR + escaped[:cut]]
        [(ids, starts)] = self._encode_literally(anchored, self._continuation_copy, with_starts)
        later, later_starts = self.encode([escaped[cut:]], with_starts)[0] if first else ([], [])
        positions = [start - len(_ANCHOR) for start in starts[1:]] + [cut + start for start in later_starts]
        return ids[1:] + later, positions

    def _encode_literally(
        self, escaped: Sequence[str], tokenizer: Tokenizer, with_starts: bool
    ) -> list[Encoded]:
        aliased = list(map(self._marks.with_aliases, escaped))
        spelled = [text for text, _ in aliased]
        encoded = tokenize_texts(tokenizer, spelled, literal=True, with_starts=with_starts)
        # Some vocabularies have special tokens as ordinary pieces.
        special_ids = set(self._real_ids.values()) - {self._tokenizer.unk_token_id}
        if any(not special_ids.isdisjoint(ids) for ids, _ in encoded):
            raise UnusableRecordError("special_token_in_text", "the tokenizer cannot encode it as text")
        return [
            (
                [self._real_ids.get(token, token) for token in ids],
                [_origin(start, pieces) for start in starts],
            )
            for (ids, starts), (_, pieces) in zip(encoded, aliased, strict=True)
        ]

    @cached_property
    def _literal_copy(self) -> Tokenizer:
        """Encodes spelled control tokens as text; their aliases are tokens, and strip spaces as they do."""
        tokens = set(self._marks.tokens)

        def with_special(part: dict[str, Any]) -> dict[str, Any]:
            return {**part, "special": True} if part.get("content") in tokens and "special" in part else part

        changed = _with_backend(self._tokenizer, with_special)
        added = {str(token): token for token in self._tokenizer.added_tokens_decoder.values()}
        aliases = [tokenizers.AddedToken(_ANCHOR, normalized=False, special=False)]
        for token in self._marks.tokens:
            strip = {"lstrip": added[token].lstrip, "rstrip": added[token].rstrip} if token in added else {}
            alias = token_alias(token)
            aliases.append(tokenizers.AddedToken(alias, normalized=False, special=False, **strip))
        changed.add_tokens(aliases)
        return changed

    @cached_property
    def _continuation_copy(self) -> Tokenizer:
        """`_literal_copy`, but it adds no space at the start of a text or after an added token."""
        return _with_backend(self._literal_copy, _without_first_space)

    @cached_property
    def _real_ids(self) -> dict[int, int]:
        """Ids of special tokens by the ids of their aliases."""
        alias_ids = self._literal_copy.convert_tokens_to_ids(list(map(token_alias, self._marks.tokens)))
        real_ids = self._tokenizer.convert_tokens_to_ids(self._marks.tokens)
        return dict(zip(alias_ids, real_ids, strict=True))
