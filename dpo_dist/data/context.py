"""Read the fields beside the responses: prompt, system text, history, tools, template arguments."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.data.messages import (
    FIRST_TURN,
    from_json,
    has_value,
    is_messages,
    messages_of,
    role_of,
    spelled_messages,
    without_nulls,
)
from dpo_dist.data.records import (
    BadRecord,
    Dialogue,
    Fields,
    Message,
    Messages,
    PreferenceRecord,
    Prompt,
    RawContent,
    Response,
    UnusableRecordError,
)

# A question in one of these is a user's turn.
QUESTIONS = ("question", "query", "input")
CONVERSATIONS = ("conversations", "messages")
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_ARGUMENTS = "chat_template_kwargs"
_THINKING = "enable_thinking"
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}
_MAYBE_IN_PROMPT = ("instruction", *QUESTIONS)
# Part of the question in some datasets; no format adds it to the prompt.
_BACKGROUND = "context"
_SIDES = ("chosen", "rejected")
# A chat template renders these or a model sees them, and no format reads them.
_MEDIA = ("images", "image", "videos", "video", "audio", "audios")
_UNREAD_FIELDS = ("documents", *_MEDIA, *(f"{side}_{name}" for side in _SIDES for name in _MEDIA))
# Weights and margins of a record in the loss, and the value that has no effect.
_UNREAD_NUMBERS = {"weight": 1.0, "sample_weight": 1.0, "loss_weight": 1.0, "margin": 0.0}
_BESIDE = frozenset(
    (
        *(*_SYSTEMS, "history", *_TOOLS, _ARGUMENTS, _THINKING, *_MAYBE_IN_PROMPT),
        *(_BACKGROUND, *_UNREAD_FIELDS, *_UNREAD_NUMBERS, *CONVERSATIONS),
    )
)


@dataclass(frozen=True)
class Context:
    """Everything before the responses of a record; as in `PreferenceRecord`."""

    prompt: Prompt
    tools: tuple[Fields, ...] = ()
    template_arguments: Fields = field(default_factory=dict)


def prompt_of(record: Fields, responses: Iterable[Any]) -> tuple[Any, bool]:
    """Return a record's prompt, and whether it includes the record's system text, history and input.

    The prompt is `prompt`, a conversation that does not end with the assistant, `instruction` with `input`,
    or a question; None if the record has none of them, or if its responses are whole conversations.
    """
    if record.get("prompt") is not None or any(map(is_conversation, responses)):
        return record.get("prompt"), False
    for name in CONVERSATIONS:
        turns = from_json(record.get(name))
        if turns is not None and not ends_with_response(turns):
            return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns, False
    if has_value(record.get("instruction")):
        return _instruction_messages(record), True
    question = next((record[name] for name in QUESTIONS if has_value(record.get(name))), None)
    if question is None or is_messages(spelled_messages(question, "user")):
        return question, False
    return [{"role": "user", "content": question}], False


def is_conversation(response: Any) -> bool:
    """Return whether a response includes the turns before it, as messages or as an HH dialogue."""
    if isinstance(response, str) and response.startswith(FIRST_TURN):
        return True
    turns = spelled_messages(response)
    is_list = isinstance(turns, list) and bool(turns) and is_messages(turns)
    return is_list and not ends_with_response(turns[:1])


def has_prompt(record: Fields) -> bool:
    """Return whether a record has a field for a prompt, perhaps an empty one."""
    return any(record.get(name) is not None for name in ("prompt", *_MAYBE_IN_PROMPT, *CONVERSATIONS))


def ends_with_response(turns: Any) -> bool:
    """Return whether the last of a list of messages is the assistant's."""
    turns = from_json(turns)
    return isinstance(turns, list) and bool(turns) and role_of(turns[-1]) == "assistant"


