"""Render a record as texts to tokenise: a prompt, and its responses with their turns."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dpo_dist.config.data import DataConfig, TextTemplate
from dpo_dist.data.counts import NO_CHANGES, Changes
from dpo_dist.data.records import (
    Dialogue,
    Fields,
    Message,
    Messages,
    Origin,
    PreferenceRecord,
    Response,
    UnusableRecordError,
)
from dpo_dist.data.template import (
    THOUGHT_TAGS,
    before_open_thought,
    check_arguments,
    end_of_empty_thought,
    ends_thought,
    has_ended_thought,
    opens_thought,
    split_thought,
    within_thought,
    without_ended_thought,
)
from dpo_dist.data.tokenizer import TokenizerFacts
from dpo_dist.data.turns import ChatRenderer, Escapable, Span, Trace, Turns
from dpo_dist.foundation.errors import ConfigError

THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
CALLS = "tool_calls"


def thought_of(message: Message) -> str | None:
    """Return the thought that a field of a message has."""
    found = (message.fields.get(name) for name in THOUGHT_FIELDS)
    return next((thought for thought in found if thought and isinstance(thought, str)), None)


def _is_written(text: str, turns: Messages, tools: Iterable[Fields]) -> bool:
    """Return whether a rendered text has the contents of all turns, the last thought, and names of tools.

    Thoughts of earlier turns, and a content with a thought, are the template's to keep or change.
    """
    parts = [turn.content.strip() for turn in turns if not ends_thought(turn.content)]
    parts += filter(None, [thought_of(turns[-1])])
    parts += [tool["function"]["name"] for tool in tools if "name" in tool.get("function", ())]
    parts += [call["function"]["name"] for turn in turns for call in turn.fields.get(CALLS, ())]
    return all(part.strip() in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in parts)


@dataclass(frozen=True)
class RenderedResponse:
    """An escaped response with its end of turn.

    Attributes:
        text: the text after the prompt.
        counted: the turns in it that the loss counts, without their headers.
    """

    text: str
    counted: tuple[Span, ...]


@dataclass(frozen=True)
class Rendered:
    """Texts to tokenise, escaped, and the changes that rendering made."""

    prompt: str
    responses: tuple[RenderedResponse, ...]
    changes: Changes = NO_CHANGES


def counted(text: str) -> RenderedResponse:
    """Return a response that the loss counts as a whole."""
    return RenderedResponse(text, ((0, len(text)),))


class Conversation:
    """The prompt of one record, with the tools and arguments of the template for it."""

    def __init__(
        self,
        prompt: Messages,
        context: Escapable,
        facts: TokenizerFacts,
        chat: ChatRenderer,
        config: DataConfig,
    ):
        self._facts = facts
        self._chat = chat
        self._config = config
        self._prompt: Turns = tuple(map(chat.turn, prompt))
        self._context = context
        self._role = prompt[-1].role if prompt else ""
        self._generation: dict[str, str] = {}

    def render(self, responses: tuple[Messages, ...]) -> Rendered:
        """Render the prompt and its responses.

        Raises:
            UnusableRecordError: the template rejects a conversation or omits a turn of a response.
        """
        if any(len(turns) != 1 or turns[0].role != "assistant" for turns in responses):
            return self._render_turns(responses)
        messages = [turns[0] for turns in responses]
        prompt = self._chat.render(self._prompt, self._context, generation=True)
        if opens_thought(prompt):
            rendered = self._render_after_thought(messages, prompt)
        else:
            texts, is_prefix = self._render_each(messages, prompt)
            is_reopened = has_ended_thought(prompt) and any(map(ends_thought, texts))
            if is_reopened and self._ends_thoughts_by_itself():
                prompt = without_ended_thought(prompt)
                texts, _ = self._render_each(messages, prompt)
            changes = Changes(prompt_not_prefix=not is_prefix, ended_thought_reopened=is_reopened)
            rendered = Rendered(prompt, tuple(map(counted, texts)), changes)
        if all(map(self._is_counted, messages)):
            return rendered
        pairs = zip(messages, rendered.responses, strict=True)
        masked = (one if self._is_counted(turn) else replace(one, counted=()) for turn, one in pairs)
        return replace(rendered, responses=tuple(masked))

    def _ends_thoughts_by_itself(self) -> bool:
        """Return whether the template ends a thought in the prompt without an argument that asks for it."""
        tools = {name: value for name, value in self._context.plain.items() if name == "tools"}
        prompt = self._chat.render(self._prompt, self._chat.data(tools), generation=True)
        return has_ended_thought(prompt)

    def _is_counted(self, message: Message) -> bool:
        return (
            message.role in self._config.trained_roles if message.is_trained is None else message.is_trained
        )

    def _after_prompt(self, message: Message, prompt: str) -> str | None:
        """Return the text of a response after the rendered `prompt`, up to its end of turn.

        Includes text that the template adds to a response (a leading space, an empty thought). None if the
        template renders the prompt differently when a response follows.
        """
        whole = self._chat.render((*self._prompt, self._chat.turn(message)), self._context)
        return self._facts.until_end(whole[len(prompt) :]) if whole.startswith(prompt) else None

    def _render_each(self, messages: list[Message], prompt: str) -> tuple[list[str], bool]:
        """Return the text of each response, and whether all follow the prompt as it is."""
        texts = [self._after_prompt(message, prompt) for message in messages]
        return [
            self._render_alone(message) if text is None else text
            for text, message in zip(texts, messages, strict=True)
        ], None not in texts

    def _render_alone(self, message: Message) -> str:
        """Return a response as the template writes its turn after a prompt that it renders differently."""
        turns = (*self._prompt, self._chat.turn(message))
        trace = self._chat.trace(turns, self._context)
        span = trace.spans[-1]
        if span is None:
            raise UnusableRecordError("turn_not_rendered", "the chat template does not write the response")
        turn = trace.text[slice(*span)]
        header = turn[: self._header_length(turn, self._prompt, self._role)]
        # The prompt before it has no opened thought.
        return self._facts.until_end(turn[len(before_open_thought(header)) :])

    def _header_length(self, turn: str, before: Turns, role: str) -> int:
        """Return the length of the header of an assistant turn: the part that a generation prompt writes.

        Args:
            turn: as the template writes it.
            before: the turns before it.
            role: of the last of them.
        """
        if role not in self._generation:
            trace = self._chat.trace(before, self._context, generation=True)
            end = trace.end
            if not before or trace.spans[-1] is None:
                # Llama 3.1 writes tools and the first question before its loop over messages.
                end = _common_length(trace.text, self._chat.render(before, self._context))
            self._generation[role] = trace.text[end:]
        generation = self._generation[role]
        header = turn[: _common_length(turn, generation)]
        # The thought of the turn is the model's if the generation prompt opens none, or ends it.
        return len(header if opens_thought(generation) else before_open_thought(header))

    def _render_after_thought(self, messages: list[Message], prompt: str) -> Rendered:
        """Render responses to a prompt that opens a thought: each ends it and none opens it again."""
        texts = [self._after_prompt(message, prompt) for message in messages]
        if all(text is not None and _ends_opened_thought(text) for text in texts):
            scaffold = self._common_scaffold(list(map(str, texts)))
            following = (str(text).removeprefix(scaffold) for text in texts)
            return Rendered(prompt + scaffold, tuple(map(counted, following)))
        spelled = [_with_spelled_thought(message) for message in messages]
        closed = prompt.rstrip().removesuffix(THOUGHT_TAGS[0])
        if all(ends_thought(message.content) for message in spelled):
            joined = [within_thought(message.content, prompt) for message in spelled]
            ended = [self._ended(*both, closed) for both in zip(spelled, joined, strict=True)]
            is_joined = joined != [message.content for message in spelled]
            return Rendered(prompt, tuple(map(counted, ended)), Changes(opened_thought_joined=is_joined))
        rendered, is_prefix = self._render_each(messages, closed)
        ended = [
            self._ended(message, message.content, closed)
            if ends_thought(message.content)
            and not _has_thought_of(self._facts.marks.spell(whole), message.content)
            else whole
            for message, whole in zip(spelled, rendered, strict=True)
        ]
        changes = Changes(opened_thought_removed=True, prompt_not_prefix=not is_prefix)
        return Rendered(closed, tuple(map(counted, ended)), changes)

    def _common_scaffold(self, responses: list[str]) -> str:
        """Return the end of an empty thought with which all responses start: a part of the prompt."""
        if "empty_thoughts" not in self._config.untrained:
            return ""
        starts = set(map(end_of_empty_thought, responses))
        return starts.pop() if len(starts) == 1 else ""

    def _ended(self, message: Message, content: str, prompt: str) -> str:
        """Return a content with its thought and an end of turn; tool calls as the template writes them."""
        if not message.fields.get(CALLS):
            return self._facts.bare_response(content)
        thought, rest = split_thought(content)
        separator = rest[: len(rest) - len(rest.lstrip())]
        [rendered], _ = self._render_each([replace(message, content=rest)], prompt)
        return self._facts.escape_response(thought) + separator + rendered.lstrip()

    def _render_turns(self, responses: tuple[Messages, ...]) -> Rendered:
        """Render responses of several turns, after the prompt as it is in the whole conversation."""
        parts = [self._parts(response) for response in responses]
        prompts = [trace.text[:start] for trace, start, _ in parts]
        is_prefix, start = True, len(prompts[0])
        if any(prompt != prompts[0] for prompt in prompts):
            is_prefix = False
            common = min(_common_length(prompts[0], prompt) for prompt in prompts[1:])
            start = self._facts.after_last_special(prompts[0][:common])
        elif self._prompt:
            generation = all(turns[0].role == "assistant" for turns in responses)
            alone = self._chat.render(self._prompt, self._context, generation=generation)
            is_prefix = alone == prompts[0]
            if opens_thought(alone):
                start += len(self._common_scaffold([trace.text[start:] for trace, _, _ in parts]))
        return Rendered(
            parts[0][0].text[:start],
            tuple(_following(trace, start, spans) for trace, _, spans in parts),
            Changes(prompt_not_prefix=not is_prefix),
        )

    def _parts(self, response: Messages) -> tuple[Trace, int, list[Span]]:
        """Return a whole conversation, the start of its response, and the spans that the loss counts.

        The text ends with the end of the response's last turn.
        """
        turns = (*self._prompt, *map(self._chat.turn, response))
        trace = self._chat.trace(turns, self._context)
        role, first, turn = self._role, 0, ""
        starts: list[int] = []
        spans: list[Span] = []
        for index, message in enumerate(response, start=len(self._prompt)):
            span = trace.spans[index]
            if span is None:
                raise UnusableRecordError("turn_not_rendered", "the chat template does not write a turn")
            first, turn = span[0], trace.text[slice(*span)]
            is_assistant = message.role == "assistant"
            header = self._header_length(turn, turns[:index], role) if is_assistant else 0
            if index == len(turns) - 1:
                turn = self._facts.until_end(turn)
            starts.append(first + header)
            if self._is_counted(message):
                content = header if is_assistant else max(turn.find(message.content.strip()), 0)
                end = self._facts.end_of_rendered(turn, trace.text[span[1] :])
                spans.append((first + content, first + end))
            role = message.role
        return replace(trace, text=trace.text[:first] + turn), starts[0], spans


def _following(trace: Trace, start: int, spans: list[Span]) -> RenderedResponse:
    turns = ((max(first - start, 0), end - start) for first, end in spans)
    return RenderedResponse(trace.text[start:], tuple(turns))


def _common_length(one: str, other: str) -> int:
    """Return the length of the common start of two texts, which does not end inside the tag of a thought."""
    differing = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    length = next(differing, min(len(one), len(other)))
    # A generation prompt may open a thought where a turn starts with another tag, such as <tool_call>.
    last = max(one.rfind("<", 0, length), 0)
    is_cut = any(
        text.startswith(tag, last) and last + len(tag) > length
        for text in (one, other)
        for tag in THOUGHT_TAGS
    )
    return last if is_cut else length


def _has_thought_of(rendered: str, content: str) -> bool:
    """Return whether a rendered response has the thought of a content, and no other one."""
    begin, end = THOUGHT_TAGS
    thought = split_thought(content)[0].removesuffix(end).rpartition(begin)[2].strip()
    return rendered.count(end) == 1 and thought in rendered


def _ends_opened_thought(response: str) -> bool:
    """Return whether a response ends the thought opened in its prompt, without opening it again."""
    return ends_thought(response) and not response.lstrip().startswith(THOUGHT_TAGS[0])


def _with_spelled_thought(message: Message) -> Message:
    """Return a message whose thought is part of its content, if a field has it."""
    thought = thought_of(message)
    if thought is None or ends_thought(message.content):
        return message
    fields: Fields = {name: part for name, part in message.fields.items() if name not in THOUGHT_FIELDS}
    content = f"<think>\n{thought}\n</think>\n\n{message.content}"
    return replace(message, content=content, fields=fields)


def render_record(record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig) -> Rendered:
    """Render a record: messages, and dialogues if the tokenizer has a chat template, by that template.

    Raises:
        UnusableRecordError: the template rejects the record or would lose a part of it.
        ConfigError: the tokenizer has no chat template for messages, or an unusable one.
    """
    prompt = record.prompt
    is_text = all(isinstance(response, str) for response in record.responses)
    if isinstance(prompt, Dialogue) and facts.chat is None and is_text:
        return _render_text(prompt.text, record.response_texts, facts)
    if isinstance(prompt, Dialogue):
        stripped = tuple(one.strip() if isinstance(one, str) else one for one in record.responses)
        return _render_messages(prompt, stripped, record, facts, config)
    if not isinstance(prompt, str):
        return _render_messages(prompt, record.responses, record, facts, config)
    if not is_text:
        return _render_messages((Message("user", prompt),), record.responses, record, facts, config)
    return _render_plain_prompt(prompt, record, facts, config)


def _render_plain_prompt(
    prompt: str, record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig
) -> Rendered:
    is_applied = config.template is TextTemplate.applied
    if facts.is_templated(prompt):
        if is_applied:
            ended = tuple(map(facts.end_templated, record.response_texts))
            return Rendered(prompt, tuple(map(counted, ended)), Changes(templated_text=True))
        return _changed(_render_plain(prompt, record, facts, config), templated_text=True)
    if any(map(facts.is_ended, record.response_texts)):
        if is_applied:
            record = replace(record, responses=tuple(map(facts.without_end, record.response_texts)))
        return _changed(_render_plain(prompt, record, facts, config), templated_text=True)
    return _render_plain(prompt, record, facts, config)


def _render_plain(
    prompt: str, record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig
) -> Rendered:
    if config.text_as_messages:
        rendered = _render_messages((Message("user", prompt),), record.responses, record, facts, config)
        return _changed(rendered, templated_content=False)
    return _render_text(prompt, record.response_texts, facts)


def _render_text(prompt: str, responses: Sequence[str], facts: TokenizerFacts) -> Rendered:
    ended = (facts.escape(response) + facts.end_of_text for response in responses)
    return Rendered(facts.escape(prompt), tuple(map(counted, ended)))


def _render_messages(
    messages: Messages,
    given: tuple[Response, ...],
    record: PreferenceRecord,
    facts: TokenizerFacts,
    config: DataConfig,
) -> Rendered:
    if facts.chat is None:
        raise _no_template(record.origin)
    responses = tuple(map(_turns_of, given))
    arguments = record.template_arguments
    known = {name: value for name, value in arguments.items() if name in facts.chat.arguments}
    context = facts.chat.data(_template_context(record, known, facts.chat, config))
    rendered = Conversation(messages, context, facts, facts.chat, config).render(responses)
    spelled = facts.marks.spell(rendered.prompt)
    wholes = [
        _is_written(spelled + facts.marks.spell(one.text), (*messages, *turns), record.tools)
        for one, turns in zip(rendered.responses, responses, strict=True)
    ]
    return _changed(
        rendered,
        unknown_template_argument=len(known) < len(arguments),
        by_template=True,
        content_not_rendered=not all(wholes),
        templated_content=any(
            facts.has_turns(turn.content) for turns in (messages, *responses) for turn in turns
        ),
    )


def _changed(rendered: Rendered, **changes: bool) -> Rendered:
    return replace(rendered, changes=replace(rendered.changes, **changes))


def _template_context(
    record: PreferenceRecord, own: Fields, chat: ChatRenderer, config: DataConfig
) -> Fields:
    tools = {"tools": list(record.tools)} if record.tools else {}
    if config.template_arguments:
        check_arguments(config.template_arguments, chat.arguments)
        return {**config.template_arguments, **own, **tools}
    return {**own, **tools}


def _turns_of(response: Response) -> Messages:
    return (Message("assistant", response),) if isinstance(response, str) else response


def _no_template(origin: Origin) -> ConfigError:
    return ConfigError(
        "the data are conversations, but the tokenizer has no chat template",
        where=str(origin),
        got="messages",
        expected="plain prompt, chosen and rejected texts, or a tokenizer with a chat template",
        remedy="use the tokenizer of an instruction-tuned model, set data.chat_template, "
        "set data.text_as_messages=false, or convert the conversations to plain text",
    )
