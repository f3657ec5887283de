"""Values of fields, made plain: JSON, also inside texts, without the nulls of tables; numbers; messages."""

import ast
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_dist.data.read.fields import (
    CONVERSATIONS,
    IMAGES,
    LISTS,
    NUMBERS,
    OTHERS,
    QUESTIONS,
    TOOLS,
    VOTES,
    fields_with,
)
from dpo_dist.data.read.verdicts import is_verdict, two_answers
from dpo_dist.data.records import MAX_SHOWN_KEYS, UnusableRecordError, shown_key
from dpo_dist.foundation.types import Fields

_EMPTY_TEXTS = ("", "[]", "{}", "null")
# Roles of other programs, and the role that chat templates know.
ROLES = {
    **dict.fromkeys(("human", "User", "Human"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "Assistant"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function"), "tool"),
}
# In turns with these roles the content is a tool call, as JSON.
CALLING = ("function_call", "tool_call")
PLAIN_ROLES = (*ROLES, "system", "developer", "user", "assistant", "tool")
ALL_ROLES = (*PLAIN_ROLES, *CALLING)
# A text that is one message in JSON has these fields only; a response may be an object with more.
_BARE_MESSAGES = ({"role", "content"}, {"from", "value"})
_PROMPTS = ("prompt", *QUESTIONS)
_KEPT = frozenset(fields_with("kept"))
_READ = frozenset(fields_with("read"))
_JSON_FIELDS, _WITH_NULLS, _TEXTS = (frozenset(fields_with(word)) for word in ("json", "nulls", "text"))
ARGUMENTS = ("arguments", "parameters", "args", "input", "action_input", "tool_input", "kwargs", "params")
"""Keys with the arguments of a tool call: of OpenAI, Llama, LangChain and Gemini, Anthropic, agents."""
NOT_UTF8 = "not UTF-8"
# The least and the most of each of `NUMBERS`.
_RANGES = {"loss_weight": (0.0, math.inf), "soft_label": (0.0, 1.0), "margin": (-math.inf, math.inf)}


def parse_json(content: bytes | str) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, also for a duplicate key, without quoting the JSON."""
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        return _JSON.decode(content)
    except UnicodeDecodeError as fault:
        raise ValueError(NOT_UTF8) from fault
    except RecursionError as fault:
        raise ValueError("nested too deeply") from fault


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def from_json(value: Any, *, of_texts: bool = False) -> Any:
    """Return the list or object that a text holds as JSON, or as Python prints it; else `value`.

    A list of texts as Python prints it is read as a list only if the field has lists `of_texts`.
    """
    if not may_be_json(value):
        return value
    try:
        return _JSON.decode(value)
    except (ValueError, RecursionError):
        pass
    text = value.strip()
    is_printed = text.startswith(("[{'", "{'")) or (of_texts and text.startswith("['"))
    try:
        return ast.literal_eval(text) if is_printed else value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def without_nulls(value: Any) -> Any:
    """Return a value without null fields: a table writes null for each field that an object lacks."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


def may_be_json(value: Any) -> bool:
    """Return whether a value is a text that may hold a list or an object."""
    return isinstance(value, str) and value.lstrip().startswith(("[", "{"))


def has_value(value: Any) -> bool:
    """Return whether a field has content: not an empty text, list or object, also in JSON, and not false."""
    if value is None or value is False:
        return False
    if isinstance(value, str):
        return value.strip() not in _EMPTY_TEXTS
    return not isinstance(value, list | tuple | Mapping) or len(value) > 0


def with_value(fields: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the names of those fields that have content."""
    return [name for name in names if name in fields and has_value(fields[name])]


def first_value(fields: Fields, names: Iterable[str]) -> Any:
    """Return the value of the first of these fields that is not null; None if all are."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def finite_numbers(values: Iterable[Any]) -> tuple[float, ...]:
    """Return the values as finite numbers. Raises UnusableRecordError if any is not."""
    is_list = isinstance(values, Iterable) and not isinstance(values, str | Mapping)
    numbers = tuple(map(_no_flag, values)) if is_list else ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UnusableRecordError("invalid_scores", "a score is missing, or is not a finite number")
    return numbers


def _no_flag(value: Any) -> float:
    """Return a number; nan also for true and false."""
    return math.nan if isinstance(value, bool) else to_number(value)


def to_number(value: Any) -> float:
    """Return a number, perhaps written as text; nan for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def given_images(fields: Fields) -> list[Any]:
    """Return the values of a record's or a message's own images, without nulls."""
    lists = list[list[Any]]()
    for name in IMAGES:
        value = from_json(fields.get(name), of_texts=True)
        if value is not None:
            images = value if isinstance(value, list | tuple) else [value]
            lists.append([*filter(is_given, images)])
    if len(lists) > 1 and all(lists):
        raise UnusableRecordError("image_count", f"images in {' and in '.join(IMAGES)}")
    return list(itertools.chain(*lists))


def is_given(image: Any) -> bool:
    """Return whether a value has content, not only the nulls of a table."""
    return has_value(without_nulls(image))


def is_message(value: Any) -> bool:
    """Return whether a value is an object with a role and a content, also as `from` and `value`."""
    if not isinstance(value, Mapping):
        return False
    has_role = "role" in value and not {"content", "tool_calls", "function_call"}.isdisjoint(value)
    return has_role or {"from", "value"} <= value.keys()


def message_role(value: Any) -> str | None:
    """Return the role of a message; None for another value."""
    role = value.get("role", value.get("from")) if is_message(value) else None
    if not isinstance(role, str):
        return None
    return "assistant" if role in CALLING else ROLES.get(role, role)


def is_messages(value: Any) -> bool:
    """Return whether a value is one message or a list of messages, perhaps an empty one."""
    return is_message(value) or (isinstance(value, list) and all(map(is_message, value)))


def spelled_messages(value: Any) -> Any:
    """Return the messages that a text holds as JSON; else `value`."""
    spelled = from_json(value)
    if not isinstance(value, str) or spelled is value:
        return value
    messages = spelled
    # An object with more fields may be a response in JSON that happens to have a role.
    if isinstance(spelled, Mapping) and set(spelled) in _BARE_MESSAGES:
        messages = [spelled]
    if not isinstance(messages, list) or not messages or not is_messages(messages):
        return value
    roles = [message.get("role", message.get("from")) for message in messages]
    return messages if all(role in ALL_ROLES for role in roles) else value


def plain_record(fields: Fields, *, has_texts: bool, is_ranking: bool) -> Fields:
    """Return a record with the values that its texts hold as JSON, and without other fields that are empty.

    `has_texts`: by its configured format prompt and responses are texts, whatever they look like.
    `is_ranking`: by this format `output` has a list of responses; else it may be a text that is JSON, too.
    """
    record: dict[str, Any] = {}
    columns: dict[str, str] = {}
    answers = two_answers(fields)
    texts = _TEXTS.union(answers.names if answers else ())
    if not has_texts:
        fields = _with_prompt_outside(fields)
    for name, value in fields.items():
        # An empty verdict says that nobody judged; `chosen_audio` is none, whatever its name is like.
        says_what_it_is = name in _KEPT or (name not in _READ and is_verdict(str(name)))
        if not says_what_it_is and not has_value(value):
            continue
        record[name] = value
        is_list = name in LISTS and (is_ranking or name != "output")
        if name in _WITH_NULLS:
            plain = from_json(without_nulls(value))
            record[name] = list(map(from_json, plain)) if isinstance(plain, list) else plain
        elif name in _JSON_FIELDS:
            record[name] = from_json(value)
        elif is_list and may_be_json(value):
            items = from_json(value)
            if isinstance(items, list):
                record[name] = items
        elif name in texts and not has_texts:
            plain = spelled_messages(value)
            record[name] = plain
            is_object = plain.startswith("{") if isinstance(plain, str) else isinstance(plain, Mapping)
            if is_object and name not in _PROMPTS:
                columns |= _nested_conversation(name, plain)
    if columns:
        raise UnusableRecordError("unknown_format", "objects with messages inside", columns=columns)
    return record


def _with_prompt_outside(record: Fields) -> Fields:
    """Return a record with the fields of a prompt that is an object of messages, tools and others.

    So OpenAI writes preferences: {input: {messages, tools}, preferred_output, non_preferred_output}.
    """
    for field in _PROMPTS:
        paths = _nested_conversation(field, record.get(field))
        if not paths:
            continue
        names = {paths[field].rpartition(".")[2]: "prompt"}
        outer = {name: value for name, value in record.items() if name != field}
        inner = {names.get(name, name): value for name, value in from_json(record[field]).items()}
        inner = {name: inner[name] for name in with_value(inner, inner)}
        twice = with_value(outer, inner)
        if twice:
            raise UnusableRecordError(
                "ambiguous_format", f"beside {field} and inside it: {', '.join(map(shown_key, twice))}"
            )
        return outer | inner
    return record


def _nested_conversation(field: str, value: Any) -> dict[str, str]:
    """Return the paths of messages and tools inside a field, if it holds an object, perhaps as JSON."""
    content = from_json(value)
    if not isinstance(content, Mapping):
        return {}
    for conversation in CONVERSATIONS:
        turns = from_json(content.get(conversation))
        if turns and is_messages(turns):
            tools = {name: f"{field}.{name}" for name in with_value(content, TOOLS)}
            return {field: f"{field}.{conversation}", **tools}
    return {}


def unknown_format(record: Fields, columns: Mapping[str, str]) -> UnusableRecordError:
    """Return the error for a record whose fields fit no format, with `columns` that are right for it."""
    fields = [shown_key(key) for key, value in record.items() if value is not None and key != OTHERS]
    columns = dict(columns)
    for name, value in record.items():
        if isinstance(value, Mapping) and {"chosen", "rejected"} <= value.keys():
            columns.setdefault("record", shown_key(name))
    fields = fields[: MAX_SHOWN_KEYS + 1]  # one more, so that it is known that there are more
    return UnusableRecordError(
        "unknown_format", "" if fields else "no fields", fields=fields, columns=columns
    )


def ignoring(fields: Iterable[str]) -> dict[str, str]:
    """Return the `columns` of a source that ignore these fields."""
    return {name: "null" for name in fields if shown_key(name) == name}


def record_numbers(record: Fields, responses: int) -> dict[str, float]:
    """Return a record's `NUMBERS` that have an effect; votes become a soft label."""
    numbers = dict[str, float]()
    for name in (*NUMBERS, *VOTES):
        if record.get(name) not in (None, ""):
            numbers[name] = _no_flag(record[name])
    votes = [numbers.pop(name) for name in VOTES if name in numbers]
    if votes:
        total = sum(votes)
        if len(votes) < 2 or "soft_label" in numbers or not 0 <= min(votes) < total < math.inf:
            detail = f"{' and '.join(VOTES)} must be two numbers, not both 0, and replace soft_label"
            raise UnusableRecordError("invalid_numbers", detail)
        numbers["soft_label"] = votes[0] / total
    for name, value in numbers.items():
        least, most = _RANGES[name]
        if not (math.isfinite(value) and least <= value <= most):
            raise UnusableRecordError("invalid_numbers", f"{name} is not a number from {least:g} to {most:g}")
    numbers = {name: value for name, value in numbers.items() if value != NUMBERS[name]}
    of_pairs = numbers.keys() - {"loss_weight"}
    if responses != 2 and of_pairs:
        raise UnusableRecordError("invalid_numbers", f"{min(of_pairs)} of a record that is no pair")
    return numbers
