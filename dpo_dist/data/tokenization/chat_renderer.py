"""Render conversations with a chat template, escaped, and find their turns in its output."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from dpo_dist.data.records import Message, UnusableRecordError
from dpo_dist.data.tokenization.marks import Marks, any_text
from dpo_dist.data.tokenization.template_arguments import argument_names
from dpo_dist.data.tokenization.template_limits import limited, place_of
from dpo_dist.data.tokenization.turn_trace import Trace, read_trace, traced_template, traced_turn
from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        self._place = place_of(tokenizer, template)

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
            return limited(
                lambda: str(
                    self._tokenizer.apply_chat_template(
                        [turn.form(number) for turn in turns],
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=generation,
                        **context.form(number),
                    )
                ),
                self._place,
            )
        except TemplateError as fault:
            raise UnusableRecordError("template_rejected", str(fault)) from fault
        except ConfigError:
            raise
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
