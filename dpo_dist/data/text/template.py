"""Chat templates: choose one, fix its date, and render conversations."""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from jinja2 import Environment, TemplateError, nodes
from jinja2.meta import find_undeclared_variables

from dpo_dist.data.records import IMAGE, RESERVED_CHARACTER, Message, Messages, UnusableRecordError, parts_of
from dpo_dist.data.text.escape import THOUGHT_FIELDS, Marks, any_of
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.types import Fields, Tokenizer

_CLOCK_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# Tags of transformers, which Jinja itself does not know.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt", "strftime_now"}

_PROBE = "probe answer"
_PROBES = ({"role": "user", "content": "probe question"}, {"role": "assistant", "content": _PROBE})
_NOTHING = {"role": "assistant", "content": ""}
PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}
PROBE_CALL = {"type": "function", "id": "probe1234", "function": {"name": "probe", "arguments": {"a": "b"}}}


def pin_clock(template: str, day: str) -> str:
    """Return the template with `day` (ISO 8601) in place of its calls of a clock with a literal format."""
    moment = datetime.fromisoformat(day)
    return _CLOCK_CALL.sub(lambda match: json.dumps(moment.strftime(match[2])), template)


@lru_cache(maxsize=8)
def _parsed(template: str) -> nodes.Template:
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701
    try:
        return environment.parse(_GENERATION.sub("", template))
    except (TemplateError, RecursionError) as fault:
        raise ConfigError(
            "the chat template is not valid Jinja",
            where="data.chat_template (null: the tokenizer's own)",
            got=first_line(fault),
            remedy="correct the template, or name another one: data.chat_template=FILE",
        ) from fault


@lru_cache(maxsize=8)
def argument_names(template: str) -> frozenset[str]:
    """Return the names that a template may read besides messages and tools. Raises ConfigError."""
    return frozenset(find_undeclared_variables(_parsed(template))) - _OWN_VARIABLES


class ChatTemplate:
    """The chat template of a tokenizer that `data.chat_template` chooses.

    `choice` is a file, or None: the tokenizer's only or default one, or the one for tools.
    """

    def __init__(self, tokenizer: Tokenizer, choice: str | None):
        self._tokenizer = tokenizer
        self._choice = choice

    def text(self, *, with_tools: bool = False) -> str | None:
        """Return the template, of records `with_tools` or of others; None if the tokenizer has none.

        Raises ConfigError: the file cannot be read.
        """
        if self._choice is None and not self._tokenizer.chat_template:
            return None
        if self._choice is None:
            return str(self._tokenizer.get_chat_template(tools=[{}] if with_tools else None))
        try:
            return Path(self._choice).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise ConfigError(
                "the chat template does not exist, or cannot be read",
                where="data.chat_template",
                got=f"{self._choice}: {fault}",
                expected="a file with a Jinja template in UTF-8",
                remedy="correct the path, or remove data.chat_template to use the tokenizer's own template",
            ) from fault

    def check_arguments(self, arguments: Collection[str]) -> None:
        """Check that the template exists and names these `data.template_arguments`. Raises ConfigError."""
        names = frozenset[str]()
        for with_tools in (False, True):
            names |= argument_names(self.text(with_tools=with_tools) or "")
        unknown = sorted(set(arguments) - names)
        if unknown:
            raise ConfigError(
                "the chat template has no such argument",
                where="data.template_arguments",
                got=", ".join(unknown),
                expected=", ".join(sorted(names)) or "no arguments: the template names none",
                remedy="correct or remove these arguments, or choose another template by data.chat_template",
            )

    def alone(self) -> Tokenizer:
        """Return a copy of the tokenizer with only this template, to save with a model."""
        changed = copy(self._tokenizer)
        changed.chat_template = self.text()
        return changed


