"""Read prompts and responses: plain text, messages, or HH dialogues."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from dpo_dist.data.fields.message_fields import is_messages, read_message, spelled_messages
from dpo_dist.data.fields.sharegpt import check_turns
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
)

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
