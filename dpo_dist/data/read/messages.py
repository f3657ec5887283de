"""Read prompts and responses as messages: roles, tool calls, thoughts, ShareGPT's turns."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from dpo_dist.data.read.fields import IMAGES, MEDIA
from dpo_dist.data.read.values import (
    ALL_ROLES,
    ARGUMENTS,
    CALLING,
    PLAIN_ROLES,
    ROLES,
    first_value,
    from_json,
    given_images,
    has_value,
    is_given,
    is_messages,
    with_value,
    without_nulls,
)
from dpo_dist.data.records import (
    IMAGE,
    Dialogue,
    Message,
    Messages,
    Prompt,
    Response,
    UnusableRecordError,
    shown_key,
    turns_of,
)
from dpo_dist.foundation.types import Fields

# Fields with the calls of a message; LangChain's may stand only in `additional_kwargs`.
_CALL_FIELDS = ("tool_calls", "function_call")
_SCHEMAS = ("input_schema", "inputSchema")  # of Anthropic and of MCP
# Keys of a call that are none of its arguments.
_BESIDE_ARGUMENTS = ("name", "function", "id", "call_id", "tool_call_id", "type", "index", "status")
# Other keys of a message or a part with calls, such as `functionCall`, but no identifiers.
_CALLS = re.compile(r"((?i:(?<![a-z])call|tool_?use|(?:tool|function)call)|Call)(?!.*(?:_id|Id)s?\Z)")
# Keys of a message with definitions of tools (OLMo 3, Phi 4), and such as `thought` (Apriel).
_TOOLS = ("functions", "tools")
# A text is a call under a name that ends with the word: `function_calls`, but no `call_to_action`.
_CALLS_AS_TEXT = re.compile(r"(calls?|tool_?use)\Z", re.IGNORECASE)
_OTHER_THOUGHTS = re.compile("reasoning|thinking|thought", re.IGNORECASE)
_ABOUT_THOUGHTS = re.compile(r"_(budget|effort|level|mode|style|time|tokens|type)\Z", re.IGNORECASE)
_WORD = re.compile(r"[\w.-]*", re.ASCII)
# Lists of thoughts, of OpenRouter and of LiteLLM, and where their items have the texts.
_THOUGHT_LISTS = ("reasoning_details", "thinking_blocks")
_THOUGHT_TEXTS = {"reasoning.text": "text", "thinking": "thinking"}
_THOUGHTS = {
    "reasoning_content": "reasoning_content",
    "reasoning": "reasoning_content",
    "thinking": "thinking",
}
WEIGHTS = ("loss_weight", "loss", "weight", "loss_scale", "train", "training")
# Weights of parts of a turn, or with an unclear meaning.
_UNREAD_WEIGHTS = ("mask", "train_detail", "training_detail")
# Thoughts and calls of gpt-oss; other channels do not split a turn.
_UNREAD_CHANNELS = ("analysis", "commentary")
# Kinds of the parts in a message's content, also those of OpenAI's Responses.
_PARTS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **{kind: kind for kind in ("reasoning", "thinking", "tool_call")},
}
_IMAGE_PARTS = ("image", "image_url", "input_image")
# The fields of such a part that can have its image.
_SOURCES = ("image", "image_url", "url", "path", "base64")
# The keys of a message that are read, or that drop its record, beside its role and its content.
_READ = frozenset(
    (
        *_CALL_FIELDS,
        *_THOUGHTS,
        *WEIGHTS,
        *_UNREAD_WEIGHTS,
        *IMAGES,
        *MEDIA,
        "channel",
        "name",
        "tool_call_id",
    )
)
PLACED = "images"
"""A field of messages until `place_images` reads it: the values of the content's images, None for one that
is in the record's own list."""


def parse_messages(value: Any, role: str) -> Messages:
    """Return messages from a list, one message, or a text, which gets the role `role`."""
    if isinstance(value, str):
        return (Message(role, value),)
    if not is_messages(value):
        raise UnusableRecordError("unknown_format", "not a list of messages with role and content")
    messages = [value] if isinstance(value, Mapping) else value
    return tuple(map(_read_message, messages))


def has_more(fields: Fields) -> bool:
    """Return whether a message has tool calls, tools or thoughts beside its content."""
    return bool(with_value(fields, (*_CALL_FIELDS, *_THOUGHTS))) or bool(_own_keys(fields))


def unread_error(
    detail: str, unread: Sequence[str], columns: Mapping[str, str] = MappingProxyType({})
) -> UnusableRecordError:
    """Return the error for fields that no format reads; audio and video have their own reason."""
    is_media = any(name.rpartition("_")[2] in MEDIA for name in unread)
    reason = "media_not_read" if is_media else "unread_content"
    return UnusableRecordError(reason, detail, tuple(unread), columns=columns)