def turn_tokens(tokenizer: Tokenizer, chat_template: str | None, of_thoughts: Collection[str]) -> set[str]:
    """Return the added tokens that a template writes around turns, special or not.

    Without BOS, EOS and those `of_thoughts`; empty if the template cannot render a conversation.
    """
    if chat_template is None:
        return set()
    in_parts = roles_in_parts(tokenizer, chat_template)
    rendered = probed(tokenizer, chat_template, (*_PROBES, _PROBES[0]), in_parts)
    added = any_of(map(str, tokenizer.added_tokens_decoder.values()))
    return set(added.findall(rendered)) - {tokenizer.bos_token, tokenizer.eos_token, *of_thoughts}


def roles_in_parts(tokenizer: Tokenizer, chat_template: str) -> frozenset[str]:
    """Return the roles, of user and assistant, whose content a template reads as a list of parts only.

    Templates of some image models do, and leave out a content that is a plain text.
    """
    for roles in ((), ("assistant",), ("user",), ("user", "assistant")):
        rendered = probed(tokenizer, chat_template, _PROBES, roles)
        if all(probe["content"] in rendered for probe in _PROBES):
            return frozenset(roles)
    return frozenset()


def probed(
    tokenizer: Tokenizer,
    template: str,
    probes: Sequence[Fields],
    in_parts: Collection[str],
    *,
    generation: bool = True,
    arguments: Fields = MappingProxyType({}),
) -> str:
    """Return the output of a template for probes; "" if it rejects them."""
    turns = [in_form(probe, in_parts) for probe in probes]
    options: Any = {"tokenize": False, "add_generation_prompt": generation, **arguments}
    for tools in (None, [PROBE_TOOL]):  # some templates for tools cannot do without (Hermes)
        # A template can raise anything; each record is rendered again, with its error.
        with contextlib.suppress(Exception):
            return str(tokenizer.apply_chat_template(turns, chat_template=template, tools=tools, **options))
    return ""


def in_form(turn: Fields, roles: Collection[str]) -> dict[str, Any]:
    """Return a turn; its content becomes a list of parts if it has images, or its role is in `roles`.

    Every role except the assistant's counts as the user's.
    """
    role = turn["role"] if turn["role"] == "assistant" else "user"
    if IMAGE not in turn["content"] and role not in roles:
        return {**turn}
    return {**turn, "content": parts_of(turn["content"])}


class Forms(NamedTuple):
    """A turn, or the tools and arguments of the template, in two forms."""

    plain: Fields
    marked: Fields  # with a mark beside each control token


Turns: TypeAlias = tuple[Forms, ...]
NO_CONTEXT = Forms({}, {})
CONTENT, CALLS = "content", "tool_calls"
_TEXTS = frozenset({CONTENT, *THOUGHT_FIELDS})
# Further keys of `Message.fields` are the data's own: calls, tools or thoughts that only some templates read.
_USUAL_FIELDS = frozenset({CALLS, "tool_call_id", "name", *THOUGHT_FIELDS})


