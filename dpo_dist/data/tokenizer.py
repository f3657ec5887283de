"""Properties of a tokenizer and its chat template, found by probing it once; encoding of escaped texts.

In an *escaped* text a mark replaces each special token that a content spells (`</s>`), so that every special
token left was written by the chat template or by this program. Only escaped texts are encoded; a content that
spells no special token is equal to its escaped form.
"""

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from dpo_dist.config.data_schema import DataConfig
from dpo_dist.data.chat_template import FOREIGN_ENDS, any_of, has_foreign_marks, pin_clock, turn_tokens
from dpo_dist.data.fast_tokenizer import has_local_tokens, last_words, token_ids
from dpo_dist.data.records import Message, Messages
from dpo_dist.data.tokenizer_copies import continuation_copy, literal_copy
from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A Unicode noncharacter, never part of interchanged text: it delimits marks.
RESERVED_CHARACTER = "\ufdd0"

_LITERAL = re.compile(f"{RESERVED_CHARACTER}literal(\\d+){RESERVED_CHARACTER}")
_ANCHOR = f"{RESERVED_CHARACTER}anchor{RESERVED_CHARACTER}"
_PROBE = "probe answer"


class SpecialTokenInTextError(Exception):
    """A content spells a special token, and the tokenizer has no other tokens for that text."""


