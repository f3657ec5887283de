"""Chat templates: choose one, fix its date, and render conversations."""

import contextlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from copy import copy
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from dpo_dist.config.schema import DataConfig
from dpo_dist.data.records import IMAGE, Message, Messages, Tokenizer, UnusableRecordError, parts_of
from dpo_dist.data.text.escape import RESERVED_CHARACTER, THOUGHT_FIELDS, THOUGHT_TAGS, Marks, any_of
from dpo_dist.foundation.errors import ConfigError, first_line
from dpo_dist.foundation.types import Fields

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
def argument_names(template: str) -> frozenset[str]:
    """Return the names that a template may read besides messages and tools. Raises ConfigError."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701
    try:
        tree = environment.parse(_GENERATION.sub("", template))
    except (TemplateError, RecursionError) as fault:
        raise ConfigError(
            "the chat template is not valid Jinja",
            where="data.chat_template (null: the tokenizer's own)",
            got=first_line(fault),
            remedy="correct the template, or name another one: data.chat_template=FILE",
        ) from fault
    return frozenset(find_undeclared_variables(tree)) - _OWN_VARIABLES


def check_template_keys(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Check that the chosen template exists and names the arguments of the run. Raises ConfigError."""
    templates = [
        chosen_template(tokenizer, config.chat_template, with_tools=given) for given in (False, True)
    ]
    known = frozenset[str]().union(*(argument_names(template or "") for template in templates))
    if unknown := sorted(set(config.template_arguments or ()) - known):
        raise ConfigError(
            "the chat template has no such argument",
            where="data.template_arguments",
            got=", ".join(unknown),
            expected=", ".join(sorted(known)) or "no arguments: the template names none",
            remedy="correct or remove these arguments, or choose another template by data.chat_template",
        )


def chosen_template(tokenizer: Tokenizer, choice: str | None, *, with_tools: bool = False) -> str | None:
    """Return the chat template that `data.chat_template` chooses; None if the tokenizer has none.

    `choice` is a file, the name of one of the tokenizer's templates, or None: its only or default one, or the
    one for tools. Raises ConfigError: there is no such file and no such template.
    """
    stored = tokenizer.chat_template
    if choice is None:
        return str(tokenizer.get_chat_template(tools=[{}] if with_tools else None)) if stored else None
    if isinstance(stored, dict) and choice in stored:
        return str(stored[choice])
    try:
        return Path(choice).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise _no_such_template(f"{choice}: {fault}", stored if isinstance(stored, dict) else {}) from fault


def check_template_file(choice: str | None) -> None:
    """Check that a chosen template that can only be a file exists; needs no tokenizer. Raises ConfigError."""
    if choice and (choice.endswith(".jinja") or "/" in choice) and not Path(choice).expanduser().exists():
        raise _no_such_template(choice, [])


def _no_such_template(got: str, names: Collection[str]) -> ConfigError:
    templates = f" or one of the tokenizer's templates ({', '.join(sorted(names))})" if names else ""
    return ConfigError(
        "the chat template does not exist, or cannot be read",
        where="data.chat_template",
        got=got,
        expected=f"a file with a Jinja template in UTF-8{templates}",
        remedy="correct the path, or remove data.chat_template to use the tokenizer's own template",
    )


def with_chosen_template(tokenizer: Tokenizer, choice: str) -> Tokenizer:
    """Return a copy of a tokenizer with only the template of `data.chat_template`, to save with a model."""
    changed, stored = copy(tokenizer), tokenizer.chat_template
    chosen = chosen_template(tokenizer, choice)
    # Also by its name: else the same configuration would not find the template in the saved model.
    is_named = isinstance(stored, dict) and choice in stored
    changed.chat_template = {"default": chosen, choice: chosen} if is_named else chosen
    return changed


def turn_tokens(tokenizer: Tokenizer, chat_template: str | None) -> set[str]:
    """Return the added tokens that a template writes around turns, special or not.

    Without BOS, EOS and the tags of thoughts; empty if the template cannot render a conversation.
    """
    if chat_template is None:
        return set()
    in_parts = roles_in_parts(tokenizer, chat_template)
    rendered = _probed(tokenizer, chat_template, (*_PROBES, _PROBES[0]), in_parts)
    added = any_of(map(str, tokenizer.added_tokens_decoder.values()))
    return set(added.findall(rendered)) - {tokenizer.bos_token, tokenizer.eos_token, *THOUGHT_TAGS}


