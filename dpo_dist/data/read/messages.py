"""Prompts and responses as messages, strictly: a key is known, declared by the source, or an error."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dpo_dist.data.read.plain import from_json, is_given, without_nulls
from dpo_dist.data.records import (
    IMAGE,
    Message,
    Messages,
    Prompt,
    Response,
    UnusableRecordError,
    shown_key,
)
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.types import Fields

_TABLE = own_table(Path(__file__).with_suffix(".yaml"))
ROLES: dict[str, str] = _TABLE["roles"] | {role: role for role in _TABLE["plain_roles"]}
"""Roles that are known, and what chat templates call them."""
CALLING: list[str] = _TABLE["calling_roles"]
ARGUMENTS: list[str] = _TABLE["arguments"]
_SAID_BY = ("role", "content"), ("from", "value")
_OPENS_OBJECT = re.compile(r"\s*\[?\s*\{")
_KEYS = ("calls", "thoughts", "weights", "images", "kept")
_KNOWN = frozenset().union(*_SAID_BY, *(_TABLE[name] for name in _KEYS))
_OF_CALLS = frozenset((*_TABLE["of_calls"], *ARGUMENTS))
OF_KEYS = "[]."
"""Begins the name of a key of messages among the columns of a source."""
PLACED = "images"
"""A field of messages until `place_images` reads it: the values of the content's images, None for one that
is in the record's own list."""


class MessageKeys(NamedTuple):
    """What a source says of the other keys of its messages."""

    given: frozenset[str] = frozenset()
    """Given to the chat template as they are."""
    ignored: frozenset[str] = frozenset()


def is_message(value: Any) -> bool:
    """Return whether a value is an object with a role and a content, also as `from` and `value`."""
    if not isinstance(value, Mapping):
        return False
    has_role = "role" in value and not value.keys().isdisjoint(("content", *_TABLE["calls"]))
    return has_role or {"from", "value"} <= value.keys()


def is_messages(value: Any) -> bool:
    """Return whether a value is one message or a list of messages, perhaps an empty one."""
    return is_message(value) or (isinstance(value, list) and all(map(is_message, value)))


def spelled_as(value: Any) -> str:
    """Return the filter that reads the messages that a text spells, in JSON or as Python; "": none."""
    if not isinstance(value, str) or not _OPENS_OBJECT.match(value):
        return ""
    for quote, way in (('"', "|fromjson"), ("'", "|frompython")):
        if any(all(f"{quote}{key}{quote}" in value for key in said_by) for said_by in _SAID_BY):
            return way
    return ""


def unknown_keys(value: Any, keys: MessageKeys) -> set[str]:
    """Return the keys of messages that nothing reads, as a source names them."""
    messages = value if isinstance(value, list) else [value]
    known = _KNOWN.union(*keys)
    given = (key for each in filter(is_message, messages) for key in each if is_given(each[key]))
    return {f"{OF_KEYS}{shown_key(key)}" for key in given if key not in known}


def given_images(value: Any) -> list[Any]:
    """Return images, one or a list, without nulls."""
    return [*filter(is_given, value if isinstance(value, list | tuple) else [value])]


def parse_messages(value: Any, role: str, keys: MessageKeys) -> Messages:
    """Return messages from a list, one message, or a text, which gets the role `role`."""
    if isinstance(value, str):
        return (Message(role, value),)
    if not is_messages(value):
        raise UnusableRecordError("unknown_format", "neither a text nor messages with role and content")
    messages = [value] if isinstance(value, Mapping) else value
    return tuple(_read_message(message, keys) for message in messages)


