"""Read one turn of a conversation: role, text, tool calls, thoughts, and whether the loss counts it."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.data.files.json_values import parse_json
from dpo_dist.data.records import Fields, Message, UnusableRecordError

# Roles that other programs write for those of chat templates.
_ROLES = {
    **dict.fromkeys(("human", "User", "Human"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "Assistant"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function"), "tool"),
}
# The content of a turn with such a role is a tool call, as JSON.
_CALLING = ("function_call", "tool_call")
_ALL_ROLES = (*_ROLES, *_CALLING, "system", "developer", "user", "assistant", "tool")
_THOUGHTS = {
    "reasoning_content": "reasoning_content",
    "reasoning": "reasoning_content",
    "thinking": "thinking",
}
# The fields of a message that a text may spell alone; a response may be an object with more.
_BARE_MESSAGES = ({"role", "content"}, {"from", "value"})
_COPIED = ("tool_call_id", "name")
_WEIGHTS = ("loss_weight", "loss", "weight", "loss_scale", "train", "training")
# Weights of the parts of a turn, or of unclear sense.
_UNREAD_WEIGHTS = ("mask", "train_detail", "training_detail")
# Thoughts and calls of gpt-oss; a channel of another name is no part of a turn.
_UNREAD_CHANNELS = ("analysis", "commentary")
_MEDIA = ("images", "image", "audio", "audios", "video", "videos")
# Parsing takes a hundred times the memory of the text.
_MAX_PRINTED_CHARACTERS = 2**20
_NO_VALUES: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {}, ())


def has_value(value: Any) -> bool:
    """Return whether a field has content; an empty text, list or object, also in JSON, is none.

    So is false, but 0 is not.
    """
    if isinstance(value, int | float):
        return value is not False
    return value not in _NO_VALUES and not (isinstance(value, str) and not value.strip())


def from_json(value: Any) -> Any:
    """Return the list or object that a text spells in JSON, or as Python prints it; else `value`."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_json(value.encode())
    except ValueError:
        pass
    is_printed = value.lstrip().startswith(("[{'", "{'")) and len(value) <= _MAX_PRINTED_CHARACTERS
    try:
        return ast.literal_eval(value.strip()) if is_printed else value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def is_message(value: Any) -> bool:
    """Return whether a value is an object with a role and a content, also as `from` and `value`."""
    return isinstance(value, Mapping) and (
        ("role" in value and bool({"content", "tool_calls", "function_call"} & value.keys()))
        or {"from", "value"} <= value.keys()
    )


def role_of(value: Any) -> str | None:
    """Return the role of a message; None for another value."""
    role = value.get("role", value.get("from")) if is_message(value) else None
    if not isinstance(role, str):
        return None
    return "assistant" if role in _CALLING else _ROLES.get(role, role)


def is_messages(value: Any) -> bool:
    """Return whether a value is one message or a list of messages, perhaps an empty one."""
    return is_message(value) or (isinstance(value, list) and all(map(is_message, value)))


def spelled_messages(value: Any, alone: str = "assistant") -> Any:
    """Return the messages that a text spells as JSON; any other value unchanged.

    They are a list of messages, or one of the role `alone` with no fields but role and content.
    """
    found = from_json(value) if isinstance(value, str) else value
    if found is not value and isinstance(found, Mapping) and set(found) in _BARE_MESSAGES:
        found = [found] if role_of(found) == alone else value
    if found is value or not isinstance(found, list) or not found or not is_messages(found):
        return value
    # A response may be an object with a role of its own.
    roles = [message.get("role", message.get("from")) for message in found]
    return found if all(role in _ALL_ROLES for role in roles) else value


def has_more(fields: Fields) -> bool:
    """Return whether a message has tool calls or thoughts beside its content."""
    return any(has_value(fields.get(name)) for name in ("tool_calls", "function_call", *_THOUGHTS))


