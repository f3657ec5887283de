"""Render a record as texts to tokenise: a prompt, and its responses with their turns."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dpo_dist.config.schema import DataConfig, TextTemplate
from dpo_dist.data.images import ExpandedImage, ImageProcessor
from dpo_dist.data.records import (
    IMAGE,
    Dialogue,
    Message,
    Messages,
    Origin,
    PreferenceRecord,
    UnusableRecordError,
)
from dpo_dist.data.text.escape import THOUGHT_FIELDS, THOUGHT_TAGS
from dpo_dist.data.text.template import (
    PROBE_CALL,
    PROBE_TOOL,
    ChatRenderer,
    Forms,
    Span,
    Turns,
    argument_names,
    check_template_keys,
)
from dpo_dist.data.text.tokenizer import TokenizerFacts
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.remedies import Remedy
from dpo_dist.foundation.types import Fields

CALLS = "tool_calls"
_OPEN, _CLOSE = THOUGHT_TAGS
_EMPTY_THOUGHT = re.compile(rf"\A{_OPEN}\s*{_CLOSE}\s*")
_EMPTY_END = re.compile(rf"\s*{_CLOSE}\s*")
_NO_THOUGHT = re.compile(rf"\s*(?:{_OPEN}\s*)?{_CLOSE}|(?!.*{_CLOSE})", re.DOTALL)
_TO_THOUGHT = re.compile(rf"\s*(?:{_OPEN}|{_CLOSE}|\Z)")
_ENDED = re.compile(rf"(?:{_OPEN}\s*)?{_CLOSE}\s*\Z")


@dataclass(frozen=True)
class RenderedRecord:
    """Escaped texts to tokenise: a prompt, and each response after it, with its end of turn.

    `counted` are the spans of the turns of each response that the loss counts, without their headers, and
    `changes` names in counts.yaml.
    """

    prompt: str
    responses: tuple[str, ...]
    counted: tuple[tuple[Span, ...], ...]
    changes: frozenset[str] = frozenset()
    read_as: str = ""


def render_record(record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig) -> RenderedRecord:
    """Render a record, by the chat template if it has messages, or a dialogue and there is a template."""
    prompt, responses = record.prompt, record.responses
    texts = tuple(response for response in responses if isinstance(response, str))
    is_text = len(texts) == len(responses)
    if isinstance(prompt, Dialogue):
        form = "hh (Human/Assistant turns)"
        if facts.chat is None and is_text:
            return _as_text(prompt.text, texts, facts, f"{form}, without the chat template")
        stripped = tuple(text.strip() if isinstance(text, str) else text for text in responses)
        return _by_template(replace(record, responses=stripped), facts, config, form)
    if not isinstance(prompt, str):
        return _by_template(record, facts, config, "messages")
    as_messages = replace(record, prompt=(Message("user", prompt),))
    if not is_text:
        return _by_template(as_messages, facts, config, "text")
    is_templated, read_as = facts.is_templated(prompt), "text, without the chat template"
    changes = {"templated_text"} if is_templated or any(map(facts.is_ended, texts)) else set()
    is_applied = bool(changes) and config.template is TextTemplate.applied
    if is_applied:
        read_as, ends = "text, with the template that is in it", [facts.split_end(text) for text in texts]
        texts = tuple(bare for bare, _ in ends)
        if is_templated:
            return _all_counted(prompt, [bare + end for bare, end in ends], read_as, changes)
    if config.text_as_messages:
        rendered = _by_template(replace(as_messages, responses=texts), facts, config, "text")
        return replace(rendered, changes=rendered.changes - {"templated_content"} | changes)
    if facts.tokenizer.chat_template and not is_applied:
        changes.add("chat_template_not_applied")
    return _as_text(prompt, texts, facts, read_as, changes)


_CALLED = Message("assistant", "", {CALLS: [PROBE_CALL]})
_RESULT = Message("tool", "probe result", {"name": "probe", "tool_call_id": PROBE_CALL["id"]})
_SAID, _ASKED = Message("assistant", "probe answer"), Message("user", "probe question")


def trained_ends(facts: TokenizerFacts) -> set[str]:
    """Return the tokens with which training ends turns and that stand nowhere else in a turn."""
    ends = set[str]()
    for turns in ((_CALLED, _RESULT, _SAID), (_SAID, _ASKED, _SAID)):
        record = PreferenceRecord((_ASKED,), (turns,), Origin("", 0), tools=(PROBE_TOOL,))
        with contextlib.suppress(UnusableRecordError, ConfigError):  # the template cannot be used for these
            rendered = render_record(record, facts, DataConfig())
            [text], [counted] = rendered.responses, rendered.counted
            ends |= {facts.ending_token(text[start:end]) for start, end in counted}
    return {*facts.stops, *ends} - facts.within_turns - {""}


def with_images(
    rendered: RenderedRecord,
    images: Sequence[ExpandedImage],
    facts: TokenizerFacts,
    processor: ImageProcessor,
) -> RenderedRecord:
    """Return a rendered record with the placeholders of each image in the place that the template wrote.

    A token of images that a text spells is escaped, so that it is no place. Raises UnusableRecordError: there
    are more places, or fewer; ConfigError: the template writes none for images.
    """
    if facts.chat is None:
        raise UnusableRecordError("image_count", "a text without a chat template has no place for images")
    facts.chat.check_images(processor.token)
    first, *others = rendered.prompt.split(processor.token)
    places = len(others) + sum(text.count(processor.token) for text in rendered.responses)
    if not len(images) == len(others) == places:
        detail = f"{len(images)} images, and {places} places for images in the output of the chat template"
        raise UnusableRecordError("image_count", detail)
    parts = [image.text + text for image, text in zip(images, others, strict=True)]
    return replace(rendered, prompt="".join([first, *parts]))


def _as_text(
    prompt: str, responses: Sequence[str], facts: TokenizerFacts, read_as: str, changes: Iterable[str] = ()
) -> RenderedRecord:
    escape, end = facts.marks.escape, facts.end_of_text
    return _all_counted(escape(prompt), [escape(response) + end for response in responses], read_as, changes)


def _all_counted(
    prompt: str, responses: Sequence[str], read_as: str, changes: Iterable[str]
) -> RenderedRecord:
    """Return texts whose responses count in the loss as a whole."""
    counted = tuple(((0, len(response)),) for response in responses)
    return RenderedRecord(prompt, tuple(responses), counted, frozenset(changes), read_as)


def _by_template(
    record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig, form: str
) -> RenderedRecord:
    """Render a record whose prompt is messages."""
    chat, messages = facts.chat, record.prompt
    assert isinstance(messages, tuple)
    if chat is None:
        raise ConfigError(
            "the data are conversations, but the tokenizer has no chat template",
            where=str(record.origin),
            got="messages",
            expected="plain prompt, chosen and rejected texts, or a tokenizer with a chat template",
            remedy="use the tokenizer of an instruction-tuned model, set data.chat_template, or "
            + (
                Remedy.to_set("data.text_as_messages=false")
                if config.text_as_messages
                else "convert them to plain text"
            ),
        )
    responses = tuple(
        (Message("assistant", turns),) if isinstance(turns, str) else turns for turns in record.responses
    )
    arguments = record.template_arguments
    names = argument_names(chat.template)
    known = {name: value for name, value in arguments.items() if name in names}
    if not names.issuperset(config.template_arguments or ()):
        check_template_keys(config, facts.tokenizer)
    tools = {"tools": list(record.tools)} if record.tools else {}
    context = chat.data({**(config.template_arguments or {}), **known, **tools})
    rendered = _Conversation(messages, context, facts, chat, config).render(responses)
    changes = set(rendered.changes)
    if len(known) < len(arguments):
        changes.add("unknown_template_argument")
    texts = list(map(facts.marks.spell, rendered.responses))
    spelled = [facts.marks.spell(rendered.prompt) + text for text in texts]
    # A part of a response may also stand in the prompt: a tool's name, or a short answer.
    given = [*_contents(messages), *_tool_names(record.tools)]
    if not all(
        _is_written(whole, given)
        and _is_written(text, [*_contents(turns), message_thought(turns[-1]) or ""])
        and chat.writes_calls((*messages, *turns), context)
        for whole, text, turns in zip(spelled, texts, responses, strict=True)
    ):
        changes.add("content_not_rendered")
    # A template that does not read `tools` may still write their names, in calls.
    is_read = re.search(r"\btools\b", chat.template) is not None
    written = _tool_names(record.tools)
    if record.tools and not (is_read and all(name in text for name in written for text in spelled)):
        changes.add("tools_not_rendered")
    if any(facts.has_turns(turn.content) for turns in (messages, *responses) for turn in turns):
        changes.add("templated_content")
    spans = zip(rendered.responses, rendered.counted, strict=True)
    if any(facts.stops_within(text[start:end]) for text, turns in spans for start, end in turns):
        changes.add("stop_within_turn")
    return replace(rendered, changes=frozenset(changes), read_as=f"{form}, by the chat template")


def _contents(turns: Messages) -> list[str]:
    """Return the texts of contents that a template writes: it may leave out or change those with thoughts."""
    contents = (turn.content for turn in turns if _CLOSE not in turn.content)
    return [part for content in contents for part in content.split(IMAGE)]


def _is_written(text: str, parts: Iterable[str]) -> bool:
    """Return whether a rendered text has all parts."""
    return all(
        part.strip() in text or json.dumps(part.strip(), ensure_ascii=False)[1:-1] in text for part in parts
    )


def _tool_names(tools: Iterable[Fields]) -> list[str]:
    return [tool["function"]["name"] for tool in tools if "name" in tool.get("function", ())]


def message_thought(message: Message) -> str | None:
    """Return the thought that a field of a message has."""
    thoughts = (message.fields.get(name) for name in THOUGHT_FIELDS)
    return next((thought for thought in thoughts if thought and isinstance(thought, str)), None)


@dataclass
class _Conversation:
    """The prompt of one record, with the tools and arguments of the template for it."""

    messages: Messages
    context: Forms
    facts: TokenizerFacts
    chat: ChatRenderer
    config: DataConfig

    def __post_init__(self) -> None:
        self.prompt: Turns = tuple(map(self.chat.turn, self.messages))
        self.role = self.messages[-1].role if self.messages else ""
        self.generation: dict[str, str] = {}

    def render(self, responses: Sequence[Messages]) -> RenderedRecord:
        """Render the prompt and its responses."""
        if any(len(turns) != 1 or turns[0].role != "assistant" for turns in responses):
            return self._render_turns(responses)
        messages = [turns[0] for turns in responses]
        prompt = self.chat.render(self.prompt, self.context, generation=True)
        changes = set[str]()
        if _opens_thought(prompt):
            prompt, texts, changes = self._after_opened_thought(messages, prompt)
        else:
            texts, is_prefix = self._after(messages, prompt)
            if not is_prefix:
                changes.add("prompt_not_prefix")
            if prompt.rstrip().endswith(_CLOSE) and any(_CLOSE in text for text in texts):
                changes.add("ended_thought_reopened")
                # Does the template end a thought in the prompt even if no argument asks for that?
                tools = {name: value for name, value in self.context[0].items() if name == "tools"}
                usual = self.chat.render(self.prompt, self.chat.data(tools), generation=True)
                if usual.rstrip().endswith(_CLOSE):
                    prompt = _ENDED.sub("", prompt)
                    texts, _ = self._after(messages, prompt)
        counted = tuple(
            ((0, len(text)),) if self._is_counted(turn, text) else ()
            for turn, text in zip(messages, texts, strict=True)
        )
        return RenderedRecord(prompt, tuple(texts), counted, frozenset(changes))

    def _is_counted(self, turn: Message, text: str) -> bool:
        """Return whether the loss counts a turn, rendered as `text`.

        Raises UnusableRecordError: the loss counts the turn, but the template leaves out its call or thought.
        """
        is_counted = turn.role in self.config.trained_roles if turn.is_trained is None else turn.is_trained
        has_more = turn.role == "assistant" and (turn.fields or _CLOSE in turn.content)
        is_all = has_more and not turn.content.rpartition(_CLOSE)[2].strip()
        if is_counted and is_all and self.facts.is_blank(text):
            raise UnusableRecordError("turn_not_rendered", "the chat template leaves out a call or a thought")
        return is_counted

    def _following(self, messages: Sequence[Message], prompt: str) -> list[str | None]:
        """Return the text of each response after the rendered `prompt`, up to its end of turn.

        The text includes what the template adds (a leading space, an empty thought). None if the
        template renders the prompt differently when a response follows.
        """
        turns = map(self.chat.turn, messages)
        wholes = [self.chat.render((*self.prompt, turn), self.context) for turn in turns]
        return [
            self.facts.until_end(whole[len(prompt) :]) if whole.startswith(prompt) else None
            for whole in wholes
        ]

    def _after(self, messages: Sequence[Message], prompt: str) -> tuple[list[str], bool]:
        """Return the text of each response, and whether the prompt is unchanged before all of them."""
        following, texts = self._following(messages, prompt), list[str]()
        for text, message in zip(following, messages, strict=True):
            if text is not None:
                texts.append(text)
                continue
            # As the template writes the turn after a prompt that it renders differently. The record's prompt
            # opens no thought: a thought opened before the turn belongs to the response.
            whole, start, _ = self._whole_conversation((message,))
            texts.append(whole[whole.rindex(_OPEN, 0, start) if _opens_thought(whole[:start]) else start :])
        return texts, None not in following

    def _header_length(self, message: Message, turn: str, before: Turns, role: str) -> int:
        """Return the length of a rendered message's header: what a generation prompt writes after `before`.

        `role` is the role of the last turn of `before`.
        """
        if role not in self.generation:  # templates write it by the role of the last turn alone
            trace = self.chat.trace(before, self.context, generation=True)
            end = trace.end
            if not before or trace.spans[-1] is None or end == len(trace.text):
                # Llama 3.1 writes tools and the first question before its loop over messages; Zephyr and
                # OLMo 2 write the generation prompt in that loop.
                alone = self.facts.without_prompt(self.chat.render(before, self.context))
                end = self.facts.common_length(trace.text, alone)
            self.generation[role] = trace.text[end:]
        generation = self.generation[role]
        length, space = self.facts.common_length(turn, generation), len(turn) - len(turn.lstrip())
        rest = generation[length:]
        # The space before the header may be another one, or belong to the former turn (Alpaca).
        if shared := self.facts.common_length(turn[space:], generation.lstrip()):
            length, rest = space + shared, generation.lstrip()[shared:]
        if not rest:
            return length
        # The prompt may say more before the header (Command R+ with tools).
        if tail := self.facts.tail_of(generation, turn[space:]):
            return space + tail
        # A content may begin like the generation prompt, where the turn itself does not (Apriel).
        for part in filter(None, (message_thought(message), message.content.strip())):
            text = self.facts.marks.escape(part, self.facts.marks.in_response)
            start = turn.find(text, max(length - len(text) + 1, 0))
            length = min(length, start) if start >= 0 else length
        # The thought of the turn is the model's if the generation prompt ends one (<channel|> of Gemma 4).
        return self.facts.before_opened(turn, length, rest)

    def _after_opened_thought(
        self, messages: Sequence[Message], prompt: str
    ) -> tuple[str, list[str], set[str]]:
        """Return a prompt that opens a thought, its responses and changes.

        Each response then ends the thought and none opens it again; else the returned prompt opens none.
        """
        texts = [text or "" for text in self._following(messages, prompt)]
        if all(_CLOSE in text and not text.lstrip().startswith(_OPEN) for text in texts):
            scaffold = self._common_scaffold(texts)
            changes = {"opened_thought_removed"} if any(map(_NO_THOUGHT.match, texts)) else set[str]()
            return prompt + scaffold, [text.removeprefix(scaffold) for text in texts], changes
        spelled = list(map(_with_spelled_thought, messages))
        closed = _without_opened_thought(prompt)
        if all(_CLOSE in message.content for message in spelled):
            within = [_within_thought(message.content, prompt) for message in spelled]
            changes = set() if within == [turn.content for turn in spelled] else {"opened_thought_joined"}
            pairs = zip(spelled, within, strict=True)
            return prompt, [self._ended(message, text, closed) for message, text in pairs], changes
        rendered, is_prefix = self._after(messages, closed)
        ended = [
            self._ended(message, message.content, closed)
            if _CLOSE in message.content
            and not _has_only_thought(self.facts.marks.spell(whole), message.content)
            else whole
            for message, whole in zip(spelled, rendered, strict=True)
        ]
        return closed, ended, {"opened_thought_removed", *([] if is_prefix else ["prompt_not_prefix"])}

    def _common_scaffold(self, responses: Iterable[str]) -> str:
        """Return the end of an empty thought with which all responses start: a part of the prompt."""
        if "empty_thoughts" not in self.config.untrained:
            return ""
        starts = {match.group() if (match := _EMPTY_END.match(text)) else "" for text in responses}
        return starts.pop() if len(starts) == 1 else ""

    def _ended(self, message: Message, content: str, prompt: str) -> str:
        """Return a content with its thought and end of turn; the template writes the tool calls."""
        marks = self.facts.marks
        if not message.fields.get(CALLS):
            return marks.escape(content, marks.in_response) + self.facts.end_of_turn
        thought, rest = _split_thought(content)
        separator = rest[: len(rest) - len(rest.lstrip())]
        [rendered], _ = self._after([replace(message, content=rest.lstrip())], prompt)
        # The thought stands before what the template writes, perhaps after an empty thought of its own.
        written = _EMPTY_THOUGHT.sub("", rendered.lstrip())
        return marks.escape(thought, marks.in_response) + separator + written

    def _render_turns(self, responses: Sequence[Messages]) -> RenderedRecord:
        """Render responses of several turns, each as a part of the whole conversation."""
        parts = [self._whole_conversation(response) for response in responses]
        texts, starts = [text for text, _, _ in parts], [start for _, start, _ in parts]
        prompts, changes = [text[:start] for text, start, _ in parts], set[str]()
        prompt, generation = prompts[0], all(turns[0].role == "assistant" for turns in responses)
        alone = self.chat.render(self.prompt, self.context, generation=generation) if self.prompt else ""
        if self.prompt and {alone} != {*prompts}:
            changes.add("prompt_not_prefix")
        # Of the first turn: templates write empty thoughts before later ones (Qwen3).
        thinks = any(_CLOSE in turns[0].content or bool(message_thought(turns[0])) for turns in responses)
        # DeepSeek V3.2 ends a thought at the start of each turn, and in the generation prompt, too.
        thinks |= any(text[start:].lstrip().startswith(_CLOSE) for text, start, _ in parts)
        is_other = _opens_thought(alone) or (thinks and _ENDED.search(alone))
        # Turns before the response may depend on it: then only what all sides share is the prompt.
        is_same = len(set(prompts)) == 1 or all(map(alone.startswith, prompts))
        if alone and generation and is_same and not is_other:
            prompt = alone  # as for one turn: it may end a thought that the turn does not have (Gemma 4)
        elif len(set(prompts)) > 1:
            changes.add("prompt_not_prefix")
            shared = prompt[: min(self.facts.common_length(prompt, other) for other in prompts[1:])]
            prompt = _without_opened_thought(shared)
            if all(_TO_THOUGHT.match(other, len(prompt)) for other in prompts):
                # Only the thoughts of their headers differ: the model writes them, as after one turn.
                parts = [
                    (text, start, [(len(prompt) if first == start else first, end) for first, end in spans])
                    for text, start, spans in parts
                ]
            else:
                prompt = shared[: self.facts.after_last_special(shared)]
            starts = [len(prompt)] * len(parts)
        elif _opens_thought(alone):
            following = [text[start:] for text, start in zip(texts, starts, strict=True)]
            scaffold = following[0][: len(self._common_scaffold(following))]
            starts, prompt = [start + len(scaffold) for start in starts], prompt + scaffold
        following = [text[start:] for text, start in zip(texts, starts, strict=True)]
        is_removed = not _opens_thought(prompt) or any(map(_NO_THOUGHT.match, following))
        if _opens_thought(alone) and is_removed:
            changes.add("opened_thought_removed")
        return RenderedRecord(
            prompt,
            tuple(following),
            tuple(
                tuple((max(first - start, 0), end - start) for first, end in spans)
                for (_, _, spans), start in zip(parts, starts, strict=True)
            ),
            frozenset(changes),
        )

    def _whole_conversation(self, response: Messages) -> tuple[str, int, list[Span]]:
        """Return a whole conversation up to the end of its last turn, and in it the start of its response
        and the spans that the loss counts.
        """
        turns = (*self.prompt, *map(self.chat.turn, response))
        trace = self.chat.trace(turns, self.context)
        role, first, turn = self.role, 0, ""
        starts: list[int] = []
        spans: list[Span] = []
        written = [span for span in trace.spans[len(self.prompt) :] if span]
        is_apart = all(one[1] <= other[0] for one, other in pairwise(written))
        if len(written) < len(response) or not is_apart:
            written = self._added(turns, trace.text)
        for index, message in enumerate(response, start=len(self.prompt)):
            first, end = written[index - len(self.prompt)]
            turn = trace.text[first:end]
            is_assistant = message.role == "assistant"
            header = self._header_length(message, turn, turns[:index], role) if is_assistant else 0
            if index == len(turns) - 1:
                turn = turn[:header] + self.facts.until_end(turn[header:])
            starts.append(first + header)
            content = header if is_assistant else max(turn.find(message.content.strip()), 0)
            length = self.facts.end_of_rendered(turn, trace.text[end:])
            if self._is_counted(message, turn[content:length]):
                spans.append((first + content, first + length))
            role = message.role
        return trace.text[:first] + turn, starts[0], spans

    def _added(self, turns: Turns, whole: str) -> list[Span]:
        """Return the span of each turn of a response: what it adds to the conversation before it.

        Some templates write turns after their loop (Nemotron), or tools' results with the call (Gemma 4) or
        with each other (Command R7B): such a result may have an empty span.
        """
        first, end, spans, ending = len(self.prompt), 0, list[Span](), self.facts.end_of_turn
        for count in range(first, len(turns) + 1):
            start, around = end, [form["role"] for form, _ in turns[:count][-1:] + turns[count : count + 1]]
            if "assistant" in around or count in (first, len(turns)):
                alone = self.facts.without_prompt(self.chat.render(turns[:count], self.context))
                end = self.facts.common_length(alone, whole)
                if not self.facts.is_blank(alone[end:]):  # more than an end of turn
                    # The last answer of a conversation may have another form (Nemotron).
                    found = whole.find(ending, start) if around[0] == "assistant" else -1
                    end = found + len(ending) if found >= 0 else -1
                if end < start:
                    raise UnusableRecordError(
                        "turns_not_found", "no turns are found in the template's output"
                    )
                if count > first and not whole[start:end].strip():
                    raise UnusableRecordError("turn_not_rendered", "the chat template leaves out a turn")
            spans.append((start, end))
        return spans[1:]


def _opens_thought(prompt: str) -> bool:
    return prompt.rstrip().endswith(_OPEN)


def _without_opened_thought(prompt: str) -> str:
    return prompt.rstrip().removesuffix(_OPEN) if _opens_thought(prompt) else prompt


def _split_thought(content: str) -> tuple[str, str]:
    """Return a content up to the end of its thought, and the rest."""
    end = content.rindex(_CLOSE) + len(_CLOSE)
    return content[:end], content[end:]


def _within_thought(content: str, prompt: str) -> str:
    """Return a content without its opening tag of a thought, which the prompt already has."""
    start = content.lstrip()
    if not start.startswith(_OPEN):
        return content
    content = start.removeprefix(_OPEN)
    return content[len(os.path.commonprefix([content, prompt.rpartition(_OPEN)[2]])) :]  # noqa: RUF071


def _has_only_thought(rendered: str, content: str) -> bool:
    """Return whether a rendered response has the thought of a content, and no other."""
    thought = _split_thought(content)[0].removesuffix(_CLOSE).rpartition(_OPEN)[2].strip()
    return rendered.count(_CLOSE) == 1 and thought in rendered


def _with_spelled_thought(message: Message) -> Message:
    """Return a message with its thought, if a field has one, spelled in its content."""
    thought = message_thought(message)
    if thought is None or _CLOSE in message.content:
        return message
    fields = {name: part for name, part in message.fields.items() if name not in THOUGHT_FIELDS}
    return replace(message, content=f"{_OPEN}\n{thought}\n{_CLOSE}\n\n{message.content}", fields=fields)
