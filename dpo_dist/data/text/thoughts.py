r"""The marks between which a chat template writes a thought, found by probes.

<think>\n                      \n</think>\n\n      Qwen3
<think:opensource>             </think:opensource>  Hy3
<|START_THINKING|>             <|END_THINKING|>     Command A
<|channel>thought\n            \n<channel|>         Gemma 4
<|open|>think<|sep|>           <|close|>think<|sep|>        Kimi K3
<|channel|>analysis<|message|> <|end|>              gpt-oss, where a thought is a turn of its own
"""

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
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
    def whole_empty_start(self) -> re.Pattern[str]:
        """Pattern of a response that starts with an empty thought."""
        begin, end = map(re.escape, self.tags)
        return re.compile(rf"\A{begin}\s*{end}\s*")

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

# No two of these begin alike, so that what templates write before them can be compared.
_QUESTION = "dpo_dist question"
_THOUGHT = "a probe's thought"
_ANSWER = "Its answer"
_ASKED: dict[str, Any] = {"role": "user", "content": _QUESTION}
_SAID: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
_CALLED: dict[str, Any] = {"role": "assistant", "content": ""}
_CALL_NAME: str = PROBE_CALL["function"]["name"]  # type: ignore[index]
_TAG = r"<[^<>\s]{1,60}>"


def thought_marks(tokenizer: Tokenizer, template: str | None, in_parts: Collection[str]) -> ThoughtMarks:
    """Return the marks of the thoughts that a template writes; `in_parts`: as `roles_in_parts` returns."""
    if template is None or not any(field in template for field in THOUGHT_FIELDS):
        return DEFAULT_MARKS
    probe = _Probe(tokenizer, template, in_parts)
    # Some templates write thoughts only if an argument asks for them, such as `is_training` of Hy3.
    return next(filter(None, map(probe.marks, probe.switched())), DEFAULT_MARKS)


@dataclass(frozen=True)
class _Probe:
    """Renders probes, and compares what the template writes around them."""

    tokenizer: Tokenizer
    template: str
    in_parts: Collection[str]

    @cached_property
    def _token(self) -> re.Pattern[str]:
        """Pattern of the tokens, and of what looks like one, inside which no text is cut."""
        added = any_of(filter(str.strip, map(str, self.tokenizer.added_tokens_decoder.values())))
        return re.compile(f"{added.pattern}|{_TAG}")

    def switched(self) -> Iterator[Fields]:
        """Yield arguments of the template: none, and each that it names."""
        names = sorted(argument_names(self.template) - self.tokenizer.special_tokens_map.keys())
        yield {}
        for name in names:
            yield {name: True}

    def _after_question(self, arguments: Fields, *turns: Fields, generation: bool = False) -> str:
        """Return the output after the question; "" if the template rejects the turns."""
        output = probed(
            self.tokenizer,
            self.template,
            (_ASKED, *turns),
            self.in_parts,
            generation=generation,
            arguments=arguments,
        )
        return output.rpartition(_QUESTION)[2]

    def _of_call(self, arguments: Fields, fields: Fields) -> str:
        """Return the output for a call of a tool, whose arguments some templates take as text."""
        calls = ([call] for call in (PROBE_CALL, with_text_arguments(PROBE_CALL)))
        outputs = (
            self._after_question(arguments, {**_CALLED, **fields, "tool_calls": call}) for call in calls
        )
        return next(filter(None, outputs), "")

    def marks(self, arguments: Fields) -> ThoughtMarks | None:
        """Return the marks around the thought of an answer or of a call; None if neither is written."""
        thinking = dict.fromkeys(THOUGHT_FIELDS, _THOUGHT)
        answer = self._after_question(arguments, _SAID | thinking)
        call = self._of_call(arguments, thinking)
        with_thought = [text.partition(_THOUGHT) for text in (answer, call) if _THOUGHT in text]
        if not with_thought:
            return None
        # What stands before and after an answer, a call and a generation that have no thought.
        bare_answer = self._after_question(arguments, _SAID)
        bare_call = self._of_call(arguments, {})
        before = with_thought[0][0]
        # What follows the thought of an answer and that of a call alike; or what only a turn with one has.
        following = [after for _, _, after in with_thought]
        if len(following) == 2:
            closing = self._common(*following)
        else:
            bare = bare_answer if _THOUGHT in answer else bare_call
            shared = _common_length(following[0][::-1], bare[::-1])
            closing = following[0][: len(following[0]) - shared]
        closing = closing.partition(_ANSWER)[0]
        tokens = len(self._token.findall(closing))
        start, end = self._header(before, [bare_answer, bare_call], arguments, tokens)
        # A thought that is a turn of its own is followed by the header of the next one.
        closing, next_turn, _ = closing.partition(before[start:end].strip() or _ANSWER)
        marks = ThoughtMarks(before[end:], closing, is_turn=bool(next_turn))
        return marks if all(marks.tags) else None

    def _header(self, before: str, bare: list[str], arguments: Fields, tokens: int) -> tuple[int, int]:
        """Return where the header of the turn starts and ends in what stands before its thought.

        Args: the turns without a thought; how many `tokens` close a thought.
        """
        turns = (_ASKED, _SAID, _ASKED)
        earlier = probed(self.tokenizer, self.template, turns, self.in_parts, arguments=arguments)
        others = [*bare, earlier.partition(_QUESTION)[2]]
        for switch in ({}, *self.switched()):
            for value in (True, False):
                asked = {**arguments, **dict.fromkeys(switch, value)}
                others.append(self._after_question(asked, generation=True))
        start = len(self._common(before, self._after_question(arguments)))
        lengths = (len(self._common(before, other)) for other in others)
        # A header is more than the end of the question, and an opening more than white space.
        ends = [length for length in lengths if before[start:length].strip() and before[length:].strip()]
        # If each turn and each prompt has the opening, it has as many tokens as the closing.
        last = [0, *(token.start() for token in self._token.finditer(before))][-max(tokens, 1) :]
        return start, min(ends, default=last[0])

    def _common(self, one: str, other: str) -> str:
        """Return the common start of two outputs, without a token that names itself after it.

        Such as <|open|> of <|open|>think<|sep|> and <|open|>response<|sep|>.
        """
        length = _common_length(one, other)
        for text in (one, other):
            for token in self._token.finditer(text):
                if token.start() < length < token.end():
                    length = token.start()
        tokens = [token for token in self._token.finditer(one[:length]) if token.end() == length]
        if tokens and all(_is_word(text[length:]) for text in (one, other)):
            length = tokens[-1].start()
        return one[:length]


def _is_word(text: str) -> bool:
    """Return whether a text goes on with a word of the template."""
    return text[:1].isalnum() and not text.startswith((_ANSWER, _THOUGHT, _CALL_NAME))


def _common_length(one: str, other: str) -> int:
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071  (of characters)
