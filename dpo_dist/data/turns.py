"""Render conversations with a chat template, find their turns, and which of them the loss counts."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from dpo_dist.config.data import MARKER_GAP, UNTRAINED_PARTS
from dpo_dist.data.escape import RESERVED_CHARACTER, Marks, any_text
from dpo_dist.data.records import Message, UnusableRecordError
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
    """The output of a template and the position of its turns.

    Attributes:
        text: the output.
        spans: of each turn; None if the template does not write it inside a loop over messages.
        end: position after the last turn; the generation prompt follows.
    """

    text: str
    spans: list[Span | None]
    end: int


def traced_template(template: str) -> str:
    """Return the template with marks around the body of each loop."""
    targets: list[str | None] = []

    def with_marks(found: re.Match[str]) -> str:
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

    return _COMMENT_OR_LOOP.sub(with_marks, template)


def traced_turn(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a turn with the marks that a traced template writes around it."""
    marks = {_START: f"start{index}", _END: f"end{index}"}
    return {**turn, **{key: f"{RESERVED_CHARACTER}{mark}{RESERVED_CHARACTER}" for key, mark in marks.items()}}


def read_trace(rendered: str, turns: int) -> Trace | None:
    """Return the turns in the output of a traced template; None if one is written twice or left open."""
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


def _print(name: str, key: str) -> str:
    return f"print ({name} is mapping and {name}['{key}']) or ''"


_PROBE = "probe answer"
_PROBES = ({"role": "user", "content": "probe question"}, {"role": "assistant", "content": _PROBE})
_PROBE_CALL = {"type": "function", "id": "probe1234", "function": {"name": "probe", "arguments": {"a": "b"}}}


@dataclass(frozen=True, eq=False)
class Escapable:
    """A value for the template, with marks if it spells control tokens.

    Attributes:
        plain: the value.
        marked: its forms with each token replaced by a mark, and with a mark beside each token; None if
            it spells no control token.
    """

    plain: Mapping[str, Any]
    marked: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None

    def form(self, number: int | None) -> Mapping[str, Any]:
        """Return the plain value, or one with marks."""
        return self.plain if self.marked is None or number is None else self.marked[number]


Turns: TypeAlias = tuple[Escapable, ...]
NO_CONTEXT = Escapable({})


