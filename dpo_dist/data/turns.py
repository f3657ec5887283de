"""Render conversations with a chat template, find their turns, and which of them the loss counts."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from dpo_dist.config.data import MARKER_GAP, UNTRAINED_PARTS
from dpo_dist.data.escape import RESERVED_CHARACTER, Marks, any_text
from dpo_dist.data.records import Fields, Message, UnusableRecordError
from dpo_dist.data.template import THOUGHT_TAGS, argument_names
from dpo_dist.foundation.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Span = tuple[int, int]
"""Start and end of a part of a text, in characters."""

_START, _END = "dpo_dist_turn_start", "dpo_dist_turn_end"
_MARK = re.compile(f"{RESERVED_CHARACTER}(start|end)(\\d+){RESERVED_CHARACTER}")
_COMMENT_OR_LOOP = re.compile(
    r"\{#.*?#\}|\{%(?P<open>[-+]?)\s*(?P<body>(?:for|endfor)\b.*?)(?P<close>[-+]?)%\}", re.DOTALL
)
_TARGET = re.compile(r"for\s+(\w+)\s+in\b")


@dataclass(frozen=True)
class Trace:
    """The output of a template with the span of each turn (None: not written in a loop over messages).

    The generation prompt follows the last turn, at `end`.
    """

    text: str
    spans: list[Span | None]
    end: int


def _mark(kind: str, index: int) -> str:
    return f"{RESERVED_CHARACTER}{kind}{index}{RESERVED_CHARACTER}"


def _with_marks(template: str) -> str:
    """Return the template with marks around the body of each loop."""
    targets: list[str | None] = []

    def marked(found: re.Match[str]) -> str:
        tag, body = found.group(), found["body"]
        if body is None:
            return tag
        # `print` is a statement: the whitespace around it is trimmed as around the tag of the loop.
        if body.startswith("for"):
            target = _TARGET.match(body)
            targets.append(target[1] if target else None)
            start = f"%}}{{% {_print(target[1], _START)} {found['close']}%}}" if target else ""
            return f"{{%{found['open']} {body} {start}" if target else tag
        name = targets.pop() if targets else None
        return f"{{%{found['open']} {_print(name, _END)} %}}{{% {body} {found['close']}%}}" if name else tag

    return _COMMENT_OR_LOOP.sub(marked, template)


def _print(name: str, key: str) -> str:
    return f"print ({name} is mapping and {name}['{key}']) or ''"


def _read_trace(rendered: str, turns: int) -> Trace | None:
    """Return the turns in the output of a template with marks; None if one is written twice or left open."""
    text, end, removed = _MARK.sub("", rendered), 0, 0
    spans: list[Span | None] = [None] * turns
    opened: dict[int, int] = {}
    for found in _MARK.finditer(rendered):
        index, position = int(found[2]), found.start() - removed
        removed += len(found.group())
        if found[1] == "start":
            opened[index] = position
            continue
        end, start = position, opened.pop(index, position)
        # A loop without output only computes.
        if text[start:position].strip():
            if spans[index] is not None:
                return None
            spans[index] = (start, position)
    return None if opened else Trace(text, spans, end)


Forms: TypeAlias = tuple[Fields, Fields, Fields]
"""A value for the template: plain, with a mark in place of each control token, with a mark beside each."""
Turns: TypeAlias = tuple[Forms, ...]
NO_CONTEXT: Forms = ({}, {}, {})
_PROBE = "probe answer"
_PROBES = ({"role": "user", "content": "probe question"}, {"role": "assistant", "content": _PROBE})
_PROBE_CALL = {"type": "function", "id": "probe1234", "function": {"name": "probe", "arguments": {"a": "b"}}}
_TEXTS = frozenset({"content", "reasoning_content", "thinking", "reasoning"})


class ChatRenderer:
    """A chat template, whose properties are found by rendering probes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str, marks: Marks):
        self._tokenizer = tokenizer
        self.template, self._traced = template, _with_marks(template)
        self._marks = marks

    def turn(self, message: Message) -> Forms:
        """Return a message as the template gets it."""
        fields: dict[str, Any] = {"role": message.role, "content": message.content, **message.fields}
        if (calls := fields.get("tool_calls")) and not self._takes_objects:
            fields["tool_calls"] = [_with_text_arguments(call) for call in calls]
        if message.role != "assistant":
            return self.data(fields)
        # Calls and names are no text of the model: a template writes the tags around them.
        others = self.data({name: part for name, part in fields.items() if name not in _TEXTS})
        texts = {name: part for name, part in fields.items() if name in _TEXTS}
        _, replaced, in_place = self._marked(texts, self._marks.in_response)
        return fields, {**others[1], **replaced}, {**others[2], **in_place}

    def data(self, values: Fields) -> Forms:
        """Return tools or arguments as the template gets them."""
        return self._marked(values, self._marks.anywhere)

    def _marked(self, value: Fields, pattern: re.Pattern[str]) -> Forms:
        if not any_text(value, pattern):
            return value, value, value
        return value, self._marks.replaced(value, pattern), self._marks.in_place(value, pattern)

    def render(self, turns: Turns, context: Forms = NO_CONTEXT, *, generation: bool = False) -> str:
        """Render a conversation, escaped; `context` are tools and arguments of the template, of `data`.

        Raises UnusableRecordError: the template rejects it, or marks would change the template's decisions.
        """
        return self._render(self.template, turns, context, generation)

    def trace(self, turns: Turns, context: Forms = NO_CONTEXT, *, generation: bool = False) -> Trace:
        """Render a conversation as `render`, with the position of each turn."""
        text = self.render(turns, context, generation=generation)
        marks = ({_START: _mark("start", index), _END: _mark("end", index)} for index in range(len(turns)))
        numbered = [[{**form, **both} for form in turn] for turn, both in zip(turns, marks, strict=True)]
        found = _read_trace(self._render(self._traced, numbered, context, generation), len(turns))
        if found is None or found.text != text:
            raise UnusableRecordError("turns_not_found", "the chat template does not write turn after turn")
        return found

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names of the arguments that the template may get besides messages and tools."""
        return argument_names(self.template)

    @cached_property
    def after_response(self) -> str:
        """The output of the template after the last assistant turn."""
        try:
            _, found, after = self.render(tuple(map(self.data, _PROBES))).rpartition(_PROBE)
            fault = "" if found else "its output does not contain the response"
        except UnusableRecordError as error:
            fault = error.detail
        if fault:
            raise ConfigError(
                "the chat template cannot render a user turn and an assistant turn",
                where="chat template of model.path",
                got=fault,
                remedy="use the chat template of an instruction-tuned model of the same family",
            )
        return after

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether the template takes the arguments of tool calls as objects; DeepSeek's wants JSON text."""

        def is_rendered(call: Mapping[str, Any]) -> bool:
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                self.render((self.data(_PROBES[0]), self.data(turn)))
            except UnusableRecordError:
                return False
            return True

        return is_rendered(_PROBE_CALL) or not is_rendered(_with_text_arguments(_PROBE_CALL))

    def _render(
        self, template: str, turns: Sequence[Sequence[Fields]], context: Forms, generation: bool
    ) -> str:
        def applied(form: int) -> str:
            try:
                return str(
                    self._tokenizer.apply_chat_template(
                        [turn[form] for turn in turns],
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=generation,
                        **context[form],
                    )
                )
            except TemplateError as fault:
                raise UnusableRecordError("template_rejected", str(fault)) from fault
            except Exception as fault:  # its operators, methods and nesting can raise anything
                raise UnusableRecordError("template_rejected", f"{type(fault).__name__} in it") from fault

        plain = applied(0)
        if all(part[0] == part[1] for part in (context, *turns)):
            return plain
        for form in (1, 2):
            marked = self._marks.settle(applied(form))
            if self._marks.spell(marked) == plain:
                return marked
        raise UnusableRecordError(
            "special_token_in_text", "the chat template changes a text with a special token in it"
        )


