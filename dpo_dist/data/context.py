"""What a record has beside its responses: prompt, system text, history, tools, arguments of the template."""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dpo_dist.data.messages import (
    FIRST_TURN,
    MEDIA,
    from_json,
    has_value,
    is_messages,
    messages_of,
    role_of,
    without_nulls,
)
from dpo_dist.data.records import (
    Dialogue,
    Fields,
    Message,
    Messages,
    PreferenceRecord,
    Prompt,
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
# Parts of the question in some datasets: they must be in the prompt. No format adds `context` to it.
_OF_PROMPT = ("instruction", *QUESTIONS, "context")
# A chat template renders these or a model sees them, and no format reads them.
_UNREAD = ("documents", *MEDIA, *(f"{side}_{name}" for side in ("chosen", "rejected") for name in MEDIA))
# Weights and margins of a record in the loss, and the value that has no effect.
_UNREAD_NUMBERS = {"weight": 1.0, "sample_weight": 1.0, "loss_weight": 1.0, "margin": 0.0}


def prompt_of(record: Fields, responses: Iterable[Any]) -> Any:
    """Return a record's prompt: text or messages; None without one, or if responses are conversations."""
    if record.get("prompt") is not None or any(map(is_conversation, responses)):
        return record.get("prompt")
    for turns in map(record.get, CONVERSATIONS):
        if turns is not None and not ends_with_response(turns):
            return _asked(turns)
    if has_value(record.get("instruction")):
        parts = [record["instruction"], record.get("input")]
        if not all(part is None or isinstance(part, str) for part in parts):
            if has_value(parts[1]):
                raise UnusableRecordError("unread_content", "instruction and input are not texts", ("input",))
            return [{"role": "user", "content": parts[0]}]
        return _asked("\n".join(filter(None, parts)))
    question = next((record[name] for name in QUESTIONS if has_value(record.get(name))), None)
    return question if question is None or is_messages(question) else [{"role": "user", "content": question}]


def _asked(turns: Any) -> Any:
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns


def is_conversation(response: Any) -> bool:
    """Return whether a response includes the turns before it, as messages or as an HH dialogue."""
    if isinstance(response, str):
        return response.startswith(FIRST_TURN)
    is_list = isinstance(response, list) and bool(response) and is_messages(response)
    return is_list and not ends_with_response(response[:1])


def has_prompt(record: Fields) -> bool:
    """Return whether a record has a field for a prompt, perhaps an empty one."""
    names = ("prompt", "instruction", *QUESTIONS, *CONVERSATIONS)
    return any(record.get(name) is not None for name in names)


def ends_with_response(turns: Any) -> bool:
    """Return whether the last of a list of messages is the assistant's."""
    return isinstance(turns, list) and bool(turns) and role_of(turns[-1]) == "assistant"


def with_context(
    prompt: Prompt, record: Fields, responses: Collection[str], *, is_plain: bool
) -> tuple[Prompt, tuple[Fields, ...], Fields]:
    """Return the prompt after the record's system text and `history`, its tools and template arguments.

    A text prompt becomes a user's turn if the record has any of them, unless the configured format says that
    it `is_plain`. `responses` are the names of the fields that were read. Raises UnusableRecordError:
    `unread_content` with the names of fields that would be lost, or `invalid_tools`.
    """
    is_dialogue = isinstance(prompt, Dialogue)
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    unread = [name for name in _UNREAD if has_value(record.get(name))]
    unread += [name for name, neutral in _UNREAD_NUMBERS.items() if not _is_number(record.get(name), neutral)]
    given = [name for name in (*_TOOLS, _ARGUMENTS) if has_value(record.get(name))]
    given += [_THINKING] if record.get(_THINKING) not in (None, "") else []
    turns: list[Message] = []
    if is_plain or is_dialogue:
        unread += [*given, *(name for name in (*_SYSTEMS, "history") if has_value(record.get(name)))]
    else:
        unread += _TOOLS[1:] if set(_TOOLS) <= set(given) else ()
        unread += _add_turns_before(turns, record, messages)
    # A dialogue is read from the responses alone; a conversation may repeat the prompt or a response.
    for name in (*_OF_PROMPT, *(["prompt"] if is_dialogue else []), *CONVERSATIONS):
        is_response = name in CONVERSATIONS and (name in responses or ends_with_response(record.get(name)))
        if not is_response and _is_outside(record.get(name), prompt):
            unread.append(name)
    if unread:
        raise UnusableRecordError("unread_content", f"fields: {', '.join(unread)}", tuple(unread))
    if not turns and not given:
        return prompt, (), {}
    tools = next((_tools(record[name]) for name in _TOOLS if name in given), ())
    return (*turns, *messages), tools, _arguments(record)


def _add_turns_before(turns: list[Message], record: Fields, prompt: Messages) -> list[str]:
    """Add the turns of a record's system text and history to `turns`; return the ambiguous fields."""
    unread = []
    for name in _SYSTEMS:
        text = record.get(name)
        first = [*turns, *prompt][:1]
        if not has_value(text):
            continue
        if isinstance(text, str) and (not first or first[0].role != "system"):
            turns.append(Message("system", text))
        elif not isinstance(text, str) or first[0].content.strip() != text.strip():
            unread.append(name)
    if has_value(record.get("history")):
        exchanges = _exchanges(from_json(record["history"]))
        if exchanges is None or [message.role for message in prompt] != ["user"]:
            return [*unread, "history"]
        turns += exchanges
    return unread


def _exchanges(history: Any) -> list[Message] | None:
    """Return the turns of a list of messages or of [question, answer] pairs; None if it is anything else."""
    if is_messages(history):
        return list(messages_of(history, role="user"))
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or list(map(type, pair)) != [str, str] for pair in history
    ):
        return None
    return [
        Message(role, text)
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


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
        detail = f"{_THINKING} is neither true nor false, or has two values"
        raise UnusableRecordError("unread_content", detail, (_THINKING,))
    return {**found, _THINKING: is_thinking}


def _is_outside(value: Any, prompt: Prompt) -> bool:
    """Return whether a field has a value that the prompt does not contain."""
    if not has_value(value):
        return False
    whole = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    whole += [prompt.text] if isinstance(prompt, Dialogue) else []
    texts = [turn.content for turn in messages_of(value, role="user")] if is_messages(value) else [value]
    return not all(isinstance(one, str) and any(one.strip() in text for text in whole) for one in texts)


def _is_number(value: Any, neutral: float) -> bool:
    """Return whether a field is empty or this number, perhaps as text."""
    try:
        return value in (None, "") or float(value) == neutral
    except (TypeError, ValueError):
        return False


_FEW = {1: ("the completion",), 2: ("chosen", "rejected")}


def check_content(record: PreferenceRecord) -> None:
    """Check that something can be learned from a record. Raises UnusableRecordError."""
    parts = [_values(turns) for turns in (record.prompt, *record.responses)]
    try:
        _json([parts, record.tools, record.template_arguments]).encode()
    except UnicodeEncodeError:
        raise UnusableRecordError("invalid_unicode", "a text has a lone surrogate") from None
    prompt, number = record.prompt, len(record.responses)
    as_turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if not any(turn.content.strip() or turn.fields for turn in as_turns):
        raise UnusableRecordError("empty_prompt")
    names = _FEW.get(number, [f"response {rank} of the ranking" for rank in range(1, number + 1)])
    empty = [name for name, response in zip(names, record.responses, strict=True) if _is_empty(response)]
    if empty:
        raise UnusableRecordError("empty_response", f"no text in {', '.join(empty)}")
    if len(set(map(_json, parts[1:]))) < number:
        raise UnusableRecordError("identical_responses")


def _values(turns: Prompt | Response) -> Any:
    if isinstance(turns, str):
        return turns.strip()
    return [(turn.role, turn.content.strip(), turn.fields) for turn in turns]


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


def _is_empty(response: Response) -> bool:
    """Return whether the loss can count nothing of a response."""
    turns = (Message("assistant", response),) if isinstance(response, str) else response
    trained = [turn for turn in turns if turn.role == "assistant" and turn.is_trained is not False]
    return not any(turn.content.strip() or turn.fields for turn in trained)