def with_context(prompt: Prompt, record: Fields, content: RawContent, *, plain: bool) -> Context:
    """Return the prompt after the record's system text and `history`, its tools and template arguments.

    A text prompt becomes a user's turn if the record has any of them.

    Args:
        prompt: as a reader returned it.
        record: all fields of the record.
        content: the prompt and responses found in the record.
        plain: whether the configured format says that prompts are plain text.

    Raises:
        UnusableRecordError: `unread_content` with the names of fields that would be ignored, or
            `invalid_tools`.
    """
    if _BESIDE.isdisjoint(record) and not (isinstance(prompt, Dialogue) and "prompt" in record):
        return Context(prompt)
    unread = [name for name in _UNREAD_FIELDS if has_value(record.get(name))]
    unread += [name for name, neutral in _UNREAD_NUMBERS.items() if not _is_number(record.get(name), neutral)]
    given = [name for name in (*_TOOLS, _ARGUMENTS) if has_value(record.get(name))]
    given += [_THINKING] if record.get(_THINKING) not in (None, "") else []
    if plain or isinstance(prompt, Dialogue):
        unread += given
    elif set(_TOOLS) <= set(given):
        unread.append(_TOOLS[1])
    turns: list[Message] = []
    if content.has_context and not isinstance(prompt, Dialogue):
        systems = [record[name] for name in _SYSTEMS if has_value(record.get(name))]
        unread += _SYSTEMS[1:] if systems[1:] and systems[0] != systems[1] else ()
        outside = [name for name in QUESTIONS if name != "input"]
    else:
        outside = [*_MAYBE_IN_PROMPT]
        # A dialogue is read from the responses alone.
        unread += ["prompt"] if isinstance(prompt, Dialogue) and _is_outside(record, "prompt", prompt) else []
        unread += _add_turns(turns, record, prompt, plain=plain)
    unread += [name for name in (*outside, _BACKGROUND) if _is_outside(record, name, prompt)]
    unread += [name for name in CONVERSATIONS if _is_other_conversation(record, name, content, prompt)]
    if unread:
        raise UnusableRecordError("unread_content", f"fields: {', '.join(unread)}", tuple(unread))
    if not turns and not given:
        return Context(prompt)
    assert not isinstance(prompt, Dialogue)
    tools = next((_tools(record[name]) for name in _TOOLS if name in given), ())
    return Context((*turns, *_as_messages(prompt)), tools, _arguments(record))


def _add_turns(turns: list[Message], record: Fields, prompt: Prompt, *, plain: bool) -> list[str]:
    """Add the turns of a record's system text and history to `turns`; return the ambiguous fields."""
    unread = []
    for name in (*_SYSTEMS, "history"):
        if has_value(record.get(name)):
            before = None if plain else _turns_before(prompt, turns, name, from_json(record[name]))
            if before is None:
                unread.append(name)
            else:
                turns += before
    return unread


def _instruction_messages(record: Fields) -> list[Fields]:
    """Return the messages of `system`, `history`, `instruction` and `input`, as LLaMA-Factory joins them."""
    system = record.get("system") or record.get("system_prompt")
    turns = [("system", system)] if system else []
    history = _exchanges(from_json(record.get("history")) or [])
    if history is None:
        raise UnusableRecordError("unread_content", "fields: history", ("history",))
    turns += [(message.role, message.content) for message in history]
    parts = [record["instruction"], record.get("input")]
    are_texts = all(map(_is_text, parts))
    if not are_texts and has_value(parts[1]):
        raise UnusableRecordError("unread_content", "instruction and input are not texts", ("input",))
    text = "\n".join(part for part in parts if part) if are_texts else parts[0]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", text)]]


def _tools(value: Any) -> tuple[Fields, ...]:
    """Return definitions of tools, each as `{type: function, function: {name, ...}}` if it has a name."""
    found = from_json(without_nulls(value))
    listed = [found] if isinstance(found, Mapping) else found
    tools = [from_json(tool) for tool in listed] if isinstance(listed, list) else []
    if not tools or not all(isinstance(tool, Mapping) for tool in tools):
        raise UnusableRecordError("invalid_tools", "tools is no list of JSON objects")
    return tuple(
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
        for tool in tools
    )