class TokenizerFacts:
    """A tokenizer with its probed properties.

    Attributes:
        prefix_ids: ids that the tokenizer adds before a text (BOS, or none).
        chat_template: template of conversations; None if the tokenizer has none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.prefix_ids = _prefix_ids(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._turn_tokens = turn_tokens(tokenizer, chat_template)
        self._special_tokens = sorted(special | self._turn_tokens)
        self._special = any_of(self._special_tokens)
        self._added = any_of({*map(str, added), *self._special_tokens})

    @cached_property
    def end_of_text(self) -> str:
        """The token that ends a plain text."""
        if self.tokenizer.eos_token is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token",
                where="tokenizer of model.path",
                remedy="set eos_token in the model's tokenizer_config.json",
            )
        return str(self.tokenizer.eos_token)

    @cached_property
    def _after_response(self) -> str:
        """The output of the template after the last assistant turn."""
        messages = (Message("user", "probe question"), Message("assistant", _PROBE))
        try:
            _, found, after = self.render(messages).rpartition(_PROBE)
        except TemplateError as fault:
            raise _unusable_template(str(fault)) from fault
        if not found:
            raise _unusable_template("its output does not contain the response")
        return after

    @cached_property
    def end_of_turn(self) -> str:
        """The special token with which the template ends a response; the end of text if it writes none."""
        first = self._special.search(self._after_response)
        return first.group() if first else self.end_of_text

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
        ends = (*self._turn_tokens, *FOREIGN_ENDS, *([str(eos)] if eos is not None else []))
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
        ends = [self.end_of_text] if self.chat_template is None else [self.end_of_turn, self.end_of_text]
        end = ends[0]
        while (bare := response.rstrip()).endswith(tuple(ends)):
            end = next(end for end in ends if bare.endswith(end))
            response = bare.removesuffix(end)
        return response, end

    def escape(self, text: str) -> str:
        """Return `text` with a mark in place of each special token that it spells."""
        return self._special.sub(self._mark, text)

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Render a conversation with the chat template, escaped. Raises jinja2's TemplateError."""
        turns = [{"role": message.role, "content": self.escape(message.content)} for message in messages]
        rendered = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return str(rendered)

    def bare_response(self, response: str) -> str:
        """Return the escaped text of a response with an end of turn."""
        return self.escape(response) + self.end_of_turn

    def rendered_response(self, messages: Messages, response: str, prompt: str) -> str | None:
        """Render a response after the rendered `prompt`, up to its end of turn; escaped.

        Includes text that the template adds to a response (a leading space, an empty thought). None if the
        template renders the prompt differently when a response follows.
        """
        whole = self.render((*messages, Message("assistant", response)))
        if not whole.startswith(prompt):
            return None
        added = whole[len(prompt) :]
        end = added.rfind(self.end_of_turn)
        if end < 0:
            return added.removesuffix(self._after_response) + self.end_of_turn
        return added[: end + len(self.end_of_turn)]

    def with_prefix(self, ids: list[int]) -> tuple[list[int], int]:
        """Return `ids` with the tokenizer's prefix exactly once, and how many of them truncation keeps."""
        prefix = list(self.prefix_ids)
        if ids[: len(prefix)] != prefix:
            return prefix + ids, len(prefix)
        starts_with_bos = ids[:1] == [self.tokenizer.bos_token_id]
        return ids, max(len(prefix), int(starts_with_bos))

    def encode(self, escaped: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without added tokens. Raises SpecialTokenInTextError."""
        if any(RESERVED_CHARACTER in text for text in escaped):
            return self._encode_literally(escaped)
        return token_ids(self.tokenizer, escaped)

    def encode_continuation(self, escaped: str) -> list[int]:
        """Return the token ids of a text that continues another one: no space is added before it."""
        # Text after an added token is encoded as usual, with a space if the tokenizer adds one.
        first = self._added.search(escaped)
        cut = first.start() if first else len(escaped)
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
        return has_local_tokens(self.tokenizer)

    def _start_of_last_special(self, escaped: str) -> int:
        last = 0
        for found in self._special.finditer(escaped):
            last = found.start()
        return last

    def _encode_literally(
        self, escaped: Sequence[str], tokenizer: "PreTrainedTokenizerBase | None" = None
    ) -> list[list[int]]:
        real_ids = self._real_ids
        spelled = [_LITERAL.sub(self._literal, self._special.sub(_alias, text)) for text in escaped]
        encoded = token_ids(tokenizer or self._literal_copy, spelled, literal=True)
        # Some vocabularies have special tokens as ordinary pieces; these cannot be encoded as text.
        special_ids = set(real_ids.values()) - {self.tokenizer.unk_token_id}
        if any(not special_ids.isdisjoint(ids) for ids in encoded):
            raise SpecialTokenInTextError
        return [[real_ids.get(token, token) for token in ids] for ids in encoded]

    @cached_property
    def _literal_copy(self) -> "PreTrainedTokenizerBase":
        """Encodes spelled special tokens as text, and their aliases as special tokens."""
        aliases = {token: _alias_of(token) for token in self._special_tokens}
        return literal_copy(self.tokenizer, aliases, [_ANCHOR])

    @cached_property
    def _continuation_copy(self) -> "PreTrainedTokenizerBase":
        return continuation_copy(self._literal_copy)

    @cached_property
    def _real_ids(self) -> dict[int, int]:
        """Ids of special tokens by the ids of their aliases."""
        alias_ids = self._literal_copy.convert_tokens_to_ids(
            [_alias_of(token) for token in self._special_tokens]
        )
        real_ids = self.tokenizer.convert_tokens_to_ids(self._special_tokens)
        return dict(zip(alias_ids, real_ids, strict=True))

    def _mark(self, found: "re.Match[str]") -> str:
        number = self._special_tokens.index(found.group())
        return f"{RESERVED_CHARACTER}literal{number}{RESERVED_CHARACTER}"

    def _literal(self, found: "re.Match[str]") -> str:
        token: str = self._special_tokens[int(found.group(1))]
        return token


_facts = lru_cache(maxsize=4)(TokenizerFacts)


def tokenizer_facts(
    tokenizer: "PreTrainedTokenizerBase", template_date: str = DataConfig.template_date
) -> TokenizerFacts:
    """Return the properties of `tokenizer`, probed once for each chat template.

    Args:
        tokenizer: of the policy.
        template_date: current date for a template with a clock (ISO 8601).
    """
    template = pin_clock(tokenizer.get_chat_template(), template_date) if tokenizer.chat_template else None
    return _facts(tokenizer, template)


def _prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def _alias_of(token: str) -> str:
    return f"{RESERVED_CHARACTER}{token}{RESERVED_CHARACTER}"


def _alias(found: "re.Match[str]") -> str:
    return _alias_of(found.group())


def _unusable_template(got: str) -> ConfigError:
    return ConfigError(
        "the chat template cannot render a user turn and an assistant turn",
        where="chat template of model.path",
        got=got,
        expected="a template for user and assistant turns",
        remedy="use the chat template of an instruction-tuned model of the same family",
    )
