"""Read prompts and responses as text or messages: roles, tool calls, thoughts, ShareGPT's turns."""

import ast
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from dpo_dist.data.records import (
    BadRecord,
    Dialogue,
    Fields,
    Message,
    Messages,
    Origin,
    Prompt,
    RawContent,
    Response,
    UnusableRecordError,
    shown_key,
)

_ARGUMENTS = ("arguments", "parameters")


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8. Raises ValueError: it is none, an object has a key twice, or it is too deep."""
    try:
        return JSON.decode(content.decode("utf-8-sig"))
    except RecursionError as fault:
        raise ValueError("nested too deeply") from fault


def fault_of(fault: ValueError) -> str:
    """Return why parsing failed, without quoting the text."""
    match fault:
        case json.JSONDecodeError():
            return f"{fault.msg} at character {fault.pos + 1}"
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {fault.start + 1}"
    return str(fault)


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of objects, with which tables fill what an object lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def with_given_arguments(value: Any) -> Any:
    """Return a value of a table without the nulls with which it fills the arguments of tool calls."""
    if isinstance(value, Mapping):
        return {
            name: without_nulls(item) if name in _ARGUMENTS else with_given_arguments(item)
            for name, item in value.items()
        }
    return [with_given_arguments(item) for item in value] if isinstance(value, list) else value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"an object has the key {shown_key(twice)} twice")
    return fields


JSON = json.JSONDecoder(object_pairs_hook=_without_duplicates)


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


# Names of the fields of a message, and of its roles.
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ASKING = ("human", "user", "observation", "tool", "tool_response")
_ANSWERING = ("gpt", "assistant", "chatgpt", "function_call", "tool_call")
_RESULTS = ("observation", "tool", "tool_response")
_EXCHANGES = ("conversation", "conversations")
_EXCHANGE = ({"human", "user", "tool"}, {"assistant", "gpt", "bot"})


def with_turns(record: Fields) -> Fields:
    """Return a record whose `conversation` is a list of `{human, assistant}` with the turns in `messages`.

    Any other record is unchanged.
    """
    name = next((name for name in _EXCHANGES if _is_exchanges(record.get(name))), None)
    if name is None or record.get("messages") is not None:
        return record
    turns = [
        {"role": role, "content": exchange[role]}
        for exchange in record[name]
        for side in _EXCHANGE
        for role in side.intersection(exchange)
        if exchange[role] is not None
    ]
    return {**{other: record[other] for other in record if other != name}, "messages": turns}


def _is_exchanges(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_exchange, value))


def _is_exchange(value: Any) -> bool:
    """Return whether a value is an object of one question, or tool result, and one response."""
    return (
        isinstance(value, Mapping)
        and value.keys() <= set.union(*_EXCHANGE)
        and all(len(side.intersection(value)) == 1 for side in _EXCHANGE)
    )


def check_turns(messages: Sequence[Fields]) -> None:
    """Check that turns alternate: after a system text, questions or tool results, and responses or calls.

    Raises:
        UnusableRecordError: `roles_out_of_turn`.
    """
    roles = [message.get("from") for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    for index, role in enumerate(roles):
        if role not in _ASKING and role not in _ANSWERING:
            raise UnusableRecordError("roles_out_of_turn", f"turn {index + 1} is from {shown_key(role)}")
        before = roles[index - 1] if index else None
        results = role in _RESULTS and before in _RESULTS
        if before is not None and (role in _ASKING) == (before in _ASKING) and not results:
            raise UnusableRecordError("roles_out_of_turn", f"turn {index + 1} follows one of the same side")


def role_tag(tags: Mapping[str, str]) -> str:
    """Return the name of the field with the role of a turn."""
    return {**TAGS, **tags}["role_tag"]


def has_role_tag(value: Any, tags: Mapping[str, str]) -> bool:
    """Return whether a value is a turn of these tags, or a list with one."""
    if isinstance(value, list):
        return any(has_role_tag(item, tags) for item in value)
    return isinstance(value, Mapping) and role_tag(tags) in value


def with_usual_tags(value: Any, tags: Mapping[str, str]) -> Any:
    """Return messages whose fields and roles have other names by their usual names; other values unchanged.

    Args:
        value: a message, a list of messages, or anything else.
        tags: name of each tag of `TAGS` that is not usual.
    """
    if isinstance(value, list):
        return [with_usual_tags(item, tags) for item in value]
    names = {**TAGS, **tags}
    role, content = names["role_tag"], names["content_tag"]
    if not has_role_tag(value, tags):
        return value
    usual = {names[tag]: name for tag, name in TAGS.items() if tag not in ("role_tag", "content_tag")}
    rest = {name: item for name, item in value.items() if name not in (role, content)}
    given = value[role]
    return rest | {
        "from": usual.get(given, given) if isinstance(given, str) else given,
        "value": value.get(content),
    }


Reader: TypeAlias = Callable[[RawContent, Origin], tuple[Prompt, Sequence[Response]] | BadRecord]
"""Reads the prompt and the responses. May raise UnusableRecordError."""

_LAST_TURN = "\n\nAssistant:"
FIRST_TURN = "\n\nHuman:"


def reader_of(content: RawContent) -> Reader | None:
    """Return the reader for the types of the prompt and the responses; None if no reader fits."""
    responses = [spelled_messages(response) for response in content.responses.values()]
    if all(map(is_messages, responses)) or is_messages(spelled_messages(content.prompt, "user")):
        return read_messages
    if not all(isinstance(response, str) for response in responses):
        return None
    dialogues = [_dialogue(response, content.prompt).startswith(FIRST_TURN) for response in responses]
    if all(dialogues) or (content.prompt is None and any(dialogues)) or _is_open(content.prompt):
        return read_hh
    return read_text if isinstance(content.prompt, str) else None


def read_text(content: RawContent, origin: Origin) -> tuple[Prompt, Sequence[Response]] | BadRecord:
    """Return prompt and responses that are plain text."""
    if content.prompt is None:
        return BadRecord("missing_field", origin, "prompt")
    texts = [content.prompt, *content.responses.values()]
    if not all(isinstance(text, str) for text in texts):
        return BadRecord("unknown_format", origin, f"prompt, {', '.join(content.responses)} must be text")
    return texts[0], texts[1:]


def read_implicit(content: RawContent, origin: Origin) -> tuple[Prompt, Sequence[Response]] | BadRecord:
    """Split texts where they part: the prompt is the start that they share, as TRL's `extract_prompt`."""
    texts = list(content.responses.values())
    if content.prompt is not None or not all(isinstance(text, str) for text in texts):
        return BadRecord("unknown_format", origin, f"{', '.join(content.responses)} alone must be text")
    columns = enumerate(zip(*texts, strict=False))
    shared = next((index for index, letters in columns if len(set(letters)) > 1), min(map(len, texts)))
    # A response has at least one character, and the space before it.
    end = min(shared, min(map(len, texts)) - 1)
    if texts[0][max(end - 1, 0) : end] == " ":
        end -= 1
    return texts[0][: max(end, 0)], [text[max(end, 0) :] for text in texts]


