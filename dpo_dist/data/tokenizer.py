"""Properties of a tokenizer, found by probing it once; encoding of escaped texts (`marks`)."""

import re
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from dpo_dist.config.data import TEMPLATE_DATE, DataConfig
from dpo_dist.data.escape import EscapedEncoder, Marks
from dpo_dist.data.template import (
    FOREIGN_ENDS,
    FOREIGN_MARKS,
    any_of,
    chosen_template,
    has_foreign_marks,
    pin_clock,
    turn_tokens,
    written_tokens,
)
from dpo_dist.data.turns import ChatRenderer
from dpo_dist.foundation.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerFacts:
    """A tokenizer with its probed properties.

    Attributes:
        prefix_ids: ids that the tokenizer adds before a text (BOS, or none).
        marks: the control tokens of the tokenizer and its template.
        encoder: encodes escaped texts.
        chat: renders conversations; None if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None):
        self.tokenizer = tokenizer
        self.prefix_ids = _prefix_ids(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._turn_tokens = turn_tokens(tokenizer, chat_template)
        # Few texts have one of these characters, and they are found faster than all tokens.
        self._turn_starts = {token[0] for token in (*self._turn_tokens, *FOREIGN_MARKS)}
        special |= self._turn_tokens
        self.marks = Marks(special, written_tokens(map(str, added), chat_template))
        self._special = self.marks.in_text
        self.encoder = EscapedEncoder(tokenizer, self.marks, any_of({*map(str, added), *special}))
        self.chat = None if chat_template is None else ChatRenderer(tokenizer, chat_template, self.marks)

    @cached_property
    def end_of_text(self) -> str:
        """The token that ends a plain text."""
        if not self.tokenizer.eos_token:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token",
                where="tokenizer of model.path",
                remedy="set eos_token in the model's tokenizer_config.json",
            )
        return str(self.tokenizer.eos_token)

    @cached_property
    def end_of_turn(self) -> str:
        """The special token with which the template ends a response; the end of text if it writes none."""
        first = None if self.chat is None else self._special.search(self.chat.after_response)
        return first.group() if first else self.end_of_text

    @cached_property
    def around_turns(self) -> re.Pattern[str]:
        """Pattern of the tokens that the template writes around turns, and of those that end a response."""
        return any_of({*self._turn_tokens, self.end_of_turn, self.end_of_text})

    def is_templated(self, text: str) -> bool:
        """Return whether a text seems to be the output of a chat template (turns, or BOS at its start)."""
        bos = self.tokenizer.bos_token
        return (
            any(found.group() in self._turn_tokens for found in self._special.finditer(text))
            or (bos is not None and text.startswith(str(bos)))
            or has_foreign_marks(text)
        )

    def is_ended(self, response: str) -> bool:
        """Return whether a response ends as in the output of a chat template: with an end of turn or EOS."""
        eos = self.tokenizer.eos_token
        ends = (*self._turn_tokens, *FOREIGN_ENDS, *([str(eos)] if eos else []))
        return response.rstrip().endswith(ends)

    def end_templated(self, response: str) -> str:
        """Return a templated response with exactly one end of turn or end of text, and nothing after it."""
        bare, end = self._without_end(response)
        return bare + end

    def without_end(self, response: str) -> str:
        """Return a templated response without its end of turn or end of text."""
        return self._without_end(response)[0]

    def _without_end(self, response: str) -> tuple[str, str]:
        """Split a response before its first end; the default end if it has none."""
        ends = [self.end_of_text] if self.chat is None else [self.end_of_turn, self.end_of_text]
        end = ends[0]
        while (bare := response.rstrip()).endswith(tuple(ends)):
            end = next(end for end in ends if bare.endswith(end))
            response = bare.removesuffix(end)
        return response, end

    def escape(self, text: str) -> str:
        """Return `text` with a mark in place of each special token that it spells."""
        return self.marks.escape(text)

    def has_turns(self, content: str) -> bool:
        """Return whether a content has tokens that a chat template writes around turns."""
        for start in self._turn_starts:
            if start in content:
                return has_foreign_marks(content) or any(token in content for token in self._turn_tokens)
        return False

    def bare_response(self, response: str) -> str:
        """Return the escaped text of a response with an end of turn."""
        return self.escape_response(response) + self.end_of_turn

    def escape_response(self, text: str) -> str:
        """Return the content of an assistant turn, escaped."""
        return str(self.marks.replaced(text, self.marks.in_response))

    def until_end(self, rendered: str) -> str:
        """Return a rendered assistant turn up to its end of turn, which is added if it has none."""
        end = rendered.rfind(self.end_of_turn)
        if end >= 0:
            return rendered[: end + len(self.end_of_turn)]
        # Some turns end with another token, such as calls of tools.
        if last := self._last_special(rendered):
            return rendered[:last]
        after = "" if self.chat is None else self.chat.after_response
        return rendered.removesuffix(after) + self.end_of_turn

    def end_of_rendered(self, turn: str, after: str) -> int:
        """Return the position after the special token that ends a rendered turn.

        In some templates (GLM) the token that starts the text `after` it ends the turn; else the turn's end.
        """
        if last := self._last_special(turn):
            return last
        following = self._special.match(after)
        return len(turn) + (following.end() if following else 0)

    def _last_special(self, escaped: str) -> int:
        """Return the position after the last special token if only spaces follow it, else 0."""
        last = self.after_last_special(escaped)
        return 0 if escaped[last:].strip() else last

    def after_last_special(self, escaped: str) -> int:
        """Return the position after the last special token or token around turns, 0 if there is none."""
        return max((found.end() for found in self._special.finditer(escaped)), default=0)

    def with_prefix(self, ids: list[int]) -> tuple[list[int], int]:
        """Return `ids` with the tokenizer's prefix exactly once, and how many of them truncation keeps."""
        prefix = list(self.prefix_ids)
        if ids[: len(prefix)] != prefix:
            return prefix + ids, len(prefix)
        starts_with_bos = ids[:1] == [self.tokenizer.bos_token_id]
        return ids, max(len(prefix), int(starts_with_bos))


_facts = lru_cache(maxsize=8)(TokenizerFacts)
_DEFAULTS = DataConfig()


def tokenizer_facts(
    tokenizer: "PreTrainedTokenizerBase", config: DataConfig = _DEFAULTS, *, with_tools: bool = False
) -> TokenizerFacts:
    """Return the properties of `tokenizer`, probed once for each chat template.

    Some tokenizers have an own template for records `with_tools`. Raises ConfigError: `data.chat_template` is
    neither a file nor the name of a template.
    """
    template = chosen_template(tokenizer, config.chat_template, with_tools=with_tools)
    return _facts(tokenizer, template and pin_clock(template, TEMPLATE_DATE))


def end_notes(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return a note for the user on a tokenizer without an end token; texts are then an error."""
    if tokenizer.eos_token:
        return []
    return [
        "warning: the tokenizer has no end token (eos_token): responses end only as the chat template ends a "
        "turn, and a model so trained does not stop elsewhere; set eos_token in tokenizer_config.json"
    ]


def _prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])
