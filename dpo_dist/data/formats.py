"""From files to preference records, one layout per function.

Nothing is lost on the way: a record that cannot be used comes out as a `BadRecord` with its reason. Texts
are taken as they stand. Details of bad records never quote a record's text, which may be offensive or
personal.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from typing import Any, TypeAlias

from dpo_dist.config.schema import DataFormat, SourceConfig
from dpo_dist.data.files import read_rows
from dpo_dist.data.records import BadRecord, Dialogue, Message, Messages, Origin, PreferenceRecord
from dpo_dist.errors import ConfigError

Row: TypeAlias = Mapping[str, Any]

_SIDES = ("chosen", "rejected")
_LAST_TURN = "\n\nAssistant:"
_FIRST_TURN = "\n\nHuman:"
_UNREAD_MESSAGE_KEYS = ("tool_calls", "reasoning_content", "thinking")


def read_records(source: SourceConfig | str) -> Iterator[PreferenceRecord | BadRecord]:
    """Read one source of preference pairs, in its own order.

    Args:
        source: what to read; a bare string is its path. The path names a local .jsonl, .json (an array), .csv
            or .parquet file, a folder saved by `datasets`, or a data set on the hub.

    Returns:
        One item per record, read as the iterator is advanced. Reasons of bad records: `unparsable`,
        `unknown_format`, `missing_field`, `history_differs`, `not_one_answer`, `unread_content`,
        `invalid_scores`, `invalid_unicode`, `empty_prompt`, `empty_response`, `identical_responses`.

    Raises:
        DataError: the source does not exist or cannot be read at all; raised by this call.
        ConfigError: `limit` is not positive, or `split` has no effect on such a source.
    """
    if isinstance(source, str):
        source = SourceConfig(path=source)
    if source.limit is not None and source.limit < 1:
        raise ConfigError(
            "a source is limited to no records",
            where=f"limit of {source.path}",
            got=str(source.limit),
            expected="a positive number of records, or null for all",
        )
    rows = islice(read_rows(source.path, source.split), source.limit)
    return (
        row if isinstance(row, BadRecord) else _from_row(row, source.format, origin) for row, origin in rows
    )


def _from_row(row: Row, layout: DataFormat, origin: Origin) -> PreferenceRecord | BadRecord:
    if layout is DataFormat.auto:
        recognised = _recognise(row)
        if recognised is None:
            return BadRecord("unknown_format", origin, f"keys: {', '.join(sorted(map(str, row)))}")
        layout = recognised
    for side in _SIDES:
        if row.get(side) is None:
            return BadRecord("missing_field", origin, side)
    match layout:
        case DataFormat.hh:
            record = _from_hh(row, origin)
        case DataFormat.text:
            record = _from_text(row, origin)
        case _:
            record = _from_messages(row, origin)
    return record if isinstance(record, BadRecord) else _checked(record)


def _recognise(row: Row) -> DataFormat | None:
    """The layout of a record by its keys and types; None where no known one fits."""
    prompt = row.get("prompt")
    sides = [row[side] for side in _SIDES if row.get(side) is not None]
    if not sides:
        return None
    if all(_is_messages(side) for side in sides) or _is_messages(prompt):
        return DataFormat.messages
    if not all(isinstance(side, str) for side in sides):
        return None
    if isinstance(prompt, str):
        return DataFormat.text
    if prompt is None and any(side.startswith(_FIRST_TURN) for side in sides):
        return DataFormat.hh
    return None


def _is_messages(value: Any) -> bool:
    """Whether `value` is one message or a list of messages."""
    messages = [value] if isinstance(value, Mapping) else value
    return isinstance(messages, list) and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages
    )


def _from_hh(row: Row, origin: Origin) -> PreferenceRecord | BadRecord:
    """Whole dialogues; the prompt is what both sides have before their last answer (arXiv:2204.05862)."""
    histories, answers = [], []
    for side in _SIDES:
        text = row[side]
        if not isinstance(text, str) or not text.startswith(_FIRST_TURN):
            return BadRecord("unknown_format", origin, f"{side} is not a text that starts with a Human turn")
        history, turn, answer = text.rpartition(_LAST_TURN)
        if not turn or _FIRST_TURN in answer:
            return BadRecord("not_one_answer", origin, f"{side} does not end with an Assistant turn")
        histories.append(history + turn)
        answers.append(answer)
    if histories[0] != histories[1]:
        return BadRecord("history_differs", origin, "the dialogue before the last answer is not the same")
    return _record(Dialogue(histories[0]), answers, row, origin)


def _from_text(row: Row, origin: Origin) -> PreferenceRecord | BadRecord:
    """`prompt`, `chosen` and `rejected` as plain texts."""
    if row.get("prompt") is None:
        return BadRecord("missing_field", origin, "prompt")
    texts = [row[key] for key in ("prompt", *_SIDES)]
    if not all(isinstance(text, str) for text in texts):
        return BadRecord("unknown_format", origin, "prompt, chosen and rejected are not all texts")
    prompt, *answers = texts
    return _record(prompt, answers, row, origin)


def _from_messages(row: Row, origin: Origin) -> PreferenceRecord | BadRecord:
    """Conversations: the prompt as messages beside one answer each, or contained in both sides."""
    histories: list[Messages] = []
    answers: list[str] = []
    for side in _SIDES:
        conversation = _conversation(row[side], origin, role="assistant")
        if isinstance(conversation, BadRecord):
            return conversation
        if not conversation or conversation[-1].role != "assistant":
            return BadRecord("not_one_answer", origin, f"{side} does not end with an assistant message")
        histories.append(conversation[:-1])
        answers.append(conversation[-1].content)
    prompt = _messages_prompt(row.get("prompt"), histories, origin)
    return prompt if isinstance(prompt, BadRecord) else _record(prompt, answers, row, origin)


def _messages_prompt(given: Any, histories: list[Messages], origin: Origin) -> Messages | BadRecord:
    """The prompt from the field of that name and from what stands before each side's answer."""
    history = histories[0]
    if histories[1] != history:
        return BadRecord("history_differs", origin, "the messages before the answers are not the same")
    if given is None:
        return history
    prompt = _conversation(given, origin, role="user")
    if isinstance(prompt, BadRecord) or not history or history == prompt:
        return prompt
    if isinstance(given, str) and any(message.content.strip() == given.strip() for message in history):
        return history
    return BadRecord("history_differs", origin, "the prompt is not what stands before the answers")


