"""Read prompts and responses: plain text, messages or HH dialogues, with system text and history."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dpo_dist.data.records import BadRecord, Dialogue, Fields, Message, Messages, Origin, Prompt, RawContent

Reader: TypeAlias = Callable[[RawContent, Origin], tuple[Prompt, list[str]] | BadRecord]
"""Reads the prompt and the texts of the responses."""

_LAST_TURN = "\n\nAssistant:"
_FIRST_TURN = "\n\nHuman:"
_NO_VALUES: tuple[Any, ...] = (None, False, "", "[]", "{}", "null", [], {}, ())
_SYSTEMS = ("system", "system_prompt")
_MAYBE_IN_PROMPT = ("instruction", "input")
# A chat template renders these or a model sees them, and no format reads them.
_UNREAD_FIELDS = (
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
    "images",
    "image",
    "videos",
    "audio",
)
_UNREAD_MESSAGE_FIELDS = (
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


def reader_of(content: RawContent) -> Reader | None:
    """Return the reader for the types of the prompt and the responses; None if no reader fits."""
    responses = content.responses.values()
    if all(map(_is_messages, responses)) or _is_messages(content.prompt):
        return read_messages
    if not all(isinstance(response, str) for response in responses):
        return None
    if isinstance(content.prompt, str):
        return read_text
    if content.prompt is None and any(response.startswith(_FIRST_TURN) for response in responses):
        return read_hh
    return None


def read_text(content: RawContent, origin: Origin) -> tuple[Prompt, list[str]] | BadRecord:
    """Return prompt and responses that are plain text."""
    if content.prompt is None:
        return BadRecord("missing_field", origin, "prompt")
    texts = [content.prompt, *content.responses.values()]
    if not all(isinstance(text, str) for text in texts):
        return BadRecord("unknown_format", origin, f"prompt, {', '.join(content.responses)} must be text")
    return texts[0], texts[1:]


def read_hh(content: RawContent, origin: Origin) -> tuple[Prompt, list[str]] | BadRecord:
    """Split dialogues before their last response; the prompt is the part they share (arXiv:2204.05862)."""
    histories, texts = [], []
    for name, dialogue in content.responses.items():
        if not isinstance(dialogue, str) or not dialogue.startswith(_FIRST_TURN):
            return BadRecord("unknown_format", origin, f"{name} does not start with a Human turn")
        history, turn, text = dialogue.rpartition(_LAST_TURN)
        if not turn or _FIRST_TURN in text:
            return BadRecord("not_one_answer", origin, f"{name} does not end with an Assistant turn")
        histories.append(history + turn)
        texts.append(text)
    if any(history != histories[0] for history in histories):
        return BadRecord("history_differs", origin, "the dialogues differ before their last response")
    return Dialogue(histories[0]), texts


def read_messages(content: RawContent, origin: Origin) -> tuple[Prompt, list[str]] | BadRecord:
    """Return the messages of the prompt and the last message of each response.

    The prompt is a field of its own, or the messages before the last one of every response, or both.
    """
    histories: list[Messages] = []
    texts: list[str] = []
    for name, value in content.responses.items():
        messages = _messages(value, origin, role="assistant")
        if isinstance(messages, BadRecord):
            return messages
        if not messages or messages[-1].role != "assistant":
            return BadRecord("not_one_answer", origin, f"{name} does not end with an assistant message")
        histories.append(messages[:-1])
        texts.append(messages[-1].content)
    prompt = _shared_prompt(content.prompt, histories, origin)
    return prompt if isinstance(prompt, BadRecord) else (prompt, texts)


def with_context(
    prompt: Prompt, record: Fields, content: RawContent, origin: Origin, *, plain: bool
) -> Prompt | BadRecord:
    """Put the record's system text and `history` before its prompt; a text prompt becomes a user turn then.

    Args:
        prompt: as a reader returned it.
        record: all fields of the record.
        content: the prompt and responses found in the record.
        origin: of the record.
        plain: whether the configured format says that prompts are plain text.

    Returns:
        The whole prompt, or `unread_content` with the names of fields that would be ignored.
    """
    unread = [name for name in _UNREAD_FIELDS if has_value(record.get(name))]
    turns: list[Message] = []
    if content.has_context:
        given = [record[name] for name in _SYSTEMS if has_value(record.get(name))]
        unread += _SYSTEMS[1:] if given[1:] and given[0] != given[1] else ()
    else:
        unread += [name for name in _MAYBE_IN_PROMPT if _is_outside(record, name, prompt)]
        # A dialogue is read from the responses alone.
        unread += ["prompt"] if isinstance(prompt, Dialogue) and _is_outside(record, "prompt", prompt) else []
        for name in (*_SYSTEMS, "history"):
            if has_value(record.get(name)):
                before = None if plain else _turns_before(prompt, turns, name, record[name])
                if before is None:
                    unread.append(name)
                else:
                    turns += before
    if unread:
        return BadRecord("unread_content", origin, f"fields: {', '.join(unread)}", tuple(unread))
    if not turns:
        return prompt
    assert not isinstance(prompt, Dialogue)
    return (*turns, *_as_messages(prompt))


def instruction_messages(record: Fields) -> list[Fields] | None:
    """Return the messages of `system`, `history`, `instruction` and `input`, as LLaMA-Factory joins them."""
    history = record.get("history") or []
    if record.get("instruction") is None or not isinstance(history, list):
        return None
    system = record.get("system") or record.get("system_prompt")
    turns = [("system", system)] if system else []
    for exchange in history:
        if not isinstance(exchange, list) or len(exchange) != 2:
            return None
        turns += zip(("user", "assistant"), exchange, strict=True)
    text = f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", text)]]


def has_value(value: Any) -> bool:
    """Return whether a field has content; an empty text, list or object, also in JSON, is none."""
    return value not in _NO_VALUES and not (isinstance(value, str) and not value.strip())


def unread_keys(*messages: Fields) -> tuple[str, ...]:
    """Return the fields of messages that have a value and that no format reads."""
    return tuple(
        key for key in _UNREAD_MESSAGE_FIELDS if any(has_value(message.get(key)) for message in messages)
    )


def _is_messages(value: Any) -> bool:
    messages = [value] if isinstance(value, Mapping) else value
    return isinstance(messages, list) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages
    )


def _messages(value: Any, origin: Origin, role: str) -> Messages | BadRecord:
    """Return messages from a list, one message, or a text, which gets the role `role`."""
    if isinstance(value, str):
        return (Message(role, value),)
    if not _is_messages(value):
        return BadRecord("unknown_format", origin, "not a list of messages with role and content")
    messages = [value] if isinstance(value, Mapping) else value
    for message in messages:
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            return BadRecord(
                "unread_content", origin, "the role or content of a message is not a text", ("content",)
            )
    unread = unread_keys(*messages)
    if unread:
        return BadRecord("unread_content", origin, f"a message has {', '.join(unread)}", unread)
    return tuple(Message(message["role"], message["content"]) for message in messages)


def _shared_prompt(given: Any, histories: list[Messages], origin: Origin) -> Messages | BadRecord:
    """Return the prompt, from its own field and from the messages before each response."""
    history = histories[0]
    if any(other != history for other in histories):
        return BadRecord("history_differs", origin, "the responses follow different messages")
    if given is None:
        return history
    prompt = _messages(given, origin, role="user")
    if isinstance(prompt, BadRecord) or not history or history == prompt:
        return prompt
    if isinstance(given, str) and any(message.content.strip() == given.strip() for message in history):
        return history
    return BadRecord("history_differs", origin, "the prompt differs from the messages before the responses")


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
    """Return the turns of a list of [question, answer] pairs; None if it is anything else."""
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
    value = record.get(name)
    if not has_value(value):
        return False
    texts = [prompt.text] if isinstance(prompt, Dialogue) else [turn.content for turn in _as_messages(prompt)]
    return not isinstance(value, str) or not any(value.strip() in text for text in texts)
