"""Fields that stand beside a record's prompt: a system text, earlier turns, and those that are not read."""

from typing import Any

from dpo_dist.data.conversations import has_value
from dpo_dist.data.layouts import Answers, Row
from dpo_dist.data.records import BadRecord, Dialogue, Message, Messages, Origin, Prompt

_SYSTEMS = ("system", "system_prompt")
# They change what a chat template writes or what a model sees, and no format here reads them.
_UNREAD = ("tools", "functions", "documents", "chat_template_kwargs", "images", "image", "videos", "audio")
_MAYBE_IN_PROMPT = ("instruction", "input")


def in_context(
    prompt: Prompt, row: Row, answers: Answers, origin: Origin, *, plain: bool
) -> Prompt | BadRecord:
    """Put the row's `system` text and `history` before its prompt, which makes a plain prompt a user turn.

    Args:
        prompt: as its format reads it.
        row: with all its fields.
        answers: what was found in the row.
        origin: of the row.
        plain: whether the source's format says that prompts are plain text.

    Returns:
        The whole prompt, or `unread_content` with the names of the fields that would have been ignored.
    """
    unread = [name for name in _UNREAD if has_value(row.get(name))]
    turns: list[Message] = []
    if answers.is_instruction:
        given = [row[name] for name in _SYSTEMS if has_value(row.get(name))]
        unread += _SYSTEMS[1:] if given[1:] and given[0] != given[1] else ()
    else:
        unread += [name for name in _MAYBE_IN_PROMPT if _is_beside(row, name, prompt)]
        # A dialogue is read from the answers alone.
        unread += ["prompt"] if isinstance(prompt, Dialogue) and _is_beside(row, "prompt", prompt) else []
        for name in (*_SYSTEMS, "history"):
            if has_value(row.get(name)):
                before = None if plain else _turns_before(prompt, turns, name, row[name])
                if before is None:
                    unread.append(name)
                else:
                    turns += before
    if unread:
        return BadRecord("unread_content", origin, f"fields: {', '.join(unread)}", tuple(unread))
    if not turns:
        return prompt
    assert not isinstance(prompt, Dialogue)
    return (*turns, *_messages(prompt))


def _messages(prompt: str | Messages) -> Messages:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _turns_before(prompt: Prompt, turns: list[Message], name: str, value: Any) -> list[Message] | None:
    """The turns that a field adds after `turns` and before the prompt; None if that has no plain meaning."""
    if isinstance(prompt, Dialogue):
        return None
    messages = _messages(prompt)
    if name == "history":
        alone = [message.role for message in messages] == ["user"]
        return _exchanges(value) if alone else None
    if not isinstance(value, str):
        return None
    first = [*turns, *messages][:1]
    if first and first[0].role == "system":
        return [] if first[0].content.strip() == value.strip() else None
    return [Message("system", value)]


def _exchanges(history: Any) -> list[Message] | None:
    """Turns of a list of pairs of question and answer."""
    turns: list[Message] = []
    for exchange in history if isinstance(history, list) else [None]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            return None
        if not all(isinstance(text, str) for text in exchange):
            return None
        turns += (Message("user", exchange[0]), Message("assistant", exchange[1]))
    return turns


def _is_beside(row: Row, name: str, prompt: Prompt) -> bool:
    """Whether a field says something that the row's prompt does not contain."""
    value = row.get(name)
    if not has_value(value):
        return False
    texts = [prompt.text] if isinstance(prompt, Dialogue) else [turn.content for turn in _messages(prompt)]
    return not isinstance(value, str) or not any(value.strip() in text for text in texts)