def _conversation(value: Any, origin: Origin, role: str) -> Messages | BadRecord:
    """Messages from a list, from one message, or from a text spoken by `role`."""
    if isinstance(value, str):
        return (Message(role, value),)
    if not _is_messages(value):
        return BadRecord("unknown_format", origin, "not a list of messages with role and content")
    messages = [value] if isinstance(value, Mapping) else value
    for message in messages:
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            return BadRecord("unread_content", origin, "a message whose role or content is not a text")
        unread = [key for key in _UNREAD_MESSAGE_KEYS if message.get(key)]
        if unread:
            return BadRecord("unread_content", origin, f"a message has {', '.join(unread)}")
    return tuple(Message(message["role"], message["content"]) for message in messages)


def _record(
    prompt: str | Messages | Dialogue, answers: list[str], row: Row, origin: Origin
) -> PreferenceRecord | BadRecord:
    try:
        scores = _scores(row)
    except (TypeError, ValueError):
        return BadRecord("invalid_scores", origin, "score_chosen and score_rejected are not two numbers")
    return PreferenceRecord(prompt, tuple(answers), origin, scores)


def _scores(row: Row) -> tuple[float, ...] | None:
    """The pair's scores from the row or its metadata, None where it has none; raises on anything else."""
    metadata = row.get("metadata")
    places: list[Row] = [row, metadata] if isinstance(metadata, Mapping) else [row]
    for fields in places:
        found: list[Any] = [fields.get(f"score_{side}") for side in _SIDES]
        if any(score is not None for score in found):
            scores = tuple(map(float, found))
            if not all(map(math.isfinite, scores)):
                raise ValueError("a score is not finite")
            return scores
    return None


def _checked(record: PreferenceRecord) -> PreferenceRecord | BadRecord:
    """The record, or the reason why its content cannot teach a preference; shared by all layouts."""
    prompt_texts = _prompt_texts(record)
    if not all(map(_is_valid_unicode, (*prompt_texts, *record.responses))):
        return BadRecord("invalid_unicode", record.origin, "a text holds a lone surrogate")
    if not any(text.strip() for text in prompt_texts):
        return BadRecord("empty_prompt", record.origin)
    empty = [str(rank) for rank, text in enumerate(record.responses, start=1) if not text.strip()]
    if empty:
        return BadRecord("empty_response", record.origin, f"rank {', '.join(empty)}")
    if any(first.strip() == second.strip() for first, second in combinations(record.responses, 2)):
        return BadRecord("identical_responses", record.origin)
    return record


def _prompt_texts(record: PreferenceRecord) -> tuple[str, ...]:
    if isinstance(record.prompt, str):
        return (record.prompt,)
    messages = record.prompt.messages() if isinstance(record.prompt, Dialogue) else record.prompt
    return tuple(message.content for message in messages)


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
