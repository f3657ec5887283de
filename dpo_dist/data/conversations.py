"""Conversations as rows write them: lists of `{role, content}` messages."""

from collections.abc import Mapping
from typing import Any

from dpo_dist.data.records import BadRecord, Message, Messages, Origin

_NO_VALUES: tuple[Any, ...] = (None, False, "", "[]", "{}", "null", [], {}, ())
# What a chat template may write and `Message` has no place for.
_UNREAD_MESSAGE_KEYS = (
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "images",
    "image",
    "audio",
    "videos",
)


def has_value(value: Any) -> bool:
    """Whether a field says anything: an empty list, object or text does not, also one written as JSON."""
    return value not in _NO_VALUES and not (isinstance(value, str) and not value.strip())


def unread_keys(*messages: Mapping[str, Any]) -> tuple[str, ...]:
    """What messages have beside their content that is not read, by the name of the field."""
    return tuple(
        key for key in _UNREAD_MESSAGE_KEYS if any(has_value(message.get(key)) for message in messages)
    )


def is_messages(value: Any) -> bool:
    """Whether `value` is one message or a list of messages."""
    messages = [value] if isinstance(value, Mapping) else value
    return isinstance(messages, list) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages
    )


def conversation(value: Any, origin: Origin, role: str) -> Messages | BadRecord:
    """Messages from a list, from one message, or from a text spoken by `role`."""
    if isinstance(value, str):
        return (Message(role, value),)
    if not is_messages(value):
        return BadRecord("unknown_format", origin, "not a list of messages with role and content")
    messages = [value] if isinstance(value, Mapping) else value
    for message in messages:
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            return BadRecord(
                "unread_content", origin, "a message whose role or content is not a text", ("content",)
            )
    unread = unread_keys(*messages)
    if unread:
        return BadRecord("unread_content", origin, f"a message has {', '.join(unread)}", unread)
    return tuple(Message(message["role"], message["content"]) for message in messages)


def prompt_before(given: Any, histories: list[Messages], origin: Origin) -> Messages | BadRecord:
    """The prompt from the field of that name and from what stands before each answer."""
    history = histories[0]
    if any(other != history for other in histories):
        return BadRecord("history_differs", origin, "the messages before the answers are not the same")
    if given is None:
        return history
    prompt = conversation(given, origin, role="user")
    if isinstance(prompt, BadRecord) or not history or history == prompt:
        return prompt
    if isinstance(given, str) and any(message.content.strip() == given.strip() for message in history):
        return history
    return BadRecord("history_differs", origin, "the prompt is not what stands before the answers")