def _arguments(record: Fields) -> Fields:
    """Return the arguments of the chat template: those of `chat_template_kwargs`, and `enable_thinking`."""
    value = record.get(_ARGUMENTS)
    found = from_json(without_nulls(value)) if has_value(value) else {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise UnusableRecordError("unread_content", f"{_ARGUMENTS} is not an object", (_ARGUMENTS,))
    if record.get(_THINKING) in (None, ""):
        return found
    is_thinking = _TRUTHS.get(str(record[_THINKING]).lower())
    if is_thinking is None or found.get(_THINKING, is_thinking) != is_thinking:
        raise UnusableRecordError(
            "unread_content", f"{_THINKING} is neither true nor false, or has two values", (_THINKING,)
        )
    return {**found, _THINKING: is_thinking}


def _as_messages(prompt: str | Messages) -> Messages:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _turns_before(prompt: Prompt, turns: list[Message], name: str, value: Any) -> list[Message] | None:
    """Return the turns that a field adds after `turns` and before the prompt; None if that is ambiguous."""
    if isinstance(prompt, Dialogue):
        return None
    messages = _as_messages(prompt)
    if name == "history":
        is_one_question = [message.role for message in messages] == ["user"]
        return _exchanges(value) if is_one_question else None
    if not isinstance(value, str):
        return None
    first = [*turns, *messages][:1]
    if first and first[0].role == "system":
        return [] if first[0].content.strip() == value.strip() else None
    return [Message("system", value)]


def _exchanges(history: Any) -> list[Message] | None:
    """Return the turns of a list of messages or of [question, answer] pairs; None if it is anything else."""
    if isinstance(history, list) and is_messages(history):
        return list(messages_of(history, role="user"))
    turns: list[Message] = []
    for exchange in history if isinstance(history, list) else [None]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            return None
        if not all(isinstance(text, str) for text in exchange):
            return None
        turns += (Message("user", exchange[0]), Message("assistant", exchange[1]))
    return turns


def _is_outside(record: Fields, name: str, prompt: Prompt) -> bool:
    """Return whether a field has a value that the prompt does not contain."""
    value = spelled_messages(record.get(name), "user")
    if not has_value(value):
        return False
    if isinstance(value, list | Mapping) and is_messages(value):
        texts_of = [turn.content for turn in messages_of(value, role="user")]
    else:
        texts_of = [value]
    whole = [prompt.text] if isinstance(prompt, Dialogue) else [turn.content for turn in _as_messages(prompt)]
    return not all(isinstance(one, str) and any(one.strip() in text for text in whole) for one in texts_of)


def _is_number(value: Any, neutral: float) -> bool:
    """Return whether a field is empty or this number, perhaps as text."""
    try:
        return value in (None, "") or float(value) == neutral
    except (TypeError, ValueError):
        return False


def _is_other_conversation(record: Fields, name: str, content: RawContent, prompt: Prompt) -> bool:
    """Return whether a conversation is neither a response nor the prompt, nor a copy of one of them."""
    value = record.get(name)
    if value is None or name in content.responses or ends_with_response(value):
        return False
    return _is_outside(record, name, prompt)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_FEW = {1: ("the completion",), 2: ("chosen", "rejected")}


def check_content(record: PreferenceRecord) -> PreferenceRecord | BadRecord:
    """Return the record, or the reason why nothing can be learned from it.

    The reasons are `invalid_unicode`, `empty_prompt`, `empty_response` and `identical_responses`.
    """
    prompt = record.prompt.contents if isinstance(record.prompt, Dialogue) else record.prompt
    prompt_texts = [prompt] if isinstance(prompt, str) else _texts(prompt)
    texts = [[text] if isinstance(text, str) else _texts(text) for text in record.responses]
    if not _is_valid_unicode("".join(itertools.chain(prompt_texts, *texts, _other_texts(record)))):
        return BadRecord("invalid_unicode", record.origin, "a text has a lone surrogate")
    if not any(text.strip() for text in prompt_texts):
        return BadRecord("empty_prompt", record.origin)
    empty = [
        name
        for name, response in zip(_names(len(record.responses)), record.responses, strict=True)
        if not (response.strip() if isinstance(response, str) else any(map(_has_content, response)))
    ]
    if empty:
        return BadRecord("empty_response", record.origin, f"no text in {', '.join(empty)}")
    if len(set(map(_stripped, record.responses))) < len(record.responses):
        return BadRecord("identical_responses", record.origin)
    return record


def _names(responses: int) -> Sequence[str]:
    """Return the names of the responses of a record, the best first."""
    numbered = [f"response {number} of the ranking" for number in range(1, responses + 1)]
    return _FEW.get(responses, numbered)


def _texts(messages: Messages) -> list[str]:
    """Return the contents of messages, and their other fields as JSON."""
    fields = [
        json.dumps(message.fields, ensure_ascii=False, default=str) for message in messages if message.fields
    ]
    return [message.content for message in messages] + fields


def _other_texts(record: PreferenceRecord) -> Iterator[str]:
    """Yield what a chat template writes besides the texts of turns."""
    if record.tools or record.template_arguments:
        yield json.dumps([record.tools, record.template_arguments], ensure_ascii=False, default=str)
    for turns in (record.prompt, *record.responses):
        if isinstance(turns, tuple):
            yield from (message.role for message in turns)


def _has_content(message: Message) -> bool:
    """Return whether the loss may count anything of a message."""
    return (
        message.role == "assistant"
        and message.is_trained is not False
        and bool(message.content.strip() or message.fields)
    )


def _stripped(response: Response) -> str:
    """Return a text that is equal for responses that differ only in outer white space."""
    if isinstance(response, str):
        return response.strip()
    turns = [(turn.role, turn.content.strip(), turn.fields) for turn in response]
    return json.dumps(turns, ensure_ascii=False, sort_keys=True, default=str)


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
