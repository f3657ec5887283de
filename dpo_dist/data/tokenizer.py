"""Properties of a tokenizer and its chat template, found by probing them once; ends of turns and texts."""

import re
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from dpo_dist.config.data import TEMPLATE_DATE, DataConfig
from dpo_dist.data.escape import EscapedEncoder, Marks
from dpo_dist.data.template import any_of, chosen_template, pin_clock, turn_tokens, written_tokens
from dpo_dist.data.turns import ChatRenderer
from dpo_dist.foundation.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens around turns of common model families: a text may come from another tokenizer's template.
_FOREIGN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_FOREIGN_MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>"),
    *("<|user|>", "<|assistant|>", "<start_of_turn>", "[INST]"),
)


class TokenizerFacts:
    """A tokenizer with its probed properties; `chat` is None if it has no chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None):
        self.tokenizer = tokenizer
        self.prefix_ids = _prefix_ids(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._turn_tokens = turn_tokens(tokenizer, chat_template)
        self._turns = any_of({*self._turn_tokens, *_FOREIGN_MARKS})
        special |= self._turn_tokens
        self.marks = Marks(special, written_tokens(list(map(str, added)), chat_template))
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

    def has_turns(self, content: str) -> bool:
        """Return whether a content has tokens that a chat template, or one of another family, writes."""
        return self._turns.search(content) is not None

    def is_templated(self, text: str) -> bool:
        """Return whether a text seems to be the output of a chat template (turns, or BOS at its start)."""
        bos = self.tokenizer.bos_token
        return self.has_turns(text) or (bos is not None and text.startswith(str(bos)))

    def is_ended(self, response: str) -> bool:
        """Return whether a response ends as in the output of a chat template: with an end of turn or EOS."""
        eos = self.tokenizer.eos_token
        return response.rstrip().endswith((*self._turn_tokens, *_FOREIGN_ENDS, *([str(eos)] if eos else [])))

    def split_end(self, response: str) -> tuple[str, str]:
        """Return a templated response before its end of turn or of text, and that end or the default one."""
        ends = [self.end_of_text] if self.chat is None else [self.end_of_turn, self.end_of_text]
        end = ends[0]
        while (bare := response.rstrip()).endswith(tuple(ends)):
            end = next(end for end in ends if bare.endswith(end))
            response = bare.removesuffix(end)
        return response, end

    def escape_response(self, text: str) -> str:
        """Return the content of an assistant turn, escaped."""
        return str(self.marks.replaced(text, self.marks.in_response))

    def until_end(self, rendered: str) -> str:
        """Return a rendered assistant turn up to its end of turn, which is added if it has none."""
        end = rendered.rfind(self.end_of_turn)
        if end >= 0:
            return rendered[: end + len(self.end_of_turn)]
        # Some turns end with another token, such as calls of tools.
        if last := self._final_special(rendered):
            return rendered[:last]
        after = "" if self.chat is None else self.chat.after_response
        return rendered.removesuffix(after) + self.end_of_turn

    def end_of_rendered(self, turn: str, after: str) -> int:
        """Return the position after the special token that ends a rendered turn.

        In some templates (GLM) the token that starts the text `after` it ends the turn; else the turn's end.
        """
        following = self._special.match(after)
        return self._final_special(turn) or len(turn) + (following.end() if following else 0)

    def _final_special(self, escaped: str) -> int:
        """Return the position after the last special token if only spaces follow it, else 0."""
        last = self.after_last_special(escaped)
        return 0 if escaped[last:].strip() else last

    def after_last_special(self, escaped: str) -> int:
        """Return the position after the last special token or token around turns, 0 if there is none."""
        return max((found.end() for found in self._special.finditer(escaped)), default=0)

    def with_prefix(self, ids: list[int]) -> tuple[list[int], int]:
        """Return `ids` with the tokenizer's prefix exactly once, and how many of them truncation keeps."""
        if ids[: len(self.prefix_ids)] != self.prefix_ids:
            return self.prefix_ids + ids, len(self.prefix_ids)
        starts_with_bos = ids[:1] == [self.tokenizer.bos_token_id]
        return ids, max(len(self.prefix_ids), int(starts_with_bos))


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


def _prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that a tokenizer adds before a text (BOS, or none)."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[: next(starts, 0)]