def _read_message(fields: Fields, keys: MessageKeys) -> Message:
    said_by = _SAID_BY["role" not in fields]
    role, content = map(fields.get, said_by)
    if isinstance(content, str) and len(fields) == 2 and isinstance(role, str) and role in ROLES:
        return Message(ROLES[role], content)  # fast path: most messages
    given = {key: value for key, value in fields.items() if is_given(value)}
    unknown = sorted(unknown_keys(fields, keys))
    if unknown:
        raise UnusableRecordError("unknown_key", ", ".join(unknown), tuple(unknown))
    if not isinstance(role, str) or ("from" in said_by and role not in (*ROLES, *CALLING)):
        raise UnusableRecordError("unread_content", "a message has a role that is not read", ("role",))
    calls = [call for name in _TABLE["calls"] if name in given for call in _tool_calls(given[name])]
    if role in CALLING:
        role = "assistant"
        calls = _tool_calls(content)
        content = ""
    extra = {name: without_nulls(given[name]) for name in (*_TABLE["kept"], *keys.given) if name in given}
    extra |= _thoughts(fields)
    images = [image for name in _TABLE["images"] for image in given_images(given.get(name))]
    if content is None and (calls or extra):
        content = ""
    role = ROLES.get(role, role)
    if role == "tool":
        content = _result_text(content)
    # The content has an `IMAGE` where it has an image.
    parts = {"text": [IMAGE] * len(images), "image": images, "call": calls, "thought": list[Any]()}
    for kind, value in _parts(content):
        parts[kind].append(value)
        if kind == "image":
            parts["text"].append(IMAGE)
    if images:
        extra[PLACED] = images
    if parts["thought"]:
        extra.setdefault("reasoning_content", "".join(parts["thought"]))
    if calls:
        extra["tool_calls"] = calls
    return Message(role, "".join(parts["text"]), extra, _is_trained(given))


def _thoughts(fields: Fields) -> dict[str, str]:
    thoughts = dict[str, str]()
    for name, field in _TABLE["thoughts"].items():
        if isinstance(fields.get(name), str):
            thoughts[field] = fields[name]
        elif is_given(fields.get(name)):
            raise UnusableRecordError("unread_content", f"{name} of a message is no text", (name,))
    return thoughts