def read_message(fields: Fields) -> Message:
    """Return one turn.

    Args:
        fields: as `is_message`: `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        UnusableRecordError: `unread_content` or `invalid_tool_call`.
    """
    role, content = (fields["role"], fields.get("content")) if "role" in fields else _turn(fields)
    if isinstance(role, str) and isinstance(content, str) and len(fields) == 2 and role not in _CALLING:
        return Message(_ROLES.get(role, role), content)
    check_no_media([fields])
    if not isinstance(role, str):
        raise UnusableRecordError("unread_content", "the role of a message is not a text", ("role",))
    if fields.get("channel") in _UNREAD_CHANNELS:
        raise UnusableRecordError("unread_content", "a message has another channel than final", ("channel",))
    calls: list[Fields] = []
    if role in _CALLING:
        role, content, calls = "assistant", "", read_tool_calls(content)
    text, extra = _text(content, is_optional=bool(calls) or has_more(fields))
    for name in ("tool_calls", "function_call"):
        if has_value(fields.get(name)):
            calls += read_tool_calls(fields[name])
    calls += extra.pop("tool_calls", [])
    extra |= {kept: fields[name] for name, kept in _THOUGHTS.items() if has_value(fields.get(name))}
    extra |= {name: fields[name] for name in _COPIED if has_value(fields.get(name))}
    if calls:
        extra["tool_calls"] = calls
    return Message(_ROLES.get(role, role), text, extra, _is_trained(fields))


def check_no_media(messages: Sequence[Fields]) -> None:
    """Check that no message has an image, audio or video. Raises UnusableRecordError."""
    unread = tuple(key for key in _MEDIA if any(has_value(message.get(key)) for message in messages))
    if unread:
        raise UnusableRecordError("unread_content", f"a message has {', '.join(unread)}", unread)


def read_tool_calls(value: Any) -> list[Fields]:
    """Return tool calls as chat templates read them: a function's name, and its arguments as an object.

    Args:
        value: a list of calls or one call, as `{name, arguments}` or `{function: {name, arguments}}`; it and
            its arguments may be JSON texts.

    Raises:
        UnusableRecordError: `invalid_tool_call`.
    """
    found = from_json(value)
    calls = [found] if isinstance(found, Mapping) else found
    if not isinstance(calls, list) or not calls:
        raise UnusableRecordError("invalid_tool_call", "a tool call is no JSON object and no list of them")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> Fields:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnusableRecordError("invalid_tool_call", "a tool call has no name of a function")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = from_json(arguments) if has_value(arguments) else {}
    if not isinstance(arguments, Mapping):
        raise UnusableRecordError("invalid_tool_call", "the arguments of a tool call are not a JSON object")
    kept = {"id": call["id"]} if has_value(call.get("id")) else {}
    return kept | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _turn(fields: Fields) -> tuple[Any, Any]:
    return fields["from"], fields["value"]


def _text(content: Any, *, is_optional: bool) -> tuple[str, dict[str, Any]]:
    """Return the text of a content, and its thoughts and tool calls if it is a list of parts."""
    if isinstance(content, str):
        return content, {}
    if content is None and is_optional:
        return "", {}
    if not isinstance(content, list) or not content:
        raise _not_text()
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Fields] = []
    for part in content:
        kind, value = _part(part)
        if kind == "tool_call":
            calls += read_tool_calls(value)
        elif not isinstance(value, str):
            raise _not_text()
        else:
            (thoughts if kind in ("reasoning", "thinking") else texts).append(value)
    extra: dict[str, Any] = {"tool_calls": calls} if calls else {}
    return "".join(texts), extra | ({"reasoning_content": "".join(thoughts)} if thoughts else {})


def _part(part: Any) -> tuple[str, Any]:
    """Return the kind and the value of a part of a content; the value is None if no format reads it."""
    if not isinstance(part, Mapping):
        return "text", part
    kind = part.get("type", "text")
    if kind not in ("text", "reasoning", "thinking", "tool_call"):
        return "other", None
    return kind, next((part[name] for name in (kind, "text", "value") if part.get(name) is not None), None)


def _not_text() -> UnusableRecordError:
    return UnusableRecordError("unread_content", "the content of a message is not a text", ("content",))


def _is_trained(fields: Fields) -> bool | None:
    """Return the weight of a message in the loss, 0 or 1, as a bool; None without one."""
    for name in _UNREAD_WEIGHTS:
        if fields.get(name) is not None:
            raise UnusableRecordError("unread_content", f"a message has {name}; write loss_weight", (name,))
    given = {name: fields[name] for name in _WEIGHTS if fields.get(name) is not None}
    for name, weight in given.items():
        if weight not in (0, 1):
            raise UnusableRecordError("unread_content", f"{name} of a message is neither 0 nor 1", (name,))
    weights = set(map(bool, given.values()))
    if len(weights) > 1:
        raise UnusableRecordError("unread_content", f"different weights: {', '.join(given)}", tuple(given))
    return weights.pop() if weights else None
