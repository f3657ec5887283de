"""Encode escaped texts (`marks`) as token ids: marks as ordinary text, control tokens as such."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from dpo_dist.data.tokenization.fast_tokenizer import has_local_tokens, last_words, token_ids
from dpo_dist.data.tokenization.marks import RESERVED_CHARACTER, Marks
from dpo_dist.data.tokenization.tokenizer_copies import continuation_copy, literal_copy
from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