def _with_text_arguments(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    changed = {**call}
    if isinstance(call.get("function"), Mapping):
        changed["function"] = _with_text_arguments(call["function"])
    if isinstance(call.get("arguments"), Mapping | list):
        changed["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return changed


Mask = npt.NDArray[np.bool_]

# Of an opened marker and the white space after it, in characters.
_LONGEST_OPENING = 128


Untrained: TypeAlias = tuple[tuple[str | None, re.Pattern[str]], ...]
"""Patterns of untrained text: inside of a turn (None), or at the start of one that follows an opening."""


@lru_cache(maxsize=8)
def untrained_parts(names: tuple[str, ...], formatting: re.Pattern[str] | None) -> Untrained:
    """Return `data.untrained`, compiled; `formatting` matches tokens around turns, if they are untrained."""
    parts: list[tuple[str | None, re.Pattern[str]]] = [] if formatting is None else [(None, formatting)]
    begin, end = map(re.escape, THOUGHT_TAGS)
    if "empty_thoughts" in names:
        parts.append(("", re.compile(rf"\s*{begin}\s*{end}\s*")))
        parts.append((THOUGHT_TAGS[0], re.compile(rf"\s*{end}\s*")))
    markers = [tuple(name.split(MARKER_GAP, 1)) for name in names if name not in UNTRAINED_PARTS]
    for first, last in [*markers, *([THOUGHT_TAGS] if "thoughts" in names else [])]:
        spaces = r"\s*" if (first, last) == THOUGHT_TAGS else ""
        until = rf".*?(?:{re.escape(last)}{spaces}|\Z)"
        parts.append((None, re.compile(re.escape(first) + until, re.DOTALL)))
        parts.append((first, re.compile(until, re.DOTALL)))
    return tuple(parts)


def counted_characters(before: str, text: str, turns: Sequence[Span], parts: Untrained) -> list[Span] | None:
    """Return the spans of a response `text` after a prompt that the loss counts; None: all of it.

    `turns` are the spans of its trained turns, and `parts` what is not trained in them.
    """
    before, counted = before[-_LONGEST_OPENING:], list[Span]()
    for start, end in turns:
        turn, tail = text[start:end], (before + text[:start])[-_LONGEST_OPENING:].rstrip()
        found: list[re.Match[str]] = []
        for opening, pattern in parts:
            if opening is None:
                found += pattern.finditer(turn)
            elif tail.endswith(opening) and (first := pattern.match(turn)):
                found.append(first)
        position = start
        for begin, stop in sorted(one.span() for one in found):
            if position < start + begin:
                counted.append((position, start + begin))
            position = max(position, start + stop)
        if position < end:
            counted.append((position, end))
    return None if counted == [(0, len(text))] else counted


def token_mask(starts: Sequence[int], length: int, counted: Iterable[Span]) -> Mask:
    """Return whether each token has a counted character: the loss counts it.

    `starts` are the positions of the tokens' first characters, not falling, in a text of `length` characters.
    """
    begins = np.array(starts, dtype=np.int64)
    # A character of several tokens (bytes) belongs to each of them.
    following = np.searchsorted(np.append(begins, length), begins, side="right")
    ends = np.append(begins, length)[np.minimum(following, len(begins))]
    mask = np.zeros(len(begins), dtype=np.bool_)
    for start, end in counted:
        mask |= (begins < end) & (ends > start)
    return mask
