"""Formats of input records: a table with a row for each, and the way of a record through it.

To add a format: add its name to `DataFormat`, a function that returns a record's `Content`, and a row to
`FORMATS`. `read/layouts` has these functions, `read/messages` reads the messages that they return.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from dpo_dist.data.config import DataFormat, SourceConfig
from dpo_dist.data.read.fields import (
    ASKED,
    CONVERSATIONS,
    IMAGES_OF_SIDES,
    LABELS,
    NUMBERS,
    OTHERS,
    PAIR_SCORES,
    QUESTIONS,
    SIDE_FIELDS,
    SYSTEMS,
    TEMPLATE_ARGUMENTS,
    TOOLS,
    TOOLS_OF_SIDES,
    fields_with,
)
from dpo_dist.data.read.images import check_objects, place_images
from dpo_dist.data.read.layouts import (
    Content,
    check_no_other,
    completion,
    ends_with_response,
    has_completion,
    has_pair,
    has_ranking,
    is_labelled,
    label_column,
    labelled,
    pair,
    ranking,
    repeats,
)
from dpo_dist.data.read.messages import (
    is_outside,
    read_history,
    read_messages,
    read_tools,
    unread_error,
    unread_keys,
)
from dpo_dist.data.read.values import (
    has_value,
    ignoring,
    is_messages,
    plain_record,
    record_numbers,
    to_number,
    unknown_format,
    with_value,
)
from dpo_dist.data.read.verdicts import contradicting
from dpo_dist.data.records import (
    FIRST_TURN,
    IMAGE,
    LAST_TURN,
    MAX_RECORD_BYTES,
    BadRecord,
    Dialogue,
    Message,
    Messages,
    Origin,
    PreferenceRecord,
    Prompt,
    Record,
    Response,
    UnusableRecordError,
    turns_of,
)
from dpo_dist.foundation.types import Fields

# A value other than 1 would be ignored.
_WEIGHTS = ("weight", "sample_weight")
_READ = frozenset(fields_with("read"))
_UNREAD = fields_with("unread")
# What a prompt that stays text, or a dialogue, cannot have.
_CONTEXT = (*TOOLS, TEMPLATE_ARGUMENTS, *SYSTEMS, "history")
# With one of these a text prompt becomes a user's turn.
_OF_CHATS = (*TOOLS, *TOOLS_OF_SIDES, TEMPLATE_ARGUMENTS)

# A record with one of these faults may still have a usable prompt.
_RESPONSE_FAULTS = {
    "unknown_format",
    "missing_field",
    "not_one_answer",
    "empty_response",
    "identical_responses",
    "unread_content",
    "unread_verdict",
    "invalid_tool_call",
    "unknown_label",
    "no_ranking",
    "all_tied",
    "no_scores",
    "invalid_scores",
    "invalid_numbers",
}
# A record with only these fields has its prompt inside the sides.
_SCORES = (*itertools.chain(*PAIR_SCORES), "metadata")
_BESIDE_SIDES = frozenset((*SIDE_FIELDS, *_SCORES, OTHERS))


def parse_record(record: Fields, name: DataFormat, origin: Origin) -> Record:
    """Return the preference in a record, read in the format `name` (`auto`: the first that matches).

    Details of a bad record never quote its texts, which may be offensive or personal.
    """
    try:
        return _parse(record, name, origin)
    except UnusableRecordError as fault:
        return fault.as_bad_record(origin)
    except RecursionError:
        return BadRecord("unparsable", origin, "nested too deeply")


def parse_prompt(record: Fields, name: DataFormat, origin: Origin) -> Record:
    """Return a record of format `name`, without responses if it has none that can be used."""
    parsed = parse_record(record, name, origin)
    if not isinstance(parsed, BadRecord) or parsed.reason not in _RESPONSE_FAULTS:
        return parsed
    # With a made-up response, the prompt is read as in any completion record.
    turns = record.get("messages")
    if record.get("prompt") is None and isinstance(turns, list):
        invented: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": "response"}]}
    else:
        invented = {"completion": "response"}
    completed = parse_record({**record, **invented}, DataFormat.completion, origin)
    if isinstance(completed, BadRecord):
        return parsed if completed.reason in _RESPONSE_FAULTS else completed
    return replace(completed, responses=(), scores=None)


def _parse(fields: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord:
    has_texts = FORMATS[name].read in _READS_TEXT
    record = plain_record(fields, has_texts=has_texts, is_ranking=name is DataFormat.ranked)
    # The prompt and the responses.
    row = _detected(record) if name is DataFormat.auto else FORMATS[name]
    if row is None:
        raise unknown_format(fields, label_column(record))
    content = row.content(record)
    if name is DataFormat.auto:
        check_no_other(record, content)
        if content.field and content.scores is None:
            # Only the user knows what the order of a list means.
            raise UnusableRecordError("no_scores", content.field)
    read = row.read or _select_reader(content.prompt, content.responses)
    if read is None and _has_sides_only(fields):
        read = _read_implicit  # the prompt can only be inside the sides
    has_prompt = any(record.get(name) is not None for name in ASKED)
    if read is None and content.prompt is None and has_prompt:
        raise UnusableRecordError("empty_prompt")
    if read is None:
        raise unknown_format(fields, {})
    prompt, responses = read(content.prompt, content.responses)
    # What stands beside them.
    is_plain = row.read in (_read_text, _read_implicit)
    prompt, tools, arguments = _with_context(prompt, record, content, is_plain=is_plain)
    prompt, images = place_images(prompt, responses, record, origin.folders, is_plain=is_plain)
    check_objects(record, prompt, responses, has_images=bool(images))
    numbers = record_numbers(record, len(responses))
    unread = _unread_fields(record, content)
    result = PreferenceRecord(
        prompt,
        tuple(responses),
        origin,
        scores=content.scores,
        tools=tools,
        template_arguments=arguments,
        numbers=numbers,
        unread=unread,
        images=images,
    )
    check_content(result)
    return _exchanged(result) if numbers.get("soft_label", 1.0) < 0.5 else result


def _detected(record: Fields) -> "Format | None":
    """Return the first format that matches a record."""
    for row in FORMATS.values():
        if row.matches is not None and row.matches(record):
            return row
    return None


def _has_sides_only(fields: Fields) -> bool:
    """Return whether nothing but the sides of a pair, and their scores, has a value."""
    return all(value is None or name in _BESIDE_SIDES for name, value in fields.items())


Reader: TypeAlias = Callable[[Any, Fields], tuple[Prompt, Sequence[Response]]]
"""Reads a prompt (None: the responses contain it) and responses by name. May raise UnusableRecordError."""


def _select_reader(prompt: Any, responses: Fields) -> Reader | None:
    """Return the reader for the types of the prompt and the responses; None if no reader fits."""
    sides = list(responses.values())
    if all(map(is_messages, sides)) or is_messages(prompt):
        return read_messages
    if not all(isinstance(side, str) for side in sides):
        return None
    dialogues = [_dialogue(side, prompt).startswith(FIRST_TURN) for side in sides]
    if all(dialogues) or (prompt is None and any(dialogues)) or _is_open(prompt):
        return _read_hh
    return _read_text if isinstance(prompt, str) else None


def _read_text(prompt: Any, responses: Fields) -> tuple[Prompt, Sequence[Response]]:
    """Return prompt and responses that are plain text."""
    if prompt is None:
        raise UnusableRecordError("missing_field", "prompt")
    texts = [prompt, *responses.values()]
    if not all(isinstance(text, str) for text in texts):
        raise UnusableRecordError("unknown_format", f"prompt, {', '.join(responses)} must be text")
    return texts[0], texts[1:]


def _read_implicit(prompt: Any, responses: Fields) -> tuple[Prompt, Sequence[Response]]:
    """Split texts at their first difference: the prompt is the start that they share, as in TRL."""
    texts = list(responses.values())
    if prompt is not None or not all(isinstance(text, str) for text in texts):
        raise UnusableRecordError("unknown_format", f"{', '.join(responses)} alone must be text")
    # A response is at least a space and one character.
    shared = os.path.commonprefix(texts)  # noqa: RUF071  (of characters)
    end = min(len(shared), min(map(len, texts)) - 1)
    end = max(end - (texts[0][max(end - 1, 0) : end] == " "), 0)
    return texts[0][:end], [text[end:] for text in texts]


def _read_hh(prompt: Any, responses: Fields) -> tuple[Prompt, Sequence[Response]]:
    """Split dialogues before their last response; the prompt is the part they share (arXiv:2204.05862)."""
    start = prompt if _is_open(prompt) else ""
    histories, texts = [], []
    for name, side in responses.items():
        dialogue = _dialogue(side, prompt) if isinstance(side, str) else ""
        if start and isinstance(side, str) and not dialogue.startswith(FIRST_TURN):
            dialogue = start + side
        if not dialogue.startswith(FIRST_TURN):
            raise UnusableRecordError("unknown_format", f"{name} does not start with a Human turn")
        history, turn, text = dialogue.rpartition(LAST_TURN)
        if not turn or FIRST_TURN in text:
            raise UnusableRecordError("not_one_answer", f"{name} does not end with an Assistant turn")
        histories.append(history + turn)
        texts.append(text)
    if len(set(histories)) > 1:
        raise UnusableRecordError("history_differs", "the dialogues differ before their last response")
    return Dialogue(histories[0]), texts


def _dialogue(text: str, prompt: Any) -> str:
    """Return a text; a dialogue without a blank line before its first turn gets one."""
    start = prompt.strip() if _is_open(prompt) else FIRST_TURN.strip()
    may_be = prompt is None or _is_open(prompt)  # else it may be a text about a dialogue
    if may_be and LAST_TURN in text and text.lstrip().startswith(start):
        return "\n\n" + text.lstrip()
    return text


def _is_open(prompt: Any) -> bool:
    """Return whether a prompt is a dialogue that a response completes."""
    return isinstance(prompt, str) and prompt.startswith(FIRST_TURN) and prompt.rstrip().endswith(LAST_TURN)


def _with_context(
    prompt: Prompt, record: Fields, content: Content, *, is_plain: bool
) -> tuple[Prompt, tuple[Fields, ...], Fields]:
    """Return the prompt after the record's system text and `history`, its tools and template arguments.

    A text prompt becomes a user's turn if the record has such context, unless the prompt `is_plain` by the
    configured format. Raises UnusableRecordError: `unread_content` with the names of fields that would be
    lost, `image_in_response`, or `invalid_tools`.
    """
    images = tuple(name for name in IMAGES_OF_SIDES if name in record)
    if images:
        raise UnusableRecordError("image_in_response", f"fields: {', '.join(images)}", images)
    turns = turns_of(prompt, "user")
    before: list[Message] = []
    if is_plain or isinstance(prompt, Dialogue):
        misplaced = [name for name in _CONTEXT if name in record]
    else:
        before, misplaced = _turns_before(record, turns)
    _check_nothing_is_lost(record, content, misplaced, _outside(prompt, record, content))
    tools = _tools(record)
    arguments = _template_arguments(record)
    is_chat = bool(before) or any(name in record for name in _OF_CHATS)
    if is_chat:
        prompt = (*before, *turns)
    return prompt, tools, arguments


def _check_nothing_is_lost(
    record: Fields, content: Content, misplaced: Sequence[str], outside: Sequence[str]
) -> None:
    """Raise UnusableRecordError `unread_content` if a field would be lost that changes what is trained.

    `misplaced`: fields with turns that do not fit to the prompt; `outside`: those with another prompt.
    """
    verdicts = _against(record, content)
    weights = list[str]()
    for name in _WEIGHTS:
        has_weight = record.get(name) not in (None, "")
        if has_weight and to_number(record[name]) != 1:
            weights.append(name)
    fields = [*_never_read(record), *misplaced, *outside, *verdicts, *weights]
    if not fields:
        return
    detail = f"fields: {', '.join(fields)}"
    if verdicts:
        detail += "; no verdict for the chosen side"
    if weights:
        detail += f"; to weigh the loss, set columns: {{loss_weight: {weights[0]}}}"
    raise unread_error(detail, fields, ignoring(fields))


def _template_arguments(record: Fields) -> Fields:
    arguments = record.get(TEMPLATE_ARGUMENTS, {})
    if isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments):
        return arguments
    raise UnusableRecordError(
        "unread_content", f"{TEMPLATE_ARGUMENTS} is not an object", (TEMPLATE_ARGUMENTS,)
    )


def _turns_before(record: Fields, messages: Messages) -> tuple[list[Message], list[str]]:
    """Return the turns before a prompt's own, and the fields with such turns that do not fit to it."""
    before: list[Message] = []
    misplaced = list[str]()
    if set(TOOLS) <= record.keys():  # definitions of tools twice
        misplaced += TOOLS[1:]
    for name in SYSTEMS:
        if name not in record:
            continue
        text = record[name]
        first = next(iter([*before, *messages]), None)
        if not isinstance(text, str):
            misplaced.append(name)
        elif first is None or first.role != "system":
            before.append(Message("system", text))
        elif first.content.strip() != text.strip():
            misplaced.append(name)
    if has_value(record.get("history")):
        turns = read_history(record["history"])
        before += turns or ()
        if turns is None or [turn.role for turn in messages] != ["user"]:
            misplaced.append("history")
    return before, misplaced