def _parts(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield the kind and the value of the parts of a content: text, a thought, a call or an image."""
    for part in content if isinstance(content, list) and content else [content]:
        fields = {"text": part}
        if isinstance(part, Mapping):
            fields = {key: value for key, value in part.items() if value is not None}
        name = str(fields.get("type", "text"))
        kind = _TABLE["parts"].get(name)
        if kind == "image":
            source = next((key for key in _TABLE["image_sources"] if is_given(fields.get(key))), "")
            yield kind, f"data:;base64,{fields[source]}" if source == "base64" else fields.get(source)
            continue
        unknown = [
            shown_key(key)
            for key in fields
            if key not in (name, *_TABLE["of_parts"]) and is_given(fields[key])
        ]
        value = next((fields[key] for key in (name, "text", "value") if key in fields), None)
        if kind == "call":
            yield from ((kind, call) for call in _tool_calls(value))
            continue
        if kind == "thought" and isinstance(value, list):
            value = "".join(text for _, text in _parts(value))  # Mistral's thoughts are parts, too
        if unknown or kind is None or not isinstance(value, str):
            what = ", ".join(unknown) or f"the type {shown_key(name)!r}, and no text"
            raise UnusableRecordError("unread_content", f"a part of a message has {what}", ("content",))
        yield kind, value


def _result_text(content: Any) -> Any:
    """Return what a tool returned as text, in JSON if it is neither text nor parts of a message."""
    items = content if isinstance(content, list) else [content]
    is_part = [isinstance(item, str) or (isinstance(item, Mapping) and "type" in item) for item in items]
    if content is None or any(is_part):
        return content if isinstance(content, list | str | None) else [content]
    return json.dumps(content, ensure_ascii=False, default=str)


def _tool_calls(value: Any) -> list[Fields]:
    """Return a call or a list of calls, perhaps in JSON, as chat templates read them."""
    try:
        calls = from_json(value)
        return [_tool_call(call) for call in ([calls] if isinstance(calls, Mapping) else calls)]
    except (TypeError, ValueError, AttributeError, KeyError) as fault:
        detail = "a tool call is no JSON object with the name of a function and an object of arguments"
        raise UnusableRecordError("invalid_tool_call", detail) from fault


def _tool_call(call: Fields) -> Fields:
    function = call.get("function", call)
    parts = {**call, **function}
    arguments = [from_json(parts[key]) for key in ARGUMENTS if parts.get(key) not in (None, "", {})]
    unknown = [key for key in parts if key not in _OF_CALLS and is_given(parts[key])]
    name = function["name"]
    if not isinstance(name, str) or (unknown and not arguments):
        raise TypeError("no name, or no arguments")
    if any(not isinstance(each, Mapping) or each != arguments[0] for each in arguments):
        raise TypeError("two objects of arguments, or none")
    identity = {"id": call["id"]} if is_given(call.get("id")) else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": [*arguments, {}][0]}}


def _is_trained(given: Fields) -> bool | None:
    """Return the weight of a message in the loss, 0 or 1, as a flag; None without one."""
    weights = {name: given[name] for name in _TABLE["weights"] if name in given}
    if any(weight not in (0, 1) for weight in weights.values()) or len(set(map(bool, weights.values()))) > 1:
        detail = f"a message has {', '.join(weights)}; write loss_weight, 0 or 1"
        raise UnusableRecordError("unread_content", detail, tuple(weights))
    return bool(next(iter(weights.values()))) if weights else None


def read_history(history: Any, keys: MessageKeys) -> Messages:
    """Return the turns before a question: pairs of a question and its answer, or messages."""
    if isinstance(history, list) and all(isinstance(pair, list) for pair in history):
        turns = zip(itertools.cycle(("user", "assistant")), itertools.chain(*history), strict=False)
        history = [{"role": role, "content": text} for role, text in turns]
    return parse_messages(history, "user", keys)


def read_tools(value: Any) -> tuple[Fields, ...]:
    """Return definitions of tools, each as `{type: function, function: {name, ...}}` if it has a name."""
    try:
        tools = [without_nulls(from_json(tool)) for tool in (value if isinstance(value, list) else [value])]
        return tuple(map(_tool, tools))
    except (AttributeError, TypeError, ValueError) as fault:
        raise UnusableRecordError("invalid_tools", "a tool or its name is no JSON of that kind") from fault


def _tool(tool: Fields) -> Fields:
    function = dict(tool.get("function", tool))
    if not isinstance(function.get("name", ""), str):
        raise TypeError("a name that is no text")
    schema = next((name for name in _TABLE["schemas"] if function.get(name)), None)
    if schema and not function.get("parameters"):
        function["parameters"] = function.pop(schema)
    if "function" in tool:
        return {**tool, "function": function}
    return {"type": "function", "function": function} if "name" in tool else tool


def read_messages(prompt: Any, responses: Fields, keys: MessageKeys) -> tuple[Prompt, Sequence[Response]]:
    """Return the messages that all sides share, and each side's messages from the first difference.

    The prompt is a separate field, or the start of every side, or both.
    """
    sides = []
    for name, value in responses.items():
        side = parse_messages(value, "assistant", keys)
        if not side or side[-1].role != "assistant":
            raise UnusableRecordError("not_one_answer", f"{name} does not end with an assistant message")
        sides.append(side)
    sides, prompt_turns = _with_prompt(prompt, sides, keys)
    start = max(_shared_turns(sides), prompt_turns)
    if any(side[start].role != "assistant" for side in sides):
        raise UnusableRecordError("history_differs", "the responses follow different messages")
    shared = tuple(replace(turn, is_trained=None) for turn in sides[0][:start])
    after = [side[start:] for side in sides]
    for turns in after:
        if all(turn.is_trained is False for turn in turns if turn.role == "assistant"):
            raise UnusableRecordError("untrained_response", "the loss counts no turn of a response")
    return shared, [*map(_text_or_turns, after)]


def _text_or_turns(turns: Messages) -> Response:
    """Return a response; one assistant turn with nothing beside its content is a text."""
    return turns[0].content if len(turns) == 1 and not turns[0].fields else turns


def _with_prompt(value: Any, sides: list[Messages], keys: MessageKeys) -> tuple[list[Messages], int]:
    """Return each side with the prompt before it, and the number of turns of a prompt that must be kept."""
    if value is None:
        return sides, 0
    prompt = parse_messages(value, "user", keys)
    size = len(prompt)
    if all(len(side) > size and side[:size] == prompt for side in sides):
        return sides, size
    if all(side[0].role in ("assistant", "tool") for side in sides):
        return [(*prompt, *side) for side in sides], size
    # A question beside whole conversations repeats one of their turns.
    shared = [message.content.strip() for message in sides[0][: _shared_turns(sides)]]
    if size == 1 and prompt[0].content.strip() in shared:
        return sides, 0
    raise UnusableRecordError("history_differs", "the prompt differs from the messages before the responses")


def _shared_turns(sides: list[Messages]) -> int:
    """Return how many first turns all sides share; at least one turn is left in each side.

    A single side is split before its first assistant turn with weight 1 in the loss, else before its last.
    """
    limit = min(map(len, sides)) - 1
    for index, turns in enumerate(zip(*(side[:limit] for side in sides), strict=True)):
        first = turns[0]
        if len(sides) == 1 and first.is_trained and first.role == "assistant":
            return index
        if any(turn != first for turn in turns):
            return index
    return limit