class ChatRenderer:
    """A chat template with its probed properties.

    Attributes:
        template: its source.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str, marks: Marks):
        self._tokenizer = tokenizer
        self.template = template
        self._marks = marks

    def turn(self, message: Message) -> Escapable:
        """Return a message as the template gets it."""
        is_response = message.role == "assistant"
        pattern = self._marks.in_response if is_response else self._marks.anywhere
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        is_marked = pattern.search(message.content) is not None
        if not message.fields:
            if not is_marked and message.role in ("user", "assistant", "system"):
                return Escapable(plain)
            return self._marked(plain, pattern)
        plain |= message.fields
        calls = plain.get("tool_calls")
        if calls and not self._takes_objects:
            plain["tool_calls"] = [_with_text_arguments(call) for call in calls]
        # Calls and names are no text of the model: a template writes the tags around them.
        other = {name: part for name, part in plain.items() if name not in _TEXTS} if is_response else {}
        if not other:
            return self._marked(plain, pattern)
        text, data = self._marked({n: plain[n] for n in plain if n in _TEXTS}, pattern), self.data(other)
        if text.marked is None and data.marked is None:
            return Escapable(plain)
        forms = [{**text.form(number), **data.form(number)} for number in (0, 1)]
        return Escapable(plain, (forms[0], forms[1]))

    def data(self, values: Mapping[str, Any]) -> Escapable:
        """Return tools or arguments as the template gets them."""
        return self._marked(values, self._marks.anywhere)

    def _marked(self, value: Mapping[str, Any], pattern: Any) -> Escapable:
        if not any_text(value, pattern):
            return Escapable(value)
        return Escapable(value, (self._marks.replaced(value, pattern), self._marks.in_place(value, pattern)))

    def render(self, turns: Turns, context: Escapable = NO_CONTEXT, *, generation: bool = False) -> str:
        """Render a conversation, escaped.

        Args:
            turns: of `turn`.
            context: of `data`: tools and arguments of the template.
            generation: whether the generation prompt follows the last turn.

        Raises:
            UnusableRecordError: the template rejects the conversation, or marks would change its decisions.
        """
        return self._render(self.template, turns, context, generation)

    def trace(self, turns: Turns, context: Escapable = NO_CONTEXT, *, generation: bool = False) -> Trace:
        """Render a conversation as `render`, with the position of each turn.

        Raises:
            UnusableRecordError: as `render`, or the turns are not found.
        """
        text = self.render(turns, context, generation=generation)
        numbered = tuple(
            Escapable(
                traced_turn(turn.plain, index),
                turn.marked and (traced_turn(turn.marked[0], index), traced_turn(turn.marked[1], index)),
            )
            for index, turn in enumerate(turns)
        )
        found = read_trace(self._render(self._traced, numbered, context, generation), len(turns))
        if found is None or found.text != text:
            raise UnusableRecordError("turns_not_found", "the chat template does not write turn after turn")
        return found

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names of the arguments that the template may get besides messages and tools."""
        return argument_names(self.template)

    @cached_property
    def _traced(self) -> str:
        return traced_template(self.template)

    def _render(self, template: str, turns: Turns, context: Escapable, generation: bool) -> str:
        plain = self._apply(template, turns, context, generation, None)
        if context.marked is None and all(turn.marked is None for turn in turns):
            return plain
        for number in (0, 1):
            marked = self._marks.settle(self._apply(template, turns, context, generation, number))
            if self._marks.spell(marked) == plain:
                return marked
        raise UnusableRecordError(
            "special_token_in_text", "the chat template changes a text with a special token in it"
        )

    def _apply(
        self, template: str, turns: Turns, context: Escapable, generation: bool, number: int | None
    ) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [turn.form(number) for turn in turns],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **context.form(number),
                )
            )
        except TemplateError as fault:
            raise UnusableRecordError("template_rejected", str(fault)) from fault
        except Exception as fault:  # its operators, methods and nesting can raise anything
            raise UnusableRecordError("template_rejected", f"{type(fault).__name__} in it") from fault

    @cached_property
    def after_response(self) -> str:
        """The output of the template after the last assistant turn."""
        try:
            _, found, after = self.render(tuple(map(Escapable, _PROBES))).rpartition(_PROBE)
        except UnusableRecordError as fault:
            raise _unusable_template(fault.detail) from fault
        if not found:
            raise _unusable_template("its output does not contain the response")
        return after

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether the template takes the arguments of tool calls as objects; DeepSeek's wants JSON text."""

        def is_rendered(call: Mapping[str, Any]) -> bool:
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                self.render((Escapable(_PROBES[0]), Escapable(turn)))
            except UnusableRecordError:
                return False
            return True

        return is_rendered(_PROBE_CALL) or not is_rendered(_with_text_arguments(_PROBE_CALL))


_TEXTS = frozenset({"content", "reasoning_content", "thinking", "reasoning"})