class ChatRenderer:
    """Renders conversations by a chat template; probes find the template's properties."""

    def __init__(
        self, tokenizer: Tokenizer, template: str, marks: Marks, common_length: Callable[[str, str], int]
    ):
        """Args: `common_length` of two texts, which ends inside of no added token or tag."""
        self._tokenizer = tokenizer
        self._common_length = common_length
        self.template = template
        self._marks = marks
        self._in_parts = roles_in_parts(tokenizer, template)
        self._omitted: dict[str, frozenset[str]] = {}

    def _plain(self, message: Message) -> dict[str, Any]:
        plain = {"role": message.role, "content": message.content, **message.fields}
        fields = in_form(plain, self._in_parts)
        calls = fields.get("tool_calls")
        if calls and not self._takes_objects:
            fields["tool_calls"] = list(map(with_text_arguments, calls))
        return fields

    def turn(self, message: Message) -> Forms:
        """Return a message in the template's form."""
        fields = self._plain(message)
        if message.role != "assistant":
            return self.data(fields)
        # The model does not write the tags around calls and names as text: the template does.
        marks = self._marks
        marked = {}
        for name, value in fields.items():
            pattern = marks.in_response if name in _TEXTS else marks.anywhere
            marked[name] = marks.mark_tokens(value, pattern)
        return Forms(fields, marked)

    def data(self, values: Fields) -> Forms:
        """Return tools or arguments in the template's form."""
        return Forms(values, self._marks.mark_tokens(values, self._marks.anywhere))

    def render(
        self,
        turns: Turns,
        context: Forms = NO_CONTEXT,
        *,
        generation: bool = False,
        template: str | None = None,
    ) -> str:
        """Render a conversation, escaped; `context` are tools and arguments of the template, of `data`.

        `template`: another one than the renderer's. Raises UnusableRecordError: the template rejects the
        turns, or marks would change its output.
        """

        def applied(arguments: Fields, messages: list[Fields]) -> str:
            try:
                return str(
                    self._tokenizer.apply_chat_template(
                        messages,
                        chat_template=template or self.template,
                        tokenize=False,
                        add_generation_prompt=generation,
                        **arguments,
                    )
                )
            except TemplateError as fault:
                raise UnusableRecordError("template_rejected", str(fault)) from fault
            except Exception as fault:  # its operators, methods and nesting can raise anything
                raise UnusableRecordError("template_rejected", f"{type(fault).__name__} in it") from fault

        text = applied(context.plain, [turn.plain for turn in turns])
        if all(form.plain == form.marked for form in (context, *turns)):
            return text
        marked = applied(context.marked, [turn.marked for turn in turns])
        escaped = self._marks.replace_marked(marked)
        if self._marks.spell(escaped) != text:
            detail = "the chat template changes a text with a special token in it"
            raise UnusableRecordError("special_token_in_text", detail)
        return escaped

    def omitted(self, prompt: Messages, response: Messages, context: Forms = NO_CONTEXT) -> frozenset[str]:
        """Return the keys of messages that the output of the template leaves out: contents, calls and others.

        A part of a message is written if a mark in it is: its words may also stand elsewhere.
        """
        messages = (*prompt, *response)
        if any(message.fields.keys() - THOUGHT_FIELDS for message in messages):
            return self._unmarked(messages, len(prompt), context)
        # Whether a template writes a turn does not depend on the words of its content.
        turns = [(turn.role, bool(turn.content.strip()), sorted(turn.fields)) for turn in messages]
        arguments = {name: value for name, value in context.plain.items() if name != "tools"}
        form = json.dumps([turns, len(prompt), arguments, "tools" in context.plain], default=str)
        if form not in self._omitted:
            self._omitted[form] = self._unmarked(messages, len(prompt), context)
        return self._omitted[form]

    def _unmarked(self, messages: Messages, of_prompt: int, context: Forms) -> frozenset[str]:
        """Return the keys of messages whose marks are not in the output of the template."""
        keys: list[str] = []  # of each mark

        def marked(text: str, key: str) -> str:
            keys.append(key)
            return f"{text}{_mark(len(keys) - 1)}"

        def turn_of(message: Message) -> Forms:
            content = message.content
            if content.strip():
                content = marked(content, CONTENT)
            turn = self._plain(replace(message, content=content))
            calls = turn.get(CALLS)
            if calls:
                functions = [call["function"] for call in calls]
                names = [marked(function["name"], CALLS) for function in functions]
                turn[CALLS] = [
                    {**call, "function": {**call["function"], "name": name}}
                    for call, name in zip(calls, names, strict=True)
                ]
            for name in message.fields.keys() - _USUAL_FIELDS:
                turn[name] = _with_last_text(turn[name], partial(marked, key=name))
            return Forms(turn, turn)

        turns = tuple(map(turn_of, messages))
        # Some templates write a system's turn only into a question that is the last turn (Mistral).
        missing = set(range(len(keys)))
        for part, is_prompt in ((turns, False), (turns[:of_prompt], True)):
            if missing and part:
                with contextlib.suppress(UnusableRecordError):
                    rendered = self.render(part, Forms(context.plain, context.plain), generation=is_prompt)
                    rendered = self._marks.replace_marked(rendered)
                    missing -= {number for number in missing if _mark(number) in rendered}
        return frozenset(keys[number] for number in missing)

    @cached_property
    def after_response(self) -> str:
        """The output of the template after the last assistant turn."""
        try:
            probes = tuple(self.data(in_form(probe, self._in_parts)) for probe in _PROBES)
            _, probe, after = (self._probed(*_PROBES) or self.render(probes)).rpartition(_PROBE)
            fault = "" if probe else "its output does not contain the response"
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
    def after_earlier_response(self) -> str:
        """The output of the template after an assistant turn before another turn."""
        return self._probed(*_PROBES, _PROBES[0]).rpartition(_PROBE)[2]

    @cached_property
    def before_question(self) -> str:
        """The output of the template before the first user's content."""
        return self._probed(*_PROBES).partition(_PROBES[0]["content"])[0]

    @cached_property
    def turns_of_parts(self) -> list[str]:
        """The output of the template after the prompt for a thought and an answer, and a text and a call."""
        said = _PROBES[1]
        thinking = said | dict.fromkeys(("reasoning_content", "thinking"), "probe thought")
        call = PROBE_CALL if self._takes_objects else with_text_arguments(PROBE_CALL)
        return [self._answered(turn) for turn in (thinking, said | {"tool_calls": [call]})]

    @cached_property
    def empty_turn(self) -> str:
        """The output of the template after the prompt for an assistant turn without content."""
        return self._answered(_NOTHING)

    def check_images(self, token: str) -> None:
        """Check that the template writes the `token` of an image for an image. Raises ConfigError."""
        turn = {"role": "user", "content": IMAGE}
        if token not in self._marks.tokens or self._probed(turn, generation=True).count(token) != 1:
            raise ConfigError(
                "the chat template has no place for images",
                where="data.chat_template (null: the tokenizer's own)",
                got="no place for the image of a user's turn",
                expected=f"one {token!r} for a part {{type: image}} of a content, as a special token",
                remedy="use the chat template of the model's processor, or set model.images=null",
            )

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether the template takes the arguments of tool calls as objects; DeepSeek's wants JSON text."""

        def is_rendered(call: Fields) -> bool:
            return self._probed(_PROBES[0], _NOTHING | {"tool_calls": [call]}) != ""

        return is_rendered(PROBE_CALL) or not is_rendered(with_text_arguments(PROBE_CALL))

    def _answered(self, turn: Fields) -> str:
        """Return the output of the template for a turn after the question, without the turn's header.

        The output before the end of the question is not compared: it may be another in a generation prompt.
        `TurnFinder` finds the header of any turn, but by `TokenizerFacts`, which are made from these probes.
        """
        question = _PROBES[0]["content"]
        answered, prompt, alone = (
            rendered.rpartition(question)[2]
            for rendered in (
                self._probed(_PROBES[0], turn),
                self._probed(_PROBES[0], generation=True),
                self._probed(_PROBES[0]),
            )
        )
        # After the question, from ChatML:
        #   answered  <|im_end|>\n<|im_start|>assistant\nprobe answer<|im_end|>\n
        #   prompt    <|im_end|>\n<|im_start|>assistant\n
        #   alone     <|im_end|>\n
        header = prompt[self._common_length(prompt, alone) :]
        # A prompt can have more than a conversation between question and header, such as a hint to think.
        #   prompt     /think<|im_end|>\n<|im_start|>assistant\n
        start = self._marks.in_text.search(header)
        if not answered.startswith(prompt) and start and start.group() in answered:
            answered = answered[answered.index(start.group()) :]
            prompt = header[start.start() :]
        return answered[self._common_length(answered, prompt) :]

    def _probed(self, *turns: Fields, generation: bool = False) -> str:
        return probed(self._tokenizer, self.template, turns, self._in_parts, generation=generation)


def _mark(number: int) -> str:
    return f"{RESERVED_CHARACTER}{number}{RESERVED_CHARACTER}"


def _with_last_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with its last text changed: itself, or one in its lists and objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {**value, **{name: _with_last_text(value[name], change) for name in [*value][-1:]}}
    if isinstance(value, list) and value:
        return [*value[:-1], _with_last_text(value[-1], change)]
    return value


def with_text_arguments(call: Fields) -> Fields:
    """Return a call of a tool with its arguments as JSON text."""
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