def _never_read(record: Fields) -> list[str]:
    """Return the fields that a template or a model uses, and that no format reads."""
    fields = [name for name in _UNREAD if name in record]
    # Even a false one: outside of the template's arguments it would be ignored.
    if record.get("enable_thinking") not in (None, ""):
        fields.append("enable_thinking")
    return fields


def _against(record: Fields, content: Content) -> list[str]:
    """Return the fields beside a pair that do not say that its chosen side is the better one."""
    if len(content.responses) != 2 or content.field or content.verdicts:
        return []
    others = [name for name in record if name not in _READ and name not in content.responses]
    return contradicting(record, others, [*content.responses])


def _outside(prompt: Prompt, record: Fields, content: Content) -> list[str]:
    """Return the fields with questions or conversations that are not part of the prompt."""
    # A dialogue is read from the responses alone; a conversation may repeat the prompt or a response.
    conversations = (*CONVERSATIONS, "conversation")
    questions = ["instruction", *QUESTIONS, "context"]
    if isinstance(prompt, Dialogue):
        questions.append("prompt")
    best = next(iter(content.responses.values()))
    outside = []
    for name in with_value(record, (*questions, *conversations)):
        value = record[name]
        if name in conversations:
            if repeats(value, best):
                value = value[:-1]
            elif name in content.responses or ends_with_response(value):
                continue
        if is_outside(value, prompt):
            outside.append(name)
    return outside


