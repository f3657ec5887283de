"""The marks between which a chat template writes a thought."""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from dpo_dist.data.text.escape import THOUGHT_FIELDS, THOUGHT_TAGS, any_of
from dpo_dist.data.text.template import PROBE_CALL, argument_names, probed, with_text_arguments
from dpo_dist.foundation.types import Fields, Tokenizer


@dataclass(frozen=True)
class ThoughtMarks:
    """What stands before and after a thought, with the white space that the template writes there."""

    opening: str = f"{THOUGHT_TAGS[0]}\n"
    closing: str = f"\n{THOUGHT_TAGS[1]}\n\n"
    is_turn: bool = False  # the closing ends a turn, also one that is no thought
    is_known: bool = True  # False: the template writes thoughts, between marks that are not found

    @cached_property
    def tags(self) -> tuple[str, str]:
        """The marks without the space around them."""
        return self.opening.strip(), self.closing.strip()

    @cached_property
    def _ended(self) -> str:
        """Pattern of an empty thought; templates also write its end alone (GLM 4.7, DeepSeek V3.2)."""
        begin, end = map(re.escape, self.tags)
        return rf"{begin}\s*{end}" if self.is_turn else rf"(?:{begin}\s*)?{end}"

    @cached_property
    def empty_start(self) -> re.Pattern[str]:
        """Pattern of a response that starts with an empty thought, or ends an opened one at once."""
        return re.compile(rf"\A\s*{self._ended}\s*")

    @cached_property
    def empty_end(self) -> re.Pattern[str]:
        """Pattern of the end of an opened thought that has no text."""
        return re.compile(rf"\s*{re.escape(self.tags[1])}\s*")

    @cached_property
    def none_or_empty(self) -> re.Pattern[str]:
        """Pattern of a response without a thought, or with an empty one."""
        return re.compile(rf"\s*{self._ended}|(?!.*{re.escape(self.tags[1])})", re.DOTALL)

    @cached_property
    def _ended_at_end(self) -> re.Pattern[str]:
        return re.compile(rf"{self._ended}\s*\Z")

    @cached_property
    def only_tags(self) -> re.Pattern[str]:
        """Pattern of a rest of a prompt with nothing but a mark of thoughts."""
        begin, end = map(re.escape, self.tags)
        return re.compile(rf"\s*(?:{begin}|{end}|\Z)")

    def opens(self, prompt: str) -> bool:
        """Return whether a prompt ends with an opened thought."""
        return prompt.rstrip().endswith(self.tags[0])

    def ends(self, prompt: str) -> bool:
        """Return whether a prompt ends with an empty thought, or with the end of a thought."""
        is_ended = prompt.rstrip().endswith(self.tags[1])  # fast path: a search takes long
        return is_ended and self._ended_at_end.search(prompt) is not None

    def without_ended(self, prompt: str) -> str:
        """Return a prompt without the empty thought at its end."""
        return self._ended_at_end.sub("", prompt)

    def without_opened(self, prompt: str) -> str:
        """Return a prompt without the opening of a thought at its end."""
        return prompt.rstrip().removesuffix(self.tags[0]) if self.opens(prompt) else prompt

    def is_in(self, content: str) -> bool:
        """Return whether a content has the end of a thought."""
        return self.tags[1] in content

    def split(self, content: str) -> tuple[str, str]:
        """Return a content up to the end of its thought, and the rest."""
        end = content.rindex(self.tags[1]) + len(self.tags[1])
        return content[:end], content[end:]

    def spelled(self, content: str) -> str:
        """Return the thought in a content, without its marks."""
        begin, end = self.tags
        return self.split(content)[0].removesuffix(end).rpartition(begin)[2].strip()

    def is_only_in(self, rendered: str, content: str) -> bool:
        """Return whether a rendered response has the thought of a content, and no other."""
        return rendered.count(self.tags[1]) == 1 and self.spelled(content) in rendered

    def within(self, content: str, prompt: str) -> str:
        """Return a content without its opening of a thought, which the prompt already has."""
        begin = self.tags[0]
        start = content.lstrip()
        if not start.startswith(begin):
            return content
        content = start.removeprefix(begin)
        return content[len(os.path.commonprefix([content, prompt.rpartition(begin)[2]])) :]  # noqa: RUF071


DEFAULT_MARKS = ThoughtMarks()
"""For texts, and for templates that write no thought of a field: then only contents have thoughts."""

# Marks of several tokens or of none. In the last two a thought is a turn of its own.
_WRITTEN = {
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|open|>think<|sep|>": "<|close|>think<|sep|>",  # Kimi K3
    "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]",  # Apriel
    "<|channel|>analysis<|message|>": "<|end|>",  # gpt-oss
    "to=self<|message|>": "<|eom|>",  # Muse
}
_TURNS = ("<|end|>", "<|eom|>")
_TAG = r"<[^<>\s]{1,60}>"
_QUESTION = "probe question"
_THOUGHT = "probe thought"
_ASKED: Fields = {"role": "user", "content": _QUESTION}
_THINKING: dict[str, Any] = {"role": "assistant", "content": ""} | dict.fromkeys(THOUGHT_FIELDS, _THOUGHT)


def thought_marks(tokenizer: Tokenizer, template: str | None, in_parts: Collection[str]) -> ThoughtMarks:
    """Return the marks of the thoughts that a template writes; `in_parts`: as `roles_in_parts` returns.

    They are marks that are known; else the token or tag on each side of the thought, if it stands nowhere
    else in a turn.
    """
    if template is None or not any(field in template for field in THOUGHT_FIELDS):
        return DEFAULT_MARKS
    added = any_of(filter(str.strip, map(str, tokenizer.added_tokens_decoder.values())))
    token = f"(?:{added.pattern}|{_TAG})"
    known = [(re.escape(opening), re.escape(closing)) for opening, closing in _WRITTEN.items()]
    # Some templates write thoughts only before a call, or if an argument asks for them (Hy3).
    names = sorted(argument_names(template) - tokenizer.special_tokens_map.keys())
    calls = [[call] for call in (PROBE_CALL, with_text_arguments(PROBE_CALL))]
    turns = [_THINKING | {"content": "probe answer"}, *(_THINKING | {"tool_calls": call} for call in calls)]
    is_written = False
    for arguments, turn in product([{}, *({name: True} for name in names)], turns):
        output = probed(tokenizer, template, (_ASKED, turn), in_parts, generation=False, arguments=arguments)
        written = output.rpartition(_QUESTION)[2]
        is_written |= _THOUGHT in written
        for opening, closing in (*known, (token, token)):
            found = re.search(rf"({opening}\s*){_THOUGHT}(\s*{closing}\s*)", written)
            if found:
                marks = ThoughtMarks(found[1], found[2], is_turn=found[2].strip() in _TURNS)
                is_own = all(written.count(tag) == 1 for tag in marks.tags)
                if is_own or opening != token:
                    return marks
    return ThoughtMarks(is_known=not is_written)