def read_hh(content: RawContent, origin: Origin) -> tuple[Prompt, Sequence[Response]] | BadRecord:
    """Split dialogues before their last response; the prompt is the part they share (arXiv:2204.05862).

    A prompt that is such a dialogue up to its last `Assistant:` precedes each response.
    """
    start = content.prompt if _is_open(content.prompt) else ""
    histories, texts = [], []
    for name, side in content.responses.items():
        dialogue = _dialogue(side, content.prompt) if isinstance(side, str) else ""
        if start and isinstance(side, str) and not dialogue.startswith(FIRST_TURN):
            dialogue = start + side
        if not dialogue.startswith(FIRST_TURN):
            return BadRecord("unknown_format", origin, f"{name} does not start with a Human turn")
        history, turn, text = dialogue.rpartition(_LAST_TURN)
        if not turn or FIRST_TURN in text:
            return BadRecord("not_one_answer", origin, f"{name} does not end with an Assistant turn")
        histories.append(history + turn)
        texts.append(text)
    if any(history != histories[0] for history in histories):
        return BadRecord("history_differs", origin, "the dialogues differ before their last response")
    return Dialogue(histories[0]), texts


def _dialogue(text: str, prompt: Any) -> str:
    """Return a text, with the blank line before its first turn that is missing from some dialogues.

    Only without a prompt, or if it repeats a prompt that is a dialogue: else it may be a story of one.
    """
    start = prompt.strip() if _is_open(prompt) else FIRST_TURN.strip()
    may_be = prompt is None or _is_open(prompt)
    if may_be and _LAST_TURN in text and text.lstrip().startswith(start):
        return "\n\n" + text.lstrip()
    return text