def _tools(record: Fields) -> tuple[Fields, ...]:
    """Return a record's definitions of tools, which both sides share."""
    tools = next((read_tools(record[name]) for name in TOOLS if name in record), ())
    sides = [name for name in TOOLS_OF_SIDES if name in record]
    others = [name for name in sides if read_tools(record[name]) != tools]
    if others:
        raise unread_error(f"fields: {', '.join(others)}, other than tools", others, ignoring(others))
    return tools


def _unread_fields(record: Fields, content: Content) -> tuple[str, ...]:
    """Return the names of fields with a value that nothing reads, and the keys of messages."""
    scores: tuple[str, ...] = ()
    if content.scores is not None and content.field:
        scores = ("scores",)
    elif content.scores is not None:
        scores = _SCORES if len(content.responses) == 2 else LABELS
    read = _READ.union(content.responses, [content.field], scores, content.verdicts)
    names = with_value(record, [name for name in record if name not in read])
    others = record.get(OTHERS)
    if isinstance(others, tuple):  # else a column of this name
        names = [*(name for name in names if name != OTHERS), *others]
    return (*names, *unread_keys([content.prompt, *content.responses.values(), record.get("history")]))


def _exchanged(record: PreferenceRecord) -> PreferenceRecord:
    """Return a pair with its sides exchanged, its soft label and its margin too: the loss stays the same."""
    numbers = dict(record.numbers)
    numbers["soft_label"] = 1 - record.numbers["soft_label"]
    numbers["margin"] = -record.numbers.get("margin", 0.0)
    return replace(
        record,
        responses=record.responses[::-1],
        scores=record.scores and record.scores[::-1],
        numbers={name: value for name, value in numbers.items() if value != NUMBERS[name]},
        is_exchanged=True,
    )


