"""Facts about a tokenizer and its chat template, probed once: starts and ends of texts and turns."""

import os
import re
from functools import cached_property, lru_cache
from typing import NamedTuple

from dpo_dist.data.config import TEMPLATE_DATE, DataConfig
from dpo_dist.data.records import RESERVED_CHARACTER
from dpo_dist.data.text.escape import THOUGHT_TAGS, EscapedEncoder, Marks, any_of
from dpo_dist.data.text.template import (
    ChatRenderer,
    ChatTemplate,
    pin_clock,
    roles_in_parts,
    turn_tokens,
)
from dpo_dist.data.text.thoughts import thought_marks
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.types import Tokenizer

# Tokens around turns of common model families: a text may come from another tokenizer's template.
_FOREIGN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_FOREIGN_STARTS = ("<|im_start|>", "<|start_header_id|>", "<|user|>", "<|assistant|>", "<start_of_turn>")
_FOREIGN_MARKS = (*_FOREIGN_STARTS, "[INST]", "<|im_end|>", "<|eot_id|>")


class _AfterAnswer(NamedTuple):
    """What a template writes after the last answer of a conversation."""

    end: str  # the end of the answer's turn, up to a special token; "" if there is none (GLM)
    tail: str  # what only the end of a conversation has


class TokenizerFacts:
    """A tokenizer with its probed properties; `chat` is None if it has no chat template.

    The places of a text that a template writes, as its tokens are named here (ChatML):

        <|im_start|>assistant\\n    Hello.    <|im_end|>        \\n<|im_start|>user
        around turns               inside    end of the turn   around turns, or the tail of the conversation
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None):
        if not tokenizer.is_fast:
            raise ConfigError(
                "the tokenizer has no fast version",
                where="tokenizer of model.path",
                remedy="use a model with a tokenizer.json, or convert its tokenizer to one",
            )
        self.tokenizer = tokenizer
        chat_template = template and pin_clock(template, TEMPLATE_DATE)
        # What the tokenizer puts before every text: BOS, or nothing.
        text_ids: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        all_ids: list[int] = tokenizer("a")["input_ids"]
        starts = (at for at in range(len(all_ids)) if all_ids[at : at + len(text_ids)] == text_ids)
        self.prefix_ids = all_ids[: next(starts, 0)]
        # Its added tokens: special ones, tokens around turns (special or not), tags of calls and thoughts.
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        tags = {token for token in added if not (token.isspace() or token.isalnum())}  # no ordinary text
        in_parts = frozenset[str]() if chat_template is None else roles_in_parts(tokenizer, chat_template)
        self.thoughts = thought_marks(tokenizer, chat_template, in_parts)
        # The end of a thought that is a turn of its own may also end other turns (gpt-oss).
        thought_tags = set(THOUGHT_TAGS)
        if not self.thoughts.is_turn:
            thought_tags.update(self.thoughts.tags)
        self._turn_tokens = tags & turn_tokens(tokenizer, chat_template, thought_tags)
        special = {token for token, is_special in added.items() if is_special}
        special |= self._turn_tokens | set(tokenizer.all_special_tokens)
        in_template = {token for token in tags if token in (chat_template or "")}
        # A content must not become one of these: spelled there, they are encoded as text.
        self.marks = Marks(special, in_template | thought_tags.intersection(added), thought_tags)
        self._special = self.marks.in_text
        self._turns = any_of({*self._turn_tokens, *_FOREIGN_MARKS})
        self._markup = any_of({*special, *thought_tags})
        # Inside these no text is cut, also where a tag of thoughts is several tokens.
        unbroken = {token for token in {*added, *special, *thought_tags} if not token.isspace()}
        self.unbroken = any_of(unbroken)
        self._longest = max(map(len, unbroken))
        self.encoder = EscapedEncoder(tokenizer, self.marks, any_of({*added, *special}))
        self.chat = None
        if chat_template is not None:
            self.chat = ChatRenderer(tokenizer, chat_template, self.marks, self.common_length)

    # What the template writes around turns, and the tokens that end a response.

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
        """What the template writes after a response, up to its last special token; else the end of text.

        Usually one token, as `<|im_end|>` of ChatML; some templates (Kimi K3) write several, with text
        between them. EOS follows a token that also stands within turns (GigaChat 3), where no response may
        stop.
        """
        return self._after_answer.end + self._added_eos or self.end_of_text

    @cached_property
    def _added_eos(self) -> str:
        last = self.last_special(self._after_answer.end)
        return self.end_of_text if last in self.tokens_inside_turns else ""

    @cached_property
    def _after_answer(self) -> _AfterAnswer:
        """What the template writes after the last answer of a conversation, in two parts."""
        # By comparison with what it writes after an earlier answer:
        #   the last answer              an earlier answer          end         tail
        #   <|im_end|>\n                 <|im_end|>\n<|im_start|>   <|im_end|>                         ChatML
        #   <|end|>\n<|endoftext|>       <|end|>\n<|user|>          <|end|>     <|endoftext|>          Phi 3
        #   <|end|><|start|><|chatbot|>  <|end|><|start|><|user|>   <|end|>     <|start|><|chatbot|>
        if self.chat is None:
            return _AfterAnswer("", "")
        after = self.chat.after_response
        first = self._special.search(after)
        if first is None:
            return _AfterAnswer("", "")
        shared = after[: self.common_length(after, self.chat.after_earlier_response)]
        if shared != after:
            # They may share the start of the next turn: the third template, as that of Command A, always
            # writes a generation prompt.
            bos = self.tokenizer.bos_token
            starts = (token for token in self._special.findall(self.chat.before_question) if token != bos)
            shared = shared.partition(next(starts, RESERVED_CHARACTER))[0]
        end = self.after_last_special(shared) or first.end()
        return _AfterAnswer(after[:end].lstrip(), after[end:].lstrip())

    @cached_property
    def tokens_inside_turns(self) -> set[str]:
        """The special tokens that the template writes within turns, as gpt-oss does between channels."""
        tokens = set[str]()
        if self.chat is not None:
            for turn in map(self.without_tail, self.chat.turns_of_parts):
                tokens.update(self._special.findall(turn)[:-1])
        return tokens - {self.tokenizer.eos_token}

    @cached_property
    def tokens_around_turns(self) -> re.Pattern[str]:
        """Pattern of the tokens that the template writes around turns, and of those that end a response."""
        return any_of({*self._turn_tokens, self.end_of_turn, self.end_of_text})

    # Texts to which a template seems to be applied.

    def has_turns(self, content: str) -> bool:
        """Return whether a content has tokens that chat templates write, of this or another model family."""
        return self._turns.search(content) is not None

    def is_templated(self, text: str) -> bool:
        """Return whether a text seems to be the output of a chat template (turns, or BOS at its start)."""
        bos = self.tokenizer.bos_token
        return self.has_turns(text) or (bos is not None and text.startswith(str(bos)))

    def is_ended(self, response: str) -> bool:
        """Return whether a response ends as in the output of a chat template: with an end of turn or EOS."""
        eos = filter(None, [self.tokenizer.eos_token])
        return response.rstrip().endswith((*self._turn_tokens, *_FOREIGN_ENDS, *eos))

    # Parts of the output of the template.

    def turn_with_end(self, rendered: str) -> str:
        r"""Return the last turn of a conversation up to its end of turn, which is added if it is missing.

        From ChatML, for each of `Hello.<|im_end|>\n`, `Hello.<|im_end|>Bye.` and `Hello.`:
        `Hello.<|im_end|>`.
        """
        turn = self.without_tail(rendered)
        # Hello.<|im_end|>\n of ChatML, or another end: a call of gpt-oss ends with <|call|>.
        end = self.after_ending_token(turn)
        if end:
            turn = turn[:end]
            if turn.endswith(self._after_answer.end):
                turn += self._added_eos
            return turn
        # Text after the end: Hello.<|im_end|>--
        before, ending, _ = turn.rpartition(self.end_of_turn)
        if ending:
            return before + ending
        # No end: \n<think></think>\nHello. of GLM 4.5 gets <|endoftext|>; an earlier turn ends with the token
        # that starts the next one (`TurnFinder._end`).
        assert self.chat is not None
        return turn.removesuffix(self.chat.after_response) + self.end_of_turn

    def without_tail(self, rendered: str) -> str:
        """Return a rendered conversation without what the template writes at the end of each.

        Such as an end of text (Phi 3), or a generation prompt that is always written (Command A).
        """
        return rendered.removesuffix(self._after_answer.tail)

    def is_blank(self, turn: str) -> bool:
        """Return whether a rendered turn has only the text that the template writes around a content."""
        assert self.chat is not None
        text, blank = ("".join(self._markup.sub("", part).split()) for part in (turn, self.chat.empty_turn))
        return text in ("", blank)

    def ending_token(self, turn: str) -> str:
        r"""Return the special token that ends a rendered turn, "" if none does.

        For `Hello.<|im_end|>\n` it is `<|im_end|>`; for `Hello.<|im_end|>Bye.` it is "".
        """
        return self.last_special(turn) if self.after_ending_token(turn) else ""

    # Positions of tokens in a text.

    def common_length(self, one: str, other: str) -> int:
        r"""Return the length of the common start of two escaped texts, which ends in no added token or tag.

        Of `<|end|>\n<|user|>` and `<|end|>\n<|endoftext|>` it is `<|end|>\n`, not `<|end|>\n<|`.
        """
        length = len(os.path.commonprefix([one, other]))  # noqa: RUF071  (of characters)
        # A token that begins before the difference and ends behind it.
        for start in range(max(length - self._longest, 0), length):
            for text in (one, other):
                token = self.unbroken.match(text, start)
                if token is not None and token.end() > length:
                    return start
        return length

    def after_ending_token(self, escaped: str) -> int:
        r"""Return the position after the special token that ends a turn, 0 if none does.

        For `Hello.<|im_end|>\n` it is that of `\n`; for `Hello.<|im_end|>Bye.` it is 0, as text follows.
        """
        last = self.after_last_special(escaped)
        return 0 if escaped[last:].strip() else last

    def after_last_special(self, escaped: str) -> int:
        r"""Return the position after the last special token or token around turns, 0 if there is none.

        For `Hello.<|im_end|>\n` it is that of `\n`; for `Hello.<|im_end|>Bye.` it is that of `Bye.`.
        """
        return max((match.end() for match in self._special.finditer(escaped)), default=0)

    def last_special(self, escaped: str) -> str:
        """Return the last special token or token around turns, "" if there is none.

        For `Hello.<|im_end|>Bye.` it is `<|im_end|>`, though that ends no turn: see `ending_token`.
        """
        return next(reversed(self._special.findall(escaped)), "")

    # Token ids.

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, and of those that the template writes around turns."""
        tokens = list(filter(self._special.fullmatch, self.marks.tokens))
        return frozenset(self.tokenizer.convert_tokens_to_ids(tokens))

    def with_prefix(self, ids: list[int], *, is_whole: bool = False) -> tuple[list[int], int]:
        """Return `ids` with the tokenizer's prefix exactly once, and how many of them truncation keeps.

        If the ids are a whole conversation, as a template writes it with or without BOS, nothing is added.
        """
        has_prefix = ids[: len(self.prefix_ids)] == self.prefix_ids
        if not has_prefix and not is_whole:
            return self.prefix_ids + ids, len(self.prefix_ids)
        starts_with_bos = ids[:1] == [self.tokenizer.bos_token_id]
        return ids, max(len(self.prefix_ids) * has_prefix, int(starts_with_bos))


_facts = lru_cache(maxsize=8)(TokenizerFacts)
_DEFAULTS = DataConfig()


def tokenizer_facts(
    tokenizer: Tokenizer, config: DataConfig = _DEFAULTS, *, with_tools: bool = False
) -> TokenizerFacts:
    """Return the facts about `tokenizer`, probed once for each chat template.

    Some tokenizers have a separate template for records `with_tools`. Raises ConfigError:
    the file of `data.chat_template` cannot be read.
    """
    template = ChatTemplate(tokenizer, config.chat_template)
    return _facts(tokenizer, template.text(with_tools=with_tools))