def roles_in_parts(tokenizer: Tokenizer, chat_template: str) -> frozenset[str]:
    """Return the roles, of user and assistant, whose content a template reads as a list of parts only.

    Templates of some image models do, and leave out a content that is a plain text.
    """
    for roles in ((), ("assistant",), ("user",), ("user", "assistant")):
        rendered = _probed(tokenizer, chat_template, _PROBES, roles)
        if all(probe["content"] in rendered for probe in _PROBES):
            return frozenset(roles)
    return frozenset()


def _probed(
    tokenizer: Tokenizer,
    template: str,
    probes: Sequence[Fields],
    in_parts: Collection[str],
    *,
    generation: bool = True,
) -> str:
    """Return the output of a template for probes; "" if it rejects them."""
    turns = [in_form(probe, in_parts) for probe in probes]
    options: Any = {"tokenize": False, "add_generation_prompt": generation}
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
_TEXTS = frozenset({"content", *THOUGHT_FIELDS})


class ChatRenderer:
    """Renders conversations by a chat template; probes find the template's properties."""

    def __init__(
        self, tokenizer: Tokenizer, template: str, marks: Marks, common_length: Callable[[str, str], int]
    ):
        """Args: `common_length` of two texts, which ends inside of no added token or tag."""
        self._tokenizer, self._common_length = tokenizer, common_length
        self.template, self._marks, self._in_parts = template, marks, roles_in_parts(tokenizer, template)

    def _plain(self, message: Message) -> dict[str, Any]:
        plain = {"role": message.role, "content": message.content, **message.fields}
        fields = in_form(plain, self._in_parts)
        if (calls := fields.get("tool_calls")) and not self._takes_objects:
            fields["tool_calls"] = [_with_text_arguments(call) for call in calls]
        return fields

    def turn(self, message: Message) -> Forms:
        """Return a message in the template's form."""
        fields = self._plain(message)
        if message.role != "assistant":
            return self.data(fields)
        # The model does not write the tags around calls and names as text: the template does.
        marks = self._marks
        patterns = ((name, marks.in_response if name in _TEXTS else marks.anywhere) for name in fields)
        marked = {name: marks.mark_tokens(fields[name], pattern) for name, pattern in patterns}
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

    def writes_calls(self, messages: Messages, context: Forms = NO_CONTEXT) -> bool:
        """Return whether the output of the template has each call of a tool."""
        if not any(message.fields.get("tool_calls") for message in messages):
            return True
        marks = list[str]()

        def marked(call: Fields) -> Fields:
            marks.append(f"{RESERVED_CHARACTER}call{len(marks)}{RESERVED_CHARACTER}")
            return {**call, "function": {**call["function"], "name": call["function"]["name"] + marks[-1]}}

        named = [
            {**turn, "tool_calls": list(map(marked, turn["tool_calls"]))} if turn.get("tool_calls") else turn
            for turn in map(self._plain, messages)
        ]
        try:
            turns = tuple(Forms(turn, turn) for turn in named)
            rendered = self.render(turns, Forms(context.plain, context.plain))
        except UnusableRecordError:
            return False
        rendered = self._marks.replace_marked(rendered)
        return all(mark in rendered for mark in marks)

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
    def after_call(self) -> str:
        """The output of the template after the prompt for a call of a tool; "" if it rejects calls."""
        return self._answered(_NOTHING | {"tool_calls": [self._call]})

    @cached_property
    def turns_of_parts(self) -> list[str]:
        """The output of the template after the prompt for a thought and an answer, and a text and a call."""
        said = _PROBES[1]
        thinking = said | dict.fromkeys(("reasoning_content", "thinking"), "probe thought")
        return [self._answered(turn) for turn in (thinking, said | {"tool_calls": [self._call]})]

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
    def _call(self) -> Fields:
        return PROBE_CALL if self._takes_objects else _with_text_arguments(PROBE_CALL)

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether the template takes the arguments of tool calls as objects; DeepSeek's wants JSON text."""

        def is_rendered(call: Fields) -> bool:
            return self._probed(_PROBES[0], _NOTHING | {"tool_calls": [call]}) != ""

        return is_rendered(PROBE_CALL) or not is_rendered(_with_text_arguments(PROBE_CALL))

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
        return _probed(self._tokenizer, self.template, turns, self._in_parts, generation=generation)


def _with_text_arguments(call: Fields) -> Fields:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