def check_content(record: PreferenceRecord) -> None:
    """Check that a record has a prompt and different responses that the loss can count."""
    prompt = turns_of(record.prompt, "user")
    responses = [*map(turns_of, record.responses)]
    values = [*map(_values, (prompt, *responses))]
    try:
        plain = _json([values, record.tools, record.template_arguments])
        size = len(plain.encode())
    except UnicodeEncodeError:
        raise UnusableRecordError("invalid_unicode", "a text has a lone surrogate") from None
    if size > MAX_RECORD_BYTES:
        raise UnusableRecordError("unparsable", f"{size:,} bytes, more than {MAX_RECORD_BYTES:,}")
    if plain.count(IMAGE) != len(record.images):
        raise UnusableRecordError("reserved_character", f"a text has the noncharacter U+{ord(IMAGE):X}")
    if not any(map(_has_content, prompt)):
        raise UnusableRecordError("empty_prompt")
    for turns in responses:
        # The loss must count at least one turn with content.
        answers = [turn for turn in turns if turn.role == "assistant"]
        if not any(_has_content(turn) for turn in answers if turn.is_trained is not False):
            raise UnusableRecordError("empty_response")
    if len(set(map(_json, values[1:]))) < len(responses):
        raise UnusableRecordError("identical_responses")