def _with_text_arguments(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    changed = {**call}
    if isinstance(call.get("function"), Mapping):
        changed["function"] = _with_text_arguments(call["function"])
    if isinstance(call.get("arguments"), Mapping | list):
        changed["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return changed


def _unusable_template(got: str) -> ConfigError:
    return ConfigError(
        "the chat template cannot render a user turn and an assistant turn",
        where="chat template of model.path",
        got=got,
        expected="a template for user and assistant turns",
        remedy="use the chat template of an instruction-tuned model of the same family",
    )


Mask = npt.NDArray[np.bool_]

_NOTHING = re.compile(r"(?!)")
# Of an opened marker and the white space after it, in characters.
_LONGEST_OPENING = 128


@dataclass(frozen=True)
class UntrainedParts:
    """`data.untrained`, compiled.

    Attributes:
        at_start: pattern of text at the start of a turn that the loss does not count.
        inside: patterns of such text anywhere in a turn.
        opened: patterns of text at the start of a turn whose generation prompt opened a thought or a
            marker, each with that opening.
    """

    at_start: re.Pattern[str]
    inside: tuple[re.Pattern[str], ...]
    opened: tuple[tuple[str, re.Pattern[str]], ...]

    def within(self, before: str, turn: str) -> Iterator[Span]:
        """Yield the untrained spans of a turn, given the text before it without white space at its end."""
        if found := self.at_start.match(turn):
            yield found.span()
        for opening, pattern in self.opened:
            if before.endswith(opening) and (found := pattern.match(turn)):
                yield found.span()
        for pattern in self.inside:
            yield from (found.span() for found in pattern.finditer(turn))


@lru_cache(maxsize=8)
def untrained_parts(names: tuple[str, ...], formatting: re.Pattern[str] | None) -> UntrainedParts:
    """Return the compiled `data.untrained`.

    Args:
        names: its entries.
        formatting: pattern of the tokens around turns, if they are untrained.
    """
    at_start, opened = _NOTHING, []
    inside = [] if formatting is None else [formatting]
    begin, end = map(re.escape, THOUGHT_TAGS)
    if "empty_thoughts" in names:
        at_start = re.compile(rf"\s*{begin}\s*{end}\s*")
        opened.append((THOUGHT_TAGS[0], re.compile(rf"\s*{end}\s*")))
    markers = [name.split(MARKER_GAP, 1) for name in names if name not in UNTRAINED_PARTS]
    for first, last in [THOUGHT_TAGS, *markers] if "thoughts" in names else markers:
        spaces = r"\s*" if (first, last) == THOUGHT_TAGS else ""
        until = rf".*?(?:{re.escape(last)}{spaces}|\Z)"
        inside.append(re.compile(re.escape(first) + until, re.DOTALL))
        opened.append((first, re.compile(until, re.DOTALL)))
    return UntrainedParts(at_start, tuple(inside), tuple(opened))


def counted_characters(
    before: str, text: str, turns: Sequence[Span], parts: UntrainedParts
) -> list[Span] | None:
    """Return the spans of a response that the loss counts; None if it counts the whole text.

    Args:
        before: the rendered prompt.
        text: the rendered response.
        turns: the spans of its turns that the loss counts.
        parts: untrained parts of these turns.
    """
    before = before[-_LONGEST_OPENING:]
    if len(turns) == 1 and turns[0] == (0, len(text)):
        untrained = _union(parts.within(before.rstrip(), text))
        return _rest(0, len(text), untrained) if untrained else None
    counted = []
    for start, end in turns:
        preceding = before + text[max(start - _LONGEST_OPENING, 0) : start]
        untrained = _union(parts.within(preceding.rstrip(), text[start:end]))
        counted += [(start + first, start + last) for first, last in _rest(0, end - start, untrained)]
    return counted


def token_mask(starts: Sequence[int], length: int, counted: Sequence[Span]) -> Mask:
    """Return whether the loss counts each token: whether it has a counted character.

    Args:
        starts: position of each token's first character, not falling.
        length: of the text, in characters.
        counted: spans of characters, ascending.
    """
    begins = np.array(starts, dtype=np.int64)
    # A character of several tokens (bytes) belongs to each of them.
    following = np.searchsorted(np.append(begins, length), begins, side="right")
    ends = np.append(begins, length)[np.minimum(following, len(begins))]
    mask = np.zeros(len(begins), dtype=np.bool_)
    for start, end in counted:
        mask |= (begins < end) & (ends > start)
    return mask


def _union(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _rest(start: int, end: int, untrained: Sequence[Span]) -> list[Span]:
    edges = [start, *(edge for span in untrained for edge in span), end]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]