def _is_open(prompt: Any) -> bool:
    """Return whether a prompt is a dialogue that a response completes."""
    return isinstance(prompt, str) and prompt.startswith(FIRST_TURN) and prompt.rstrip().endswith(_LAST_TURN)


def read_messages(content: RawContent, origin: Origin) -> tuple[Prompt, Sequence[Response]] | BadRecord:
    """Return the messages that all sides share, and those of each side after the point where they part.

    The prompt is a field of its own, or the start of every side, or both. A single side parts before its last
    message, or before the first assistant turn that its data weigh in the loss.
    """
    sides = []
    for name, value in content.responses.items():
        side = messages_of(value, role="assistant")
        if not side or side[-1].role != "assistant":
            return BadRecord("not_one_answer", origin, f"{name} does not end with an assistant message")
        sides.append(side)
    whole, given = _with_prompt(content.prompt, sides)
    start = max(_parting(whole), given)
    if any(side[start].role != "assistant" for side in whole):
        raise UnusableRecordError("history_differs", "the responses follow different messages")
    prompt = tuple(replace(message, is_trained=None) for message in whole[0][:start])
    return prompt, [_response(side[start:]) for side in whole]


def messages_of(value: Any, role: str) -> Messages:
    """Return messages from a list, one message, or a text, which gets the role `role`.

    Raises:
        UnusableRecordError: it is something else, or a message cannot be read.
    """
    value = spelled_messages(value, role)
    if isinstance(value, str):
        return (Message(role, value),)
    if not is_messages(value):
        raise UnusableRecordError("unknown_format", "not a list of messages with role and content")
    messages = [value] if isinstance(value, Mapping) else value
    if any("from" in message for message in messages):
        check_turns(messages)
    return tuple(map(read_message, messages))


def content_of(message: Message) -> tuple[str, str, Fields]:
    """Return everything of a message that its model sees."""
    return message.role, message.content, message.fields


def _with_prompt(given: Any, sides: list[Messages]) -> tuple[list[Messages], int]:
    """Return each side with the prompt before it, and the number of turns of a prompt that must be kept."""
    if given is None:
        return sides, 0
    prompt = messages_of(given, role="user")
    size = len(prompt)
    if all(len(side) > size and _same(side[:size], prompt) for side in sides):
        return sides, size
    if all(side[0].role in ("assistant", "tool") for side in sides):
        return [(*prompt, *side) for side in sides], size
    # A question beside whole conversations repeats one of their turns.
    shared = [message.content.strip() for message in sides[0][: _parting(sides)]]
    if size == 1 and prompt[0].content.strip() in shared:
        return sides, 0
    raise UnusableRecordError("history_differs", "the prompt differs from the messages before the responses")


def _parting(sides: list[Messages]) -> int:
    """Return the number of first turns that all sides share, so that each has a turn left."""
    limit = min(map(len, sides)) - 1
    if len(sides) == 1:
        trained = (
            index for index, turn in enumerate(sides[0]) if turn.is_trained and turn.role == "assistant"
        )
        return next(trained, limit)
    different = (
        index
        for index, turns in enumerate(zip(*sides, strict=False))
        if any(content_of(turn) != content_of(turns[0]) for turn in turns)
    )
    return min(next(different, limit), limit)


def _same(some: Messages, others: Messages) -> bool:
    pairs = itertools.zip_longest(map(content_of, some), map(content_of, others))
    return all(one == other for one, other in pairs)


def _response(turns: Messages) -> Response:
    """Return the turns after a prompt; the content alone if it is all there is to one assistant turn."""
    assistant = [turn for turn in turns if turn.role == "assistant"]
    if all(turn.is_trained is False for turn in assistant):
        raise UnusableRecordError("untrained_response", "no turn of a response has a weight in the loss")
    if len(turns) == 1 and not turns[0].fields:
        return turns[0].content
    return turns
