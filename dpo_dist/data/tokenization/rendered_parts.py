"""Check that a chat template has rendered the tools, the calls and the thoughts of a record."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dpo_dist.data.records import Fields, Message, Messages, UnusableRecordError
from dpo_dist.data.tokenization.chat_template import ends_thought, split_thought

THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
CALLS = "tool_calls"


def thought_of(message: Message) -> str | None:
    """Return the thought that a field of a message has."""
    found = (message.fields.get(name) for name in THOUGHT_FIELDS)
    return next((thought for thought in found if thought and isinstance(thought, str)), None)


def check_parts_rendered(
    rendered: tuple[str, str], prompt: Messages, response: Messages, tools: Iterable[Fields]
) -> bool:
    """Check that a template has rendered the tools, all calls, and the thought of the last turn.

    Thoughts of earlier turns are the template's to keep or remove.

    Args:
        rendered: the prompt and the response, with all tokens spelled.
        prompt: its turns.
        response: its turns.
        tools: of the record.

    Returns:
        Whether the contents of all turns are rendered too.

    Raises:
        UnusableRecordError: `tools_not_rendered`, `calls_not_rendered` or `thought_not_rendered`.
    """
    text = "".join(rendered)
    if tools or any(turn.fields for turn in (*prompt, *response)):
        _check_calls(text, rendered[1], prompt, response, tools)
    if any(thought.strip() not in text for thought in _last_thoughts(response)):
        raise _lost("thought_not_rendered", "the thought of the last turn")
    return all(_is_written(turn.content.strip(), text) for turn in (*prompt, *response))


def _check_calls(
    text: str, rendered_response: str, prompt: Messages, response: Messages, tools: Iterable[Fields]
) -> None:
    defined = Counter(filter(None, map(_name_of, tools)))
    if any(name not in text for name in defined):
        raise _lost("tools_not_rendered", "tools")
    answered = Counter(name for turn in response for name in _called_names(turn))
    called = answered + Counter(name for turn in prompt for name in _called_names(turn))
    is_omitted = any(text.count(name) < times for name, times in (defined + called).items())
    if is_omitted or any(rendered_response.count(name) < times for name, times in answered.items()):
        raise _lost("calls_not_rendered", "all calls of tools")


def _is_written(content: str, text: str) -> bool:
    """Return whether a text has a content, perhaps as JSON; a template may change one with a thought."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text or ends_thought(content)


def _last_thoughts(turns: Messages) -> Iterator[str]:
    if turns[-1].role != "assistant":
        return
    thought = thought_of(turns[-1])
    if thought is not None:
        yield thought
    elif ends_thought(turns[-1].content):
        spelled, _ = split_thought(turns[-1].content)
        yield from spelled.replace("</think>", "<think>").split("<think>")


def _called_names(turn: Message) -> Iterator[str]:
    calls = turn.fields.get(CALLS)
    if isinstance(calls, list | tuple):
        yield from filter(None, map(_name_of, calls))


def _name_of(value: Any) -> str | None:
    """Return the name of a tool or of a call of it."""
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def _lost(reason: str, part: str) -> UnusableRecordError:
    return UnusableRecordError(reason, f"the chat template does not write {part}")