def check_no_media(messages: Sequence[Fields]) -> None:
    """Check that no message has audio, video, or a thought that is not text."""
    for message in messages:
        # A flag is no thought, nor is a number that a table wrote for an empty cell.
        names = with_value(message, _THOUGHTS)
        thoughts = [name for name in names if isinstance(message[name], list | Mapping)]
        unread = with_value(message, MEDIA) + thoughts
        if unread:
            raise unread_error(f"a message has {', '.join(unread)}", unread)


def unread_keys(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the keys of messages in these values that have a value and that nothing reads."""
    keys = dict[str, None]()
    for value in values:
        for fields in value if isinstance(value, list) else [value]:
            if not isinstance(fields, Mapping) or len(fields) == 2:  # fast path: most messages
                continue
            read = _READ.union(_said_by(fields), _own_keys(fields))
            others = {name: fields[name] for name in fields if name not in read}
            inner = from_json(others.get("additional_kwargs"))
            if isinstance(inner, Mapping):  # calls in it are read
                inner = {name: inner[name] for name in inner if name not in _CALL_FIELDS}
                others["additional_kwargs"] = inner
            keys |= dict.fromkeys(with_value(without_nulls(others), others))
    return tuple(f"messages[].{shown_key(name)}" for name in keys)


def _said_by(fields: Fields) -> tuple[str, str]:
    """Return the keys of a message's role and content."""
    return ("role", "content") if "role" in fields else ("from", "value")


def _read_message(fields: Fields) -> Message:
    role, content = map(fields.get, _said_by(fields))
    if isinstance(role, str) and role in PLAIN_ROLES and isinstance(content, str) and len(fields) == 2:
        return Message(ROLES.get(role, role), content)  # fast path: most messages
    check_no_media([fields])
    inner = from_json(fields.get("additional_kwargs"))
    if isinstance(inner, Mapping) and not with_value(fields, _CALL_FIELDS):
        fields = {**fields, **{name: inner[name] for name in _CALL_FIELDS if name in inner}}
    if not isinstance(role, str) or ("role" not in fields and role not in ALL_ROLES):
        raise UnusableRecordError("unread_content", "a message has a role that is not read", ("role",))
    if fields.get("channel") in _UNREAD_CHANNELS:
        raise UnusableRecordError("unread_content", "a message has another channel than final", ("channel",))
    calls: list[Fields] = []
    if role in CALLING:
        role, content, calls = "assistant", "", _tool_calls(content)
    if content is None and has_more(fields):
        content = ""
    for name in with_value(fields, _CALL_FIELDS):
        calls += _tool_calls(fields[name])
    # The content has an `IMAGE` where it has an image.
    images = given_images(fields)
    thoughts = list[str]()
    text = IMAGE * len(images)
    if ROLES.get(role, role) == "tool":
        content = _result_text(content)
    for kind, value in _parts(content):
        if kind == "image":
            text += IMAGE
            images.append(value)
        elif kind == "tool_call":
            calls += _tool_calls(value)
        elif kind == "text":
            text += value
        else:
            thoughts.append(value)
    extra: dict[str, Any] = {PLACED: images} if images else {}
    if thoughts:
        extra["reasoning_content"] = "".join(thoughts)
    extra |= {field: fields[name] for name, field in _THOUGHTS.items() if isinstance(fields.get(name), str)}
    extra |= {name: fields[name] for name in with_value(fields, ("tool_call_id", "name"))}
    if calls:
        extra["tool_calls"] = calls
    of_templates = {name: without_nulls(fields[name]) for name in _own_keys(fields)}
    of_templates = _listed_thoughts(of_templates, extra)
    read = {*_said_by(fields), *of_templates, *_CALL_FIELDS, *_THOUGHTS, *_THOUGHT_LISTS, *WEIGHTS, *IMAGES}
    others = {name: fields[name] for name in with_value(fields, fields) if name not in read}
    return Message(ROLES.get(role, role), text, extra | of_templates, _is_trained(fields), others)


def _own_keys(fields: Fields) -> list[str]:
    """Return the keys of a message with calls, tools or thoughts that only some templates read."""
    names = [name for name in fields if isinstance(name, str) and name not in _READ]
    return [name for name in names if _is_own(name, without_nulls(fields[name]))]


def _is_own(name: str, value: Any) -> bool:
    """Return whether a key has calls, tools or thoughts; a thought is no single word."""
    if not isinstance(value, str | list | Mapping) or not has_value(value):
        return False
    if name in _TOOLS or _CALLS.search(name):
        return not isinstance(value, str) or name in _TOOLS or _CALLS_AS_TEXT.search(name) is not None
    is_word = isinstance(value, str) and _WORD.fullmatch(value.strip()) is not None
    is_thought = _OTHER_THOUGHTS.search(name) is not None and _ABOUT_THOUGHTS.search(name) is None
    return is_thought and not is_word


def _listed_thoughts(fields: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without lists of thoughts; `extra` gets their text, if it has no other thought."""
    others = dict(fields)
    for name in set(_THOUGHT_LISTS).intersection(fields):
        items = fields[name] if isinstance(fields[name], list) else [fields[name]]
        texts = list(map(_thought_text, items))
        if None in texts:  # such as an encrypted one
            continue
        thought = "".join(map(str, texts))
        thoughts = [extra[field] for field in ("reasoning_content", "thinking") if field in extra]
        if not thoughts:
            extra["reasoning_content"] = thought
        if not thoughts or thought in thoughts:
            del others[name]
    return others


def _thought_text(item: Any) -> str | None:
    if not isinstance(item, Mapping) or item.get("type") not in _THOUGHT_TEXTS:
        return None
    text = item.get(_THOUGHT_TEXTS[item["type"]])
    return text if isinstance(text, str) else None


def _check_no_calls(part: Fields, keys: Sequence[str]) -> None:
    """Check that a part of a content has no calls under other names than these `keys`."""
    unread = list[str]()
    for name in part:
        if name in keys or _CALLS.search(str(name)) is None:
            continue
        value = without_nulls(part[name])
        if isinstance(from_json(value), list | Mapping) and has_value(value):
            unread.append(shown_key(name))
    if unread:
        raise UnusableRecordError("unread_content", f"a message has {', '.join(unread)}", tuple(unread))


def _parts(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield the kind and the value of the parts of a content: text, a thought, a tool call or an image."""
    for part in content if isinstance(content, list) and content else [{"text": content}]:
        fields = part if isinstance(part, Mapping) else {"text": part}
        kind = str(fields.get("type", "text"))
        if kind in _IMAGE_PARTS:
            # Without a value of its own it is the place of an image in the record's list.
            source = next((name for name in _SOURCES if is_given(fields.get(name))), "")
            image = fields.get(source)
            if source == "base64":
                image = f"data:;base64,{image}"
            yield "image", image
            continue
        names = (kind, "text", "value") if kind in _PARTS else ()
        value = first_value(fields, names)
        if _PARTS.get(kind) in ("reasoning", "thinking") and isinstance(value, list):
            value = "".join(_texts(value))  # Mistral's thoughts are parts, too
        _check_no_calls(fields, CALLING if kind == "tool_call" else ())
        if kind != "tool_call" and not isinstance(value, str):
            media = [name for name in MEDIA if name in kind.split("_")]
            detail = f"a message has content of type {kind!r} that is not text"
            raise unread_error(detail, media or ["content"])
        yield _PARTS[kind], value


def _texts(parts: list[Any]) -> list[str]:
    """Return the texts of parts that are all text."""
    read = list(_parts(parts))
    others = [kind for kind, _ in read if kind != "text"]
    if others:
        raise unread_error(f"a thought has content of type {others[0]!r} that is not text", ["content"])
    return [value for _, value in read]


def _result_text(content: Any) -> Any:
    """Return what a tool returned as text, in JSON if it is neither text nor parts of a message."""
    is_part = isinstance(content, Mapping) and "type" in content
    is_parts = isinstance(content, list) and any(
        isinstance(item, str) or (isinstance(item, Mapping) and not item.keys().isdisjoint(("type", "text")))
        for item in content
    )
    if content is None or isinstance(content, str) or is_parts:
        return content
    return [content] if is_part else json.dumps(content, ensure_ascii=False, default=str)


def _tool_calls(value: Any) -> list[Fields]:
    """Return a call or a list of calls, perhaps in JSON, as chat templates read them."""
    spelled = from_json(value)
    calls = [spelled] if isinstance(spelled, Mapping) else spelled
    if not isinstance(calls, list) or not calls:
        raise UnusableRecordError("invalid_tool_call", "a tool call is neither a JSON object nor a list")
    read: list[Fields] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UnusableRecordError("invalid_tool_call", "a tool call does not name a function")
        arguments = _arguments({**call, **function})
        plain = {name: call[name] for name in with_value(call, ("id",))}
        plain["type"] = "function"
        plain["function"] = {"name": function["name"], "arguments": arguments}
        read.append(plain)
    return read


def _arguments(call: Fields) -> Fields:
    """Return the arguments of a call; of one without arguments an empty object."""
    values = [from_json(call[name]) for name in with_value(call, ARGUMENTS)]
    if not all(isinstance(value, Mapping) and value == values[0] for value in values):
        raise UnusableRecordError("invalid_tool_call", "the arguments of a call are not one JSON object")
    unread = with_value(call, [name for name in call if name not in (*ARGUMENTS, *_BESIDE_ARGUMENTS)])
    if unread and all(call.get(name) is None for name in ARGUMENTS):
        detail = f"a call has no arguments, but {', '.join(map(shown_key, unread))}"
        raise UnusableRecordError("invalid_tool_call", detail)
    return values[0] if values else {}


def _is_trained(fields: Fields) -> bool | None:
    """Return the weight of a message in the loss, 0 or 1, as a bool; None without one."""
    weights = {name: fields[name] for name in WEIGHTS if fields.get(name) is not None}
    unclear = [name for name in _UNREAD_WEIGHTS if fields.get(name) is not None]
    unclear += [name for name, weight in weights.items() if weight not in (0, 1)]
    if unclear or len(set(map(bool, weights.values()))) > 1:
        unclear = unclear or list(weights)
        detail = f"a message has {', '.join(unclear)}; write loss_weight, 0 or 1"
        raise UnusableRecordError("unread_content", detail, tuple(unclear))
    return bool(next(iter(weights.values()))) if weights else None


def read_history(history: Any) -> list[Message] | None:
    """Return the turns before a question: pairs of a question and its answer, or messages; None: neither."""
    if isinstance(history, list) and all(
        isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in history
    ):
        roles = itertools.cycle(("user", "assistant"))
        return [Message(role, text) for role, text in zip(roles, itertools.chain(*history), strict=False)]
    return list(parse_messages(history, role="user")) if is_messages(history) else None


def read_tools(value: Any) -> tuple[Fields, ...]:
    """Return definitions of tools, each as `{type: function, function: {name, ...}}` if it has a name."""
    read: list[Fields] = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name", ""), str):
            raise UnusableRecordError("invalid_tools", "a tool or its name is no JSON of that kind")
        # The schema of the arguments is in `parameters`.
        schemas = with_value(function, _SCHEMAS)
        if schemas and not with_value(function, ("parameters",)):
            names = {schemas[0]: "parameters"}
            function = {names.get(name, name): function[name] for name in function if name != "parameters"}
        if "function" in tool:
            read.append({**tool, "function": function})
        elif "name" in tool:
            read.append({"type": "function", "function": function})
        else:
            read.append(tool)
    return tuple(read)


def is_outside(value: Any, prompt: Prompt) -> bool:
    """Return whether a value is not part of the prompt."""
    parts = [turn.content for turn in turns_of(prompt, "user")]
    if isinstance(prompt, Dialogue):
        parts.append(prompt.text)
    texts = [turn.content for turn in parse_messages(value, role="user")] if is_messages(value) else [value]
    return not all(isinstance(text, str) and any(text.strip() in part for part in parts) for text in texts)


def read_messages(prompt: Any, responses: Fields) -> tuple[Prompt, Sequence[Response]]:
    """Return the messages that all sides share, and each side's messages from the first difference.

    The prompt is a separate field, or the start of every side, or both.
    """
    sides = []
    for name, value in responses.items():
        side = parse_messages(value, role="assistant")
        if not side or side[-1].role != "assistant":
            raise UnusableRecordError("not_one_answer", f"{name} does not end with an assistant message")
        sides.append(side)
    sides, prompt_turns = _with_prompt(prompt, sides)
    start = max(_shared_turns(sides), prompt_turns)
    if any(side[start].role != "assistant" for side in sides):
        raise UnusableRecordError("history_differs", "the responses follow different messages")
    shared = tuple(
        replace(turns[0], is_trained=None, others=_shared_keys(turns))
        for turns in zip(*(side[:start] for side in sides), strict=True)
    )
    after = [side[start:] for side in sides]
    for turns in after:
        if all(turn.is_trained is False for turn in turns if turn.role == "assistant"):
            raise UnusableRecordError("untrained_response", "the loss counts no turn of a response")
    return shared, [*map(_text_or_turns, after)]


def _text_or_turns(turns: Messages) -> Response:
    """Return a response; one assistant turn with nothing beside its content is a text."""
    is_text = len(turns) == 1 and not turns[0].fields and not turns[0].others
    return turns[0].content if is_text else turns


def _shared_keys(turns: Sequence[Message]) -> Fields:
    """Return the other keys of a turn that are equal in all sides."""
    first = turns[0].others
    return {
        name: first[name] for name in first if all(turn.others.get(name) == first[name] for turn in turns)
    }


def _with_prompt(value: Any, sides: list[Messages]) -> tuple[list[Messages], int]:
    """Return each side with the prompt before it, and the number of turns of a prompt that must be kept."""
    if value is None:
        return sides, 0
    prompt = parse_messages(value, role="user")
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
