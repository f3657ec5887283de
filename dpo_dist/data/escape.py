"""Escaped texts: control tokens that data spell stay text; their encoding as token ids."""

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenizers import AddedToken, Tokenizer

from dpo_dist.data.records import Message, UnusableRecordError
from dpo_dist.data.template import THOUGHT_TAGS, any_of
from dpo_dist.foundation.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A Unicode noncharacter, never part of interchanged text: it delimits marks.
RESERVED_CHARACTER = "\ufdd0"
RESERVED = re.compile(RESERVED_CHARACTER)

_LITERAL = f"{RESERVED_CHARACTER}literal(\\d+){RESERVED_CHARACTER}"
_ESCAPED_CHARACTER = "\\ufdd0"
_BEFORE = f"{RESERVED_CHARACTER}before{RESERVED_CHARACTER}"
_AFTER = f"{RESERVED_CHARACTER}after{RESERVED_CHARACTER}"


Piece: TypeAlias = tuple[int, int, bool]
"""Its start in a changed text and in the original one; whether it is the same in both."""


class Marks:
    """The control tokens of a tokenizer and its chat template; marks in their place."""

    def __init__(self, special: Collection[str], written_by_template: Collection[str]):
        """Args: special tokens and tokens around turns; further added tokens that the template writes."""
        self.tokens = sorted({*special, *written_by_template})  # the index of each is the number in its mark
        # Marked in any text; in an assistant turn, where the model itself writes the tags of thoughts and of
        # tool calls; in all other turns, in tools and in arguments.
        self.in_text = any_of(special)
        self.in_response = any_of(set(special) - set(THOUGHT_TAGS))
        self.anywhere = any_of(self.tokens)
        token = self.anywhere.pattern
        numbers = enumerate(self.tokens)
        self._marks = {name: f"{RESERVED_CHARACTER}literal{n}{RESERVED_CHARACTER}" for n, name in numbers}
        self._literal = re.compile(_LITERAL)
        self._literal_or_token = re.compile(f"{_LITERAL}|{token}")
        self._in_place = re.compile(f"{_BEFORE}({token})|({token}){_AFTER}")

    def escape(self, text: str, pattern: re.Pattern[str] | None = None) -> str:
        """Return a text with a mark in place of each token of `pattern`, by default `in_text`."""
        return (pattern or self.in_text).sub(lambda found: self._marks[found[0]], text)

    def replaced(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Return a value with each token that matches `pattern` replaced by its mark."""
        return _mapped(value, lambda text: self.escape(text, pattern))

    def in_place(self, value: Any, pattern: re.Pattern[str]) -> Any:
        """Return a value with a mark beside each token, so that a template still finds it in the text.

        The mark is after a token at the start of a text and before any other one.
        """

        def beside(found: re.Match[str]) -> str:
            return _BEFORE + found[0] if found.string[: found.start()].strip() else found[0] + _AFTER

        return _mapped(value, lambda text: pattern.sub(beside, text))

    def settle(self, rendered: str) -> str:
        """Return the output of a template for marked values with marks only in place of tokens."""
        # Some templates write tools by `tojson` in ASCII or as Python would.
        rendered = rendered.replace(_ESCAPED_CHARACTER, RESERVED_CHARACTER)
        return self._in_place.sub(lambda found: self._marks[found[1] or found[2]], rendered)

    def spell(self, escaped: str) -> str:
        """Return the text that an escaped text spells."""
        return self._literal.sub(lambda found: self.tokens[int(found[1])], escaped)

    def with_aliases(self, escaped: str) -> tuple[str, list[Piece]]:
        """Return the text with its control tokens as aliases and spelled tokens as text; its pieces."""
        parts, pieces = list[str](), list[Piece]()
        length = done = 0
        for found in self._literal_or_token.finditer(escaped):
            before = escaped[done : found.start()]
            replaced = self.tokens[int(found[1])] if found[1] else alias_of(found[0])
            pieces += [(length, done, True), (length + len(before), found.start(), False)]
            parts += [before, replaced]
            length, done = length + len(before) + len(replaced), found.end()
        return "".join([*parts, escaped[done:]]), [*pieces, (length, done, True)]


def alias_of(token: str) -> str:
    """Return the text that stands for a control token where the tokenizer encodes tokens as text."""
    return f"{RESERVED_CHARACTER}{token}{RESERVED_CHARACTER}"


def any_text(value: Any, pattern: re.Pattern[str]) -> bool:
    """Return whether a text of messages or of a nested value, or a key of it, matches `pattern`."""
    match value:
        case str():
            return pattern.search(value) is not None
        case Message():
            return any_text((value.content, value.fields), pattern)
        case Mapping():
            return any(any_text(part, pattern) for item in value.items() for part in item)
    return isinstance(value, list | tuple) and any(any_text(part, pattern) for part in value)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(name, change): _mapped(part, change) for name, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list | tuple) else value


def token_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, literal: bool = False
) -> list[list[int]]:
    """Return the ids of each text, without added tokens; `literal`: spelled special tokens are text."""
    if tokenizer.is_fast:  # without offsets: in four fifths of the time
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = literal
        return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=literal, return_attention_mask=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _with_backend(
    tokenizer: "PreTrainedTokenizerBase", change: Callable[[dict[str, Any]], Any]
) -> "PreTrainedTokenizerBase":
    """Return a copy with each object of the tokenizer's description changed."""
    changed = copy.deepcopy(tokenizer)
    described = json.loads(changed.backend_tokenizer.to_str(), object_hook=change)
    changed._tokenizer = Tokenizer.from_str(json.dumps(described))
    return changed


def _without_first_space(part: dict[str, Any]) -> dict[str, Any] | None:
    """Change a part of a tokenizer that adds a space before a text; None: it does nothing else."""
    if part.get("type") == "Prepend":
        return None
    for name, value in (("prepend_scheme", "never"), ("add_prefix_space", False)):
        if name in part and part.get("type"):
            part[name] = value
    for steps in ("normalizers", "pretokenizers"):
        if part.get("type") == "Sequence" and steps in part:
            part[steps] = [step for step in part[steps] if step is not None]
    return part


_ANCHOR = f"{RESERVED_CHARACTER}anchor{RESERVED_CHARACTER}"


@dataclass(eq=False)
class EscapedEncoder:
    """A tokenizer, and copies of it that encode spelled control tokens as text; a pattern of added tokens."""

    _tokenizer: "PreTrainedTokenizerBase"
    _marks: Marks
    _added: re.Pattern[str]

    def encode(self, escaped: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without added tokens. Raises UnusableRecordError."""
        if any(RESERVED_CHARACTER in text for text in escaped):
            return self._encode_literally(escaped, self._literal_copy)
        return token_ids(self._tokenizer, escaped)

    def encode_after(self, prompt: str, responses: Sequence[str]) -> tuple[list[int], list[list[int]], bool]:
        """Return the ids of an escaped prompt and of each response; whether a response was resplit.

        A response is tokenised together with the prompt. If that would change the prompt's own tokens (a
        token across the boundary), the response is tokenised by itself.
        """
        tail = self._tail(prompt)
        texts = [prompt, tail, *(tail + response for response in responses)]
        distinct = list(dict.fromkeys(texts))
        ids_of = dict(zip(distinct, self.encode(distinct), strict=True))
        prompt_ids, start_ids, *joint = (ids_of[text] for text in texts)
        is_whole = [ids[: len(start_ids)] == start_ids for ids in joint]
        response_ids = [
            ids[len(start_ids) :] if whole else self.encode_continuation(text)
            for text, ids, whole in zip(responses, joint, is_whole, strict=True)
        ]
        return prompt_ids, response_ids, not all(is_whole)

    def token_starts(self, prompt: str, response: str, ids: list[int]) -> list[int]:
        """Return the position in an escaped response of the first character of each of its tokens.

        A token that starts before the response, with a space of the prompt, has a negative one. `ids` are
        those of the response by `encode_after`.
        """
        tail = self._tail(prompt)
        joint, starts = self._with_starts(tail + response)
        first = len(joint) - len(ids)
        if joint[first:] == ids:
            return [start - len(tail) for start in starts[first:]]
        cut = self._start_of_added(response)
        _, starts = self._with_starts(_ANCHOR + response[:cut], self._continuation_copy)
        _, later = self._with_starts(response[cut:])
        return [start - len(_ANCHOR) for start in starts[1:]] + [cut + start for start in later]

    def _tail(self, prompt: str) -> str:
        """Return the prompt from its last special token: later tokens do not depend on the text before it."""
        last = 0
        for found in self._marks.in_text.finditer(prompt):
            last = found.start()
        return prompt[last:]

    def encode_continuation(self, escaped: str) -> list[int]:
        """Return the ids of a response by itself: no space is added before it.

        Text after an added token is encoded as usual, with a space if the tokenizer adds one.
        """
        cut = self._start_of_added(escaped)
        [ids] = self._encode_literally([_ANCHOR + escaped[:cut]], self._continuation_copy)
        return ids[1:] + (self.encode([escaped[cut:]])[0] if cut < len(escaped) else [])

    def _start_of_added(self, escaped: str) -> int:
        first = self._added.search(escaped)
        return first.start() if first else len(escaped)

    def _encode_literally(
        self, escaped: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
    ) -> list[list[int]]:
        encoded = token_ids(tokenizer, [self._marks.with_aliases(text)[0] for text in escaped], literal=True)
        # Some vocabularies have special tokens as ordinary pieces.
        special_ids = set(self._real_ids.values()) - {self._tokenizer.unk_token_id}
        if any(not special_ids.isdisjoint(ids) for ids in encoded):
            raise UnusableRecordError("special_token_in_text", "the tokenizer cannot encode it as text")
        return [[self._real_ids.get(token, token) for token in ids] for ids in encoded]

    def _with_starts(
        self, escaped: str, tokenizer: "PreTrainedTokenizerBase | None" = None
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of a text, and the position of each token's first character in it."""
        if not self._tokenizer.is_fast:
            raise ConfigError(
                "the loss counts a part of the responses, but the tokenizer returns no positions of tokens",
                where="tokenizer of model.path",
                got="a tokenizer without a fast version",
                expected="a tokenizer with tokenizer.json",
                remedy="use a fast tokenizer, or set data.untrained=[] for responses of one turn",
            )
        spelled, pieces = escaped, [(0, 0, True)]
        if tokenizer is not None or RESERVED_CHARACTER in escaped:
            tokenizer = tokenizer or self._literal_copy
            spelled, pieces = self._marks.with_aliases(escaped)
        encoded = (tokenizer or self._tokenizer)(
            spelled,
            add_special_tokens=False,
            split_special_tokens=tokenizer is not None,
            return_offsets_mapping=True,
        )
        starts = []
        for position, _ in encoded["offset_mapping"]:
            start, origin, is_same = pieces[bisect_right(pieces, position, key=lambda piece: piece[0]) - 1]
            starts.append(origin + (position - start) * is_same)
        return [self._real_ids.get(token, token) for token in encoded["input_ids"]], starts

    @cached_property
    def _literal_copy(self) -> "PreTrainedTokenizerBase":
        """Encodes spelled control tokens as text; their aliases are tokens, which strip spaces as they do."""
        tokens = set(self._marks.tokens)

        def with_special(part: dict[str, Any]) -> dict[str, Any]:
            return {**part, "special": True} if part.get("content") in tokens and "special" in part else part

        if self._tokenizer.is_fast:
            changed = _with_backend(self._tokenizer, with_special)
        else:
            changed = copy.deepcopy(self._tokenizer)
        added = {str(token): token for token in self._tokenizer.added_tokens_decoder.values()}
        known = [AddedToken(_ANCHOR, normalized=False, special=False)]
        for token in self._marks.tokens:
            strip = {"lstrip": added[token].lstrip, "rstrip": added[token].rstrip} if token in added else {}
            known.append(AddedToken(alias_of(token), normalized=False, special=False, **strip))
        changed.add_tokens(known)
        return changed

    @cached_property
    def _continuation_copy(self) -> "PreTrainedTokenizerBase":
        """The same without a space at the start of a text or after an added token."""
        copied = self._literal_copy
        return _with_backend(copied, _without_first_space) if copied.is_fast else copied

    @cached_property
    def _real_ids(self) -> dict[int, int]:
        """Ids of special tokens by the ids of their aliases."""
        alias_ids = self._literal_copy.convert_tokens_to_ids(list(map(alias_of, self._marks.tokens)))
        real_ids = self._tokenizer.convert_tokens_to_ids(self._marks.tokens)
        return dict(zip(alias_ids, real_ids, strict=True))