def _values(turns: Messages) -> list[tuple[str, str, Fields]]:
    return [(turn.role, turn.content.strip(), turn.fields) for turn in turns]


def _has_content(turn: Message) -> bool:
    return bool(turn.content.strip() or turn.fields)


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


class Format(NamedTuple):
    """One format: `content` returns a record's content, or raises UnusableRecordError.

    `read` parses the prompt and the responses; None: chosen by their types. `matches`: whether a record has
    this format; None: never detected, only configured by its name.
    """

    content: Callable[[Fields], Content]
    read: Reader | None = None
    matches: Callable[[Fields], bool] | None = None


_READS_TEXT = (_read_text, _read_implicit, _read_hh)

# A record is read by the first row that matches.
FORMATS: dict[DataFormat, Format] = {
    DataFormat.text: Format(pair, read=_read_text),
    DataFormat.messages: Format(pair, read=read_messages),
    DataFormat.hh: Format(pair, read=_read_hh),
    DataFormat.implicit_prompt: Format(pair, read=_read_implicit),
    # A pair in any of the formats above.
    DataFormat.auto: Format(pair, matches=has_pair),
    DataFormat.ranked: Format(ranking, matches=has_ranking),
    DataFormat.labelled: Format(labelled, matches=is_labelled),
    # As TRL reads texts: also those that look like a dialogue, or like messages in JSON.
    DataFormat.labelled_text: Format(labelled, read=_read_text),
    DataFormat.completion: Format(completion, matches=has_completion),
}


def read_records(source: SourceConfig | str) -> Iterator[Record]:
    """Read the records of a source (a string: its path), as `DataSource.records`."""
    from dpo_dist.data.read.sources import DataSource  # noqa: PLC0415  (which reads records by the formats)

    return DataSource(source).records()
